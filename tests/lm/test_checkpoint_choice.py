"""Which checkpoint is used: whole, named by its step, not diverged, readable; and which ones are kept."""

import json
import math
import shutil
import threading
import warnings

import pytest
from safetensors.torch import load_file, save_file

from lm import checkpoint, files, history, train
from lm.checkpoint import load, save_checkpoint
from lm.config import FORMAT, Config
from lm.history import newest_checkpoint
from lm.run import RunFailed
from tests.helpers import content, refused
from tests.lm.command import one_line, run_python
from tests.lm.runs import bits, equal_runs, state_of, stepped

pytestmark = pytest.mark.usefixtures("short_samples")


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


# --- names

NOT_CHECKPOINTS = [
    "step-999999.tmp",
    "step-999999.bak",
    "step-999999 (copy)",
    "step-999999~",
    "step-0999999",
    "step-99",
    "step-999999-old",
    "step-٩٩٩٩٩٩",
    "step-+99999",
    "step-9_9999",
    "step-999999\n",
    "Step-999999",
]


@pytest.mark.parametrize("name", NOT_CHECKPOINTS, ids=repr)
def test_a_folder_of_another_name_is_no_checkpoint_and_is_never_removed(tiny, run, name):
    model, optimizer = stepped(tiny())
    folder = save_checkpoint(run, model, optimizer, state_of(2), keep=1)
    stray = shutil.copytree(folder, folder.with_name(name))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert newest_checkpoint(run) == folder
        assert history.checkpoints(run) == [folder]
        save_checkpoint(run, model, optimizer, state_of(3), keep=1)
    assert stray.is_dir() and names(run) == sorted([name, "step-000003"])


@pytest.mark.parametrize("make", ["renamed", "linked", "empty", "file"])
@pytest.mark.parametrize("step", [1, 999_999, 1_000_000])
def test_a_folder_renamed_to_another_step_is_skipped(tiny, run, make, step):
    model, optimizer = stepped(tiny())
    folder = save_checkpoint(run, model, optimizer, state_of(2), keep=3)
    stray = folder.with_name(f"step-{step:06d}")
    {
        "renamed": lambda: shutil.copytree(folder, stray),
        "linked": lambda: stray.symlink_to(folder, target_is_directory=True),
        "empty": stray.mkdir,
        "file": stray.touch,
    }[make]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert newest_checkpoint(run) == folder
        assert bits(load(run)) == bits(model)
        save_checkpoint(run, model, optimizer, state_of(3), keep=1)
        assert newest_checkpoint(run).name == "step-000003"
    assert bits(load_of(run, "step-000003", tiny())) == bits(model)


def load_of(run, name, config):
    return checkpoint.load_model(config.model, run / "checkpoints" / name / "model.safetensors")


# --- a reader beside a writer

WRITER = """
import sys, time
from pathlib import Path
import torch
from lm.config import Config
from lm.checkpoint import save_checkpoint
from tests.lm.runs import state_of, stepped
run = Path(sys.argv[1])
model, optimizer = stepped(Config.load(run / "config.toml"))
until = time.monotonic() + float(sys.argv[2])
step = 1
with torch.no_grad():
    while time.monotonic() < until:
        step += 1
        for parameter in model.parameters():
            parameter.fill_(step)
        save_checkpoint(run, model, optimizer, state_of(step), keep=1)
print(step)
"""


@pytest.mark.long
def test_a_reader_beside_a_writer_that_prunes_never_fails_and_sees_one_step(tiny, run):
    save_checkpoint(run, *stepped(tiny()), state_of(1), keep=1)
    writer = WRITER.replace("sys.argv[1]", repr(str(run))).replace("sys.argv[2]", "6")
    thread = threading.Thread(target=run_python, args=(writer,))
    thread.start()
    reads, steps = 0, set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while thread.is_alive():
            values = {float(value) for p in load(run).parameters() for value in p.detach().unique()}
            reads += 1
            if reads == 1 or not steps:
                values = values if len(values) == 1 else set()  # the first checkpoint has random weights
            if values:
                assert len(values) == 1, sorted(values)[:5]
                steps |= values
    thread.join()
    assert reads > 5 and steps


