"""A student's folder of exercises, and the process that checks them. Loads no torch.

A student's work is never overwritten: `start` leaves an existing file alone, `reset` keeps the old one.
"""

import ast
import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from lm.files import write_file

from . import overlay, source, system
from .exercise import Exercise, load_all, named

FOLDER = Path("homework")
EXERCISES = Path("exercises")
SEED = 1


class Homework:
    """The student's folder: one file for each exercise started, and a record of progress."""

    def __init__(self, folder: Path = FOLDER):
        self.exercises = load_all(EXERCISES)
        self.folder = folder
        self.notes = folder / ".progress.json"
        try:
            self.progress = source.notes(self.notes) if self.notes.exists() or self.notes.is_symlink() else {}
        except ValueError as error:
            reason = str(error).removeprefix(f"{self.notes}: ")
            raise ValueError(
                f"{self.notes}: cannot be read ({reason}); delete it to reset the progress"
            ) from None

    def named(self, name: str) -> Exercise:
        """The exercise with this name.

        Raises:
            ValueError: it does not exist.
        """
        return named(name, self.exercises)

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
        text = source.read(path)
        blank = [number for number, line in enumerate(text.splitlines(), 1) if exercise.mark in line]
        return blank[0] if blank else source.body_lines(text, exercise.function)[0] + 1
    except (ValueError, SyntaxError, OSError):
        return 1


class Checker:
    """Checks each answer in its own process, started by a server, which forks if the system can."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.start_server()

    def start_server(self) -> None:
        environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen(
            system.python("main"),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=environment, start_new_session=True,
        )  # fmt: skip
        self.lines = system.Lines(self.server.stdout)

    def __enter__(self) -> "Checker":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop_server()
        self.folder.cleanup()

    def stop_server(self) -> None:
        system.kill(self.server.pid)
        self.server.wait()

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
        for old in Path(self.folder.name).iterdir():
            old.unlink()
        job = {
            "exercise": str(exercise.path.absolute()), "file": str(path), "seed": seed, "all": every,
            "origin": str(origin(exercise).absolute()), "root": str(Path.cwd()),
            **{name: str(Path(self.folder.name) / name) for name in ("answer", "output")},
        }  # fmt: skip
        report, said = self.stage("answer", job, exercise.seconds)
        if report is None:
            report, _ = self.stage("judge", job, exercise.seconds + 60)
        report = {"checks": [], "mistakes": [], "tests": None, "used": [], **(report or {})}
        if not report["raised"] and (every or all(row["passed"] for row in report["checks"])):
            tests, said = self.stage("tests", job, exercise.seconds)
            report |= tests if tests and "raised" in tests else {"tests": tests}
        return {**report, "output": said, "seconds": round(time.monotonic() - began, 2)}

    def stage(self, name: str, job: dict[str, Any], seconds: int) -> tuple[dict[str, Any] | None, str]:
        """Run one stage of a check -> its result (None for "answer", which stays in its file), what it printed

        The result of a stage that fails holds the error as "raised".
        """
        result, output = Path(self.folder.name) / name, Path(job["output"])
        job = {**job, "stage": name, "result": str(result)}
        end = self.run(job, seconds)
        said = output.read_bytes().decode("utf-8", "replace") if output.exists() else ""
        if "late" in end or end["status"] != 0 or not result.exists():
            return {"raised": ended(Path(job["file"]), said, end, seconds)}, said
        return (None if name == "answer" else json.loads(result.read_text("utf-8"))), said

    def run(self, job: dict[str, Any], seconds: int) -> dict[str, Any]:
        """Send a job to the server -> how its process ended: "status", and "late" if it had to be stopped"""
        assert self.server.stdin is not None
        with contextlib.suppress(OSError):  # it has ended
            self.server.stdin.write(json.dumps(job).encode() + b"\n")
        begun = self.answer(120)
        if not begun:
            raise RuntimeError("importing torch and pytest took longer than 120 s")
        try:
            end = self.answer(seconds)
        except RuntimeError:  # an answer stopped the server: the next one gets another
            self.stop_server()
            self.start_server()
            return {"status": 1}
        for number, patience in ((signal.SIGABRT, 3), (system.KILL, 10)):
            if "status" not in end:
                system.kill(begun["pid"], number)
                end = {"late": True, **self.answer(patience)}
        if "status" not in end:  # its line would be read as the answer to the next job
            self.stop_server()
            self.start_server()
        return end

    def answer(self, seconds: float) -> dict[str, Any]:
        """The server's next line, parsed; {} if it does not arrive in time."""
        line = self.lines.next(seconds)
        if line == b"":
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
