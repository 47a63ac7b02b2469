"""Helpers for the tests of training and checkpoints: compare, stop and build small runs."""

import hashlib
import json
import os

import torch
from safetensors.torch import load_file

from lm import history
from lm.model import Transformer
from lm.optim import build_optimizer
from lm.run import read_metrics
from lm.train import Trainer
from moe import balance

TIMES = ("seconds", "tokens_per_second")
LOSSES = {  # name in the config -> function of a routing and the step's counts so far
    "sequence_loss": lambda routing, counts: balance.sequence_loss(routing),
    "switch_loss": lambda routing, counts: balance.switch_loss(routing),
    "global_batch_loss": lambda routing, counts: balance.switch_loss(routing, None, counts),
    "z_loss": lambda routing, counts: balance.z_loss(routing),
    "device_loss": lambda routing, counts: balance.device_loss(routing, 4),
    "communication_loss": lambda routing, counts: balance.communication_loss(routing, 4, 2),
}
DEVICES = {"num_devices": 4, "top_devices": 2}
EVERY_LOSS = {**DEVICES, **{name: 0.1 * number for number, name in enumerate(LOSSES, 1)}}


def logged(run):
    """The rows of the log, without the times."""
    return [{key: value for key, value in row.items() if key not in TIMES} for row in read_metrics(run)]


def stored(run):
    """sha256 of every tensor of the newest checkpoint, and its state without the times."""
    newest = history.newest_checkpoint(run)
    sums = {}
    for name in ("model.safetensors", "optimizer.safetensors"):
        for key, tensor in load_file(newest / name).items():
            sums[key] = hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    state = json.loads((newest / "state.json").read_text())
    return sums, {key: state[key] for key in ("step", "tokens", "dtype")}


def equal_runs(one, other):
    """Assert that two runs have the same newest checkpoint and log."""
    assert stored(one) == stored(other)
    assert logged(one) == logged(other)


def stop_at(monkeypatch, steps, number):
    """Send this process a signal in each of those steps."""
    original = Trainer.step

    def step(self, step):
        if step in steps:
            os.kill(os.getpid(), number)
        return original(self, step)

    monkeypatch.setattr(Trainer, "step", step)


def bits(model):
    """Every stored tensor's dtype, shape and bytes."""
    return {
        name: (tensor.dtype, tensor.shape, tensor.contiguous().view(torch.uint8).numpy().tobytes())
        for name, tensor in model.state_dict().items()
    }


def state_of(step):
    """A training state, as a checkpoint's state.json holds it."""
    return {
        "step": step,
        "tokens": step * 64,
        "seconds": 1.5,
        "dtype": "torch.float32",
        "cpu_capability": "x",
        "threads": 1,
        "torch": torch.__version__,
    }


def stepped(config, steps=2, dtype=torch.float32):
    """A model and its optimizer after some steps."""
    model = Transformer(config.model).to(dtype)
    model.initialize(torch.Generator().manual_seed(0))
    optimizer = build_optimizer(model, config.train)
    for step in range(steps):
        model(torch.arange(step, step + 8).unsqueeze(0)).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for router in model.routers():
            if router.bias is not None:
                router.bias += 0.1
    return model, optimizer
