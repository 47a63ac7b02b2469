"""`lm exercise`: a student's folder of exercises, their checks, hints and grades. Loads no torch.

What a student writes is never overwritten: `start` leaves a file that is there, `reset` keeps the old one.
"""

import ast
import contextlib
import itertools
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lm.config import nearest
from lm.files import write_file

from . import overlay, source
from .exercise import Exercise, load_all

FOLDER = Path("homework")
EXERCISES = Path("exercises")
SEED = 1


class Homework:
    """The student's folder: a file for each exercise begun, and what was done when."""

    def __init__(self, folder: Path = FOLDER):
        self.exercises = load_all(EXERCISES)
        self.folder = folder
        self.notes = folder / ".progress.json"
        try:
            self.progress: dict[str, dict[str, Any]] = json.loads(self.notes.read_text("utf-8"))
        except FileNotFoundError:
            self.progress = {}
        except ValueError:
            raise ValueError(f"{self.notes}: cannot be read; delete it to begin counting anew") from None

    def named(self, name: str) -> Exercise:
        """An exercise by its name.

        Raises:
            ValueError: there is none.
        """
        name = name.replace("_", "-")
        if name not in self.exercises:
            near = nearest(name, list(self.exercises))
            raise ValueError(f"no exercise {name!r}{near}; there are {', '.join(self.exercises)}")
        return self.exercises[name]

    def file(self, exercise: Exercise) -> Path:
        return self.folder / exercise.file

    def note(self, exercise: Exercise, **what: Any) -> None:
        """Keep something about an exercise."""
        self.progress.setdefault(exercise.name, {}).update(what)
        self.folder.mkdir(exist_ok=True)
        write_file(self.notes, json.dumps(self.progress, indent=1) + "\n")

    def noted(self, exercise: Exercise, key: str, otherwise: Any = None) -> Any:
        return self.progress.get(exercise.name, {}).get(key, otherwise)

    def state(self, exercise: Exercise) -> str:
        """done, begun or not begun"""
        if self.noted(exercise, "done"):
            return "done"
        return "begun" if self.file(exercise).exists() else "-"

    def current(self) -> Exercise:
        """The one at work: the first begun and not done, else the first not begun."""
        for wanted in ("begun", "-"):
            for exercise in self.exercises.values():
                if self.state(exercise) == wanted:
                    return exercise
        return list(self.exercises.values())[-1]

    def start(self, exercise: Exercise) -> Path:
        """The student's file, made if it is not there."""
        path = self.file(exercise)
        if not path.exists() and not path.is_symlink():
            self.folder.mkdir(exist_ok=True)
            write_file(path, exercise.blank(origin(exercise).read_text("utf-8")), new=True)
            self.note(exercise, started=round(time.time()))
        return path

    def reset(self, exercise: Exercise) -> Path | None:
        """The blank again -> where the old file is kept now; None where there was none"""
        path = self.file(exercise)
        kept = None
        if path.exists() or path.is_symlink():
            numbered = (path.with_suffix(f".bak{number}") for number in itertools.count(1))
            kept = path.rename(next(place for place in numbered if not place.exists()))
        self.start(exercise)
        self.note(exercise, done=False)
        return kept


def origin(exercise: Exercise) -> Path:
    """The source that the exercise is cut from."""
    path = Path(f"{exercise.module.replace('.', '/')}.py")
    if not path.is_file():
        raise ValueError(f"{path.absolute()}: no such module here; run this in a clone of the project")
    return path


def first_line(exercise: Exercise, path: Path) -> int:
    """Where in the student's file there is something to write, or the body begins; else 1."""
    try:
        text = path.read_text("utf-8")
        blank = [number for number, line in enumerate(text.splitlines(), 1) if exercise.mark in line]
        return blank[0] if blank else source.body_lines(text, exercise.function)[0] + 1
    except (ValueError, SyntaxError, OSError):
        return 1


class Checker:
    """Checks answers in processes of their own, forked from one that has torch loaded already."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", "exercises.grader.check"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=environment, start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> "Checker":
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.server.pid, signal.SIGKILL)
        self.server.wait()
        self.folder.cleanup()

    def check(self, exercise: Exercise, path: Path, seed: int = SEED, every: bool = False) -> dict[str, Any]:
        """The report on an answer.

        Args:
            every: run the project's tests whatever the probe says, and to the end.

        Raises:
            ValueError: the file is none that could be checked, in a line.
        """
        began = time.monotonic()
        path = path.absolute()
        text = origin(exercise).read_text("utf-8")
        overlay.merge(ast.parse(text), source.read(path), exercise.function, path)
        output, report = (Path(self.folder.name) / name for name in ("output", "report"))
        for old in (output, report):
            old.unlink(missing_ok=True)
        job = {
            "exercise": str(exercise.path.absolute()), "file": str(path), "seed": seed, "all": every,
            "origin": str(origin(exercise).absolute()), "root": str(Path.cwd()),
            "output": str(output), "report": str(report),
        }  # fmt: skip
        assert self.server.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.server.stdin.write(json.dumps(job).encode() + b"\n")
        begun = self.answer(120)
        if not begun:
            raise RuntimeError("torch and pytest were not loaded within 120 s")
        child = begun["pid"]
        end = self.answer(exercise.seconds)
        for number, patience in ((signal.SIGABRT, 3), (signal.SIGKILL, 10)):
            if "status" not in end:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, number)
                end = {"late": True, **self.answer(patience)}
        said = output.read_bytes().decode("utf-8", "replace") if output.exists() else ""
        if "late" not in end and end["status"] == 0 and report.exists():
            found = json.loads(report.read_text("utf-8"))
        else:
            found = {
                "checks": [],
                "mistakes": [],
                "tests": None,
                "raised": ended(path, said, end, exercise.seconds),
            }
        return {**found, "output": said, "seconds": round(time.monotonic() - began, 2)}

    def answer(self, seconds: float) -> dict[str, Any]:
        """The server's next line; nothing where it does not come in time."""
        assert self.server.stdout is not None
        ready, _, _ = select.select([self.server.stdout], [], [], seconds)
        line = self.server.stdout.readline() if ready else b""
        if ready and not line:
            raise RuntimeError(
                "the process that checks has ended; is torch or pytest missing? pip install -e '.[dev]'"
            )
        return json.loads(line) if line else {}


def ended(path: Path, said: str, end: dict[str, Any], seconds: int) -> dict[str, Any]:
    """Why a check has no report, and at which of the student's lines, if faulthandler said it."""
    lines = re.findall(rf'File "{re.escape(str(path))}", line (\d+)', said)
    line = int(lines[0]) if lines else None  # the innermost frame comes first
    if "late" in end:
        return {"type": "", "says": f"still at work after {seconds} s", "line": line}
    if end["status"] < 0:
        return {"type": "", "says": f"ended by {signal.Signals(-end['status']).name}", "line": line}
    return {"type": "", "says": f"ended without a result, exit status {end['status']}", "line": line}
