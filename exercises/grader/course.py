"""The commands of `lm exercise`, for students and teachers."""

import difflib
import os
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from lm import cli
from lm.config import nearest
from lm.console import visible

from . import grade, overlay, source, submissions, system, teacher
from .exercise import Exercise
from .homework import FOLDER, Checker, Homework, first_line, origin
from .verdict import is_done, shown

Name = tyro.conf.Positional[str | None]


@dataclass
class Student:
    """Options that all student commands share."""

    homework: Path = FOLDER  # folder with your answers


@dataclass
class List(Student):
    """List all exercises: status, time taken, hints used."""


@dataclass
class Start(Student):
    """Start an exercise: write a copy of its module with one function's body missing."""

    name: Name = None  # default: the next one


@dataclass
class Check(Student):
    """Check an answer: shapes, values, gradients, the project's tests. Exit status 0 if all pass."""

    name: Name = None  # an exercise, or a file such as homework/router.py; default: the current one
    all: bool = False  # check every exercise you have started


@dataclass
class Watch(Student):
    """Check at every save; keys: h hint, n next, l list, s solution, r reset, q quit."""

    name: Name = None  # default: the current one


@dataclass
class Hint(Student):
    """Show the next of three hints: a question, the idea, the functions to use."""

    name: Name = None  # default: the current one


@dataclass
class Solution(Student):
    """Show the package's own body and how yours differs. Viewing it is recorded."""

    name: Name = None  # default: the current one


@dataclass
class Grade:
    """Grade a folder of submissions: one row for each student and exercise. Exit status 0 if all are done.

    A submission is a folder that holds a student's files, directly or in a subfolder homework/.
    """

    folder: tyro.conf.Positional[Path]
    only: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # only this exercise; may be repeated; default: all
    seed: int = 2  # for the random inputs of the checks
    json: Path | None = None  # write the rows with all details to this file
    csv: Path | None = None  # write the rows as a table to this file
    gradescope: Path | None = None  # write Gradescope's results.json to this file; for one submission


@dataclass
class Run:
    """Run `lm` with your finished functions in the package: lm exercise run train --preset nano"""


@dataclass
class New:
    """Write a template for a new exercise."""

    target: tyro.conf.Positional[str]  # module:function, such as moe.balance:z_loss or mla.cache:Cache.write
    name: str = ""  # default: the name of the function


@dataclass
class SelfTest:
    """Test the exercises: the blank fails, correct answers pass, each mistake fails and is recognised."""

    name: Name = None  # default: all


@dataclass
class Reset(Student):
    """Start over; the old file is kept next to the new one as .bak1, .bak2, ..."""

    name: Name = None  # default: the current one


def run_list(options: List) -> int:
    """lm exercise list"""
    print(table(Homework(options.homework)))
    return 0


def table(homework: Homework) -> str:
    """One line for each exercise, and a summary."""
    lines, done = [], 0
    for exercise in homework.exercises.values():
        state = homework.state(exercise)
        done += state == "done"
        minutes = homework.noted(exercise, "minutes")
        notes = [f"{minutes} min"] if minutes is not None else []
        hints = homework.noted(exercise, "hints", 0)
        notes += [f"{hints} hint{'s' * (hints > 1)}"] if hints else []
        notes += ["solution seen"] if homework.noted(exercise, "solution") else []
        lines.append(
            f"{exercise.number:3}  {exercise.name:16}{state:9}{', '.join(notes):24}{exercise.equation}"
        )
    lines.append(
        f"\n{done} of {len(lines)} done; start one: lm exercise start NAME; check at every save: lm exercise"
    )
    return "\n".join(lines)


def chosen(homework: Homework, name: str | None) -> Exercise:
    """The exercise with this name, or the current one."""
    return homework.named(name) if name else homework.current()


def run_start(options: Start) -> int:
    """lm exercise start"""
    homework = Homework(options.homework)
    exercise = chosen(homework, options.name)
    path = homework.file(exercise)
    if path.exists() or path.is_symlink():
        print(f"{path} exists and is left unchanged; to start over: lm exercise reset {exercise.name}")
        return 0
    homework.start(exercise)
    print(introduction(exercise, path))
    return 0


