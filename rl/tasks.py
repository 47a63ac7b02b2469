"""Tasks whose answers a program can check, and the text from which a base model learns to attempt them.

A problem is a prompt of fixed width that ends in "=". A completion may think first:

    7-6+3+5+6+1-9      =<think>010409151607</think>7

and ends with END. In the base model's text some answers think in small steps, some in large ones, some not at
all, and some are wrong. Which way pays off is for the rewards to teach.
"""

import random
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

END = "\x03"  # ends a completion, and a document of the base model's text
OPEN, CLOSE = "<think>", "</think>"
WIDTH = 20  # bytes of a prompt
EASY = 3  # problems of up to this many terms are too few to hold some out
HELD_OUT = 10  # one problem in ten is in no training text and in no training problem
FORM = re.compile(rf"{OPEN}([^<>]*){CLOSE}([0-9]+)")  # \d would also take other scripts' digits


@dataclass(frozen=True)
class Problem:
    """A prompt, and the text of its answer."""

    prompt: str
    answer: str
    task: str = "sums"
    level: int = 0  # number of terms


@dataclass(frozen=True)
class Task:
    """A kind of problem.

    Attributes:
        draw: a random problem of a level -> its text, and the running totals after each term.
        digits: the width in which a total is written while thinking.
        levels: the least and the largest number of terms, unless a level is asked for.
        most: the largest number of terms that fits a prompt.
    """

    draw: Callable[[random.Random, int], tuple[str, list[int]]]
    digits: int
    levels: tuple[int, int] = (4, 8)
    most: int = 10


def problems(
    name: str, seed: int, count: int, level: int | None = None, held_out: bool = False
) -> list[Problem]:
    """Random problems of a task.

    Args:
        level: the number of terms; None: any of the task's levels.
        held_out: from the tenth of all problems that no training contains; else from the others.

    Raises:
        ValueError: there is no such task, or the level is too low or does not fit the prompt.
    """
    task, rng = find(name), random.Random(f"{name} {seed} {held_out}")
    lowest = EASY + 1 if held_out else 2
    if level is not None and not lowest <= level <= task.most:
        raise ValueError(f"level={level} must lie in {lowest}..{task.most}, the number of terms")
    levels = task.levels if level is None else (level, level)
    return [drawn(name, rng, levels, held_out)[0] for _ in range(count)]


def drawn(
    name: str, rng: random.Random, levels: tuple[int, int], held_out: bool = False
) -> tuple[Problem, list[int]]:
    """One random problem whose number of terms lies in `levels`, and its running totals."""
    task = find(name)
    while True:
        terms = rng.randint(*levels)
        text, totals = task.draw(rng, terms)
        if is_held_out(text, terms) == held_out:
            return Problem(f"{text:<{WIDTH - 1}}=", str(totals[-1]), name, terms), totals


def score(problem: Problem, completion: str, ended: bool = True) -> tuple[float, bool, bool]:
    """Reward of a completion, whether its answer is exact, and whether it has the form <think>...</think>N.

    The reward is 1.0 if both are true, else 0.0. What follows the first END is ignored. The form has one
    thought, perhaps an empty one, of any text without < and >, and then ASCII digits up to the end. The
    answer is what follows the last </think>, or all of it; it must be written as in `problem.answer`, without
    leading zeros, signs or spaces.

    Args:
        ended: whether END was generated, or is missing only because it is not part of the text; a completion
            that was cut off is wrong.
    """
    completion, _, _ = completion.partition(END)
    form = FORM.fullmatch(completion)
    answer = completion.rpartition(CLOSE)[2]
    right = ended and answer == problem.answer
    in_form = ended and form is not None
    return float(right and in_form), right, in_form


