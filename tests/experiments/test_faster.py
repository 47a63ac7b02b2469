"""Savings of a MoE computed from synthetic curves, and sizes of the compared models."""

import math

import pytest

from lm import count

SAID = "In seconds (ratio, number of seeds) the MoE is {}."


@pytest.fixture
def rows():
    """A MoE that needs half and a quarter of the steps for a loss, with steps 1.5 times as long."""
    rows = []
    for seed, ahead in ((0, 2.0), (1, 4.0)):
        for steps in (100, 200, 400):
            for name, times, cost in (("MoE", ahead, 3.0), ("dense", 1.0, 2.0)):
                loss = 5 - math.log(steps * times)
                rows.append({"model": name, "seed": seed, "steps": steps, "held_out_loss": loss})
                rows[-1] |= {"flops": 7.0 * steps, "seconds": cost * steps}
    return rows[::-1]


def test_ratios_are_what_each_seed_needs_for_the_rivals_final_loss(experiment, rows):
    assert sorted(experiment.ratios(rows, "MoE", "dense", "flops")) == pytest.approx([1 / 4, 1 / 2])
    assert sorted(experiment.ratios(rows, "MoE", "dense", "seconds")) == pytest.approx([3 / 8, 3 / 4])
    assert experiment.ratios(rows, "dense", "MoE", "flops") == []  # it never gets there
    assert experiment.ratios(rows, "MoE", "dense", "flops", steps=200) == pytest.approx(
        [1 / 2]
    )  # of one seed


def test_the_summary_has_the_mean_and_its_interval(experiment, rows):
    rivals = [{**row, "model": "dense, as many parameters"} for row in rows if row["model"] == "dense"]
    value = experiment.summary(rows + rivals)["dense"]["flops"]
    assert value["of_each_seed"] == [0.25, 0.5] and value["mean"] == 0.375
    assert value["interval_95"] == pytest.approx([0.375 - 12.706 / 8, 0.375 + 12.706 / 8], abs=1e-3)
    never = [{**row, "held_out_loss": 0.0} for row in rivals]
    found = experiment.summary(rows + never)
    assert found["dense, as many parameters"]["seconds"] == {
        "of_each_seed": [], "mean": None, "interval_95": [None, None],
    }  # fmt: skip
    said = experiment.answers({"summary": found, "frontier": {"seconds": {}}})
    assert said[0].endswith(
        "needs 0.38 (-1.21 to 1.96) of its FLOPs and 0.56 (-1.82 to 2.94) of its seconds."
    )
    assert "an unknown share" in said[1] and len(said) == 2


def test_the_frontier_has_the_points_where_the_curves_meet(experiment, rows):
    found = experiment.frontier(rows, {8: ("MoE", "dense"), 9: ("none", "no other")}, "seconds")
    assert list(found) == [8] and list(found[8]) == [200, 400]
    assert found[8][200]["of_each_seed"] == [0.75] and found[8][400]["mean"] == 0.562
    said = experiment.answers({"summary": {}, "frontier": {"seconds": found}})
    assert said == [SAID.format("ahead at dim 8, 200 steps (0.75, 1); dim 8, 400 steps (0.56, 2)")]
    found[8][200]["mean"] = 1.5
    said = experiment.answers({"summary": {}, "frontier": {"seconds": found}})
    assert said[1:] == [SAID.format("behind at dim 8, 200 steps (1.50, 1)")]


def test_compared_models_have_equal_active_width(experiment, mini):
    width = experiment.active_width(mini)
    flops = {}
    rival = experiment.dense(mini, width)
    for name, config in {"MoE": mini, "dense": rival, **experiment.varied(mini)}.items():
        flops[name] = count.training_flops_per_token(config.model, 128)
        if config.model.num_dense_layers == 0:
            assert experiment.active_width(config) == width
    assert max(flops.values()) < 1.16 * min(flops.values())  # 128 more router rows
    assert flops["MoE"] < 1.08 * flops["dense"]
    number = mini.model.moe.num_experts + mini.model.moe.num_shared_experts
    whole = experiment.dense(mini, number * mini.model.moe.hidden_dim)
    sizes = [count.total_parameters(config.model) for config in (mini, whole)]
    assert max(sizes) < 1.02 * min(sizes)


def test_at_dim_scales_all_widths_in_proportion(experiment, mini):
    for times in (1, 2, 4):
        made = experiment.at_dim(mini, mini.model.dim * times)
        assert made.model.moe.hidden_dim == mini.model.moe.hidden_dim * times
        assert made.model.attention.v_head_dim == mini.model.attention.v_head_dim * times
        assert made.model.init_std**2 * made.model.dim == pytest.approx(
            mini.model.init_std**2 * mini.model.dim
        )
        assert count.total_parameters(made.model) >= times**1.7 * count.total_parameters(mini.model)
    assert experiment.at_dim(mini, mini.model.dim) == mini
