import dataclasses
import hashlib
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lm import checkpoint, count, data, loss, machine, parts, train
from lm.config import Config
from lm.inference.generate import stream
from lm.model import Transformer
from lm.optim import learning_rate
from lm.run import RunFailed, read_metrics
from lm.train import Trainer
from moe import balance
from tests.helpers import ROOT, content

TIMES = ("seconds", "tokens_per_second")
LOSSES = {  # name in the config -> of a routing, with the step's counts so far
    "sequence_loss": lambda routing, counts: balance.sequence_loss(routing),
    "switch_loss": lambda routing, counts: balance.switch_loss(routing),
    "global_batch_loss": lambda routing, counts: balance.switch_loss(routing, None, counts),
    "z_loss": lambda routing, counts: balance.z_loss(routing),
    "device_loss": lambda routing, counts: balance.device_loss(routing, 4),
    "communication_loss": lambda routing, counts: balance.communication_loss(routing, 4, 2),
}
DEVICES = {"num_devices": 4, "top_devices": 2}
EVERY_LOSS = {**DEVICES, **{name: 0.1 * number for number, name in enumerate(LOSSES, 1)}}
OWN_PARTS = """
import torch
from torch import nn
from moe import Routing, SigmoidRouter, SoftmaxRouter


class NanAtStep7(SigmoidRouter):
    calls = 0

    def forward(self, x):
        routing = super().forward(x)
        self.calls += torch.is_grad_enabled()
        return routing._replace(weights=routing.weights * (float("nan") if self.calls == 7 else 1))


class NanGradientAtStep7(SigmoidRouter):
    calls = 0

    def forward(self, x):
        routing = super().forward(x)
        self.calls += torch.is_grad_enabled()
        if self.calls == 7 and torch.is_grad_enabled():
            routing.weights.register_hook(lambda gradient: gradient * float("nan"))
        return routing


class TrainedBias(SoftmaxRouter):
    def __init__(self, dim, num_experts, top_k):
        super().__init__(dim, num_experts, top_k)
        self.bias = nn.Parameter(torch.zeros(num_experts))

    def forward(self, x):
        routing = super().forward(x)
        chosen = self.bias.gather(0, routing.experts.flatten())
        return routing._replace(weights=routing.weights + chosen.view_as(routing.weights))


class NoBias(nn.Linear):
    def __init__(self, dim, num_experts, top_k):
        super().__init__(dim, num_experts, bias=False)
        self.top_k = top_k

    def forward(self, x):
        logits = super().forward(x.float())
        scores = logits.softmax(-1)
        weights, experts = scores.topk(self.top_k)
        return Routing(experts, weights, scores, logits)


class Fixed(nn.Module):
    def __init__(self, dim, num_experts, top_k):
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.unused = nn.Linear(dim, 2)

    def forward(self, x, tokens):
        experts = (tokens.unsqueeze(-1) + torch.arange(self.top_k)) % self.num_experts
        scores = torch.full((*tokens.shape, self.num_experts), 1 / self.num_experts)
        return Routing(experts, torch.ones(experts.shape), scores, scores)
"""


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    """Ten tokens do: writing two hundred takes longer than training."""
    monkeypatch.setattr(train, "stream", lambda *a, **k: itertools.islice(stream(*a, **k), 10))


@pytest.fixture(scope="session")
def own_parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_routers.py").write_text(OWN_PARTS)
    return folder


@pytest.fixture
def importable(own_parts, monkeypatch):
    monkeypatch.syspath_prepend(str(own_parts))


def logged(run):
    """The rows of the log without what a clock says."""
    return [{key: value for key, value in row.items() if key not in TIMES} for row in read_metrics(run)]


def stored(run):
    """sha256 of every tensor of the newest checkpoint, and its state without what a clock says."""
    newest = checkpoint.newest_checkpoint(run)
    sums = {}
    for name in ("model.safetensors", "optimizer.safetensors"):
        for key, tensor in load_file(newest / name).items():
            sums[key] = hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    state = json.loads((newest / "state.json").read_text())
    return sums, {key: state[key] for key in ("step", "tokens", "dtype")}


def equal_runs(one, other):
    assert stored(one) == stored(other)
    assert logged(one) == logged(other)


def stop_at(monkeypatch, steps, number):
    """Send this process a signal within those steps."""
    working = Trainer.step

    def step(self, step):
        if step in steps:
            os.kill(os.getpid(), number)
        return working(self, step)

    monkeypatch.setattr(Trainer, "step", step)


# --- stopped and resumed


@pytest.mark.parametrize("steps", [[1], [5], [6], [2, 3, 7, 11], list(range(1, 12))], ids=str)
def test_a_stopped_and_resumed_run_equals_the_unbroken_one(tiny, trained_once, tmp_path, monkeypatch, steps):
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
def test_other_models_resume_bit_for_bit_too(tiny, tmp_path, monkeypatch, changes):
    config = tiny(**changes)
    assert train.train(config, tmp_path / "whole") == 0
    stop_at(monkeypatch, [4], signal.SIGTERM)
    assert train.train(config, tmp_path / "run") == 143
    assert train.train(config, tmp_path / "run", resume=True) == 0
    equal_runs(tmp_path / "run", tmp_path / "whole")