def find(name: str) -> Task:
    """The task of that name."""
    if name not in TASKS:
        raise ValueError(f"no task {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name]


def is_held_out(text: str, terms: int) -> bool:
    """Whether a problem belongs to the held-out tenth, by its digest."""
    return terms > EASY and zlib.crc32(text.encode()) % HELD_OUT == 0


def draw_sum(rng: random.Random, terms: int) -> tuple[str, list[int]]:
    """A chain of sums and differences of digits, with all totals in 0..99: 7-6+3+5 -> 7, 1, 4, 9"""
    totals = [rng.randint(1, 9)]
    text = str(totals[0])
    for _ in range(terms - 1):
        operand = rng.randint(1, 9)
        plus = rng.random() < 0.5 or totals[-1] < operand
        totals.append(totals[-1] + operand if plus else totals[-1] - operand)
        text += f"{'+' if plus else '-'}{operand}"
    return text, totals


def draw_product(rng: random.Random, terms: int) -> tuple[str, list[int]]:
    """A chain of sums, differences and products modulo 10: 7*6+3*5 -> 7, 2, 5, 5, from left to right"""
    totals = [rng.randint(1, 9)]
    text = str(totals[0])
    for _ in range(terms - 1):
        operand, sign = rng.randint(1, 9), rng.choice("+-*")
        last = totals[-1]
        totals.append({"+": last + operand, "-": last - operand, "*": last * operand}[sign] % 10)
        text += f"{sign}{operand}"
    return text, totals


def draw_shuffled(rng: random.Random, terms: int) -> tuple[str, list[int]]:
    """A sum whose terms stand in a random order, each behind its place: b+8a7c-3 -> 7, 15, 12"""
    text, totals = draw_sum(rng, terms)
    parts = [text[0], *re.findall(r"[+-]\d", text[1:])]
    named = [f"{chr(ord('a') + place)}{part}" for place, part in enumerate(parts)]
    rng.shuffle(named)
    return "".join(named), totals


STYLES = {  # share of the documents
    "each": 0.13,  # every total
    "wordy": 0.09,  # every total, and the last one four times more
    "second": 0.12,  # every second total, and the last
    "third": 0.09,  # every third
    "direct": 0.45,  # no thinking, and one in ten has a planted wrong answer
    "empty": 0.06,  # <think></think>
    "open": 0.06,  # thinking that never closes
}
SLIPS = 0.02  # of the written totals are wrong
PLANTED = 0.1  # of the direct answers are wrong
TASKS: dict[str, Task] = {
    "sums": Task(draw_sum, 2),
    "products": Task(draw_product, 1),
    "shuffled": Task(draw_shuffled, 2, (4, 6), 6),
}


def document(name: str, rng: random.Random) -> str:
    """A problem that is not held out, with an answer in a random style."""
    task = find(name)
    problem, totals = drawn(name, rng, (2, task.most))
    style = rng.choices(list(STYLES), list(STYLES.values()))[0]
    return f"{problem.prompt}{answer(task, rng, totals, style)}{END}"


def answer(task: Task, rng: random.Random, totals: Sequence[int], style: str) -> str:
    """The completion of a problem in a style, without END."""
    last = totals[-1]
    if style == "direct":
        return str(slipped(task, rng, last, PLANTED))
    if style == "empty":
        return f"{OPEN}{CLOSE}{last}"
    stride = {"second": 2, "third": 3}.get(style, 1)
    chosen = [*totals[1:-1][stride - 1 :: stride], last]
    written = [f"{slipped(task, rng, total, SLIPS):0{task.digits}}" for total in chosen]
    if style == "wordy":
        written += [written[-1]] * 4
    thought = "".join(written)
    if style == "open":
        return OPEN + thought
    return f"{OPEN}{thought}{CLOSE}{int(written[-1])}"


def slipped(task: Task, rng: random.Random, total: int, share: float) -> int:
    """The total, or with this probability a number near it that has as many digits."""
    if rng.random() >= share:
        return total
    return min(max(0, total + rng.choice((-2, -1, 1, 2))), 10**task.digits - 1)


def corpus(name: str, seed: int, documents: int = 120_000) -> tuple[bytes, bytes]:
    """The base model's text of a task, and a short one for validation."""
    rng = random.Random(f"{name} text {seed}")
    texts = ["".join(document(name, rng) for _ in range(count)) for count in (documents, documents // 60)]
    return texts[0].encode(), texts[1].encode()


def sums(seed: int) -> tuple[bytes, bytes]:
    """The text of `lm train --preset reason`."""
    return corpus("sums", seed)


def products(seed: int) -> tuple[bytes, bytes]:
    """The text of `lm train --preset reason --data.generator products`."""
    return corpus("products", seed)


def shuffled(seed: int) -> tuple[bytes, bytes]:
    """The text of `lm train --preset reason --data.generator shuffled`."""
    return corpus("shuffled", seed)


class Scored:
    """A task of another package, which scores answers by itself, as those of reasoning-gym do.

    Its items are dicts with "question" and "answer"; `score_answer(answer, entry)` returns 0..1.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset
        self.entries: dict[str, Any] = {}

    def problems(self, seed: int, count: int) -> list[Problem]:
        rng = random.Random(seed)
        entries = [self.dataset[rng.randrange(len(self.dataset))] for _ in range(count)]
        found = [Problem(f"{entry['question']}=", str(entry["answer"]), "scored") for entry in entries]
        self.entries |= {problem.prompt: entry for problem, entry in zip(found, entries)}
        return found

    def score(self, problem: Problem, completion: str, ended: bool = True) -> tuple[float, bool, bool]:
        completion, _, _ = completion.partition(END)
        form = re.fullmatch(rf"{OPEN}[^<>]*{CLOSE}(?:(?!{OPEN}|{CLOSE}).)+", completion, re.DOTALL)
        in_form = ended and form is not None
        said = completion.rpartition(CLOSE)[2]
        credit = float(self.dataset.score_answer(said, self.entries[problem.prompt])) if ended else 0.0
        return credit if in_form else 0.0, credit == 1.0, in_form
