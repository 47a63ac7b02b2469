"""The run folder, its log, the signals that stop a run, and what happens when it cannot continue."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from lm import checkpoint, history, train
from lm.run import RunFailed, open_run, read_metrics, same_model
from tests.helpers import content, refused
from tests.lm.command import lm_into_head
from tests.lm.runs import equal_runs, stop_at

pytestmark = pytest.mark.usefixtures("short_samples")

# --- the log


ROW = {"step": 1, "tokens": 64, "seconds": 0.5, "loss": 2.0, "max_violations": [0.5]}


def write_rows(folder, rows, end=""):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + end)


def test_reading_returns_the_rows_that_were_written(tmp_path):
    assert read_metrics(tmp_path) == []
    rows = [{**ROW, "step": step, "val_loss": 1.5} for step in (1, 2, 3)]
    write_rows(tmp_path, rows)
    assert read_metrics(tmp_path) == rows


@pytest.mark.parametrize("end", ['{"ste', '{"step": 4, "loss": 1.', "{", "\0\0\0\0", "[" * 10**5])
def test_a_row_cut_short_by_a_crash_is_left_out(tmp_path, end):
    write_rows(tmp_path, [ROW], end)
    assert read_metrics(tmp_path) == [ROW]


@pytest.mark.parametrize(
    "row", [1, [], None, {}, {**ROW, "loss": "x"}, {**ROW, "step": None}, {**ROW, "max_violations": 1}]
)
def test_a_line_that_is_not_a_log_row_is_an_error_with_file_and_line(tmp_path, row):
    write_rows(tmp_path, [ROW, row])
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 is not a log row"):
        read_metrics(tmp_path)


# --- the folder


def test_a_run_is_locked_while_open_and_unlocked_afterwards(tmp_path):
    run = tmp_path / "deep" / "run"
    with open_run(run, resume=False):
        (run / "config.toml").touch()
        with (
            pytest.raises(ValueError, match=f"run: in use by process {os.getpid()}$"),
            open_run(run, resume=True),
        ):
            raise AssertionError("held twice")
    with open_run(run, resume=True), pytest.raises(ValueError, match="in use"), open_run(run, resume=True):
        raise AssertionError("held twice")


def test_a_failure_unlocks_the_run(tmp_path):
    with pytest.raises(RuntimeError, match="failed"), open_run(tmp_path, resume=False):
        raise RuntimeError("failed")
    with open_run(tmp_path, resume=False):
        pass


def test_training_options_may_change_on_resuming(tiny):
    same_model(tiny(), tiny(train={"steps": 99, "learning_rate": 0.5, "seed": 3}))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"model": {"dim": 32}}, "model.dim is 16 in the run and 32 now; it must not change"),
        (
            {"attention": {"kind": "gqa"}},
            "model.attention.kind is 'mla' in the run and 'gqa' now; it must not change",
        ),
        ({"rope": {"theta": 5.0}}, "model.rope.theta is 10000.0 in the run and 5.0 now; it must not change"),
        ({"data": {"path": "x"}}, "now; it must not change"),
        (
            {"moe": {"arguments": {"depth": 2}}},
            "model.moe.arguments.depth is None in the run and 2 now; it must not change",
        ),
    ],
)
def test_a_changed_value_is_named_with_both_values(tiny, changes, said):
    refused(lambda: same_model(tiny(), tiny(**changes)), said)
    refused(lambda: same_model(tiny(**changes), tiny()), "it must not change")


def test_a_folder_that_is_not_a_new_run_is_rejected_and_left_untouched(tiny, trained, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = content(tmp_path)
    for path, said in (
        (tmp_path / "other", "other: neither empty nor a run"),
        (tmp_path / "file", "file: is a file; expected a folder"),
        (trained, "run: already holds a run; use --resume"),
    ):
        refused(lambda path=path: train.train(tiny(), path), said)
    for path in (tmp_path / "other", tmp_path / "absent", tmp_path / "file"):
        refused(lambda path=path: train.train(tiny(), path, resume=True), f"{path.name}: no run to resume")
    assert content(tmp_path) == before and not (tmp_path / "absent").exists()


def test_an_empty_or_half_started_folder_can_become_a_run(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    for name in (".lock", ".owner", ".config.toml.tmp"):
        (tmp_path / "run" / name).write_text("")
    assert train.train(tiny(train={"steps": 1}), tmp_path / "run") == 0
    assert not (tmp_path / "run" / ".config.toml.tmp").exists()


def test_a_folder_that_cannot_be_created_is_rejected_with_the_reason(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="run: cannot be written: Not a directory"):
        train.train(tiny(), tmp_path / "file" / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_rejected_with_the_reason(tiny, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ValueError, match="cannot be written: Permission denied"):
        train.train(tiny(), tmp_path / "locked" / "run")


def test_a_second_process_in_the_same_folder_is_rejected(tiny, command, options, trained):
    before = content(trained / "checkpoints")
    with train.open_run(trained, resume=True):
        ended = command("train", *options(tiny()), "--out-dir", trained, "--resume")
        assert (ended.code, ended.err) == (2, f"lm train: {trained}: in use by process {os.getpid()}\n")
        assert command("train", *options(tiny()), "--out-dir", trained).code == 2
    assert content(trained / "checkpoints") == before
    assert command("train", *options(tiny()), "--out-dir", trained, "--resume", before=("quick",)).code == 0


# --- signals


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_resume(
    tiny, command, options, tmp_path, number, code
):
    run, config = tmp_path / "run", tiny(train={"steps": 10**6, "save_every": 10**6})
    pid = command.start("train", *options(config), "--out-dir", run)
    command.wait_for(lambda: len(read_metrics(run)) >= 3)
    os.kill(pid, number)
    ended = command.wait()
    assert ended.code == code and ended.err == ""
    (saved,) = history.checkpoints(run)
    step = int(saved.name.removeprefix("step-"))
    assert (
        f"stopped after step {step}, saved; resume with: lm train --resume --out-dir {run}"
        in ended.out.decode()
    )
    assert read_metrics(run)[-1]["step"] == history.read_state(saved)["step"] == step
    checkpoint.load(run)


def test_a_second_signal_exits_immediately_and_damages_nothing(tiny, command, options, tmp_path):
    run, config = tmp_path / "run", tiny(train={"steps": 10**6, "save_every": 5})
    pid = command.start("train", *options(config), "--out-dir", run, before=("slow_save",))
    command.wait_for(lambda: len(read_metrics(run)) >= 12)
    os.kill(pid, signal.SIGINT)
    command.wait_for(lambda: b"again to exit immediately" in (command.folder / "stdout").read_bytes())
    os.kill(pid, signal.SIGINT)
    ended = command.wait()
    assert ended.code == 130 and ended.err == "" and b"stopped after step" not in ended.out
    assert history.checkpoints(run)[-1].name >= "step-000010"
    checkpoint.load(run)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, -15)])
def test_a_signal_before_the_first_step_leaves_nothing_half_written(
    tiny, command, options, tmp_path, number, code
):
    pid = command.start("train", *options(tiny()), "--out-dir", tmp_path / "run", before=("slow_load",))
    stdout = command.folder / "stdout"
    command.wait_for(lambda: stdout.exists() and b"loading" in stdout.read_bytes())
    os.kill(pid, number)
    assert command.wait().code == code
    assert not (tmp_path / "run").exists()


def test_the_callers_signal_handlers_are_restored(tiny, tmp_path, monkeypatch):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers]
    stop_at(monkeypatch, [2], signal.SIGTERM)
    train.train(tiny(), tmp_path / "run")
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_closed_pipe_ends_the_run_with_a_checkpoint(tiny, options, tmp_path):
    run = tmp_path / "run"
    config = tiny(train={"steps": 10**6, "save_every": 10**6})
    ended = lm_into_head("train", *options(config), "--out-dir", run)
    assert ended.returncode == 141 and ended.stderr == ""
    assert len(ended.stdout.splitlines()) == 1
    checkpoint.load(run)


# --- failures


@pytest.mark.parametrize(
    "router, said", [("NanAtStep7", "loss nan"), ("NanGradientAtStep7", "gradient norm nan")]
)
def test_nan_stops_the_run_before_it_reaches_the_weights(tiny, command, options, tmp_path, router, said):
    run, config = tmp_path / "run", tiny(moe={"router": f"tests.lm.own_routers:{router}"})
    ended = command("train", *options(config), "--out-dir", run)
    assert ended.code == 1
    assert ended.err.startswith("lm train: step 7: ") and said in ended.err and ended.err.count("\n") == 1
    assert f"the last checkpoint is {run / 'checkpoints' / 'step-000005'}" in ended.err
    assert [path.name for path in history.checkpoints(run)] == ["step-000005"]
    for name in ("model.safetensors", "optimizer.safetensors"):
        held = load_file(run / "checkpoints" / "step-000005" / name)
        assert all(tensor.isfinite().all() for tensor in held.values())
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4, 5, 6]


def test_after_nan_the_weights_are_those_of_the_previous_step(tiny, tmp_path):
    config = tiny(moe={"router": "tests.lm.own_routers:NanAtStep7"}, train={"save_every": 6})
    with pytest.raises(RunFailed, match="step 7: loss nan"):
        train.train(config, tmp_path / "run")
    plain = tiny(train={"save_every": 6})
    train.train(plain, tmp_path / "plain")
    first, second = (
        load_file(tmp_path / name / "checkpoints" / "step-000006" / "model.safetensors")
        for name in ("run", "plain")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("save_every", [1, 12])
def test_weights_that_overflow_are_never_saved(tiny, tmp_path, save_every):
    config = tiny(train={"learning_rate": 1e300, "warmup": 0, "save_every": save_every, "eval_every": 12})
    with pytest.raises(RunFailed, match=r"step [12]: .*(inf|nan).*no checkpoint yet"):
        train.train(config, tmp_path / "run")
    assert not history.checkpoints(tmp_path / "run")


def test_a_nan_held_out_loss_stops_the_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda *a: float("nan"))
    with pytest.raises(RunFailed, match=r"step 6: held out loss nan; the last checkpoint is .*step-000005"):
        train.train(tiny(), tmp_path / "run")


@pytest.mark.parametrize("step, size", [(5, 2000), (10, 30_000), (12, 100_000)])
def test_a_full_disk_keeps_the_last_checkpoint_and_the_run_can_resume(
    tiny, command, options, tmp_path, trained_once, step, size
):
    run = tmp_path / "run"
    ended = command("train", *options(tiny()), "--out-dir", run, before=("full_disk", step, size))
    assert ended.code == 1
    assert (
        ended.err.startswith(f"lm train: step {step}: checkpoint not written (")
        and ended.err.count("\n") == 1
    )
    found = [path.name for path in (run / "checkpoints").iterdir()]
    assert sorted(found) == {5: [], 10: ["step-000005"], 12: ["step-000005", "step-000010"]}[step]
    if found:
        assert f"the last checkpoint is {run / 'checkpoints' / max(found)}" in ended.err
        checkpoint.load(run)
    assert train.train(tiny(), run, resume=True) == 0
    equal_runs(run, trained_once)
