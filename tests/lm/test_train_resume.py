"""Runs that are stopped or killed and then resumed have the same bits as uninterrupted ones."""

import dataclasses
import json
import os
import random
import signal
import time
import warnings

import pytest
import torch

from lm import history, train
from lm.config import Config
from lm.report import explore
from lm.report import run as report
from lm.run import read_metrics
from tests.helpers import content, refused
from tests.lm.command import one_line
from tests.lm.runs import DEVICES, EVERY_LOSS, LOSSES, equal_runs, logged, stop_at, stored

pytestmark = pytest.mark.usefixtures("short_samples")


@pytest.mark.parametrize("steps", [[1], [5], [6], [2, 3, 7, 11], list(range(1, 12))], ids=str)
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(
    tiny, trained_once, tmp_path, monkeypatch, steps
):
    stop_at(monkeypatch, steps, signal.SIGINT)
    for _ in steps:
        assert train.train(tiny(), tmp_path / "run", resume=(tmp_path / "run").exists()) == 130
    assert train.train(tiny(), tmp_path / "run", resume=True) == 0
    equal_runs(tmp_path / "run", trained_once)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": {"kind": "gqa"}, "moe": {"router": "softmax"}},
        {"model": {"tie_embeddings": True}, "train": {"accumulation": 2}},
        {"model": {"num_dense_layers": 3}, "train": {"dtype": "bfloat16"}},
        {"train": {"dtype": "bfloat16", "decay": 0.3, "weight_decay": 0.0, "grad_clip": 0.0}},
        {"train": {"accumulation": 2, "bias_update": "proportional", **EVERY_LOSS}},
    ],
    ids=["gqa", "tied, accumulation", "dense, bf16", "bf16", "every balance loss"],
)
def test_other_models_resume_bit_for_bit(tiny, tmp_path, monkeypatch, changes):
    config = tiny(**changes)
    assert train.train(config, tmp_path / "whole") == 0
    stop_at(monkeypatch, [4], signal.SIGTERM)
    assert train.train(config, tmp_path / "run") == 143
    assert train.train(config, tmp_path / "run", resume=True) == 0
    equal_runs(tmp_path / "run", tmp_path / "whole")


def test_a_run_of_older_code_resumes_reports_and_explores(tiny, trained_once, tmp_path, monkeypatch):
    stop_at(monkeypatch, [5], signal.SIGINT)
    run, of_rows = tmp_path / "run", ("losses", "load_entropies", "dead_experts")
    new = (*DEVICES, *LOSSES, "bias_update ", *of_rows)
    assert train.train(tiny(), run) == 130
    lines = (run / "config.toml").read_text().splitlines()
    kept = [line for line in lines if not line.startswith(new) or line.startswith("sequence_loss")]
    assert len(lines) - len(kept) == 8
    (run / "config.toml").write_text("\n".join(kept))
    assert all(row.keys() >= set(of_rows) for row in read_metrics(run))
    rows = [{key: value for key, value in row.items() if key not in of_rows} for row in read_metrics(run)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train.train(Config.load(run / "config.toml"), run, resume=True) == 0
    assert stored(run) == stored(trained_once) and len(logged(run)) == len(logged(trained_once))
    for page in (report.write(run), explore.write(run)):
        assert page.stat().st_size > 50_000


def test_resuming_skips_a_damaged_checkpoint_and_replaces_it(tiny, trained, trained_once):
    with open(trained / "checkpoints" / "step-000012" / "model.safetensors", "r+b") as file:
        file.truncate(100)
    with pytest.warns(UserWarning, match="step-000012.*sha256"):
        assert train.train(tiny(), trained, resume=True) == 0
    equal_runs(trained, trained_once)
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == ["step-000010", "step-000012"]


def test_when_every_checkpoint_is_damaged_nothing_is_trained(tiny, trained):
    for path in (trained / "checkpoints").iterdir():
        (path / "optimizer.safetensors").unlink()
    before = content(trained)
    with (
        pytest.warns(UserWarning, match="damaged checkpoint skipped"),
        pytest.raises(ValueError, match="every checkpoint is damaged"),
    ):
        train.train(tiny(), trained, resume=True)
    assert content(trained) | {".owner": b""} == before | {".owner": b""}


def test_resuming_a_finished_run_changes_no_file(tiny, trained, command):
    before = content(trained)
    ended = command("train", "--out-dir", trained, "--resume")
    assert ended.code == 0 and b"all 12 steps are done" in ended.out
    before.pop(".owner")
    after = content(trained)
    after.pop(".owner")
    assert after == before


def test_fewer_steps_than_done_are_rejected_with_both_numbers(tiny, trained):
    before = content(trained)
    config = tiny(train={"steps": 7})
    refused(
        lambda: train.train(config, trained, resume=True),
        "train.steps 7 is less than the 12 steps already done",
    )
    assert content(trained) | {".owner": b""} == before | {".owner": b""}


def test_more_steps_continue_a_finished_run(tiny, trained):
    assert train.train(tiny(train={"steps": 15}), trained, resume=True) == 0
    assert [row["step"] for row in read_metrics(trained)] == list(range(1, 16))
    assert Config.load(trained / "config.toml").train.steps == 15


@pytest.mark.parametrize(
    "option, value, said",
    [
        ("--model.dim", 32, "model.dim is 16 in the run and 32 now; it must not change"),
        ("--model.moe.top-k", 1, "model.moe.top_k is 2 in the run and 1 now; it must not change"),
        ("--model.norm-eps", 0.1, "model.norm_eps is 1e-06 in the run and 0.1 now; it must not change"),
        ("--data", "other.txt", "now; it must not change"),
    ],
)
def test_a_resumed_run_keeps_its_model_and_data(trained, command, option, value, said):
    before = content(trained)
    ended = command("train", "--out-dir", trained, "--resume", option, value)
    assert said in one_line(ended, "train")
    assert content(trained) == before


def test_a_change_of_machine_is_reported_in_one_line(tiny, trained):
    path = trained / "checkpoints" / "step-000012" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"threads": 64, "torch": "1.0"}))
    with pytest.warns(
        UserWarning, match="last bits may differ from an uninterrupted run: threads 64 -> 1, torch 1.0 -> "
    ) as caught:
        train.train(tiny(), trained, resume=True)
    assert len(caught) == 1


