"""A student's function in the package; everything else in the package is unchanged."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from exercises.grader import overlay
from tests.helpers import ROOT, refused

ANSWER = '''"""Another docstring."""

import colorsys
import math
from torch import Tensor

EXTRA = 7


def helper(x):
    return x * EXTRA


class SigmoidRouter:
    def __init__(self):
        raise RuntimeError("never used")

    def forward(self, x):
        assert colorsys.rgb_to_hsv and math.pi
        if x.shape[0] == 13:
            raise RuntimeError("thirteen")
        routing = super().__getattribute__("other")(x) if hasattr(self, "other") else None
        logits = router_logits(x, self.weight)
        scores = logits.sigmoid()
        experts = scores.topk(self.top_k).indices
        return Routing(experts, helper(scores.gather(-1, experts)), scores, logits)


def sigmoid(logits):
    return 0 * logits
'''
CHECKS = """
import inspect, pathlib, sys, traceback
from exercises.grader import overlay
path = pathlib.Path(sys.argv[1])
overlay.install([overlay.Piece("moe.router", "SigmoidRouter.forward", path)])
import torch, moe
from moe import SigmoidRouter, SoftmaxRouter
from moe.router import SigmoidRouter as again, sigmoid
import moe.router
assert again is SigmoidRouter is moe.router.SigmoidRouter is moe.SigmoidRouter
router = SigmoidRouter(4, 6, 2)
routing = router(torch.randn(5, 4))
assert isinstance(routing, moe.Routing)
torch.testing.assert_close(routing.weights, 7 * routing.scores.gather(-1, routing.experts))
assert sigmoid(torch.zeros(1)) == 0.5  # other changes in the file have no effect
assert SigmoidRouter.__doc__.startswith("Token-choice router of DeepSeek-V3")
assert moe.router.__file__.endswith("moe/router.py")
try:
    router(torch.randn(13, 4))
except RuntimeError:
    frame = traceback.extract_tb(sys.exc_info()[2])[-1]
    assert frame.filename == str(path) and frame.line == 'raise RuntimeError("thirteen")', frame
shown = inspect.getsource(SigmoidRouter.forward)
assert shown.startswith("    def forward(self, x):\\n        assert colorsys")
assert inspect.getsourcefile(SoftmaxRouter.forward).endswith("moe/router.py")
assert moe.router.helper.__code__.co_filename == str(path)
layer = moe.MoE(router, moe.Experts(6, 4, 3))
assert layer(torch.randn(2, 5, 4))[0].shape == (2, 5, 4)
print("done")
"""


def run(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_only_the_one_function_comes_from_the_student(tmp_path):
    path = tmp_path / "router.py"
    path.write_text(ANSWER)
    done = run(CHECKS, path)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_tracebacks_name_the_file_of_each_function(tmp_path):
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text("\n\n\ndef gather(x, order):\n    return 1 / 0\n")
    two.write_text("def weighted_sum(slots, weights):\n    return [] + 1\n")
    code = """
import sys, traceback
from pathlib import Path
from exercises.grader import overlay
one, two = map(Path, sys.argv[1:])
pieces = (("gather", one), ("weighted_sum", two))
overlay.install([overlay.Piece("moe.dispatch", name, path) for name, path in pieces])
from moe import dispatch
for call, path, line in ((dispatch.gather, one, 5), (dispatch.weighted_sum, two, 2)):
    try:
        call(1, 2)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        assert (frame.filename, frame.lineno) == (str(path), line), frame
    else:
        raise SystemExit("nothing raised")
"""
    done = run(code, one, two)
    assert done.returncode == 0, done.stderr


def test_the_packages_decorators_are_kept(tmp_path):
    path = tmp_path / "rope.py"
    path.write_text("def frequencies(dim, theta, scaling, device):\n    return object()\n")
    code = """
