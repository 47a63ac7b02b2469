"""Two copies of the package in one process: an edit in one changes nothing in the other."""

import importlib
import shutil
import sys

import pytest
import torch

import moe
from tests.helpers import ROOT

TOKENS, DIM, HIDDEN, NUM_EXPERTS = 24, 6, 4, 5
EDITS = {  # one line of fast.py, as a student might change it
    "forward": (
        "    return weighted_sum(outputs, target, weights), projected",
        "    return 2 * weighted_sum(outputs, target, weights), projected",
    ),
    "backward": (
        "        d_v.copy_(torch.mm(d_outputs.t(), hidden * weight[block]))",
        "        d_v.copy_(torch.mm(d_outputs.t(), hidden))",
    ),
}


def training(package):
    """The output and the gradients of a layer's training step, the same weights in every package."""
    torch.manual_seed(0)
    layer = package.MoE(
        package.SigmoidRouter(DIM, NUM_EXPERTS, 2), package.Experts(NUM_EXPERTS, DIM, HIDDEN)
    ).double()
    x = torch.randn(TOKENS, DIM, dtype=torch.float64)
    y, _ = layer(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), list(layer.parameters()))]


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Copy the package, edit one line of its fast.py, and import it under a name, even "moe" again."""
    before, loaded = dict(sys.modules), []
    monkeypatch.syspath_prepend(tmp_path)

    def load(name, edit):
        folder = tmp_path / name.replace(".", "/")
        shutil.copytree(ROOT / "moe", folder, ignore=shutil.ignore_patterns("__pycache__"))
        text = (folder / "fast.py").read_text()
        old, new = EDITS[edit]
        assert text.count(old) == 1
        (folder / "fast.py").write_text(text.replace(old, new))
        loaded.append(name.partition(".")[0])
        for module in [m for m in sys.modules if m.partition(".")[0] == loaded[-1]]:
            del sys.modules[module]
        return importlib.import_module(name)

    yield load
    for module in [m for m in sys.modules if m.partition(".")[0] in loaded]:
        del sys.modules[module]
    sys.modules.update(before)


@pytest.mark.parametrize("name", ["moe", "student_moe", "course.week_2.moe"])
@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_copy_differs_and_the_original_does_not(edit, name, load):
    before = training(moe)
    copy = load(name, edit)
    assert copy.fast.compute is not moe.fast.compute
    changed, after = training(copy), training(moe)
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    same = [torch.equal(a, b) for a, b in zip(before, changed)]
    # the output, and with it every gradient; or the gradient of experts.down alone
    assert same == ([False] * 4 if edit == "forward" else [True, True, True, False])
    assert all(torch.equal(a, b) for a, b in zip(changed, training(copy)))


def test_each_copy_registers_its_own_operators(load):
    second, third = load("moe", "forward"), load("course.moe", "forward")
    names = [package.fast.forward._qualname for package in (moe, second, third)]
    assert names[0] == "moe::run_blocks" and names[1].startswith("moe::run_blocks_")
    assert names[2] == "course_moe::run_blocks"
