"""An exercise: one function of the package, what may go wrong in it, and how to see that.

A file of exercises/ names the function (TARGET), and holds `probe`, which runs the function's module on small
inputs and gives named tensors. A mistake is an edit of the function's own text with a sentence; the right
answer is the package itself. Everything but `probe` is read without running anything.
"""

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import source

STAGES = ("shapes, types", "values", "gradients", "project tests")  # of a check


@dataclass(frozen=True)
class Exercise:
    """What a file of exercises/ says."""

    path: Path
    target: str  # module:function, with dots
    tests: tuple[str, ...]  # paths of the project's tests, or names of single ones
    equation: str  # where it comes from
    learn: str  # what it teaches, a sentence
    hints: tuple[str, str, str]  # a question; the idea, with shapes; the calls to use
    mistakes: tuple[
        tuple[str, str, str], ...
    ] = ()  # text of the function, another in its place, what it means
    right: tuple[str, ...] = ()  # other bodies that are right, to test the check
    which: str = ""  # of the tests, as pytest's -k; those that ask more than the equation does are left out
    begin: str = ""  # how the line begins from which on the body is to be written; what is before it is given
    points: int = 10
    seconds: int = 60  # after which a check is ended
    name: str = field(init=False)
    number: int = field(init=False)

    def __post_init__(self):
        number, _, name = self.path.stem.partition("_")
        object.__setattr__(self, "number", int(number))
        object.__setattr__(self, "name", name.replace("_", "-"))
        if not re.fullmatch(r"[\w.]+:[\w.]+", self.target):
            raise ValueError(f"{self.path}: TARGET {self.target!r}: module:function is needed")

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]

    @property
    def function(self) -> str:
        return self.target.partition(":")[2]

    @property
    def file(self) -> str:
        """The name of the student's file."""
        return f"{self.name.replace('-', '_')}.py"

    @property
    def mark(self) -> str:
        """The comment that stands where the body is missing."""
        return f"# exercise {self.name}: the body goes here"

    def blank(self, text: str) -> str:
        """The module's text with the function's body missing."""
        stub = f'{self.mark}\nraise NotImplementedError("exercise {self.name}")'
        return source.replaced(text, self.function, stub, self.begin)

    def with_body(self, text: str, body: str) -> str:
        """The module's text with this body in place of the missing one."""
        return source.replaced(text, self.function, body, self.begin)

    def with_mistakes(self, text: str, mistakes: Sequence[int]) -> str | None:
        """The module's text with mistakes by their numbers; None where one leaves no room for another."""
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
    """Read a file of exercises/, without running it.

    Raises:
        ValueError: something is missing in it, unknown, or no literal.
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
                        f"{path}:{node.lineno}: {name} must be written out, no expression"
                    ) from None
    try:
        return Exercise(path, **found)
    except TypeError as error:
        reason = str(error).replace("Exercise.__init__()", "").replace("positional ", "").strip()
        raise ValueError(f"{path}: {reason} (names in capitals)") from None


def load_all(folder: Path) -> dict[str, Exercise]:
    """The exercises of a folder by name, in their order.

    Raises:
        ValueError: the folder has none, or two of one name.
    """
    paths = sorted(folder.glob("[0-9]*_*.py"))
    if not paths:
        raise ValueError(f"{folder.absolute()}: no exercises here; run this in a clone of the project")
    found: dict[str, Exercise] = {}
    for path in paths:
        exercise = load(path)
        if exercise.name in found:
            raise ValueError(f"{path}: there is another exercise {exercise.name!r}")
        found[exercise.name] = exercise
    return dict(sorted(found.items(), key=lambda item: item[1].number))
