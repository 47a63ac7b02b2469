"""The commands of `lm exercise`: what a student and a teacher type."""

import difflib
import os
import select
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

from . import grade, overlay, source, teacher
from .exercise import Exercise
from .homework import FOLDER, Checker, Homework, first_line, origin
from .verdict import is_done, shown

Name = tyro.conf.Positional[str | None]


@dataclass
class Student:
    """What all commands of a student's have."""

    homework: Path = FOLDER  # the student's folder


@dataclass
class List(Student):
    """All exercises: done, begun, hints used, minutes."""


@dataclass
class Start(Student):
    """Write the student's file of an exercise: its module with one function's body missing."""

    name: Name = None  # by default the next one


@dataclass
class Check(Student):
    """Check an answer: what it gives, its gradients, the project's tests. Exit status 0 when all is right."""

    name: Name = None  # by default the one at work
    all: bool = False  # every exercise that has a file


@dataclass
class Watch(Student):
    """Check whenever the file is saved; keys: h hint, n next, l list, s solution, r reset, q quit."""

    name: Name = None  # by default the one at work


@dataclass
class Hint(Student):
    """The next of three hints: a question, the idea, the calls to use."""

    name: Name = None  # by default the one at work


@dataclass
class Solution(Student):
    """The package's own body, and what is other in yours. That it was seen is noted."""

    name: Name = None  # by default the one at work


@dataclass
class Grade:
    """Grade a folder of submissions: one row for each student and exercise. Exit status 0 if all are done.

    A submission is a folder with the students' files in it, or in a folder homework within it.
    """

    folder: tyro.conf.Positional[Path]
    only: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # this exercise; may be given again; by default all
    seed: int = 2  # of the numbers that answers are checked with
    json: Path | None = None  # where to write the rows, with all that was found
    csv: Path | None = None  # where to write them as a table
    gradescope: Path | None = None  # where to write results.json of Gradescope; for one submission


@dataclass
class Run:
    """Run `lm` with every exercise that is done laid over the package: lm exercise run train --preset nano"""


@dataclass
class New:
    """Begin an exercise of your own: write its file, to be filled in."""

    target: tyro.conf.Positional[str]  # module:function, as moe.balance:z_loss or mla.cache:Cache.write
    name: str = ""  # by default the function's


@dataclass
class SelfTest:
    """Do exercises hold? The blank fails, ours passes, each mistake is named, other right answers pass."""

    name: Name = None  # by default all


@dataclass
class Reset(Student):
    """Begin anew; the old file is kept beside it as .bak1, .bak2, ..."""

    name: Name = None  # by default the one at work


def run_list(options: List) -> int:
    """lm exercise list"""
    print(table(Homework(options.homework)))
    return 0


def table(homework: Homework) -> str:
    """A line for each exercise."""
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
            f"{exercise.number:3}  {exercise.name:16}{state:7}{', '.join(notes):24}{exercise.equation}"
        )
    lines.append(
        f"\n{done} of {len(lines)} done; lm exercise start NAME begins one, lm exercise watches the next"
    )
    return "\n".join(lines)


def chosen(homework: Homework, name: str | None) -> Exercise:
    """The exercise of that name, or the one at work."""
    return homework.named(name) if name else homework.current()


def run_start(options: Start) -> int:
    """lm exercise start"""
    homework = Homework(options.homework)
    exercise = chosen(homework, options.name)
    path = homework.file(exercise)
    if path.exists() or path.is_symlink():
        print(f"{path} is there already and stays as it is; lm exercise reset {exercise.name} begins anew")
        return 0
    homework.start(exercise)
    print(introduction(exercise, path))
    return 0


def introduction(exercise: Exercise, path: Path) -> str:
    """What is to be done, and where."""
    where = f"{path}:{first_line(exercise, path)}"
    lines = [
        f"{exercise.name}: {exercise.learn}",
        f"{where}  write the body of {exercise.function} ({exercise.equation})",
        f"then: lm exercise check {exercise.name}",
    ]
    return "\n".join(lines)


def run_check(options: Check) -> int:
    """lm exercise check"""
    homework = Homework(options.homework)
    if options.all:
        todo = [one for one in homework.exercises.values() if homework.file(one).exists()]
        if not todo:
            raise ValueError(f"{homework.folder}: nothing begun; lm exercise start NAME begins an exercise")
    else:
        todo = [chosen(homework, options.name)]
        if not homework.file(todo[0]).exists():
            raise ValueError(
                f"{homework.file(todo[0])}: not begun; lm exercise start {todo[0].name} begins it"
            )
    with Checker() as checker:
        return max(0 if check_and_show(homework, exercise, checker) else 1 for exercise in todo)