def test_a_run_from_before_there_were_other_ways_to_balance_goes_on(
    tiny, trained_once, tmp_path, monkeypatch
):
    stop_at(monkeypatch, [5], signal.SIGINT)
    run, new = tmp_path / "run", (*DEVICES, *LOSSES, "bias_update ", "load_entropies", "dead_experts")
    assert train.train(tiny(), run) == 130
    lines = (run / "config.toml").read_text().splitlines()
    kept = [line for line in lines if not line.startswith(new) or line.startswith("sequence_loss")]
    assert len(lines) - len(kept) == 8
    (run / "config.toml").write_text("\n".join(kept))
    rows = [{key: value for key, value in row.items() if key not in new} for row in read_metrics(run)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train.train(Config.load(run / "config.toml"), run, resume=True) == 0
    assert stored(run) == stored(trained_once) and len(logged(run)) == len(logged(trained_once))


def test_a_resumed_run_goes_over_a_damaged_checkpoint(tiny, trained, trained_once):
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
        pytest.warns(UserWarning, match="passed over"),
        pytest.raises(ValueError, match="every checkpoint is damaged"),
    ):
        train.train(tiny(), trained, resume=True)
    assert content(trained) | {".owner": b""} == before | {".owner": b""}


KILL_AT_CALL = """
import os, pathlib, signal
owner, name = {owner}, {name!r}
working, left = getattr(owner, name), [{number}]
def counted(*a, **k):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return working(*a, **k)
setattr(owner, name, counted)
"""


@pytest.fixture(scope="module")
def longer(tiny, tmp_path_factory):
    """An unbroken run that takes a while, and its config."""
    config = tiny(train={"steps": 60, "save_every": 7, "eval_every": 9})
    run = tmp_path_factory.mktemp("longer") / "run"
    assert train.train(config, run) == 0
    return config, run


def killed_until_done(command, quick, options, run, instants):
    """Train, killed at each instant in turn (so many seconds after that step), then to the end."""
    for instant in [*instants, None]:
        resume = ["--resume"] if (run / "config.toml").exists() else []
        pid = command.start("train", *options, "--out-dir", run, *resume, before=quick)
        if instant is not None:
            command.wait_for(lambda step=instant[0]: step == 0 or len(read_metrics(run)) >= step)
            time.sleep(instant[1])
            os.kill(pid, signal.SIGKILL)
        ended = command.wait()
        assert ended.code == (0 if instant is None else -signal.SIGKILL), ended.err


def test_killed_at_random_instants_it_equals_the_unbroken_run(longer, command, quick, options, tmp_path):
    config, whole = longer
    draw = random.Random(1)
    instants = [(step, draw.uniform(0, 0.02)) for step in sorted(draw.sample(range(1, 50), 3))]
    killed_until_done(command, quick, options(config), tmp_path / "run", instants)
    equal_runs(tmp_path / "run", whole)


@pytest.mark.long
@pytest.mark.parametrize("number", range(20))
def test_killed_at_many_random_instants_it_equals_the_unbroken_run(
    longer, command, quick, options, tmp_path, number
):
    config, whole = longer
    draw = random.Random(number)
    instants = [(step, draw.uniform(0, 0.03)) for step in sorted(draw.sample(range(50), draw.randint(1, 5)))]
    killed_until_done(command, quick, options(config), tmp_path / "run", instants)
    equal_runs(tmp_path / "run", whole)


@pytest.fixture(scope="module")
def shorter(tiny, tmp_path_factory):
    """An unbroken run of two saves, and its config."""
    config = tiny(train={"steps": 4, "save_every": 2})
    run = tmp_path_factory.mktemp("shorter") / "run"
    assert train.train(config, run) == 0
    return config, run


def killed_within_a_save(shorter, command, quick, options, folder, owner, name, number):
    config, whole = shorter
    run = folder / f"{owner}-{name}-{number}"
    before = quick + KILL_AT_CALL.format(owner=owner, name=name, number=number)
    killed = command("train", *options(config), "--out-dir", run, before=before)
    assert killed.code in (0, -signal.SIGKILL), killed.err
    resume = ["--resume"] if (run / "config.toml").exists() else []
    assert command("train", *options(config), "--out-dir", run, *resume, before=quick).code == 0
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
def test_killed_within_a_save_it_equals_the_unbroken_run(
    shorter, command, quick, options, tmp_path, owner, name, number
):
    assert killed_within_a_save(shorter, command, quick, options, tmp_path, owner, name, number)


@pytest.mark.long
@pytest.mark.parametrize(
    "owner, name",
    [
        ("os", "fsync"),
        ("pathlib.Path", "rename"),
        ("pathlib.Path", "mkdir"),
        ("pathlib.Path", "write_text"),
        ("os", "open"),
    ],
)
def test_killed_at_every_call_of_a_save_it_equals_the_unbroken_run(
    shorter, command, quick, options, tmp_path, owner, name
):
    number = 1
    while killed_within_a_save(shorter, command, quick, options, tmp_path, owner, name, number):
        number += 1
    assert number > 3