import sys
from pathlib import Path
from exercises.grader import overlay
overlay.install([overlay.Piece("mla.rope", "frequencies", Path(sys.argv[1]))])
from mla import rope
assert rope.frequencies(1, 2, None, None) is rope.frequencies(1, 2, None, None)  # lru_cache
"""
    done = run(code, path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "answer, said",
    [
        (
            "def g(x, y=1):\n    return x\n",
            "answer.py: f not found; keep the names of the function and its class",
        ),
        (
            "def f(x, z=1):\n    return x\n",
            "answer.py:1: f(x, z=1): keep the signature f(x, y=1, *, k=2)",
        ),
        (
            "\ndef f(x, y=2, *, k=2):\n    return x\n",
            "answer.py:2: f(x, y=2, *, k=2): keep the signature",
        ),
        ("async def f(x, y=1, *, k=2):\n    return x\n", "write def, without async"),
        ("class f:\n    pass\n", "f not found"),
        ("def f(x, y=1, *, k=2)\n    return x\n", "answer.py:1: expected ':'"),
    ],
)
def test_an_unusable_answer_is_refused_in_one_line(answer, said, tmp_path):
    tree = ast.parse("def f(x: int, y: int = 1, *, k: float = 2) -> int:\n    return x\n")
    refused(lambda: overlay.merge(tree, answer, "f", Path("answer.py")), said)


def test_annotations_may_be_dropped_and_the_last_definition_counts():
    tree = ast.parse("def f(x: int, y: int = 1) -> int:\n    return x\n")
    overlay.merge(
        tree, "def f(x, y=1):\n    return 1\n\n\ndef f(x, y=1):\n    return 2\n", "f", Path("answer.py")
    )
    assert ast.unparse(tree) == "def f(x, y=1):\n    return 2"


def test_a_module_that_is_already_imported_is_refused():
    with pytest.raises(ImportError, match=r"^exercises\.grader\.overlay is already imported"):
        overlay.install([overlay.Piece("exercises.grader.overlay", "find", Path("x.py"))])


IMPORTS = [  # at the top of a student's file, and a name that the function uses
    ("from moe import Routing as R", "R"),
    ("import moe", "moe.MoE"),
    ("import moe.layer as made", "made.MoE"),
    ("from moe.routers import wrong", "wrong"),
    ("from .layer import MoE", "MoE"),
    ("from mla import rope, RMSNorm", "RMSNorm"),
    ("import colorsys, moe.layer", "colorsys.rgb_to_hsv"),
    ("try:\n    import colorsys as c\nexcept ImportError:\n    c = None", "c.rgb_to_hsv"),
    ("A, (B, *C) = 1, (2, 3)", "A, B, C"),
    ("for D in range(3):\n    pass", "D"),
    ("from __future__ import annotations\nimport colorsys", "colorsys"),
]


@pytest.mark.long
@pytest.mark.parametrize("top, used", IMPORTS)
def test_imports_and_names_at_the_top_of_a_students_file_can_be_used(top, used, tmp_path):
    path = tmp_path / "router.py"
    body = f"def sigmoid_(x):\n    {used}\n    return 7 * x\n\n\n"
    path.write_text(
        f"{top}\n\n\n{body}class SigmoidRouter:\n    def forward(self, x):\n"
        f"        {used}\n        return sigmoid_(x)\n"
    )
    code = """
import sys
from pathlib import Path
from exercises.grader import overlay
overlay.install([overlay.Piece("moe.router", "SigmoidRouter.forward", Path(sys.argv[1]))])
import torch, moe
assert moe.SigmoidRouter(4, 6, 2).forward(torch.ones(2)).tolist() == [7, 7]
"""
    done = run(code, path)
    if used != "wrong":
        assert done.returncode == 0, done.stderr
    else:
        assert "No module named 'moe.routers'" in done.stderr and f'File "{path}", line 1' in done.stderr


def test_a_star_import_of_the_project_is_refused_with_its_line():
    tree = ast.parse("def f(x):\n    return x\n")
    answer = "import math\nfrom moe import *\n\n\ndef f(x):\n    return x\n"
    said = "answer.py:2: from moe import *: import the names that you use"
    refused(lambda: overlay.merge(tree, answer, "f", Path("answer.py")), said)
