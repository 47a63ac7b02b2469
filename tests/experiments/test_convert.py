"""Whole models made over: the logits stay, and the experiment's kinds fit the presets."""

import copy
import json
from pathlib import Path

import pytest
import torch

from lm.config import Config
from lm.model import Transformer

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


def make(preset, dtype):
    model = Transformer(Config.preset(preset).model)
    model.initialize(torch.Generator().manual_seed(1))
    return model.to(dtype)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@torch.no_grad()
def test_the_logits_of_a_model_made_over_are_the_same(experiment, dtype, tolerance):
    tokens = torch.randint(256, (2, 20))
    for preset, makes in (("toy-gqa", experiment.MLA), ("toy-dense", experiment.MOE)):
        model = make(preset, dtype)
        want = model(tokens).logits
        for name, options in makes.items():
            made = copy.deepcopy(model)
            if preset == "toy-dense":
                experiment.mlps_to_moe(made, options)
                assert len(made(tokens).routings) == 3
            else:
                experiment.attentions_to_mla(made, tokens, *options)
            off = (made(tokens).logits - want).abs().max()
            assert (off > 1e-3) == (preset == "toy-gqa" and name != "mla, exact")
            if off <= 1e-3:
                assert off < tolerance


def test_the_kept_result_says_what_is_claimed(experiment):
    found = json.loads((EXPERIMENTS / "results" / "convert.json").read_text())["held_out_loss"]
    gqa, dense = found["gqa"], found["dense"]
    assert list(gqa) == ["left as it was", *experiment.MLA]
    assert list(dense) == ["left as it was", *experiment.MOE]
    for row in (gqa["mla, exact"], *dense.values()):
        assert abs(row["after"] - row["before"]) < 1e-4
    half = gqa["mla, half the cache"]
    assert half["cache_bytes_per_token"] * 2 == gqa["left as it was"]["cache_bytes_per_token"]
    assert half["after"] < gqa["mla, half the cache, no sample"]["after"]
