"""`lm new`: what it writes works unchanged, and nothing is overwritten."""

import errno
import os
import random
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from exercises.grader import new
from lm import checkpoint, cli
from lm.config import Config
from lm.inference import step
from lm.inference.engine import Engine
from lm.inference.generate import generate
from lm.model import Transformer
from mla import MultiheadLatentAttention
from mla.paged import STEPS, step_of
from tests.helpers import ROOT, content, refused


def passes(*command):
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
@pytest.mark.parametrize(
    "kind, name, cls", [("router", "my-own", "MyOwnRouter"), ("attention", "my_attention", "MyAttention")]
)
def test_a_skeleton_passes_its_test_trains_and_generates(kind, name, cls, clone, lm, capsys):
    assert cli.main(["new", kind, name]) == 0
    module = name.replace("-", "_")
    assert (
        f" need --trust-code: .venv/bin/lm generate runs/{module} --trust-code\n" in capsys.readouterr().out
    )
    own = clone / "exercises" / "projects" / f"{module}.py"
    made = {path.name for path in own.parent.iterdir() if path.suffix in (".py", ".toml")}
    assert made == {"checks.py", f"{module}.py", f"test_{module}.py", f"{module}.toml"}
    assert len(own.read_text().splitlines()) <= 30 and f"class {cls}(" in own.read_text()
    config = ("--config", str(ROOT / "pyproject.toml"))
    passes(sys.executable, "-m", "ruff", "check", *config, "--ignore", "I001", str(own.parent))
    pytest_here = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ".")
    assert "1 passed" in passes(*pytest_here, f"exercises/projects/test_{module}.py")
    Path("text.txt").write_bytes(random.Random(0).randbytes(3000))
    few = ["--data", "text.txt", "--train.steps", "2", "--train.warmup", "1", "--train.batch-size", "2"]
    trained = lm("train", "--preset", f"exercises/projects/{module}.toml", "--out-dir", "run", *few)
    assert trained.returncode == 0, trained.stderr
    assert Config.load("run/config.toml") != Config.preset("mini")
    few = ["--max-new-tokens", "5", "--seed", "1", "--prompt", "to be"]
    generated = lm("generate", "run", "--trust-code", *few)
    assert generated.returncode == 0 and generated.stdout, generated.stderr
    assert "warning" not in trained.stderr + generated.stderr


def greedy_is_uncached(model):
    """20 tokens written with a cache are those that the whole text predicts without one."""
    prompt = torch.randint(256, (1, 50))
    written = generate(model, prompt, 20, temperature=0)
    with torch.no_grad():
        for length in range(50, 70):
            assert model(written[:, :length]).logits[0, -1].argmax() == written[0, length]


def test_an_attention_skeleton_decodes_over_pages(clone, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(clone)])
    assert cli.main(["new", "attention", "sharper"]) == 0
    path = clone / "exercises" / "projects" / "sharper.toml"
    logits = []
    for sharpness in ("1.0", "3.0"):
        path.write_text(path.read_text().replace("sharpness = 1.0", f"sharpness = {sharpness}"))
        model = Transformer(Config.load(path).model).eval()
        model.initialize(torch.Generator().manual_seed(0))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert Engine(model).paged
            greedy_is_uncached(model)
        logits.append(model(torch.arange(40).unsqueeze(0)).logits)
    assert not torch.allclose(*logits)
    kind = type(model.blocks[0].attention)
    assert kind.__name__ == "SharperAttention" and step_of(kind) is STEPS[MultiheadLatentAttention]


def test_the_attention_skeleton_names_the_methods_that_cost_its_pages():
    comment = "".join(re.findall(r"^ *#.*$", new.MODULES["attention"], re.M))
    methods = {name for name, value in vars(MultiheadLatentAttention).items() if callable(value)}
    named = methods & set(re.findall(r"\w+", comment)) - {"__init__"}
    assert named == set(STEPS[MultiheadLatentAttention].repeats)
    for name in methods - {"__init__"}:
        overridden = {name: vars(MultiheadLatentAttention)[name]}
        changed = type("Changed", (MultiheadLatentAttention,), overridden)
        assert (step_of(changed) is None) == (name in named)


@pytest.mark.parametrize(
    "kind, name, said",
    [
        ("router", "Mine", "name 'Mine': expected up to 50 lower-case letters, digits and underscores"),
        ("attention", "../mine", "name '../mine': expected up to 50"),
        *(
            ("router", name, f"name {name!r}: expected up to 50")
            for name in ("2mine", "_1", "class", "grüße", "a" * 51, "test_x", "conftest", "__init__")
        ),
        ("attention", "multihead-latent", "name 'multihead-latent': expected up to 50"),
        ("router", "checks", "exercises/projects/checks.py: file exists; choose another name"),
        ("router", "half", "exercises/projects/half.toml: file exists; choose another name"),
    ],
)
def test_an_invalid_name_is_an_error_and_nothing_is_written(kind, name, said, clone, capsys):
    projects = clone / "exercises" / "projects"
    (projects / "half.toml").write_text("mine")
    before = content(projects)
    assert cli.main(["new", kind, name]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"lm new: {said}") and error.count("\n") == 1
    assert content(projects) == before


def test_on_a_full_disk_nothing_is_left(clone, monkeypatch, capsys):
    link = os.link

    def full(old, new):
        if new.suffix == ".toml":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        link(old, new)

    monkeypatch.setattr(os, "link", full)
    before = content(clone / "exercises" / "projects")
    assert cli.main(["new", "router", "mine"]) == 1
    said = "lm new: exercises/projects: cannot write: No space left on device\n"
    assert capsys.readouterr().err == said
    assert content(clone / "exercises" / "projects") == before


def test_a_file_that_does_not_fit_on_the_disk_is_not_left_half_written(tmp_path):
    code = (
        "import resource; from pathlib import Path; from lm.files import write_file\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "write_file(Path('own.py'), 6000 * 'x', new=True)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert "File too large" in done.stderr and not list(tmp_path.iterdir())


def test_outside_a_clone_it_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["new", "router", "mine"]) == 2
    assert capsys.readouterr().err.endswith("run this in a clone of the project\n")
    refused(lambda: new.begin("router", "mine"), "exercises/projects", "run this in a clone of the project")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", [path.stem for path in sorted((ROOT / "exercises" / "projects").glob("*.toml"))]
)
def test_a_worked_project_is_short_has_a_test_and_can_be_saved(name, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    own = ROOT / "exercises" / "projects" / f"{name}.py"
    _, _, code = own.read_text().partition("\nclass ")
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    assert (own.parent / f"test_{name}.py").is_file()
    config = Config.load(own.with_suffix(".toml"))
    model = Transformer(config.model)
    model(torch.randint(256, (2, 9))).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    checkpoint.save(model, tmp_path / "saved")
    loaded = checkpoint.load(tmp_path / "saved", trust_code=True).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    refused(cli.Export(tmp_path / "saved", tmp_path / "theirs").start, "Hugging Face")


def test_an_attention_that_overrides_forward_decodes_without_pages_and_warns_once(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(step, "WARNED", set())
    config = Config.load(ROOT / "exercises" / "projects" / "sliding_window.toml")
    model = Transformer(config.model).eval()
    model.initialize(torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="SlidingWindowMLA overrides forward") as warned:
        greedy_is_uncached(model)
        assert not Engine(model).paged
    assert len(warned) == 1
    refused(lambda: Engine(model, compile=True), "compile", "pages")
