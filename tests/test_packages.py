"""Rules for every file of the packages: forbidden calls and docstrings; `moe` and `mla` work when copied."""

import ast
import os
import shutil
import subprocess
import sys

import pytest

from tests.helpers import ROOT

PACKAGES = ("moe", "mla", "lm", "rl")
FILES = [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]
EVERY_FILE = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))

EXAMPLE = {
    "moe": """
from moe import MoE, Experts, SigmoidRouter, balance
layer = MoE(SigmoidRouter(dim=64, num_experts=8, top_k=2), Experts(num_experts=8, dim=64, hidden_dim=32))
y, routing = layer(x)
print(balance.tokens_per_expert(routing), balance.max_violation(balance.tokens_per_expert(routing)))
assert y.shape == x.shape and balance.tokens_per_expert(routing).sum() == 2 * 16 * 2
""",
    "mla": """
from mla import MultiheadLatentAttention
attention = MultiheadLatentAttention(dim=64, num_heads=4, kv_lora_rank=16, qk_nope_head_dim=16,
                                     qk_rope_head_dim=8, v_head_dim=16)
x = x + attention(x)
cache = attention.new_cache(batch=2, max_length=32)
prefill, step = attention(x, cache), attention(x[:, -1:], cache)
assert prefill.shape == x.shape and step.shape == (2, 1, 64)
assert cache.nbytes == 2 * 32 * (16 + 8) * 4 and cache.length.tolist() == [17, 17]
""",
}


def imported(tree: ast.AST) -> set[str]:
    """The top-level names of all modules that a file imports from outside its package."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


@EVERY_FILE
def test_no_pickle_is_loaded_and_no_string_is_executed(path):
    for node in ast.walk(tree := ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            forbidden = {"eval", "exec", "compile", "__import__"}
            assert node.func.id not in forbidden, f"line {node.lineno}"
        if isinstance(node, ast.Attribute):
            pickled = ("torch.load", "torch.save", "torch.hub", "torch.package")
            assert ast.unparse(node) not in pickled, f"line {node.lineno}"
        if isinstance(node, ast.keyword):
            assert node.arg != "allow_pickle", f"line {node.lineno}"
    assert not imported(tree) & {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("torch", "numpy"):
            assert not {alias.name for alias in node.names} & {"load", "save", "hub"}, f"line {node.lineno}"


@EVERY_FILE
def test_every_public_function_and_class_has_a_docstring(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or path.name == "__main__.py"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name}, line {node.lineno}"


@pytest.mark.parametrize("names", [["moe"], ["mla"], ["mla", "moe"]], ids="+".join)
def test_a_folder_copied_alone_into_another_project_works(names, tmp_path):
    for name in names:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    lines = ["import sys, torch, " + ", ".join(names), "x = torch.randn(2, 16, 64)"]
    lines += [EXAMPLE[name] for name in names]
    lines += [f"assert {name}.__file__.startswith({str(tmp_path)!r})" for name in names]
    lines += [f"assert not set(sys.modules) & {set(PACKAGES) - set(names)}"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COV_"))}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