def introduction(exercise: Exercise, path: Path) -> str:
    """What to write, and where."""
    where = f"{path}:{first_line(exercise, path)}"
    lines = [
        f"{exercise.name}: {exercise.learn}",
        f"{where}  write the body of {exercise.function} ({exercise.equation})",
        f"then run: lm exercise check {exercise.name}",
    ]
    return "\n".join(lines)


def run_check(options: Check) -> int:
    """lm exercise check"""
    homework = Homework(options.homework)
    if options.all:
        todo = [one for one in homework.exercises.values() if homework.file(one).exists()]
        if not todo:
            raise ValueError(f"{homework.folder}: no exercise started yet; start one: lm exercise start NAME")
    elif options.name and (options.name.endswith(".py") or Path(options.name).is_file()):
        path = Path(options.name)
        source.check_regular(path)
        exercise = submissions.match(path, list(homework.exercises.values()))
        if exercise is None:
            raise ValueError(
                f"{path}: the name fits no exercise; expected one such as {first_file(homework)} for "
                f"{next(iter(homework.exercises))}; lm exercise list shows all"
            )
        with Checker() as checker:
            return 0 if check_and_show(homework, exercise, checker, path) else 1
    else:
        todo = [chosen(homework, options.name)]
        if not homework.file(todo[0]).exists():
            raise ValueError(
                f"{homework.file(todo[0])}: not started yet; start it: lm exercise start {todo[0].name}"
            )
    with Checker() as checker:
        return max(0 if check_and_show(homework, exercise, checker) else 1 for exercise in todo)


def first_file(homework: Homework) -> str:
    """The file name of the first exercise, as an example."""
    return next(iter(homework.exercises.values())).file


def check_and_show(
    homework: Homework, exercise: Exercise, checker: Checker, path: Path | None = None
) -> bool:
    """Check a file, print the report -> whether everything passed; the result for homework is recorded

    Args:
        path: the file; None: the student's file in the homework folder.
    """
    own = homework.file(exercise)
    path = path or own
    try:
        report = checker.check(exercise, path)
    except ValueError as error:
        print(visible(f"{exercise.name}: {str(error).replace(str(Path.cwd()) + os.sep, '')}"))
        return False
    good = is_done(report)
    if path.resolve() == own.resolve():
        record(homework, exercise, good)
    print(shown(exercise, path, report))
    return good


def record(homework: Homework, exercise: Exercise, good: bool) -> None:
    """Note the result of a check, and the minutes it took to get there."""
    if not good:
        homework.note(exercise, done=False)
    elif not homework.noted(exercise, "done"):
        started = homework.noted(exercise, "started", time.time())
        homework.note(exercise, done=True, minutes=round((time.time() - started) / 60))


def say(options: Hint | Solution, what: Callable[[Homework, Exercise], str]) -> int:
    """lm exercise hint, lm exercise solution"""
    homework = Homework(options.homework)
    print(what(homework, chosen(homework, options.name)))
    return 0


def next_hint(homework: Homework, exercise: Exercise) -> str:
    """The hints seen so far and the next one."""
    used = min(homework.noted(exercise, "hints", 0) + 1, len(exercise.hints))
    homework.note(exercise, hints=used)
    lines = [textwrap.fill(f"{number}. {hint}", 100) for number, hint in enumerate(exercise.hints[:used], 1)]
    return "\n".join([f"{exercise.name}: hint {used} of {len(exercise.hints)}", *lines])


def solution(homework: Homework, exercise: Exercise) -> str:
    """The package's body and its location, then a diff from the student's."""
    path = origin(exercise)
    homework.note(exercise, solution=True)
    start, ours = body(path, exercise)
    lines = [f"{path}:{start + 1}", *ours]
    mine = homework.file(exercise)
    try:
        theirs = body(mine, exercise)[1]
    except (ValueError, SyntaxError, OSError):
        theirs = []
    if theirs:
        lines += ["", *difflib.unified_diff(theirs, ours, str(mine), str(path), lineterm="")]
    return "\n".join(lines)