@pytest.mark.parametrize("at", ["check", "read"])
def test_a_checkpoint_pruned_while_it_is_read_is_read_anew(tiny, run, monkeypatch, at):
    config = tiny()
    models = [stepped(config, steps=steps) for steps in (1, 2)]
    save_checkpoint(run, *models[0], state_of(1), keep=1)
    owner, name = {"check": (history, "sha256"), "read": (checkpoint, "load_model")}[at]
    original, pruned = getattr(owner, name), []

    def prune_first(*given):
        if not pruned:
            pruned.append(True)
            save_checkpoint(run, *models[1], state_of(2), keep=1)
        return original(*given)

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(owner, name, prune_first)
        loaded = load(run)
    assert bits(loaded) == bits(models[1][0]) and names(run) == ["step-000002"]


def test_a_checkpoint_replaced_between_two_reads_is_never_mixed(tiny, run, monkeypatch):
    config = tiny()
    models = [stepped(config, steps=steps) for steps in (1, 2)]
    save_checkpoint(run, *models[0], state_of(1), keep=1)
    original, reads = checkpoint.files.read_tensor, []

    def replace_midway(name, stored):
        reads.append(name)
        if len(reads) == 5:
            save_checkpoint(run, *models[1], state_of(1), keep=1)
        return original(name, stored)

    monkeypatch.setattr(checkpoint.files, "read_tensor", replace_midway)
    assert bits(load(run)) == bits(models[1][0])
    assert len(reads) > 2 * 5


# --- diverged


