"""Folders that an earlier version wrote (commit 8a00021) load and resume: tests/lm/old, made once, then kept.

run: a training of 8 steps on text.txt, saved at 4 and 8; saved: the same model by lm.save; expected: its
logits.
"""

import shutil

import pytest
import torch
from safetensors.torch import load_file

import lm
from lm import history, train
from lm.config import Config
from lm.run import read_metrics
from tests.helpers import ROOT

OLD = ROOT / "tests" / "lm" / "old"


@pytest.mark.parametrize("folder", ["run", "saved"])
def test_a_folder_of_an_earlier_version_gives_its_logits(folder):
    expected = load_file(OLD / "expected.safetensors")
    with torch.no_grad():
        logits = lm.load(OLD / folder)(expected["tokens"]).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-5)


def test_a_run_of_an_earlier_version_goes_on(tmp_path, monkeypatch):
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    shutil.rmtree("run/checkpoints/step-000008")
    assert train.train(Config.load(OLD / "run/config.toml"), tmp_path / "old" / "run", resume=True) == 0
    last = "run/checkpoints/step-000008/model.safetensors"
    ours, theirs = load_file(tmp_path / "old" / last), load_file(OLD / last)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-3, atol=1e-5, msg=name)
    rows, before = read_metrics(tmp_path / "old/run"), read_metrics(OLD / "run")
    assert [row["step"] for row in rows] == list(range(1, 9)) and "losses" in rows[-1]
    assert rows[-1]["val_loss"] == pytest.approx(before[-1]["val_loss"], rel=1e-4)
    saved = [path.name for path in history.checkpoints(tmp_path / "old/run")]
    assert saved == ["step-000004", "step-000008"]
