"""Folders to explore: trained runs, and models with random weights."""

import itertools

import pytest
import torch

import lm
from lm import checkpoint, train
from lm.report import explore
from lm.report import run as report


@pytest.fixture(scope="module")
def make_run(tiny, tmp_path_factory):
    """make_run(name, moe=..., train=...): a run of the smallest model with short samples and no report."""

    def make(name, **changes):
        run, stream = tmp_path_factory.mktemp("explored") / name, train.stream
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "stream", lambda *a, **k: itertools.islice(stream(*a, **k), 10))
            patch.setattr(report, "write", lambda run, trust_code=False: run / "report.html")
            assert train.train(tiny(**changes), run) == 0
        return run

    return make


@pytest.fixture
def draw_run(tiny, make_model, tmp_path):
    """draw_run(steps=[1], moe=...): a run whose checkpoints have random weights."""

    def draw(steps=(1,), **changes):
        config, run = tiny(**changes), tmp_path / "run"
        (run / "checkpoints").mkdir(parents=True)
        (run / "config.toml").write_text(config.to_toml())
        model = make_model(config.model, dtype=torch.float32)
        optimizer = torch.optim.AdamW(model.parameters())
        state = {"tokens": 1, "seconds": 1.0, "dtype": "torch.float32", "cpu_capability": "", "threads": 1}
        for step in steps:
            checkpoint.save_checkpoint(run, model, optimizer, {**state, "step": step, "torch": ""}, 99)
        return run

    return draw


@pytest.fixture
def saved_or_hub(tiny, make_model, tmp_path):
    """saved_or_hub("saved" or "hub", vocab_size=...): a folder of lm.save or lm.to_hf with random weights."""

    def make(kind, **model):
        {"saved": lm.save, "hub": lm.to_hf}[kind](
            make_model(tiny(model=model).model, dtype=torch.float32), tmp_path / kind
        )
        return tmp_path / kind

    return make


@pytest.fixture(scope="module")
def run(make_run):
    """Sigmoid router, 2 of 4 groups open, a scaling factor, four checkpoints."""
    changes = {"moe": {"routed_scaling_factor": 2.5}, "train": {"save_every": 3, "keep": 9}}
    run = make_run("sigmoid", **changes)
    explore.write(run)
    return run


@pytest.fixture(scope="module")
def softmax_run(make_run):
    moe = {"router": "softmax", "normalize": False, "routed_scaling_factor": 16.0}
    run = make_run("softmax", moe=moe, train={"steps": 4})
    explore.write(run)
    return run
