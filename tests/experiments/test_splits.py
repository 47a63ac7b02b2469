"""The sizes of the compared models, as in the tables of the papers."""

import dataclasses

import pytest

from lm import count
from lm.config import Config


def test_the_five_architectures_have_the_papers_proportions(experiments, mini):
    made = experiments("architectures").models(mini)
    total = {name: count.total_parameters(config.model) for name, config in made.items()}
    active = {name: count.active_parameters(config.model) for name, config in made.items()}
    sparse = [total[name] for name in ("Hash", "Switch", "GShard", "DeepSeekMoE")]
    assert max(sparse) < 1.01 * min(sparse)
    assert active["Dense"] == total["Dense"] < active["Switch"] < active["GShard"] < active["DeepSeekMoE"]
    assert active["DeepSeekMoE"] < 1.05 * active["GShard"]
    assert active["Switch"] - active["Dense"] == 2 * 32 * mini.model.dim  # the router alone
    for name, config in made.items():
        train = config.train
        assert (train.switch_loss > 0) == (name in ("Switch", "GShard"))
        assert config.model.moe.capacity_factor == 0
    experiment = experiments("architectures")
    assert list(made) == [*experiment.PUBLISHED, experiment.ASIDE]
    assert made[experiment.ASIDE] == experiments("fineness").models(mini)["2 of 32"]


def test_experts_are_split_at_equal_total_and_active_parameters(experiments, mini):
    made = experiments("fineness").models(mini)
    assert list(made) == [
        *("2 of 32", "1 shared, 1 of 31", "1 shared, 3 of 63", "1 shared, 7 of 127"),
        *("1 shared, 1 of 31, softmax", "4 of 64"),
    ]
    for config in made.values():
        moe = config.model.moe
        assert (moe.num_experts + moe.num_shared_experts) * moe.hidden_dim == 64 * 32
        assert (moe.top_k + moe.num_shared_experts) * moe.hidden_dim == 4 * 32
        assert moe.normalize == (moe.top_k > 1)  # normalised, one weight has no gradient
    assert made["1 shared, 3 of 63"] == mini
    softmax = made["1 shared, 1 of 31, softmax"]
    assert (softmax.model.moe.router, softmax.train.bias_update_rate) == ("softmax", 0)
    assert softmax.train.switch_loss > 0


def test_rivals_have_the_toys_active_parameters_and_training(experiments):
    toy = Config.preset("toy")
    active = count.active_parameters(toy.model)
    for preset in experiments("rivals").PRESETS.values():
        config = Config.preset(preset)
        assert count.active_parameters(config.model) == pytest.approx(active, rel=0.002)
        names = (
            "steps",
            "batch_size",
            "context",
            "learning_rate",
            "warmup",
            "final_learning_rate",
            "weight_decay",
        )
        for name in names:
            assert getattr(config.train, name) == getattr(toy.train, name)
    for preset in ("toy-mixtral", "toy-qwen"):
        assert count.total_parameters(Config.preset(preset).model) == pytest.approx(
            count.total_parameters(toy.model), rel=0.08
        )


def test_gshard_and_deepseekmoe_of_specialization_have_equal_sizes(experiments, mini):
    made = experiments("specialization").models(mini)
    sizes = [dataclasses.astuple(config.model.moe)[1:5] for config in made.values()]
    assert sizes == [(63, 3, 32, 1), (32, 2, 64, 0)]
