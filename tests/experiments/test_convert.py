"""Converted models keep their logits, and the experiment's options fit the presets."""

import copy

import pytest
import torch

from lm.config import Config
from lm.model import Transformer


def make(preset, dtype):
    model = Transformer(Config.preset(preset).model)
    model.initialize(torch.Generator().manual_seed(1))
    return model.to(dtype)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@torch.no_grad()
def test_an_exact_conversion_keeps_the_logits(experiment, dtype, tolerance):
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
            assert (off > 1e-3) == (preset == "toy-gqa" and name != "MLA, exact")
            if off <= 1e-3:
                assert off < tolerance


def test_answers_take_differences_seed_by_seed(experiment):
    rows = []
    for seed in (1, 0):
        for name in (*experiment.LEFT.values(), *experiment.MLA, *experiment.MOE):
            left = name in experiment.LEFT.values()
            row = {"before": 2.0 + seed, "after": 2.0 + seed + (0 if left else 0.5), "repaired": 1.5 + seed}
            rows.append(
                {"model": name, "seed": seed, **row, "repaired": row["repaired"] - (0 if left else 0.25)}
            )
    said = experiment.answers(rows)
    assert len(said) == 3 and all("0.500 ± 0.000" in line and "0.250 ± 0.000 ahead" in line for line in said)
