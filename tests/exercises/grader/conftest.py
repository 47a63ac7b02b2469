"""A clone of the project to work in, and `lm` as a process there."""

import shutil
import subprocess
import sys

import pytest

from tests.helpers import ROOT

# -P, as for the installed command: the working folder is not on the path
LM = [sys.executable, "-P", "-c", "import sys; from lm.cli import main; sys.exit(main())"]


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """The working folder: links to the project, and an exercises/ that can be written to."""
    clone = tmp_path / "clone"
    (clone / "exercises" / "projects").mkdir(parents=True)
    for name in ("moe", "mla", "lm", "rl", "experiments", "tests", "pyproject.toml"):
        (clone / name).symlink_to(ROOT / name)
    (clone / "exercises" / "grader").symlink_to(ROOT / "exercises" / "grader")
    for path in (ROOT / "exercises").glob("*.py"):
        shutil.copy(path, clone / "exercises")
    shutil.copy(ROOT / "exercises" / "projects" / "checks.py", clone / "exercises" / "projects")
    monkeypatch.chdir(clone)
    return clone


@pytest.fixture
def lm(clone):
    """Run `lm` in the clone -> the finished process"""

    def run(*arguments):
        command = [*LM, *map(str, arguments)]
        return subprocess.run(command, cwd=clone, capture_output=True, text=True, errors="replace")

    return run
