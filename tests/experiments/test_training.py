"""The summary of a run, and which runs may stand for a preset."""

import json

import pytest

from lm import train
from lm.config import Config
from tests.helpers import ROOT, refused


@pytest.fixture
def run(experiments, tmp_path):
    """Four steps of a tiny model, in a folder with a preset's name."""
    common, command = experiments("common"), experiments("command")
    given = command.options("some", "text", 100, ["--quick", "--runs", str(tmp_path)])
    config = common.with_steps(common.base(given), 4, 0)
    assert train.train(config, tmp_path / "toy") == 0
    return tmp_path / "toy"


@pytest.fixture
def results(experiments, tmp_path, monkeypatch):
    """Empty folders in place of experiments/results and runs/experiments."""
    monkeypatch.setattr(experiments("command"), "RESULTS", tmp_path / "results")
    monkeypatch.setattr(experiments("command"), "RUNS", tmp_path / "runs")
    return tmp_path / "results"


def test_a_run_that_is_not_the_whole_preset_does_not_overwrite_its_result(experiment, run, results, capsys):
    experiment.main([str(run)])
    path = results.parent / "runs" / "short" / "train-toy.json"
    assert json.loads(path.read_text())["steps"] == 4 and not results.exists()
    assert capsys.readouterr().out.endswith(f"}}\nResult: {path}\n")
    with pytest.raises(SystemExit):
        experiment.main([str(run), "--out", str(results)])
    said = f"{run}: its model or text differs from that of the preset toy"
    assert f"--out {results}: only for runs with a verdict ({said})" in capsys.readouterr().err
    experiment.main([str(run), "--out", str(results.parent / "mine")])
    assert (results.parent / "mine" / "train-toy.json").exists()


def test_the_whole_training_of_a_preset_replaces_its_result(experiment, run, results, monkeypatch):
    config = Config.load(run / "config.toml")
    monkeypatch.setattr(experiment.Config, "preset", lambda name: config)
    experiment.main([str(run)])
    assert json.loads((results / "train-toy.json").read_text())["steps"] == 4


def test_fewer_steps_than_the_preset_are_named(experiment, experiments, run, monkeypatch):
    config = experiments("common").with_steps(Config.load(run / "config.toml"), 9, 0)
    monkeypatch.setattr(experiment.Config, "preset", lambda name: config)
    assert experiment.cut_short(run) == f"{run}: 4 of the preset's 9 steps"


def test_a_run_that_is_not_finished_is_refused(experiment, run):
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    for kept in (lines[:-1], []):
        (run / "metrics.jsonl").write_text("".join(kept))
        refused(lambda: experiment.summary(run), run / "metrics.jsonl", "has no row of step 4 with val_loss")


def test_quick_summarises_a_new_run_of_a_few_steps(experiment, results):
    experiment.main(["--quick"])
    (path,) = (results.parent / "runs" / "quick").glob("train-*.json")
    kept = json.loads((ROOT / "experiments" / "results" / "train-toy.json").read_text())
    made = json.loads(path.read_text())
    assert made["steps"] == 8 and made.keys() == kept.keys()


def test_a_run_must_be_named(experiment, capsys):
    with pytest.raises(SystemExit):
        experiment.main([])
    assert "error: a run is missing; runs/toy, for example" in capsys.readouterr().err
