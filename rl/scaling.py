"""Test-time scaling, o1's curves: accuracy against the length of thought, and against the number of votes."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lm.inference.engine import Engine
from lm.inference.sampling import sampler
from lm.model import Transformer

from . import tasks
from .rollout import END, TOKENIZER, Sampling, sample
from .tasks import CLOSE, OPEN, Problem

EXAMPLES = 4  # problems whose completions `measure` keeps
ANSWER = 4  # bytes of an answer after a thought that was closed, at most


@torch.inference_mode()
def think(
    model: Transformer, problems: Sequence[Problem], most: int | None, least: int = 0, seed: int = 0
) -> list[str]:
    """One completion for each problem, whose thought has between `least` and `most` bytes.

    The thought is opened for the model, closed after `most` bytes, and not allowed to close before `least`.
    A "<" and END also close it.

    Args:
        most: None: as long as the model likes, up to 64 bytes.
    """
    opened = [TOKENIZER.encode(problem.prompt + OPEN) for problem in problems]
    widths = sorted({len(tokens) - len(OPEN) for tokens in opened})
    if len(widths) != 1:
        raise ValueError(f"prompts of {widths} bytes: expected at least one prompt, and all of one length")
    longest = 64 if most is None else most
    if not 0 <= least <= longest:
        raise ValueError(f"least={least}, most={longest}: expected 0 <= least <= most, bytes of a thought")
    angle, close = ord(CLOSE[0]), TOKENIZER.encode(CLOSE)
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + row) for row in range(len(opened))]
    choose = sampler(1.0, None, 1.0, generators)
    caches = model.new_caches(len(opened), len(opened[0]) + longest + len(close) + ANSWER)
    written: list[list[int]] = [[] for _ in opened]
    closed = [-1] * len(opened)  # length of each thought; -1: still open
    tokens = torch.tensor(opened)
    for _ in range(longest + len(close) + ANSWER):
        logits = model(tokens, caches).logits[:, -1].clone()
        for row, own in enumerate(written):
            if closed[row] < 0 and len(own) < least:
                logits[row, [angle, END]] = float("-inf")
        drawn = choose(logits)[0].tolist()
        for row, own in enumerate(written):
            if closed[row] < 0 and (len(own) >= longest or drawn[row] in (angle, END)):
                closed[row] = len(own)
            answered = len(own) - closed[row]
            own.append(close[answered] if closed[row] >= 0 and answered < len(close) else drawn[row])
        tokens = torch.tensor([own[-1:] for own in written])
    return [OPEN + TOKENIZER.decode(own).partition(tasks.END)[0] for own in written]


def budget_curve(
    model: Transformer, problems: Sequence[Problem], budgets: Sequence[int | None], seed: int = 0
) -> list[float]:
    """Accuracy with thoughts of at most each budget; None: free."""
    return [accuracy(problems, think(model, problems, budget, seed=seed)) for budget in budgets]


def accuracy(problems: Sequence[Problem], completions: Sequence[str]) -> float:
    """Share of the completions that are right and in form."""
    scores = [tasks.score(problem, text)[0] for problem, text in zip(problems, completions, strict=True)]
    return sum(scores) / len(scores)


def majority(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer, the first of equals; None (a completion without an answer) has no vote."""
    votes = Counter(answer for answer in answers if answer is not None)
    return votes.most_common(1)[0][0] if votes else None


def pass_at_k(total: int, right: int, k: int) -> float:
    """Probability that at least one of k completions drawn from `total` is right (arXiv 2107.03374 eq. 1)."""
    if not 1 <= k <= total or not 0 <= right <= total:
        raise ValueError(
            f"total={total}, right={right}, k={k}: expected 1 <= k <= total and 0 <= right <= total"
        )
    return 1 - math.comb(total - right, k) / math.comb(total, k)


def votes(
    engine: Engine, problems: Sequence[Problem], counts: Sequence[int], seed: int = 0
) -> dict[str, list[float]]:
    """Accuracy of a majority vote among k completions, and the share of problems that any of k gets right."""
    rollout = sample(engine, problems, seed, Sampling(max(counts)))
    size = max(counts)
    in_form = rollout.in_form.flatten().tolist()  # a completion that was cut off has no vote
    answers = [answer_of(text) if whole else None for text, whole in zip(rollout.completions, in_form)]
    groups = [answers[at * size : (at + 1) * size] for at in range(len(problems))]
    right: Tensor = (rollout.rewards > 0).sum(-1)
    return {
        "majority": [
            sum(majority(group[:k]) == problem.answer for group, problem in zip(groups, problems))
            / len(problems)
            for k in counts
        ],
        "any": [sum(pass_at_k(size, int(n), k) for n in right) / len(problems) for k in counts],
    }


def answer_of(completion: str) -> str | None:
    """The answer of a completion in form; None without one."""
    form = tasks.FORM.fullmatch(completion.partition(tasks.END)[0])
    return form[2] if form else None


def measure(engine: Engine, problems: list[Problem], sampling: Sampling, seed: int = 0) -> dict[str, Any]:
    """pass@1 and what goes with it, the means over all completions, and some examples."""
    rollout = sample(engine, problems, seed, sampling)
    return {
        "pass_at_1": float(rollout.rewards.mean()),
        "right": float(rollout.right.float().mean()),
        "in_form": float(rollout.in_form.float().mean()),
        "length": float(rollout.lengths.float().mean()),
        "examples": [
            [problem.prompt, rollout.completions[at * sampling.size].partition(tasks.END)[0]]
            for at, problem in enumerate(problems[:EXAMPLES])
        ],
    }


def as_text(found: dict[str, Any]) -> str:
    """The means of `measure` in one line."""
    return (
        f"pass@1 {found['pass_at_1']:.3f}, form {found['in_form']:.3f}, length {found['length']:.1f} tokens"
    )
