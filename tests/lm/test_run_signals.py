"""Signals, closed streams and numbers beyond the machine: a training saves and ends, or never starts."""

import contextlib
import errno
import io
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from lm import budget, checkpoint, count, history, loss, machine, run, train
from lm.config import Config
from lm.console import Tolerant
from tests.helpers import refused
from tests.lm.command import PATH, SCRIPT, one_line
from tests.lm.runs import equal_runs, logged, stop_at

pytestmark = pytest.mark.usefixtures("short_samples")

# --- signals


def test_a_second_hangup_does_not_keep_the_run_from_saving(tiny, tmp_path, monkeypatch, trained_once):
    stop_at(monkeypatch, [3], signal.SIGHUP)
    save = run.Run.save
    monkeypatch.setattr(run.Run, "save", lambda *a: (os.kill(os.getpid(), signal.SIGHUP), save(*a))[1])
    assert train.train(tiny(), tmp_path / "run") == 129
    monkeypatch.setattr(run.Run, "save", save)
    assert train.train(tiny(), tmp_path / "run", resume=True) == 0
    equal_runs(tmp_path / "run", trained_once)


def test_nohup_is_obeyed(tiny, tmp_path, monkeypatch):
    stop_at(monkeypatch, [3], signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert train.train(tiny(train={"steps": 4}), tmp_path / "run") == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def slow_step(monkeypatch, step, part):
    """That forward pass of that step sends SIGTERM and takes a minute."""
    losses, calls = loss.training_losses, []

    def slow(model, *given, **options):
        found = losses(model, *given, **options)
        if model.training:
            calls.append(0)
            if len(calls) == part:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
        return found

    monkeypatch.setattr(loss, "training_losses", slow)
    monkeypatch.setattr(run, "GRACE", 0.05)


ANNEALED = {"num_groups": 1, "top_groups": 1, "routed_scaling_factor": 1.0, "arguments": {"passes": 30}}
ROUTERS = {
    "sigmoid": {},
    "with a buffer": {"router": "exercises.projects.annealed:AnnealedRouter", **ANNEALED},
}


@pytest.mark.parametrize("moe", ROUTERS.values(), ids=ROUTERS.keys())
@pytest.mark.parametrize("part, saved", [(5, 2), (6, 2), (1, 0)])
def test_a_long_step_is_abandoned_and_leaves_no_trace(tiny, tmp_path, monkeypatch, part, saved, moe):
    config = tiny(moe=moe, train={"accumulation": 2, "steps": 6})
    assert train.train(config, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        slow_step(patch, 3, part)
        began = time.monotonic()
        assert train.train(config, tmp_path / "run") == 143
        assert time.monotonic() - began < 30
    found = [path.name for path in history.checkpoints(tmp_path / "run")]
    assert found == ([f"step-{saved:06d}"] if saved else [])
    assert train.train(config, tmp_path / "run", resume=True) == 0
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")
    assert tensors(tmp_path / "run") == tensors(tmp_path / "whole")


def tensors(folder):
    """The bytes of every tensor of the newest checkpoint, numbers without a dimension included."""
    newest = history.newest_checkpoint(folder)
    files = [load_file(newest / f"{name}.safetensors") for name in ("model", "optimizer")]
    return [{name: tensor.numpy().tobytes() for name, tensor in file.items()} for file in files]


# --- streams


@pytest.mark.long
@pytest.mark.parametrize(
    "redirects, code",
    [
        (">&-", 0),
        ("2>&-", 0),
        (">&- 2>&- <&-", 0),
        (">/dev/full 2>/dev/full", 0),
        ("2> >(exit)", 0),
        ("> >(exit) 2>&1", 141),
    ],
)
def test_closed_and_broken_streams_never_end_in_a_traceback(tiny, options, tmp_path, redirects, code):
    folder, errors = tmp_path / "run", tmp_path / "errors"
    config = tiny(train={"steps": 30, "log_every": 1, "sample_every": 10})
    arguments = [sys.executable, "-P", "-c", SCRIPT, "train", *options(config), "--out-dir", str(folder)]
    shell = ["bash", "-c", f'sleep 0; "$@" {redirects}', "bash", *arguments]
    with open(errors, "wb") as file:
        ended = subprocess.run(shell, stdout=file, stderr=file, env={**os.environ, **PATH})
    assert ended.returncode == code and "Traceback" not in errors.read_text()
    state = history.read_state(history.newest_checkpoint(folder))
    assert 1 <= state["step"] <= 30 and (code or state["step"] == 30)
    assert len(run.read_metrics(folder)) == state["step"]  # nothing else was written into the log


class Failing(io.StringIO):
    """A stream whose writing fails from the third time on."""

    encoding = "utf-8"

    def __init__(self, error):
        super().__init__()
        self.error, self.left = error, 2

    def write(self, text):
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().write(text)


ERRORS = [OSError(errno.EIO, "gone"), OSError(errno.ENOSPC, "full"), ValueError("closed file")]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.parametrize("redirect", [contextlib.redirect_stdout, contextlib.redirect_stderr])
def test_a_stream_that_fails_does_not_stop_the_run(tiny, tmp_path, trained_once, redirect, error):
    with redirect(Failing(error)):
        assert train.train(tiny(), tmp_path / "run") == 0
    equal_runs(tmp_path / "run", trained_once)


def test_a_broken_pipe_for_output_stops_the_run_after_the_step_and_saves(tiny, tmp_path):
    with contextlib.redirect_stdout(Failing(BrokenPipeError(errno.EPIPE, "gone"))):
        assert train.train(tiny(), tmp_path / "run") == 141
    assert history.checkpoints(tmp_path / "run")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_what_an_encoding_lacks_is_escaped(encoding):
    raw = io.BytesIO()
    shown = Tolerant(io.TextIOWrapper(raw, encoding=encoding))
    text = "plain \u00e9 \u20ac \U0001f600 \udcff end"
    assert shown.write(text) == len(text)
    shown.flush()
    assert raw.getvalue() == text.encode(encoding, "backslashreplace")


def test_standard_output_without_a_file_is_dropped():
    assert Tolerant(None).write("text") == 4


# --- folder names


@pytest.mark.parametrize("name", [b"run\xff", b"\xff/run", b"\xe9t\xe9"])
def test_a_name_that_is_not_utf8_is_refused_before_the_start(tiny, tmp_path, command, options, name):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/" + name)
    line = refused(
        lambda: train.train(tiny(), run.Path(folder)), "the name is not UTF-8; choose another folder"
    )
    line.encode()
    assert not os.listdir(tmp_path)


def test_saving_a_model_under_a_name_that_is_not_utf8_is_refused(tiny, make_model, tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/model\xff")
    refused(lambda: checkpoint.save(make_model(tiny().model), folder), "the name is not UTF-8")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["läuft", "運行", "a b", "\U0001f600"])
def test_any_name_that_is_utf8_works(tiny, tmp_path, name):
    assert train.train(tiny(train={"steps": 1}), tmp_path / name) == 0
    checkpoint.load(tmp_path / name)


# --- numbers beyond the machine

HUGE = 2_000_000_000


@pytest.mark.parametrize(
    "changes, said",
    [
        (
            {"train": {"batch_size": HUGE}},
            f"train.batch_size {HUGE} of train.context 16 tokens takes at least",
        ),
        ({"train": {"batch_size": HUGE, "recompute": True}}, "GiB; this machine has"),
        ({"train": {"batch_size": HUGE, "accumulation": HUGE}}, "with train.accumulation takes less"),
        ({"model": {"vocab_size": HUGE}}, "training them takes"),
        ({"model": {"dim": HUGE}}, "training them takes"),
        ({"model": {"hidden_dim": HUGE}}, "training them takes"),
        ({"moe": {"hidden_dim": HUGE}}, "training them takes"),
        ({"moe": {"num_experts": HUGE}}, "training them takes"),
        ({"attention": {"num_heads": HUGE}}, "training them takes"),
        (
            {
                "moe": {
                    "num_experts": HUGE,
                    "router": "tests.lm.own_routers:NoBias",
                    **ANNEALED,
                    "arguments": {},
                }
            },
            "takes",
        ),
        ({"train": {"context": HUGE}}, "needs at least|takes at least"),
    ],
)
def test_numbers_beyond_any_machine_are_refused_before_the_start(tiny, tmp_path, changes, said):
    began = time.monotonic()
    with pytest.raises(ValueError, match=said):
        train.train(tiny(**changes), tmp_path / "run")
    assert time.monotonic() - began < 20 and not (tmp_path / "run").exists()


def test_the_command_refuses_a_huge_batch_in_one_line(tiny, command, options, tmp_path):
    ended = command("train", *options(tiny(train={"batch_size": HUGE})), "--out-dir", tmp_path / "run")
    assert "train.batch_size" in one_line(ended, "train") and not (tmp_path / "run").exists()


def saved_bytes(config):
    """The bytes that autograd keeps for a training pass, without the parameters."""
    model = train.Transformer(config.model)
    model.initialize(torch.Generator().manual_seed(0))
    tokens = torch.zeros(config.train.batch_size, config.train.context, dtype=torch.int64)
    kept, own = {}, {parameter.data_ptr() for parameter in model.parameters()}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step = train.run_block(config.train)
        dtype = getattr(torch, config.train.dtype)
        losses = loss.training_losses(model, tokens, tokens, config.train, (), dtype, step)
    del losses
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train": {"recompute": True}},
        {"train": {"dtype": "bfloat16"}},
        {"model": {"num_dense_layers": 3}},
        {"attention": {"kind": "gqa"}},
        {"attention": {"kind": "gqa"}, "model": {"num_dense_layers": 3}, "train": {"dtype": "bfloat16"}},
    ],
    ids=str,
)
def test_the_estimate_is_at_most_what_a_pass_keeps(tiny, changes):
    config = tiny(**changes, **({} if "train" in changes else {"train": {"batch_size": 16}}))
    found, least = saved_bytes(config), budget.activation_bytes(config.model, config.train)
    print(changes, found / least)
    assert found / 10 < least <= found


def test_a_batch_that_fits_is_accepted(tiny, monkeypatch):
    config = tiny()
    needed = 16 * count.total_parameters(config.model)
    needed += budget.activation_bytes(config.model, config.train)
    monkeypatch.setattr(machine, "memory", lambda: needed)
    budget.check_memory(config.model, config.train)
    monkeypatch.setattr(machine, "memory", lambda: needed - 1)
    refused(lambda: budget.check_memory(config.model, config.train), "train.batch_size 4")


@pytest.mark.parametrize("name", ["nano", "toy"])
def test_presets_fit_into_a_small_machine(monkeypatch, name):
    monkeypatch.setattr(machine, "memory", lambda: 4 * 2**30)
    config = Config.preset(name)
    budget.check_memory(config.model, config.train)