# --- signals


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(
    tiny, command, options, tmp_path, number, code
):
    run, config = tmp_path / "run", tiny(train={"steps": 10**6, "save_every": 10**6})
    pid = command.start("train", *options(config), "--out-dir", run)
    command.wait_for(lambda: len(read_metrics(run)) >= 3)
    os.kill(pid, number)
    ended = command.wait()
    assert ended.code == code and ended.err == ""
    (saved,) = checkpoint.checkpoints(run)
    step = int(saved.name.removeprefix("step-"))
    assert (
        f"stopped after step {step}, saved; go on with: lm train --resume --out-dir {run}"
        in ended.out.decode()
    )
    assert read_metrics(run)[-1]["step"] == checkpoint.read_state(saved)["step"] == step
    checkpoint.load(run)


SLOW_SAVE = """
import lm.run, time
save = lm.run.Run.save
lm.run.Run.save = lambda self, *state: time.sleep(60) if self.signal else save(self, *state)
"""


def test_a_second_signal_leaves_at_once_and_harms_nothing(tiny, command, options, tmp_path):
    run, config = tmp_path / "run", tiny(train={"steps": 10**6, "save_every": 5})
    pid = command.start("train", *options(config), "--out-dir", run, before=SLOW_SAVE)
    command.wait_for(lambda: len(read_metrics(run)) >= 12)
    os.kill(pid, signal.SIGINT)
    command.wait_for(lambda: b"once more to leave at once" in (command.folder / "stdout").read_bytes())
    os.kill(pid, signal.SIGINT)
    ended = command.wait()
    assert ended.code == 130 and ended.err == "" and b"stopped after step" not in ended.out
    assert checkpoint.checkpoints(run)[-1].name >= "step-000010"
    checkpoint.load(run)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, -15)])
def test_a_signal_before_the_first_step_leaves_nothing_half_written(
    tiny, command, options, tmp_path, number, code
):
    slow = "import lm.data, time\nlm.data.load = lambda *a: (print('loading', flush=True), time.sleep(60))\n"
    pid = command.start("train", *options(tiny()), "--out-dir", tmp_path / "run", before=slow)
    command.wait_for(
        lambda: (
            (command.folder / "stdout").exists() and b"loading" in (command.folder / "stdout").read_bytes()
        )
    )
    os.kill(pid, number)
    assert command.wait().code == code
    assert not (tmp_path / "run").exists()


