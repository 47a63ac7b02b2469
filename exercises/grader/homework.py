"""A student's folder of exercises, and the process that checks them. Loads no torch.

A student's work is never overwritten: `start` leaves an existing file alone, `reset` keeps the old one.
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
# -P and append: a statistics.py in the working folder must not shadow the standard library
SERVER = "import sys; sys.path.append(sys.argv[1]); from exercises.grader.check import main; main()"


class Homework:
    """The student's folder: one file for each exercise started, and a record of progress."""

    def __init__(self, folder: Path = FOLDER):
        self.exercises = load_all(EXERCISES)
        self.folder = folder
        self.notes = folder / ".progress.json"
        try:
            self.progress: dict[str, dict[str, Any]] = json.loads(self.notes.read_text("utf-8"))
        except FileNotFoundError:
            self.progress = {}
        except ValueError:
            raise ValueError(f"{self.notes}: cannot be read; delete it to reset the progress") from None

    def named(self, name: str) -> Exercise:
        """The exercise with this name.

        Raises:
            ValueError: it does not exist.
        """
        name = name.replace("_", "-")
        if name not in self.exercises:
            near = nearest(name, list(self.exercises))
            raise ValueError(f"no exercise {name!r}{near}; the exercises are {', '.join(self.exercises)}")
        return self.exercises[name]

    def file(self, exercise: Exercise) -> Path:
        return self.folder / exercise.file

    def note(self, exercise: Exercise, **what: Any) -> None:
        """Record progress on an exercise."""
        self.progress.setdefault(exercise.name, {}).update(what)
        self.folder.mkdir(exist_ok=True)
        write_file(self.notes, json.dumps(self.progress, indent=1) + "\n")

    def noted(self, exercise: Exercise, key: str, otherwise: Any = None) -> Any:
        return self.progress.get(exercise.name, {}).get(key, otherwise)

    def state(self, exercise: Exercise) -> str:
        """The progress: "done", "started", or "-" if not started."""
        if self.noted(exercise, "done"):
            return "done"
        return "started" if self.file(exercise).exists() else "-"

    def current(self) -> Exercise:
        """The current exercise: the first that is started and not done, else the first not started."""
        for wanted in ("started", "-"):
            for exercise in self.exercises.values():
                if self.state(exercise) == wanted:
                    return exercise
        return list(self.exercises.values())[-1]

    def start(self, exercise: Exercise) -> Path:
        """The student's file, written if it does not exist."""
        path = self.file(exercise)
        if not path.exists() and not path.is_symlink():
            self.folder.mkdir(exist_ok=True)
            write_file(path, exercise.blank(origin(exercise).read_text("utf-8")), new=True)
            self.note(exercise, started=round(time.time()))
        return path

    def reset(self, exercise: Exercise) -> Path | None:
        """Write a fresh file -> where the old one is kept; None if there was none"""
        path = self.file(exercise)
        kept = None
        if path.exists() or path.is_symlink():
            numbered = (path.with_suffix(f".bak{number}") for number in itertools.count(1))
            kept = path.rename(next(place for place in numbered if not place.exists()))
        self.start(exercise)
        self.note(exercise, done=False)
        return kept


def origin(exercise: Exercise) -> Path:
    """The module's source file."""
    path = Path(f"{exercise.module.replace('.', '/')}.py")
    if not path.is_file():
        raise ValueError(f"{path.absolute()}: module not found; run this in a clone of the project")
    return path


def first_line(exercise: Exercise, path: Path) -> int:
    """The line to edit in the student's file: where the body is missing, else where it starts; else 1."""
    try:
        text = path.read_text("utf-8")
        blank = [number for number, line in enumerate(text.splitlines(), 1) if exercise.mark in line]
        return blank[0] if blank else source.body_lines(text, exercise.function)[0] + 1
    except (ValueError, SyntaxError, OSError):
        return 1


class Checker:
    """Checks each answer in its own process, forked from a server that has already loaded torch."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen(
            [sys.executable, "-P", "-X", "faulthandler", "-c", SERVER, os.getcwd()],
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
            every: run all of the project's tests, even if the probe's outputs are wrong.

        Raises:
            ValueError: the file cannot be checked; the message is one line.
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
            raise RuntimeError("importing torch and pytest took longer than 120 s")
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
        """The server's next line, parsed; {} if it does not arrive in time."""
        assert self.server.stdout is not None
        ready, _, _ = select.select([self.server.stdout], [], [], seconds)
        line = self.server.stdout.readline() if ready else b""
        if ready and not line:
            raise RuntimeError(
                "the checking process ended; if torch or pytest is missing: pip install -e '.[dev]'"
            )
        return json.loads(line) if line else {}


def ended(path: Path, said: str, end: dict[str, Any], seconds: int) -> dict[str, Any]:
    """Why a check has no report, and the student's line that faulthandler printed, if any."""
    lines = re.findall(rf'File "{re.escape(str(path))}", line (\d+)', said)
    line = int(lines[0]) if lines else None  # the innermost frame comes first
    if "late" in end:
        return {"type": "", "says": f"not finished after {seconds} s", "line": line}
    if end["status"] < 0:
        return {"type": "", "says": f"killed by {signal.Signals(-end['status']).name}", "line": line}
    return {"type": "", "says": f"ended without a report, exit status {end['status']}", "line": line}
