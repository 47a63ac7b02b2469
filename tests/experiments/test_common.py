"""The analysis of experiments on curves whose answers are known, and a run of the smallest."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def experiment(monkeypatch):
    """experiment("faster"): the module, as from the root of the repository."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"experiments.{name}")


def test_a_level_is_reached_where_the_curve_crosses_it(experiment):
    reach = experiment("common").reach
    xs = [10, 20, 80, 160]
    losses = [4 - math.log2(x) / 2 for x in xs]  # straight over log x
    for x in (10, 15, 33, 80, 150, 160):
        assert reach(xs, losses, 4 - math.log2(x) / 2) == pytest.approx(x)
    assert reach(xs, losses, losses[0] + 0.1) is None  # it starts below
    assert reach(xs, losses, losses[-1] - 0.1) is None
    assert reach(xs, [3, 2, 2.5, 1], 2.2) == pytest.approx(10 * 2**0.8)  # the first time


def test_the_interval_is_students(experiment):
    common = experiment("common")
    mean, error = common.mean_and_error([1.0, 2.0, 6.0])
    assert (mean, error) == pytest.approx((3, math.sqrt(7 / 3)))
    assert common.interval([1.0, 2.0, 6.0]) == pytest.approx((3 - 4.303 * error, 3 + 4.303 * error))
    low, high = common.interval([1.0, 3.0])
    assert (low, high) == pytest.approx((2 - 12.706, 2 + 12.706))


def test_ratios_compare_what_each_seed_needs_for_the_rivals_last_loss(experiment):
    faster = experiment("faster")
    rows = []
    for seed, ahead in ((0, 2.0), (1, 4.0)):  # the MoE needs half, and a quarter, of the FLOPs
        for steps in (100, 200, 400):
            for name, times, cost in (("MoE", ahead, 3.0), ("dense", 1.0, 2.0)):
                loss = 5 - math.log(steps * times)
                rows.append({"model": name, "seed": seed, "steps": steps, "held_out_loss": loss})
                rows[-1] |= {"flops": 7.0 * steps, "seconds": cost * steps}
    rows = rows[::-1]
    assert sorted(faster.ratios(rows, "MoE", "dense", "flops")) == pytest.approx([1 / 4, 1 / 2])
    assert sorted(faster.ratios(rows, "MoE", "dense", "seconds")) == pytest.approx([3 / 8, 3 / 4])
    assert faster.ratios(rows, "dense", "MoE", "flops") == []  # it never comes there


@pytest.mark.long
def test_the_experiment_runs_in_little(tmp_path):
    command = [sys.executable, "-m", "experiments.faster", "--quick", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    found = json.loads((tmp_path / "faster.json").read_text())
    models, rows = found["models"], found["trainings"]
    assert (tmp_path / "faster.png").stat().st_size > 10_000
    pairs = {(name, seed) for name in models for seed in (0, 1)}
    assert {(row["model"], row["seed"]) for row in rows} == pairs
    assert sorted({row["steps"] for row in rows if row["model"] == "dense"}) == [1, 2, 4, 8]
    assert models["MoE"]["parameters"] == pytest.approx(
        models["dense, as many parameters"]["parameters"], rel=0.02
    )
    flops = [models[name]["flops_per_token"] for name in ("MoE", "dense", "8 experts")]
    assert max(flops) < 1.05 * min(flops)