def test_the_callers_signal_handlers_come_back(tiny, tmp_path, monkeypatch):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    stop_at(monkeypatch, [2], signal.SIGTERM)
    train.train(tiny(), tmp_path / "run")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_reader_that_goes_away_ends_the_run_with_a_checkpoint(tiny, options, tmp_path):
    run = tmp_path / "run"
    code = "import sys; from lm.cli import main; sys.exit(main())"
    config = tiny(train={"steps": 10**6, "save_every": 10**6})
    ended = subprocess.run(
        [
            "bash",
            "-c",
            '"$@" | head -1; exit "${PIPESTATUS[0]}"',
            "bash",
            sys.executable,
            "-c",
            code,
            "train",
            *options(config),
            "--out-dir",
            str(run),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ended.returncode == 141 and ended.stderr == ""
    assert len(ended.stdout.splitlines()) == 1
    checkpoint.load(run)


# --- what cannot go on


@pytest.mark.parametrize(
    "router, said", [("NanAtStep7", "loss nan"), ("NanGradientAtStep7", "gradient norm nan")]
)
def test_a_value_that_is_no_number_stops_before_it_touches_the_weights(
    tiny, command, options, own_parts, tmp_path, router, said
):
    run, config = tmp_path / "run", tiny(moe={"router": f"own_routers:{router}"})
    ended = command("train", *options(config), "--out-dir", run, paths=[own_parts])
    assert ended.code == 1
    assert ended.err.startswith("lm train: step 7: ") and said in ended.err and ended.err.count("\n") == 1
    assert f"the last checkpoint is {run / 'checkpoints' / 'step-000005'}" in ended.err
    assert [path.name for path in checkpoint.checkpoints(run)] == ["step-000005"]
    for name in ("model.safetensors", "optimizer.safetensors"):
        held = load_file(run / "checkpoints" / "step-000005" / name)
        assert all(tensor.isfinite().all() for tensor in held.values())
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4, 5, 6]


def test_the_weights_are_those_of_the_step_before(tiny, tmp_path, importable):
    config = tiny(moe={"router": "own_routers:NanAtStep7"}, train={"save_every": 6})
    with pytest.raises(RunFailed, match="step 7: loss nan"):
        train.train(config, tmp_path / "run")
    plain = tiny(train={"save_every": 6})
    train.train(plain, tmp_path / "plain")
    first = {
        name: t
        for name, t in load_file(
            tmp_path / "run" / "checkpoints" / "step-000006" / "model.safetensors"
        ).items()
    }
    second = load_file(tmp_path / "plain" / "checkpoints" / "step-000006" / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("save_every", [1, 12])
def test_weights_that_overflow_are_never_saved(tiny, tmp_path, save_every):
    config = tiny(train={"learning_rate": 1e300, "warmup": 0, "save_every": save_every, "eval_every": 12})
    with pytest.raises(RunFailed, match=r"step [12]: .*(inf|nan).*there is no checkpoint yet"):
        train.train(config, tmp_path / "run")
    assert not checkpoint.checkpoints(tmp_path / "run")


def test_a_held_out_loss_that_is_no_number_stops_the_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda *a: float("nan"))
    with pytest.raises(RunFailed, match=r"step 6: held out loss nan; the last checkpoint is .*step-000005"):
        train.train(tiny(), tmp_path / "run")


FULL_DISK = """
import lm.train as t, resource
save = t.Trainer.save
def limited(self, log):
    if self.state["step"] == {step}:
        resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, resource.RLIM_INFINITY))
    save(self, log)
t.Trainer.save = limited
"""


@pytest.mark.parametrize("step, size", [(5, 2000), (10, 30_000), (12, 100_000)])
def test_a_full_disk_leaves_the_checkpoint_before_and_the_run_can_go_on(
    tiny, command, options, tmp_path, trained_once, step, size
):
    run = tmp_path / "run"
    ended = command(
        "train", *options(tiny()), "--out-dir", run, before=FULL_DISK.format(step=step, size=size)
    )
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


# --- folders


def test_a_model_that_training_has_no_room_for_is_refused_before_it_is_made(tiny, tmp_path, monkeypatch):
    config = tiny()
    needed = 16 * count.total_parameters(config.model)
    monkeypatch.setattr(train.machine, "memory", lambda: needed - 1)
    with pytest.raises(ValueError, match=f"has {needed // 16:,} parameters; training them takes"):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for enough in (needed, 0):  # 0: the system does not tell
        monkeypatch.setattr(train.machine, "memory", lambda enough=enough: enough)
        train.check_memory(config.model)


def test_a_folder_that_is_no_new_run_is_refused_and_not_touched(tiny, trained, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = content(tmp_path)
    for path, said in (
        (tmp_path / "other", "other: is not empty and no run"),
        (tmp_path / "file", "file: is a file; a run needs a folder"),
        (trained, "run: holds a run already; --resume goes on with it"),
    ):
        with pytest.raises(ValueError, match=said):
            train.train(tiny(), path)
    for path in (tmp_path / "other", tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(ValueError, match=f"{path.name}: no run to resume"):
            train.train(tiny(), path, resume=True)
    assert content(tmp_path) == before and not (tmp_path / "absent").exists()


def test_an_empty_folder_or_what_a_killed_start_left_is_a_new_run(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    for name in (".lock", ".owner", ".config.toml.tmp"):
        (tmp_path / "run" / name).write_text("")
    assert train.train(tiny(train={"steps": 1}), tmp_path / "run") == 0
    assert not (tmp_path / "run" / ".config.toml.tmp").exists()


def test_a_folder_that_cannot_be_made_is_refused_with_the_reason(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="run: cannot be written: Not a directory"):
        train.train(tiny(), tmp_path / "file" / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused_with_the_reason(tiny, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ValueError, match="cannot be written: Permission denied"):
        train.train(tiny(), tmp_path / "locked" / "run")


def test_a_second_train_in_the_same_folder_is_refused(tiny, command, quick, options, trained):
    before = content(trained / "checkpoints")
    with train.open_run(trained, resume=True):
        ended = command("train", *options(tiny()), "--out-dir", trained, "--resume")
        assert (ended.code, ended.err) == (2, f"lm train: {trained}: in use by process {os.getpid()}\n")
        assert command("train", *options(tiny()), "--out-dir", trained).code == 2
    assert content(trained / "checkpoints") == before
    assert command("train", *options(tiny()), "--out-dir", trained, "--resume", before=quick).code == 0


def test_resuming_a_finished_run_changes_no_file(tiny, trained, command):
    before = content(trained)
    ended = command("train", "--out-dir", trained, "--resume")
    assert ended.code == 0 and b"all 12 steps are done" in ended.out
    before.pop(".owner")
    after = content(trained)
    after.pop(".owner")
    assert after == before


def test_fewer_steps_than_are_done_are_refused_with_both_numbers(tiny, trained):
    before = content(trained)
    with pytest.raises(ValueError, match=r"train\.steps 7 is less than the 12 steps already done"):
        train.train(tiny(train={"steps": 7}), trained, resume=True)
    assert content(trained) | {".owner": b""} == before | {".owner": b""}


def test_more_steps_go_on(tiny, trained):
    assert train.train(tiny(train={"steps": 15}), trained, resume=True) == 0
    assert [row["step"] for row in read_metrics(trained)] == list(range(1, 16))
    assert Config.load(trained / "config.toml").train.steps == 15


@pytest.mark.parametrize(
    "option, value, said",
    [
        ("--model.dim", 32, "model.dim is 16 in the run and 32 now; it must stay"),
        ("--model.moe.top-k", 1, "model.moe.top_k is 2 in the run and 1 now; it must stay"),
        ("--model.norm-eps", 0.1, "model.norm_eps is 1e-06 in the run and 0.1 now; it must stay"),
        ("--data", "other.txt", "now; it must stay"),
    ],
)
def test_a_resumed_run_keeps_its_model_and_data(trained, command, option, value, said):
    before = content(trained)
    ended = command("train", "--out-dir", trained, "--resume", option, value)
    assert (
        ended.code == 2
        and ended.err.startswith("lm train: ")
        and said in ended.err
        and ended.err.count("\n") == 1
    )
    assert content(trained) == before


def test_another_machine_is_said_in_one_line(tiny, trained):
    path = trained / "checkpoints" / "step-000012" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"threads": 64, "torch": "1.0"}))
    with pytest.warns(
        UserWarning, match="last bits may differ from an unbroken run: threads 64 -> 1, torch 1.0 -> "
    ) as caught:
        train.train(tiny(), trained, resume=True)
    assert len(caught) == 1


def test_the_dtype_that_was_chosen_once_stays(tiny, tmp_path, monkeypatch):
    config = tiny(train={"dtype": "auto"})
    stop_at(monkeypatch, [3], signal.SIGINT)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert train.train(config, tmp_path / "run") == 130
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert train.train(config, tmp_path / "run", resume=True) == 0
    assert stored(tmp_path / "run")[1]["dtype"] == "torch.bfloat16"


# --- the training itself


def test_the_same_seed_gives_the_same_bits_whatever_was_drawn_before(tiny, trained_once, tmp_path):
    torch.manual_seed(99)
    random.seed(99)
    train.train(tiny(), tmp_path / "same")
    equal_runs(tmp_path / "same", trained_once)
    train.train(tiny(train={"seed": 1}), tmp_path / "other")
    assert stored(tmp_path / "other")[0] != stored(trained_once)[0]


def test_logging_evaluating_sampling_and_saving_change_no_weight(tiny, trained_once, tmp_path):
    often = {"log_every": 3, "eval_every": 1, "sample_every": 4, "save_every": 1, "keep": 1}
    train.train(tiny(train=often), tmp_path / "run")
    assert stored(tmp_path / "run") == stored(trained_once)


def test_training_is_deterministic_by_pytorchs_own_judgement(tiny, trained_once, tmp_path):
    torch.use_deterministic_algorithms(True)
    try:
        train.train(tiny(), tmp_path / "run")
    finally:
        torch.use_deterministic_algorithms(False)
    equal_runs(tmp_path / "run", trained_once)


def test_it_learns(tiny, tmp_path):
    train.train(tiny(train={"steps": 80, "batch_size": 8}), tmp_path / "run")
    rows = read_metrics(tmp_path / "run")
    assert abs(rows[0]["loss"] - math.log(256)) < 0.2  # knows nothing yet
    assert (
        rows[-1]["loss"] < 2.5 and rows[-1]["val_loss"] < 2.5
    )  # the letters and spaces, at least: log(10) is 2.3


def test_the_log_says_what_happened(tiny, trained_once):
    config, rows = tiny(), read_metrics(trained_once)
    assert [row["step"] for row in rows] == list(range(1, 13))
    for row in rows:
        assert row["tokens"] == row["step"] * 4 * 16
        assert row["learning_rate"] == learning_rate(row["step"], config.train)
        assert row["grad_norm"] > 0 and row["loss"] > 0 and row["tokens_per_second"] > 0
        assert len(row["max_violations"]) == 2 and all(
            0 <= value <= 8 / 2 - 1 for value in row["max_violations"]
        )
        assert row["max_violation"] == pytest.approx(sum(row["max_violations"]) / 2)
        assert ("val_loss" in row) == (row["step"] in (6, 12))
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)


def test_the_run_folder_holds_the_resolved_config_and_samples(tiny, trained_once):
    assert Config.load(trained_once / "config.toml") == tiny()
    assert (trained_once / "samples.txt").read_text().startswith("--- step 12\n")
    assert sorted(path.name for path in (trained_once / "checkpoints").iterdir()) == [
        "step-000010",
        "step-000012",
    ]


def test_log_every_and_sample_every_are_kept(tiny, tmp_path):
    train.train(tiny(train={"log_every": 5, "sample_every": 4, "eval_every": 1000}), tmp_path / "run")
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [5, 10, 12]
    lines = (tmp_path / "run" / "samples.txt").read_text().splitlines()
    assert [line for line in lines if line.startswith("--- step")] == [
        "--- step 4",
        "--- step 8",
        "--- step 12",
    ]


def by_hand(model, tokens, starts):
    """Mean loss of the last 14 of 16 targets of the windows that begin there: the first 2 are known text."""
    losses = []
    with torch.no_grad():
        for start in starts:
            window = torch.from_numpy(tokens[start : start + 17].astype("int64"))
            logits = model(window[:-1].unsqueeze(0)).logits[0]
            losses.append(nn.functional.cross_entropy(logits[2:], window[3:]).item())
    return sum(losses) / len(losses)


def test_the_last_evaluation_is_of_the_whole_held_out_text(tiny, trained_once):
    model, config = checkpoint.load(trained_once), tiny()
    tokens = data.load(config.data, 256)[1]
    want = by_hand(model, tokens, range(0, len(tokens) - 16, 14))
    assert read_metrics(trained_once)[-1]["val_loss"] == pytest.approx(want, rel=1e-6)


def test_an_evaluation_between_is_of_windows_spread_over_the_text(tiny, make_model):
    config = tiny()
    model = make_model(config.model, torch.float32)
    tokens = data.load(config.data, 256)[1]
    windows, starts = data.Windows(tokens, 16), list(range(0, len(tokens) - 16, 14))
    count = len(starts)
    assert count > 20
    want = by_hand(model, tokens, [starts[i * count // 4] for i in range(4)])
    for batch_size in (1, 3, 100):
        got = train.evaluate(model, windows, 4 * 16 + 5, torch.float32, batch_size)
        assert got == pytest.approx(want, rel=1e-6)
    first = by_hand(model, tokens, [0])
    assert train.evaluate(model, windows, 1, torch.float32, 4) == pytest.approx(first, rel=1e-6)
    whole = by_hand(model, tokens, starts)
    assert train.evaluate(model, windows, 10**9, torch.float32, 7) == pytest.approx(whole, rel=1e-6)


def trainer_of(config, folder, dtype=torch.float32):
    folder.mkdir(exist_ok=True)
    texts = data.load(config.data, config.model.vocab_size)
    model = Transformer(config.model).to(dtype)
    model.initialize(torch.Generator().manual_seed(0))
    windows = data.Windows(texts[0], config.train.context, config.train.seed)
    return Trainer(config, folder, model, windows, data.Windows(texts[1], config.train.context))


def counts_of_the_batch(trainer, batches):
    """How often each expert of each layer is chosen, counted one choice after the other."""
    found = []
    for inputs, _ in batches:
        for layer, routing in enumerate(trainer.model(inputs).routings):
            if layer == len(found):
                found.append([0] * 8)
            for expert in routing.experts.flatten().tolist():
                found[layer][expert] += 1
    return found


def bias_steps(loads, kind):
    """How a bias moves at rate 1, by the config's words for it."""
    mean = sum(loads) / len(loads)
    signs = [(mean > load) - (mean < load) for load in loads]
    return {
        "sign": signs,
        "centred": [sign - sum(signs) / len(signs) for sign in signs],
        "proportional": [1 - load / mean for load in loads],
    }[kind]


@pytest.mark.parametrize("kind", ["sign", "centred", "proportional"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_bias_moves_once_a_step_by_the_counts_of_the_whole_batch(tiny, tmp_path, accumulation, kind):
    config = tiny(train={"accumulation": accumulation, "bias_update_rate": 0.25, "bias_update": kind})
    trainer = trainer_of(config, tmp_path)
    want = [[0.0] * 8, [0.0] * 8]
    for step in (1, 2, 3):
        batches = [
            trainer.windows.batch(((step - 1) * accumulation + part) * 4, 4) for part in range(accumulation)
        ]
        counts = counts_of_the_batch(trainer, batches)
        row = trainer.step(step)
        for layer, loads in enumerate(counts):
            mean = sum(loads) / 8
            assert sum(loads) == accumulation * 4 * 16 * 2
            assert row["max_violations"][layer] == pytest.approx(max(loads) / mean - 1)
            shares = [load / sum(loads) for load in loads if load]
            entropy = -sum(share * math.log(share, 8) for share in shares)
            assert row["load_entropies"][layer] == pytest.approx(entropy)
            assert row["dead_experts"][layer] == 8 - len(shares)
            for expert, move in enumerate(bias_steps(loads, kind)):
                want[layer][expert] += 0.25 * move
        for router, biases in zip(trainer.model.routers(), want):
            assert router.bias.tolist() == pytest.approx(biases, rel=1e-5, abs=1e-6)


def test_evaluation_and_samples_leave_the_bias_alone(tiny, tmp_path):
    trainer = trainer_of(tiny(train={"bias_update_rate": 0.5}), tmp_path)
    trainer.step(1)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.evaluate(None)
    trainer.sample(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())


def test_rate_0_leaves_the_bias_alone(tiny, tmp_path):
    train.train(tiny(train={"bias_update_rate": 0.0}), tmp_path / "run")
    assert all(not router.bias.any() for router in checkpoint.load(tmp_path / "run").routers())


def test_the_bias_update_evens_the_load(tiny, make_model, tmp_path):
    config = tiny(train={"bias_update_rate": 0.02, "learning_rate": 0.0, "batch_size": 16})
    trainer = trainer_of(config, tmp_path)
    trainer.model.load_state_dict(make_model(config.model, torch.float32).state_dict())
    violations = [trainer.step(step)["max_violation"] for step in range(1, 41)]
    print(violations)
    assert sum(violations[-5:]) / 5 < violations[0] / 3


def test_accumulated_steps_equal_one_step_of_the_whole_batch(tiny, tmp_path):
    whole = trainer_of(tiny(train={"batch_size": 8, "sequence_loss": 0.1}), tmp_path, torch.float64)
    parts = trainer_of(
        tiny(train={"batch_size": 4, "accumulation": 2, "sequence_loss": 0.1}), tmp_path, torch.float64
    )
    for step in range(1, 6):
        one, other = whole.step(step), parts.step(step)
        assert one["tokens"] == other["tokens"] and one["max_violations"] == other["max_violations"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-6)
    for ours, theirs in zip(whole.model.state_dict().values(), parts.model.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_with_many_logits_a_step_holds_a_few_at_once_and_is_the_same(tiny, tmp_path, monkeypatch):
    config = tiny(train={"accumulation": 2})
    whole, parts = (trainer_of(config, tmp_path, torch.float64) for _ in range(2))
    chunk, sizes, run = 4 * config.model.vocab_size * 10, [], loss.Chunked.forward
    monkeypatch.setattr(loss.Chunked, "forward", lambda *given: sizes.append(given[5]) or run(*given))
    for step in (1, 2, 3):
        rows = [whole.step(step)]
        with monkeypatch.context() as patch:
            patch.setattr(loss, "CHUNK", chunk)
            rows.append(parts.step(step))
        for key in ("loss", "grad_norm"):
            assert rows[0][key] == pytest.approx(rows[1][key], rel=1e-12)
    assert sizes == [10] * 6  # tokens at once: in each pass of `parts`, and in none of `whole`
    monkeypatch.setattr(loss, "CHUNK", chunk)
    assert parts.evaluate(None) == pytest.approx(whole.evaluate(None), rel=1e-12)
    assert len(sizes) > 6


@pytest.mark.parametrize("name", LOSSES)
def test_a_balance_loss_is_trained_on_and_not_logged(tiny, tmp_path, name):
    rows, weights = [], []
    for factor in (0.0, 100.0):
        balances = {"sequence_loss": 0.0, **DEVICES, name: factor}
        trainer = trainer_of(tiny(train={**balances, "grad_clip": 0.0}), tmp_path)
        held_out = trainer.evaluate(None)
        rows.append({**trainer.step(1), "val_loss": held_out})
        weights.append(trainer.model.routers()[0].weight.detach().clone())
    assert rows[0]["loss"] == rows[1]["loss"] and rows[0]["val_loss"] == rows[1]["val_loss"]
    assert rows[1]["grad_norm"] > rows[0]["grad_norm"]
    assert not torch.equal(*weights)


@pytest.mark.parametrize("names", [*([name] for name in LOSSES), list(LOSSES), []], ids="+".join)
def test_a_steps_gradient_is_of_the_loss_and_the_weighted_balance_losses_of_each_layer(tiny, tmp_path, names):
    weights = {"sequence_loss": 0.0, **{name: 1 / number for number, name in enumerate(names, 3)}}
    config = tiny(train={**DEVICES, **weights, "accumulation": 3, "grad_clip": 0.0})
    trainer, twin = trainer_of(config, tmp_path, torch.float64), trainer_of(config, tmp_path, torch.float64)
    counts = [0, 0]
    for part in range(3):
        inputs, targets = twin.windows.batch(part * 4, 4)
        out = twin.model(inputs)
        objective = nn.functional.cross_entropy(out.logits.flatten(0, 1), targets.flatten())
        for layer, routing in enumerate(out.routings):
            counts[layer] = counts[layer] + balance.tokens_per_expert(routing)
            for name in names:
                objective = objective + weights[name] * LOSSES[name](routing, counts[layer])
        (objective / 3).backward()
    found = []
    trainer.optimizer.step = lambda: found.extend(p.grad.clone() for p in trainer.model.parameters())
    trainer.step(1)
    for ours, theirs in zip(found, twin.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-6, atol=1e-9)


def test_a_step_is_adamw_on_the_clipped_gradient_of_loss_and_balance(tiny, tmp_path):
    config = tiny(train={"sequence_loss": 0.3, "grad_clip": 0.05, "warmup": 0, "decay": 0.0})
    trainer, twin = (
        trainer_of(config, tmp_path, torch.float64),
        trainer_of(config, tmp_path, torch.float64).model,
    )
    inputs, targets = trainer.windows.batch(0, 4)
    out = twin(inputs)
    main = nn.functional.cross_entropy(out.logits.flatten(0, 1), targets.flatten())
    (main + 0.3 * sum(balance.sequence_loss(routing) for routing in out.routings)).backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in twin.parameters()))
    row = trainer.step(1)
    assert row["loss"] == pytest.approx(main.item(), rel=1e-6) and row["grad_norm"] == pytest.approx(
        norm, rel=1e-6
    )
    assert norm > 0.05
    for ours, theirs in zip(trainer.model.named_parameters(), twin.parameters()):
        gradient = theirs.grad * 0.05 / (norm + 1e-6)
        decay = 0.1 if theirs.ndim > 1 and ours[0] != "embedding.weight" else 0.0
        want = theirs * (1 - 0.01 * decay) - 0.01 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(ours[1], want, rtol=0, atol=1e-9)


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize("router", ["TrainedBias", "NoBias", "Fixed"])
def test_a_router_of_ones_own_trains_whatever_it_calls_bias(tiny, tmp_path, router):
    config = tiny(moe={"router": f"own_routers:{router}"}, train={"bias_update_rate": 100.0})
    assert train.train(config, tmp_path / "run") == 0
    model = checkpoint.load(tmp_path / "run", trust_code=True)
    for name, parameter in model.named_parameters():
        assert parameter.abs().max() < 50, name


@pytest.mark.parametrize(
    "changes",
    [{"train": {"context": 1}}, {"train": {"context": 2, "batch_size": 1}}, {"model": {"vocab_size": 300}}],
)
def test_odd_sizes_train_too(tiny, tmp_path, changes):
    changes["train"] = {**changes.get("train", {}), "steps": 2}
    assert train.train(tiny(**changes), tmp_path / "run") == 0


def test_a_vocabulary_without_newline_trains_too(tiny, tmp_path):
    (tmp_path / "text").write_bytes(bytes(random.Random(0).choices(range(5), k=2000)))
    assert (
        train.train(tiny(model={"vocab_size": 5}, data={"path": str(tmp_path / "text")}), tmp_path / "run")
        == 0
    )


@pytest.mark.parametrize("raw", [b"\x00" * 500 + b"\xff\xfe" * 500, bytes(range(256)) * 10])
def test_any_bytes_can_be_trained_on(tiny, tmp_path, raw):
    (tmp_path / "text").write_bytes(raw)
    assert train.train(tiny(data={"path": str(tmp_path / "text")}, train={"steps": 2}), tmp_path / "run") == 0


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"data": {"path": "/nowhere/text"}}, "/nowhere/text: cannot be read: No such file"),
        ({"data": {"validation": "/nowhere/text"}}, "/nowhere/text: cannot be read: No such file"),
        ({"train": {"context": 5000}}, "the text has [0-9]+ tokens; context=5000 needs at least 5001"),
        ({"train": {"context": 10**6}}, "the text has [0-9]+ tokens; context=1000000 needs at least 1000001"),
        ({"model": {"vocab_size": 100}}, "token 104; vocab_size=100"),
        ({"train": {"device": "cuda:77"}}, "device 'cuda:77' was not found"),
        ({"moe": {"router": "nocolon"}}, "model.moe.router 'nocolon'"),
        ({"attention": {"qk_rope_head_dim": 3}}, "dim=3 must be even"),
    ],
)
def test_what_cannot_be_trained_is_said_before_anything_is_written(tiny, tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        train.train(tiny(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_event_files_are_written_where_they_are_asked_for(tiny, tmp_path):
    pytest.importorskip("tensorboard")
    train.train(tiny(train={"tensorboard": True}), tmp_path / "run")
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_the_seconds_of_a_resumed_run_go_on_from_those_before(tiny, tmp_path, monkeypatch):
    stop_at(monkeypatch, [6], signal.SIGINT)
    train.train(tiny(), tmp_path / "run")
    path = checkpoint.checkpoints(tmp_path / "run")[-1] / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 1000.0}))
    train.train(tiny(), tmp_path / "run", resume=True)
    rows = read_metrics(tmp_path / "run")
    assert rows[5]["seconds"] < 1000 < rows[6]["seconds"]


def test_resuming_takes_other_numbers_of_training(tiny, tmp_path, monkeypatch):
    stop_at(monkeypatch, [6], signal.SIGINT)
    train.train(tiny(), tmp_path / "run")
    config = dataclasses.replace(tiny(), train=dataclasses.replace(tiny().train, steps=9, log_every=2))
    assert train.train(config, tmp_path / "run", resume=True) == 0
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6, 8, 9]


