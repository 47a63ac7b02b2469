"""For teachers: write the template of a new exercise, and test that exercises work as intended."""

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
    """lm exercise new: write the template of an exercise

    Args:
        target: module:function.
        name: of the exercise; empty: the name of the function.
    """
    module, _, function = target.partition(":")
    path = Path(f"{module.replace('.', '/')}.py")
    if not function or not path.is_file():
        raise ValueError(f"target {target!r}: expected module:function of this project")
    start, stop = source.body_lines(path.read_text("utf-8"), function)
    homework = Homework()
    name = (name or function.rpartition(".")[2]).strip("_").replace("_", "-")
    if name in homework.exercises:
        raise ValueError(f"name {name!r}: already taken; choose another one with --name")
    number = 1 + max(one.number for one in homework.exercises.values())
    package, _, stem = module.rpartition(".")
    made = EXERCISES / f"{number:02}_{name.replace('-', '_')}.py"
    text = SKELETON.format(target=target, test=f"tests/{package.replace('.', '/')}/test_{stem}.py")
    write_file(made, text, new=True)
    print(f"{made}: fill it in, then run lm exercise self-test {name}; the body is {path}:{start + 1}-{stop}")
    return 0


SKELETON = '''"""The question that this exercise answers."""

import torch

TARGET = "{target}"
TESTS = ("{test}",)
EQUATION = "the paper and equation"
LEARN = "What the student understands after solving it, in one sentence."
HINTS = (
    "A question, and where to look.",
    "The idea in words, with shapes.",
    "The functions to use, in no particular order.",
)
EXPECTS = {{  # what each argument may be: shape, dtype, None
    "x": "(..., dim), fp32 or bf16",
    "returns": "the same shape and dtype",
}}
MISTAKES = (  # text that occurs once in the body, its replacement, an explanation for the student
    ("old", "new", "what is wrong, and what would be right"),
)
RIGHT = (  # other correct bodies
    """
    return None
    """,
)


def probe(module, generator):
    """Small inputs without symmetries -> named tensors; the names of gradients begin with "gradient"."""
    x = torch.randn(3, 5, 7, generator=generator)
    return {{"y": x}}
'''


def self_test(name: str | None) -> int:
    """lm exercise self-test: print one line for each problem"""
    homework = Homework()
    todo = [homework.named(name)] if name else list(homework.exercises.values())
    with Checker() as checker, tempfile.TemporaryDirectory() as folder:
        found = [line for exercise in todo for line in problems(exercise, checker, Path(folder))]
    print(*found, sep="\n", end="\n" if found else "")
    print(f"exercises tested: {len(todo)}, problems: {len(found)}")
    return 1 if found else 0


def problems(exercise: Exercise, checker: Checker, folder: Path) -> list[str]:
    """What is wrong with an exercise, one sentence each: see `lm exercise self-test --help`."""
    text, found = origin(exercise).read_text("utf-8"), []

    def report(answer: str) -> dict[str, Any]:
        path = folder / exercise.file
        path.write_text(answer, encoding="utf-8")
        return checker.check(exercise, path)

    if points(report(exercise.blank(text)))[0]:
        found.append(f"{exercise.name}: the blank passes a check")
    if not is_done(result := report(text)):
        found.append(f"{exercise.name}: the package's own body fails: {why(result)}")
    for number, answer in enumerate(exercise.right, 1):
        result = report(exercise.with_body(text, textwrap.dedent(answer)))
        if not is_done(result):
            found.append(f"{exercise.name}: correct answer {number} fails: {why(result)}")
    for number, (_, _, sentence) in enumerate(exercise.mistakes):
        wrong = exercise.with_mistakes(text, [number])
        if wrong is None:
            found.append(f"{exercise.name}: the text of a mistake does not occur exactly once: {sentence}")
        elif (result := report(wrong))["mistakes"] != [sentence]:
            instead = result["mistakes"] or why(result)
            found.append(f"{exercise.name}: mistake not recognised: {sentence}; reported instead: {instead}")
    return found
