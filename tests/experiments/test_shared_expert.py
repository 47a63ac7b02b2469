"""Disabling experts of a trained model, and restoring them."""

import copy

import pytest
import torch

from lm.evaluate import evaluate
from lm.model import Transformer


@torch.no_grad()
def test_each_change_is_measured_on_the_whole_model(experiment, experiments, mini, monkeypatch):
    monkeypatch.setattr(experiment, "TOKENS", 600)
    model = Transformer(mini.model)
    model.initialize(torch.Generator().manual_seed(0))
    before = copy.deepcopy(model)
    found = experiment.losses(model, mini)
    assert list(found) == list(experiment.CHANGES) and len(set(found.values())) == len(found)

    def loss(top_k, shared):
        made = copy.deepcopy(before)
        for block in made.blocks:
            block.mlp.router.top_k = top_k
            if not shared:
                for parameter in block.mlp.shared.parameters():
                    parameter.zero_()
        windows = experiments("common").validation(mini)
        return evaluate(made, windows, 600, torch.float32, mini.train.batch_size)

    assert found["as trained"] == pytest.approx(loss(3, True), abs=2e-5)
    assert found["one routed expert less"] == pytest.approx(loss(2, True), abs=2e-5)
    assert found["one routed expert more"] == pytest.approx(loss(4, True), abs=2e-5)
    assert found["no shared expert"] == pytest.approx(loss(3, False), abs=2e-5)
    assert found["no shared expert, one routed expert more"] == pytest.approx(loss(4, False), abs=2e-5)
    for block in model.blocks:
        assert block.mlp.router.top_k == 3 and block.mlp.shared is not None
