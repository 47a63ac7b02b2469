"""An exercise: one function of the package, the usual mistakes in it, and how to detect them.

A file in exercises/ names the function (TARGET) and defines `probe`, which runs the function's module on
small inputs and returns named tensors. A mistake is an edit of the function's source with a sentence that
explains it; the reference answer is the package itself. Everything except `probe` is read without running
the file.
"""

import ast
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lm.config import nearest

from . import source

STAGES = ("shapes, types", "values", "gradients", "memory", "precision", "project tests")  # in order


@dataclass(frozen=True)
class Exercise:
    """The contents of one file in exercises/."""

    path: Path
    target: str  # module:function; both may contain dots
    tests: tuple[str, ...]  # test files of the project, or pytest node ids
    equation: str  # the paper and equation
    learn: str  # what it teaches, in one sentence
    hints: tuple[str, str, str]  # a question; the idea, with shapes; the calls to use
    expects: dict[str, str] = field(default_factory=dict)  # what each argument may be, and the result
    mistakes: tuple[tuple[str, str, str], ...] = ()  # text of the body, its replacement, the explanation
    right: tuple[str, ...] = ()  # other correct bodies, to test the checks themselves
    which: str = ""  # pytest's -k expression: leaves out tests that require more than the equation
    begin: str = ""  # the student writes the body from the line that begins with this text; the rest is given
    points: int = 10
    seconds: int = 60  # time limit of one check
    name: str = field(init=False)
    number: int = field(init=False)

    def __post_init__(self):
        number, _, name = self.path.stem.partition("_")
        object.__setattr__(self, "number", int(number))
        object.__setattr__(self, "name", name.replace("_", "-"))
        if not re.fullmatch(r"[\w.]+:[\w.]+", self.target):
            raise ValueError(f"{self.path}: TARGET {self.target!r} must have the form module:function")

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]

    @property
    def function(self) -> str:
        return self.target.partition(":")[2]

    @property
    def file(self) -> str:
        """Name of the student's file."""
        return f"{self.name.replace('-', '_')}.py"

    @property
    def mark(self) -> str:
        """The comment in place of the missing body."""
        return f"# exercise {self.name}: the body goes here"

    def blank(self, text: str) -> str:
        """The module's source without the function's body."""
        given = [
            textwrap.fill(f"{names}: {what}", 100, initial_indent="# ", subsequent_indent="#     ")
            for names, what in self.expects.items()
        ]
        stub = "\n".join([*given, self.mark, f'raise NotImplementedError("exercise {self.name}")'])
        return source.replaced(text, self.function, stub, self.begin)

    def with_body(self, text: str, body: str) -> str:
        """The module's source with this body instead."""
        return source.replaced(text, self.function, body, self.begin)

    def with_mistakes(self, text: str, mistakes: Sequence[int]) -> str | None:
        """The module's source with these mistakes; None if their edits do not apply together."""
        start, stop = source.body_lines(text, self.function, self.begin)
        lines = text.splitlines(keepends=True)
        body = "".join(lines[start:stop])
        for number in mistakes:
            old, new, _ = self.mistakes[number]
            if body.count(old) != 1:
                return None
            body = body.replace(old, new)
        return "".join([*lines[:start], body, *lines[stop:]])


def load(path: Path) -> Exercise:
    """Read a file in exercises/ without running it.

    Raises:
        ValueError: a name is missing or unknown, or its value is not a literal.
    """
    found = {}
    for node in source.parse(source.read(path), path).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name.isupper() and not name.startswith("_"):
                try:
                    found[name.lower()] = ast.literal_eval(node.value)
                except ValueError:
                    raise ValueError(
                        f"{path}:{node.lineno}: {name} must be a literal, not an expression"
                    ) from None
    try:
        return Exercise(path, **found)
    except TypeError as error:
        reason = str(error).replace("Exercise.__init__()", "").replace("positional ", "").strip()
        raise ValueError(f"{path}: {reason} (in this file the names are upper-case)") from None


def load_all(folder: Path) -> dict[str, Exercise]:
    """The exercises in a folder, by name, ordered by their numbers.

    Raises:
        ValueError: the folder holds no exercises, or two with the same name.
    """
    paths = sorted(folder.glob("[0-9]*_*.py"))
    if not paths:
        raise ValueError(f"{folder.absolute()}: no exercises found; run this in a clone of the project")
    found: dict[str, Exercise] = {}
    for path in paths:
        exercise = load(path)
        if exercise.name in found:
            raise ValueError(f"{path}: another exercise is already named {exercise.name!r}")
        found[exercise.name] = exercise
    return dict(sorted(found.items(), key=lambda item: item[1].number))


def named(name: str, exercises: dict[str, Exercise]) -> Exercise:
    """The exercise with this name.

    Raises:
        ValueError: it does not exist.
    """
    name = name.replace("_", "-")
    if name not in exercises:
        near = nearest(name, list(exercises))
        raise ValueError(f"no exercise {name!r}{near}; the exercises are {', '.join(exercises)}")
    return exercises[name]