def body(path: Path, exercise: Exercise) -> tuple[int, list[str]]:
    """The function's body in a file -> its first line, counted from 0, and its lines"""
    text = source.read(path)
    start, stop = source.body_lines(text, exercise.function)
    return start, text.splitlines()[start:stop]


def run_reset(options: Reset) -> int:
    """lm exercise reset"""
    homework = Homework(options.homework)
    exercise = chosen(homework, options.name)
    kept = homework.reset(exercise)
    print(introduction(exercise, homework.file(exercise)) + (f"\nyour old file: {kept}" if kept else ""))
    return 0


def run_watch(options: Watch) -> int:
    """lm exercise watch: check at every save, until q"""
    homework = Homework(options.homework)
    exercise = chosen(homework, options.name)
    seen = None
    with system.keys() as pressed, Checker() as checker:
        while True:
            path = homework.start(exercise)
            stamp = path.stat().st_mtime_ns if path.exists() else 0
            if stamp != seen:
                seen = stamp
                print("\033[2J\033[H", end="")
                check_and_show(homework, exercise, checker)
                print("\nh hint   n next   l list   s solution   r reset   q quit", flush=True)
            key = pressed(0.2)
            if key == "q":
                return 0
            if key in ("n", "r"):
                seen = None
                if key == "r":
                    homework.reset(exercise)
                else:
                    exercise = homework.current()
            elif key in SAID:
                print(f"\n{SAID[key](homework, exercise)}", flush=True)


def run_grade(options: Grade) -> int:
    """lm exercise grade"""
    return grade.run(
        options.folder, options.only, options.seed, options.json, options.csv, options.gradescope
    )


def run_run(arguments: list[str]) -> int:
    """lm exercise run: run `lm` with the student's functions in the package"""
    if arguments[:1] == ["experiment"]:
        raise ValueError("experiment: its training processes use the original functions; use train")
    homework = Homework()
    done = [one for one in homework.exercises.values() if homework.state(one) == "done"]
    if not done:
        raise ValueError(f"{homework.folder}: no exercise is done yet; check one: lm exercise check NAME")
    overlay.install([overlay.Piece(one.module, one.function, homework.file(one).absolute()) for one in done])
    print(f"using your {', '.join(one.target for one in done)}", file=sys.stderr)
    return cli.main(arguments)


COMMANDS: dict[str, tuple[type, Callable[[Any], int]]] = {
    "list": (List, run_list),
    "start": (Start, run_start),
    "check": (Check, run_check),
    "watch": (Watch, run_watch),
    "hint": (Hint, lambda options: say(options, next_hint)),
    "solution": (Solution, lambda options: say(options, solution)),
    "reset": (Reset, run_reset),
    "grade": (Grade, run_grade),
    "run": (Run, run_run),
    "new": (New, lambda options: teacher.new(options.target, options.name)),
    "self-test": (SelfTest, lambda options: teacher.self_test(options.name)),
}


def main(arguments: list[str]) -> int:
    """lm exercise: without a command, watch the current exercise; without a terminal, list all."""
    name, *rest = arguments or ["watch" if sys.stdin.isatty() and sys.stdout.isatty() else "list"]
    if name in ("-h", "--help"):
        lines = [f"  {name:11}{(kind.__doc__ or '').splitlines()[0]}" for name, (kind, _) in COMMANDS.items()]
        print(
            "usage: lm exercise [COMMAND ...] (lm exercise COMMAND --help shows its options)",
            "",
            *lines,
            sep="\n",
        )
        return 0
    if name not in COMMANDS:
        raise ValueError(
            f"no command {name!r}{nearest(name, list(COMMANDS))}; the commands are {', '.join(COMMANDS)}"
        )
    kind, run = COMMANDS[name]
    if name == "run" and rest and rest[0] not in ("-h", "--help"):
        return run(rest[1:] if rest[0] == "--" else rest)
    return run(cli.parse(kind, f"exercise {name}", rest))


SAID = {"h": next_hint, "l": lambda homework, exercise: table(homework), "s": solution}
