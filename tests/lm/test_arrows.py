"""Which module may import which, read from the source: imports in functions and TYPE_CHECKING count."""

import ast
import graphlib
import sys

import pytest

import lm
from tests.helpers import ROOT

# Within lm a line imports only from the lines above it, and a package from itself.
LM = """
files
machine config fp8 console
parts tokenizer data optim
count model
loss history inference budget
checkpoint
evaluate run hub
train
report
terminal serve
cli
"""
RL = """
tasks objectives
config rollout
scaling stages
train pack
report
cli
"""
# The other packages import the standard library, themselves and what is listed here.
OUTSIDE = {"moe": "torch einops", "mla": "torch einops"}
ABOVE = {"experiments", "exercises", "benchmarks", "notebooks", "docs", "tests", "rl", "janus"}
BY_NAME = {"lm.cli"}  # starts their programs by name


def module_of(path):
    """lm/hub/hf.py -> lm.hub.hf, lm/hub/__init__.py -> lm.hub"""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_of(path): path
    for package in ("moe", "mla", "lm", "rl")
    for path in sorted((ROOT / package).rglob("*.py"))
}
EVERY_MODULE = pytest.mark.parametrize("name", MODULES)


def imports(name):
    """Every module that a module imports: ours by their full names, others as they are written."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in (alias for alias in node.names if alias.name != "__version__"):
                inner = f"{base}.{alias.name}"
                yield inner if inner in MODULES else base
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "import_here")):
            yield from (word.value for word in node.args[:1] if isinstance(word, ast.Constant))


def first(names):
    return {name.split(".")[0] for name in names}


@EVERY_MODULE
def test_no_module_imports_from_above(name):
    found = first(imports(name))
    package = name.split(".")[0]
    assert not found & (ABOVE - {package})
    if package in OUTSIDE:
        assert found <= {package, *OUTSIDE[package].split(), *sys.stdlib_module_names}
    strings = {node.value for node in ast.walk(ast.parse(MODULES[name].read_text()))
               if isinstance(node, ast.Constant) and isinstance(node.value, str)}  # fmt: skip
    named = {text for text in strings if first([text]) & ABOVE and ":" in text}
    assert not named or name in BY_NAME


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith(("lm.", "rl."))])
def test_a_package_imports_only_from_the_lines_above(name):
    package = name.split(".")[0]
    lines = [line.split() for line in {"lm": LM, "rl": RL}[package].split("\n") if line]
    level = {part: at for at, line in enumerate(lines) for part in line}
    own = name.split(".")[1]
    if own == "corpus":  # scripts that made the default text; they import nothing of ours
        assert not first(imports(name)) & {"lm", "moe", "mla"}
        return
    for other in imports(name):
        if other.startswith(f"{package}.") and other.split(".")[1] != own:
            assert level[other.split(".")[1]] < level[own], f"{name} imports {other}"
    assert "lm" not in imports(name)  # `lm` resolves its names lazily, which would hide the import


def test_imports_have_no_cycle():
    graph = {
        name: {other for other in imports(name) if other in MODULES and other != name} for name in MODULES
    }
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert sorted(order) == sorted(MODULES) and len(order) > 50


def test_mla_attention_is_short_and_imports_four_modules():
    ours = {"mla.cache", "mla.causal", "mla.norm", "mla.rope"}
    assert set(imports("mla.attention")) <= {"torch", "einops"} | ours
    assert len(MODULES["mla.attention"].read_text().splitlines()) <= 200
    assert not [name for name in MODULES if name.startswith("mla") and "mla.paged" in imports(name)]


def test_the_docstring_of_lm_names_every_module_and_package():
    files = {path.stem for path in (ROOT / "lm").glob("*.py")} - {"__init__"}
    packages = {path.parent.name for path in (ROOT / "lm").glob("*/__init__.py")}
    story, _, beside = lm.__doc__.partition("Four packages")
    assert len(files) <= 20 and not files & packages
    assert files <= set(story.replace(";", ",").replace(".", ",").replace(":", ",").replace(",", " ").split())
    assert packages <= set(beside.replace(",", " ").split())
