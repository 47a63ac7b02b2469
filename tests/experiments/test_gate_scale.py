import json

import torch

from lm.config import Config
from moe import SigmoidRouter
from tests.helpers import ROOT


def test_the_factors_of_moonlight_and_kimi_k2_are_reproduced(experiment):
    # experts of equal weight would give 2.4495 and 2.8284; softmax or no normalisation are further away
    assert round(experiment.gate_scale(64, 6, samples=5000, seed=1), 3) == 2.446
    assert round(experiment.gate_scale(256, 8, samples=5000, seed=1), 3) == 2.827
    assert abs(experiment.gate_scale(384, 8, samples=5000, seed=1) - 2.8277) < 1e-4


def test_a_router_with_this_factor_keeps_the_size_of_independent_outputs():
    moe = Config.preset("moonlight").model.moe
    router = SigmoidRouter(64, 64, moe.top_k, routed_scaling_factor=moe.routed_scaling_factor)
    router.weight.data.copy_(torch.eye(64))
    weights = router(torch.randn(2000, 64)).weights
    outputs = torch.randn(2000, moe.top_k)  # one number of each chosen expert, variance 1
    assert abs(weights.norm(dim=-1).mean() - 1) < 1e-3
    assert abs((weights * outputs).sum(-1).std() - 1) < 0.05


def test_the_same_seed_gives_the_same_number_in_any_chunks(experiment, monkeypatch):
    whole = experiment.gate_scale(16, 3, samples=1000, seed=5)
    assert experiment.gate_scale(16, 3, samples=1000, seed=5) == whole
    assert experiment.gate_scale(16, 3, samples=1000, seed=6) != whole
    monkeypatch.setattr(experiment, "CHUNK", 300)
    assert abs(experiment.gate_scale(16, 3, samples=1000, seed=5) - whole) < 0.01


def test_the_saved_result_matches_the_presets(experiment, experiments, tmp_path, monkeypatch, capsys):
    command = experiments("command")
    monkeypatch.setattr(command, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.setattr(experiment, "SAMPLES", 10)
    experiment.main(["--quick"])
    assert not list(tmp_path.glob("*.json"))
    path = tmp_path / "runs" / "quick" / "gate_scale.json"
    assert json.loads(path.read_text())["samples"] == experiment.QUICK_SAMPLES
    assert capsys.readouterr().out.endswith(
        f"\nNo verdict: --quick only tests that the experiment runs.\nResult: {path}\n"
    )
    experiment.main([])
    assert capsys.readouterr().out.endswith(f"}}\nResult: {tmp_path / 'gate_scale.json'}\n")
    made = json.loads((tmp_path / "gate_scale.json").read_text())
    kept = json.loads((ROOT / "experiments" / "results" / "gate_scale.json").read_text())
    assert made["machine"].keys() == kept["machine"].keys()
    for row, other in zip(made["gate_scale"], kept["gate_scale"], strict=True):
        assert {**row, "computed": 0} == {**other, "computed": 0}
        assert abs(other["computed"] - other["published"]) < 1e-3
        assert row["published"] == Config.preset(row["model"]).model.moe.routed_scaling_factor
