"""`lm new` as a student uses it: what it writes works as it is, and nothing is written over."""

import errno
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lm import checkpoint, cli
from lm.config import Config
from lm.inference.engine import Engine
from lm.inference.generate import generate
from lm.model import Transformer
from tests.helpers import ROOT

LM = [sys.executable, "-c", "import sys; from lm.cli import main; sys.exit(main())"]


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder with the laws of projects, as a clone has it."""
    (tmp_path / "exercises" / "projects").mkdir(parents=True)
    shutil.copy(ROOT / "exercises" / "projects" / "laws.py", tmp_path / "exercises" / "projects")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
@pytest.mark.parametrize(
    "kind, name, cls", [("router", "my-own", "MyOwnRouter"), ("attention", "my_attention", "MyAttention")]
)
def test_what_is_begun_works_is_tested_and_trains(kind, name, cls, clone, capsys):
    assert cli.main(["new", kind, name]) == 0
    module = name.replace("-", "_")
    own = clone / "exercises" / "projects" / f"{module}.py"
    made = {path.name for path in own.parent.iterdir() if path.suffix in (".py", ".toml")}
    assert made == {"laws.py", f"{module}.py", f"test_{module}.py", f"{module}.toml"}
    assert len(own.read_text().splitlines()) <= 30 and f"class {cls}(" in own.read_text()
    in_order = [
        "ruff",
        "check",
        "--config",
        str(ROOT / "pyproject.toml"),
        "--ignore",
        "I001",
        str(own.parent),
    ]
    run(sys.executable, "-m", *in_order)
    pytest_of_ours = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-c",
        str(ROOT / "pyproject.toml"),
        "--rootdir",
        ".",
    ]
    assert "1 passed" in run(
        *pytest_of_ours, "-p", "no:cacheprovider", f"exercises/projects/test_{module}.py"
    )
    Path("text.txt").write_bytes(random.Random(0).randbytes(3000))
    few = ["--data", "text.txt", "--train.steps", "2", "--train.warmup", "1", "--train.batch-size", "2"]
    run(*LM, "train", "--preset", f"exercises/projects/{module}.toml", "--out-dir", "run", *few)
    assert Config.load("run/config.toml") != Config.preset("mini")
    assert run(
        *LM, "generate", "run", "--trust-code", "--max-new-tokens", "5", "--seed", "1", "--prompt", "to be"
    )


@pytest.mark.parametrize(
    "kind, name, said",
    [
        ("router", "Mine", "name 'Mine': up to 50 small letters, digits and _ are needed, as in my_router"),
        (
            "attention",
            "../mine",
            "name '../mine': up to 50 small letters, digits and _ are needed, as in my_at",
        ),
        *(
            ("router", name, f"name {name!r}: up to 50")
            for name in ("2mine", "_1", "class", "grüße", "a" * 51)
        ),
        *(("router", name, f"name {name!r}: up to 50") for name in ("test_x", "conftest", "__init__")),
        ("attention", "multihead-latent", "name 'multihead-latent': up to 50"),
        ("router", "laws", "exercises/projects/laws.py: there is such a file; another name is needed"),
        ("router", "half", "exercises/projects/half.toml: there is such a file"),
    ],
)
def test_a_wrong_name_is_one_line_and_nothing_is_written(kind, name, said, clone, capsys):
    (clone / "exercises" / "projects" / "half.toml").write_text("mine")
    before = sorted(path.name for path in clone.rglob("*"))
    assert cli.main(["new", kind, name]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"lm new: {said}") and told.count("\n") == 1
    assert sorted(path.name for path in clone.rglob("*")) == before
    assert (clone / "exercises" / "projects" / "half.toml").read_text() == "mine"


def test_where_there_is_no_room_nothing_is_left(clone, monkeypatch, capsys):
    link = os.link

    def full(old, new):
        if new.suffix == ".toml":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        link(old, new)

    monkeypatch.setattr(os, "link", full)
    before = sorted(path.name for path in clone.rglob("*"))
    assert cli.main(["new", "router", "mine"]) == 1
    assert (
        capsys.readouterr().err
        == "lm new: exercises/projects: cannot be written to: No space left on device\n"
    )
    assert sorted(path.name for path in clone.rglob("*")) == before


def test_a_file_that_has_no_room_is_not_half_written(tmp_path):
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


def test_elsewhere_it_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["new", "router", "mine"]) == 2
    assert capsys.readouterr().err.endswith(
        "exercises/projects: not here; run this in the project's folder\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", [path.stem for path in sorted((ROOT / "exercises" / "projects").glob("*.toml"))]
)
def test_a_worked_project_has_a_test_and_is_under_thirty_lines_of_code(name, monkeypatch, tmp_path):
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
    with pytest.raises(ValueError, match="is your own; Hugging Face's format has no name for it"):
        cli.run_export(cli.Export(tmp_path / "saved", tmp_path / "theirs"))


def test_an_attention_that_inherits_its_steps_is_written_with_as_it_was_trained(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = Config.load(ROOT / "exercises" / "projects" / "sliding_window.toml")
    model = Transformer(config.model).eval()
    model.initialize(torch.Generator().manual_seed(0))
    prompt = torch.randint(256, (1, 50))
    written = generate(model, prompt, 20, temperature=0)
    for length in range(50, 70):
        with torch.no_grad():
            assert model(written[:, :length]).logits[0, -1].argmax() == written[0, length]
    assert not Engine(model).paged
    with pytest.raises(ValueError, match="no `step` of its own"):
        Engine(model, compile=True)