def test_the_machine_is_asked_for_the_device_first(tiny, tmp_path, monkeypatch):
    asked = []
    pick = machine.pick_device
    monkeypatch.setattr(machine, "pick_device", lambda name: (asked.append(name), pick(name))[1])
    train.train(tiny(train={"steps": 1}), tmp_path / "run")
    assert asked[0] == "cpu"


@pytest.mark.parametrize(
    "body, said",
    [
        ("return x", "ValueError: Odd returned a Tensor, not a moe.Routing"),
        ("return Routing(torch.full((*x.shape[:-1], 2), 99), x[..., :2], x, x)", ": "),
        ("raise RuntimeError('not this')", "RuntimeError: not this"),
        ("return Routing(x[..., :2].argsort(), x[..., :2], x[..., :3], x)", r"scores are \(2, 4, 3\)"),
        ("return Routing(x[..., :2].argsort(), x[..., :2], x[..., :8], None)", "logits are NoneType"),
        ("exit(3)", "SystemExit: 3"),
    ],
)
def test_a_router_of_ones_own_that_fails_leaves_nothing_behind(tiny, tmp_path, monkeypatch, body, said):
    text = f"""
import torch
from moe import Routing


class Odd(torch.nn.Module):
    def forward(self, x):
        {body}
"""
    name = f"odd_router_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    ungrouped = {"num_groups": 1, "top_groups": 1, "routed_scaling_factor": 1.0}
    config = tiny(moe={"router": f"{name}:Odd", **ungrouped})
    with pytest.raises(ValueError, match=rf"^{name}:Odd: a first pass fails: .*{said}") as caught:
        train.train(config, tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_the_first_pass_is_one_of_a_copy(tiny):
    ungrouped = {"num_groups": 1, "top_groups": 1, "routed_scaling_factor": 1.0}
    annealed = {"router": "exercises.projects.annealed:AnnealedRouter", "arguments": {"passes": 7}}
    model = Transformer(tiny(moe=ungrouped | annealed).model)
    parts.try_parts(model.train())
    assert [router.passed for router in model.routers()] == [0, 0]