def test_resuming_keeps_the_dtype_that_was_chosen(tiny, tmp_path, monkeypatch):
    config = tiny(train={"dtype": "auto"})
    stop_at(monkeypatch, [3], signal.SIGINT)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert train.train(config, tmp_path / "run") == 130
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert train.train(config, tmp_path / "run", resume=True) == 0
    assert stored(tmp_path / "run")[1]["dtype"] == "torch.bfloat16"


def test_a_resumed_run_continues_counting_seconds(tiny, tmp_path, monkeypatch):
    stop_at(monkeypatch, [6], signal.SIGINT)
    train.train(tiny(), tmp_path / "run")
    path = history.checkpoints(tmp_path / "run")[-1] / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 1000.0}))
    train.train(tiny(), tmp_path / "run", resume=True)
    rows = read_metrics(tmp_path / "run")
    assert rows[5]["seconds"] < 1000 < rows[6]["seconds"]


def test_resuming_accepts_other_training_options(tiny, tmp_path, monkeypatch):
    stop_at(monkeypatch, [6], signal.SIGINT)
    train.train(tiny(), tmp_path / "run")
    config = dataclasses.replace(tiny(), train=dataclasses.replace(tiny().train, steps=9, log_every=2))
    assert train.train(config, tmp_path / "run", resume=True) == 0
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6, 8, 9]


# --- killed


@pytest.fixture(scope="module")
def longer(tiny, tmp_path_factory):
    """The config of a longer run, and the run, uninterrupted."""
    config = tiny(train={"steps": 60, "save_every": 7, "eval_every": 9})
    run = tmp_path_factory.mktemp("longer") / "run"
    assert train.train(config, run) == 0
    return config, run


def killed_until_done(command, options, run, instants):
    """Train and kill at each instant (step, seconds after it) in turn; then train to the end."""
    for instant in [*instants, None]:
        resume = ["--resume"] if (run / "config.toml").exists() else []
        pid = command.start("train", *options, "--out-dir", run, *resume, before=("quick",))
        if instant is not None:
            command.wait_for(lambda step=instant[0]: step == 0 or len(read_metrics(run)) >= step)
            time.sleep(instant[1])
            os.kill(pid, signal.SIGKILL)
        ended = command.wait()
        assert ended.code == (0 if instant is None else -signal.SIGKILL), ended.err


def test_killed_at_random_instants_it_equals_an_uninterrupted_run(longer, command, options, tmp_path):
    config, whole = longer
    draw = random.Random(1)
    instants = [(step, draw.uniform(0, 0.02)) for step in sorted(draw.sample(range(1, 50), 3))]
    killed_until_done(command, options(config), tmp_path / "run", instants)
    equal_runs(tmp_path / "run", whole)


@pytest.mark.long
@pytest.mark.parametrize("number", range(20))
def test_killed_at_many_random_instants_it_equals_an_uninterrupted_run(
    longer, command, options, tmp_path, number
):
    config, whole = longer
    draw = random.Random(number)
    instants = [(step, draw.uniform(0, 0.03)) for step in sorted(draw.sample(range(50), draw.randint(1, 5)))]
    killed_until_done(command, options(config), tmp_path / "run", instants)
    equal_runs(tmp_path / "run", whole)


@pytest.fixture(scope="module")
def shorter(tiny, tmp_path_factory):
    """The config of a run that saves twice, and the run, uninterrupted."""
    config = tiny(train={"steps": 4, "save_every": 2})
    run = tmp_path_factory.mktemp("shorter") / "run"
    assert train.train(config, run) == 0
    return config, run


def killed_within_a_save(shorter, command, options, folder, owner, name, number):
    """Train, kill at that call, resume and compare -> whether the call was reached"""
    config, whole = shorter
    run = folder / f"{owner}-{name}-{number}"
    killed = command(
        "train", *options(config), "--out-dir", run, before=("kill_at_call", owner, name, number)
    )
    assert killed.code in (0, -signal.SIGKILL), killed.err
    resume = ["--resume"] if (run / "config.toml").exists() else []
    assert command("train", *options(config), "--out-dir", run, *resume, before=("quick",)).code == 0
    equal_runs(run, whole)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    assert not list(run.glob(".*.tmp"))
    return killed.code != 0


@pytest.mark.parametrize(
    "owner, name, number",
    [
        ("os", "fsync", 1),
        ("os", "fsync", 3),
        ("os", "fsync", 13),
        ("pathlib.Path", "rename", 3),
    ],
)
def test_killed_within_a_save_it_equals_an_uninterrupted_run(
    shorter, command, options, tmp_path, owner, name, number
):
    assert killed_within_a_save(shorter, command, options, tmp_path, owner, name, number)
