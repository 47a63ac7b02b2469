"""What a MoE saves, from curves that are made up; and a run of the smallest."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_ratios_compare_what_each_seed_needs_for_the_rivals_last_loss(experiment):
    rows = []
    for seed, ahead in ((0, 2.0), (1, 4.0)):  # the MoE needs half, and a quarter, of the FLOPs
        for steps in (100, 200, 400):
            for name, times, cost in (("MoE", ahead, 3.0), ("dense", 1.0, 2.0)):
                loss = 5 - math.log(steps * times)
                rows.append({"model": name, "seed": seed, "steps": steps, "held_out_loss": loss})
                rows[-1] |= {"flops": 7.0 * steps, "seconds": cost * steps}
    rows = rows[::-1]
    assert sorted(experiment.ratios(rows, "MoE", "dense", "flops")) == pytest.approx([1 / 4, 1 / 2])
    assert sorted(experiment.ratios(rows, "MoE", "dense", "seconds")) == pytest.approx([3 / 8, 3 / 4])
    assert experiment.ratios(rows, "dense", "MoE", "flops") == []  # it never comes there


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
