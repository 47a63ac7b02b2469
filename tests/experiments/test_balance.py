"""The load that the balance experiment measures, and the options of its methods."""

import pytest
import torch

from lm.model import Transformer


def test_the_load_counts_the_whole_held_out_text(experiment, experiments, mini, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(256)) * 60)
    config = experiments("common").changed(
        mini, data={"path": str(text)}, train={"context": 16, "batch_size": 7}, model={"num_layers": 2}
    )  # fmt: skip
    torch.manual_seed(1)
    model = Transformer(config.model)
    model.initialize(torch.Generator().manual_seed(1))
    found = experiment.load(model, config)
    windows = experiments("common").validation(config)
    counts = torch.zeros(2, 63)
    for index in range(len(windows)):  # one by one
        for layer, routing in enumerate(model(windows[index][:-1].unsqueeze(0)).routings):
            for expert in routing.experts.flatten().tolist():
                counts[layer, expert] += 1
    worst = (counts.amax(-1) / counts.mean(-1) - 1).max()
    assert found["max_violation"] == pytest.approx(float(worst))
    assert found["dead_experts"] == int((counts == 0).sum())
    assert 0 < found["load_entropy"] < 1


def test_methods_set_only_the_options_in_their_name(experiment, experiments, mini):
    for name, method in experiment.METHODS.items():
        config = experiment.in_quarters(experiments("common").changed(mini, train=experiment.OFF | method))
        train = config.train
        assert train.batch_size * train.accumulation == mini.train.batch_size
        assert (train.accumulation == 4) == ("quarters" in name)
        assert (train.bias_update_rate > 0) == name.startswith("bias")
        weights = [
            getattr(train, f"{loss}_loss")
            for loss in ("sequence", "switch", "global_batch", "z", "device", "communication")
        ]
        losses = {"none": 0, "V2's three losses": 3}.get(name, int("loss" in name))
        assert sum(weight > 0 for weight in weights) == losses
