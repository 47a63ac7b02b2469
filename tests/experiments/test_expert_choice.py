"""Three ways to compute a loss: equal for a causal model, different with expert choice."""

import pytest
import torch

from lm.model import Transformer


@pytest.mark.parametrize("router, causal", [("sigmoid", True), ("expert_choice", False)])
def test_the_ways_differ_only_with_expert_choice(experiment, experiments, mini, monkeypatch, router, causal):
    monkeypatch.setattr(experiment, "WINDOWS", 3)
    moe = {"router": router, "routed_scaling_factor": 1.0}
    config = experiments("common").changed(mini, moe=moe, train={"context": 12})
    model = Transformer(config.model)
    model.initialize(torch.Generator().manual_seed(0))
    found = list(experiment.losses(model, config).values())
    assert (max(found) - min(found) < 1e-5) == causal
    windows = experiments("common").validation(config)
    total = []
    for index in range(3):  # the third way, a byte at a time
        window = windows[index * (len(windows) // 3)]
        for stop in range(6, 12):
            logits = model(window[: stop + 1].unsqueeze(0)).logits[0, -1]
            total.append(-float(logits.log_softmax(-1)[window[stop + 1]]))
    assert found[2] == pytest.approx(sum(total) / len(total), abs=1e-5)
