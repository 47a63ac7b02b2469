"""Exercises of one's own: begin one, and see whether exercises keep their laws."""

import tempfile
import textwrap
from pathlib import Path
from typing import Any

from lm.files import write_file

from . import source
from .exercise import Exercise
from .homework import EXERCISES, Checker, Homework, origin
from .verdict import is_done, points, why


def new(target: str, name: str) -> int:
    """lm exercise new: the file of an exercise of one's own, to be filled in

    Args:
        target: module:function.
        name: of the exercise; none: the function's.
    """
    module, _, function = target.partition(":")
    path = Path(f"{module.replace('.', '/')}.py")
    if not function or not path.is_file():
        raise ValueError(f"target {target!r}: module:function of this project is needed")
    start, stop = source.body_lines(path.read_text("utf-8"), function)
    homework = Homework()
    name = (name or function.rpartition(".")[2]).strip("_").replace("_", "-")
    if name in homework.exercises:
        raise ValueError(f"name {name!r}: there is such an exercise; another is needed, --name")
    number = 1 + max(one.number for one in homework.exercises.values())
    package, _, stem = module.rpartition(".")
    made = EXERCISES / f"{number:02}_{name.replace('-', '_')}.py"
    text = SKELETON.format(target=target, test=f"tests/{package.replace('.', '/')}/test_{stem}.py")
    write_file(made, text, new=True)
    print(f"{made}: fill it in, then lm exercise self-test {name}; its body is {path}:{start + 1}-{stop}")
    return 0


SKELETON = '''"""A question that the exercise answers."""

import torch

TARGET = "{target}"
TESTS = ("{test}",)
EQUATION = "where it comes from"
LEARN = "What whoever solves it has understood, a sentence."
HINTS = (
    "A question, and where to look.",
    "The idea in words, with shapes.",
    "The calls to use, not their order.",
)
MISTAKES = (  # text of the body that is there once, another in its place, what whoever writes that believes
    ("old", "new", "what is wrong with it, and what would be right"),
)
RIGHT = (  # other bodies that are right
    """
    return None
    """,
)


def probe(module, generator):
    """Small inputs with nothing symmetric about them -> named tensors; names of gradients begin so."""
    x = torch.randn(3, 5, 7, generator=generator)
    return {{"y": x}}
'''


def self_test(name: str | None) -> int:
    """lm exercise self-test: what does not hold, a line each"""
    homework = Homework()
    todo = [homework.named(name)] if name else list(homework.exercises.values())
    with Checker() as checker, tempfile.TemporaryDirectory() as folder:
        broken = [law for exercise in todo for law in laws(exercise, checker, Path(folder))]
    print(*broken, sep="\n", end="\n" if broken else "")
    print(f"{len(todo)} exercises: {f'{len(broken)} laws broken' if broken else 'all laws hold'}")
    return 1 if broken else 0


def laws(exercise: Exercise, checker: Checker, folder: Path) -> list[str]:
    """What of the laws does not hold, in a sentence each."""
    text, broken = origin(exercise).read_text("utf-8"), []

    def report(answer: str) -> dict[str, Any]:
        path = folder / exercise.file
        path.write_text(answer, encoding="utf-8")
        return checker.check(exercise, path)

    if points(report(exercise.blank(text)))[0]:
        broken.append(f"{exercise.name}: the blank passes a check")
    if not is_done(found := report(text)):
        broken.append(f"{exercise.name}: the package's own body fails: {why(found)}")
    for number, answer in enumerate(exercise.right, 1):
        found = report(exercise.with_body(text, textwrap.dedent(answer)))
        if not is_done(found):
            broken.append(f"{exercise.name}: right answer {number} fails: {why(found)}")
    for number, (_, _, sentence) in enumerate(exercise.mistakes):
        wrong = exercise.with_mistakes(text, [number])
        if wrong is None:
            broken.append(f"{exercise.name}: the text of a mistake is not there once: {sentence}")
        elif (found := report(wrong))["mistakes"] != [sentence]:
            broken.append(f"{exercise.name}: not named, but {found['mistakes'] or why(found)}: {sentence}")
    return broken