def check_and_show(homework: Homework, exercise: Exercise, checker: Checker) -> bool:
    """Check the student's file, say what was found, note it -> is all right?"""
    path = homework.file(exercise)
    try:
        report = checker.check(exercise, path)
    except ValueError as error:
        print(f"{exercise.name}: {str(error).replace(str(Path.cwd()) + os.sep, '')}")
        return False
    good = is_done(report)
    if good and not homework.noted(exercise, "done"):
        started = homework.noted(exercise, "started", time.time())
        homework.note(exercise, done=True, minutes=round((time.time() - started) / 60))
    elif not good:
        homework.note(exercise, done=False)
    print(shown(exercise, path, report))
    return good


def say(options: Hint | Solution, what: Callable[[Homework, Exercise], str]) -> int:
    """lm exercise hint, lm exercise solution"""
    homework = Homework(options.homework)
    print(what(homework, chosen(homework, options.name)))
    return 0


def next_hint(homework: Homework, exercise: Exercise) -> str:
    """One hint more than were seen; all again when there is no other."""
    used = min(homework.noted(exercise, "hints", 0) + 1, len(exercise.hints))
    homework.note(exercise, hints=used)
    lines = [textwrap.fill(f"{number}. {hint}", 100) for number, hint in enumerate(exercise.hints[:used], 1)]
    return "\n".join([f"{exercise.name}: hint {used} of {len(exercise.hints)}", *lines])


def solution(homework: Homework, exercise: Exercise) -> str:
    """The package's body with its place, then what is other in the student's."""
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
    """Where a function's body begins in a file, counted from 0, and its lines"""
    text = source.read(path)
    start, stop = source.body_lines(text, exercise.function)
    return start, text.splitlines()[start:stop]


def run_reset(options: Reset) -> int:
    """lm exercise reset"""
    homework = Homework(options.homework)
    exercise = chosen(homework, options.name)
    kept = homework.reset(exercise)
    print(introduction(exercise, homework.file(exercise)) + (f"\nthe old file is {kept}" if kept else ""))
    return 0


def run_watch(options: Watch) -> int:
    """lm exercise watch: check at every save, until q"""
    import termios
    import tty

    homework = Homework(options.homework)
    exercise = chosen(homework, options.name)
    before = termios.tcgetattr(sys.stdin)
    with Checker() as checker:
        try:
            tty.setcbreak(sys.stdin)
            seen = None
            while True:
                path = homework.start(exercise)
                stamp = path.stat().st_mtime_ns if path.exists() else 0
                if stamp != seen:
                    seen = stamp
                    print("\033[2J\033[H", end="")
                    check_and_show(homework, exercise, checker)
                    print("\nh hint   n next   l list   s solution   r reset   q quit", flush=True)
                if not select.select([sys.stdin], [], [], 0.2)[0]:
                    continue
                key = sys.stdin.read(1)
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
        finally:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def run_grade(options: Grade) -> int:
    """lm exercise grade"""
    return grade.run(
        options.folder, options.only, options.seed, options.json, options.csv, options.gradescope
    )


def run_run(arguments: list[str]) -> int:
    """lm exercise run: `lm` with the student's functions in the package"""
    if arguments[:1] == ["experiment"]:
        raise ValueError("experiment: trains in processes that do not take your functions; train does")
    homework = Homework()
    done = [one for one in homework.exercises.values() if homework.state(one) == "done"]
    if not done:
        raise ValueError(
            f"{homework.folder}: no exercise is done yet; lm exercise check NAME says when one is"
        )
    overlay.install([overlay.Piece(one.module, one.function, homework.file(one).absolute()) for one in done])
    print(f"yours: {', '.join(one.target for one in done)}", file=sys.stderr)
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
    """lm exercise: on a terminal the one at work is watched, else all are listed."""
    name, *rest = arguments or ["watch" if sys.stdin.isatty() and sys.stdout.isatty() else "list"]
    if name in ("-h", "--help"):
        lines = [f"  {name:11}{(kind.__doc__ or '').splitlines()[0]}" for name, (kind, _) in COMMANDS.items()]
        print(
            "usage: lm exercise [COMMAND ...] (lm exercise COMMAND --help tells its options)",
            "",
            *lines,
            sep="\n",
        )
        return 0
    if name not in COMMANDS:
        raise ValueError(
            f"no command {name!r}{nearest(name, list(COMMANDS))}; there are {', '.join(COMMANDS)}"
        )
    kind, run = COMMANDS[name]
    if name == "run" and rest and rest[0] not in ("-h", "--help"):
        return run(rest[1:] if rest[0] == "--" else rest)
    return run(cli.parse(kind, f"exercise {name}", rest))


SAID = {"h": next_hint, "l": lambda homework, exercise: table(homework), "s": solution}
