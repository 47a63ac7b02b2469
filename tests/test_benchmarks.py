"""The benchmarks run, and their peers compute the same function."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks.peers import loop_over_experts, speed_model, with_attention
from benchmarks.speed import at_context
from lm.config import Config
from lm.inference.step import Decoder
from lm.model import Transformer
from lm.parts import build_moe
from tests.helpers import ROOT


def test_the_loop_over_experts_equals_the_layer():
    config = speed_model()
    layer, x = build_moe(config.dim, config.moe), torch.randn(50, config.dim)
    torch.testing.assert_close(loop_over_experts(layer, x), layer(x)[0])


def test_rivals_differ_only_in_attention():
    config = speed_model()
    model = with_attention(config, 8)
    assert model.config.moe == config.moe and model.config.attention.kind == "gqa"
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, 256)


@torch.no_grad()
def test_a_timed_decode_step_is_at_its_context(monkeypatch):
    model = Transformer(Config.preset("nano").model)
    seen = []
    step = Decoder.step
    monkeypatch.setattr(
        Decoder,
        "step",
        lambda decoder, tokens, pools, plan: (
            seen.append((plan.rows, int(plan.positions[0]))) or step(decoder, tokens, pools, plan)
        ),
    )
    call = at_context(model, 300, 3, steps=4)
    assert call().shape == (3, 256)
    call()
    assert seen == [(3, 300), (3, 301)]


@pytest.mark.long
@pytest.mark.parametrize("name", ["speed", "scaling"])
def test_a_quick_run_writes_every_measurement(name, tmp_path):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = tmp_path.glob(f"{name}-*.json")
    found = json.loads(path.read_text())
    kinds = {
        "speed": ("train step", "MoE layer", "decode", "long context", "engine"),
        "scaling": ("experts", "dim", "tokens", "decode", "crossing"),
    }[name]
    assert all(any(key.startswith(kind) for key in found) for kind in kinds)
    assert found["machine"]["torch"] == torch.__version__
