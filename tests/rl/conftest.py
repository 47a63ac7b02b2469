"""A tiny base model: random weights, and one that already writes right answers now and then."""

import random
from dataclasses import replace

import pytest
import torch

from lm.config import AttentionConfig, Config, MoEConfig
from lm.model import Transformer
from rl import stages, tasks
from rl.tasks import Problem


@pytest.fixture(scope="session")
def config():
    """The preset's shape, small enough to learn something in a few seconds."""
    model = Config.preset("reason").model
    return replace(
        model,
        dim=32,
        attention=replace(
            AttentionConfig(), num_heads=2, kv_lora_rank=16, qk_nope_head_dim=16, v_head_dim=16
        ),
        moe=replace(MoEConfig(), num_experts=8, top_k=2, hidden_dim=16),
    )


@pytest.fixture
def untrained(config):
    model = Transformer(config)
    model.initialize(torch.Generator().manual_seed(0))
    return model.eval()


@pytest.fixture(scope="session")
def learned(config):
    """A model that guesses: half of its answers have the form, and one in three of these is right."""
    model = Transformer(config)
    model.initialize(torch.Generator().manual_seed(0))
    draw, examples = random.Random(0), []
    for problem in easy(400, seed=10_000):
        answer = draw.choice(["9", "10", "11"])
        thought = tasks.OPEN + "".join(draw.choices("0123456789", k=draw.randint(1, 3))) + tasks.CLOSE
        examples.append((problem, draw.choice([thought, ""]) + answer))
    stages.finetune(model, examples, 80, 32, 1e-2)
    return model.eval()


@pytest.fixture
def base(learned, tmp_path):
    """The folder of that model."""
    from lm import checkpoint

    checkpoint.save(learned, tmp_path / "base-model")
    return tmp_path / "base-model"


def easy(count, seed=0):
    """Sums of two terms that make 9, 10 or 11: a guess is right one time in three."""
    draw = random.Random(seed)
    pairs = [(draw.randint(2, 8), draw.choice([9, 10, 11])) for _ in range(count)]
    return [Problem(f"{a}+{b - a}".ljust(tasks.WIDTH - 1) + "=", str(b), "sums", 2) for a, b in pairs]