def with_numbers(folder, name, value):
    """Put a value into a checkpoint's tensors, with the sums that a writer would have stored."""
    tensors = load_file(folder / name)
    next(iter(tensors.values())).view(-1)[0] = value
    save_file(tensors, folder / name)
    state = json.loads((folder / "state.json").read_text())
    state["sha256"][name] = files.sha256(folder / name)
    (folder / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_checkpoint_that_is_not_finite_is_skipped(tiny, trained, trained_once, name, value):
    with_numbers(trained / "checkpoints" / "step-000012", name, value)
    with pytest.warns(UserWarning, match="step-000012.*holds NaN or infinite numbers"):
        assert newest_checkpoint(trained).name == "step-000010"
    with pytest.warns(UserWarning, match="step-000012.*holds NaN or infinite numbers"):
        assert train.train(tiny(), trained, resume=True) == 0
    equal_runs(trained, trained_once)


def test_a_finite_checkpoint_whose_next_loss_is_not_is_skipped(tiny, trained, trained_once, monkeypatch):
    ahead = train.Trainer.loss_ahead
    answers = iter([math.inf])  # at the first check
    monkeypatch.setattr(train.Trainer, "loss_ahead", lambda self: next(answers, ahead(self)))
    with pytest.warns(UserWarning, match="step-000012: its next loss is not finite"):
        assert train.train(tiny(train={"steps": 12}), trained, resume=True) == 0
    equal_runs(trained, trained_once)


@pytest.mark.parametrize("rate", [30.0, 1e3, 1e5, 1e20, 1e38])
def test_after_a_run_diverged_resuming_with_a_sane_rate_starts_from_the_last_good_checkpoint(
    tiny, tmp_path, trained_once, rate
):
    run = tmp_path / "run"
    shutil.copytree(trained_once, run)
    wild = {"steps": 40, "learning_rate": rate, "grad_clip": 0.0, "save_every": 3, "warmup": 0, "decay": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert train.train(tiny(train=wild), run, resume=True) == 0
        except RunFailed as error:
            assert "the last checkpoint is " in str(error)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        newest = newest_checkpoint(run)
        state = history.read_state(newest)
        assert state["step"] == 12 and not state.get("diverged")
        load(run)
        sane = tiny(train={"steps": 14, "learning_rate": 1e-3})
        assert train.train(sane, run, resume=True) == 0
    assert history.read_state(newest_checkpoint(run))["step"] == 14


def test_pruning_keeps_the_last_good_checkpoint(tiny, run):
    model, optimizer = stepped(tiny())
    for step, diverged in ((1, False), (2, False), (3, True), (4, True), (5, True)):
        save_checkpoint(run, model, optimizer, {**state_of(step), "diverged": diverged}, keep=2)
    assert names(run) == ["step-000002", "step-000004", "step-000005"]
    with pytest.warns(UserWarning, match="step-00000[45]: training had diverged") as caught:
        assert newest_checkpoint(run).name == "step-000002"
    assert len(caught) == 2
    save_checkpoint(run, model, optimizer, {**state_of(6), "diverged": False}, keep=2)
    assert names(run) == ["step-000005", "step-000006"]


def test_if_all_have_diverged_the_newest_is_used(tiny, run):
    model, optimizer = stepped(tiny())
    for step in (1, 2):
        save_checkpoint(run, model, optimizer, {**state_of(step), "diverged": True}, keep=2)
    with pytest.warns(UserWarning, match="training had diverged"):
        assert newest_checkpoint(run).name == "step-000002"


def test_a_checkpoint_whose_next_step_fails_is_marked(tiny, tmp_path):
    config = tiny(moe={"router": "tests.lm.own_routers:NanGradientAtStep7"}, train={"save_every": 3})
    with pytest.raises(RunFailed, match=r"step 7: .*gradient norm nan; the last checkpoint is .*step-000003"):
        train.train(config, tmp_path / "run")
    marked = {path.name: history.read_state(path)["diverged"] for path in checkpoints_of(tmp_path)}
    assert marked == {"step-000003": False, "step-000006": True}


def checkpoints_of(folder):
    return history.checkpoints(folder / "run")


# --- killed while pruning


def test_what_a_kill_left_is_pruned_at_the_next_start(tiny, trained, trained_once):
    folder = trained / "checkpoints"
    for step in (3, 5):
        shutil.copytree(folder / "step-000010", folder / f"step-{step:06d}")
        path = folder / f"step-{step:06d}" / "state.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"step": step}))
    (folder / ".step-000003.tmp").mkdir()
    (folder / ".step-000003.tmp" / "state.json").touch()
    assert train.train(tiny(), trained, resume=True) == 0
    assert names(trained) == ["step-000010", "step-000012"]
    equal_runs(trained, trained_once)


def test_fewer_checkpoints_to_keep_are_kept_from_the_start(tiny, trained):
    assert train.train(tiny(train={"keep": 1}), trained, resume=True) == 0
    assert names(trained) == ["step-000012"]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_killed_while_pruning_the_run_goes_on_and_keeps_as_many_as_asked(
    tiny, command, options, tmp_path, number
):
    run, config = tmp_path / "run", tiny(train={"steps": 4, "save_every": 1, "keep": 1})
    before = ("kill_at_call", "shutil", "rmtree", 3 * number)
    assert command("train", *options(config), "--out-dir", run, before=before).code in (0, -9)
    assert command("train", "--out-dir", run, "--resume", before=("quick",)).code == 0
    assert names(run) == ["step-000004"]


# --- format version


def test_the_format_is_written(trained):
    assert (trained / "config.toml").read_text().startswith(f"format = {FORMAT}\n")
    assert json.loads((newest_checkpoint(trained) / "state.json").read_text())["format"] == FORMAT


def with_format(run, name, value):
    if name == "config.toml":
        lines = (run / name).read_text().splitlines()
        lines[0] = f"format = {json.dumps(value)}"
        (run / name).write_text("\n".join([*lines, "[new]", "key = 1"]))
    else:
        path = run / "checkpoints" / "step-000012" / "state.json"
        path.write_text(json.dumps({"format": value, "everything": "new"}))


@pytest.mark.parametrize("name", ["config.toml", "state.json"])
@pytest.mark.parametrize("number", [2, 99, 2**40, 10**30])
def test_a_newer_format_is_refused_in_one_line_that_says_so(tiny, trained, command, name, number):
    with_format(trained, name, number if name == "state.json" else min(number, 2**62))
    before = content(trained)
    for arguments in (("train", "--resume", "--out-dir", trained), ("generate", trained)):
        line = one_line(command(*arguments), arguments[0], code=2)
        assert name in line
        assert f"is newer than {FORMAT}, the newest that this version of lm reads; update lm" in line
    assert content(trained) | {".owner": b""} == before | {".owner": b""}


@pytest.mark.parametrize("value", [0, -1, 1.0, "1", None, True, [1]], ids=repr)
def test_a_format_that_is_no_number_is_damage(tiny, trained, value):
    with_format(trained, "state.json", value)
    with pytest.warns(UserWarning, match="damaged checkpoint skipped: .*format: a whole number"):
        assert newest_checkpoint(trained).name == "step-000010"
    if value is not None:
        with_format(trained, "config.toml", value)
        refused(lambda: load(trained), "config.toml: format: a whole number")


def test_a_file_without_a_format_is_of_an_earlier_version(tiny, trained):
    path = trained / "config.toml"
    path.write_text(path.read_text().removeprefix(f"format = {FORMAT}\n"))
    assert Config.load(path) == tiny()
