"""R1's other stages: a cold start, rejection sampling with fine-tuning, distillation into another model."""

import random
from collections.abc import Sequence

import torch

from lm.config import TrainConfig
from lm.inference.engine import Engine
from lm.model import Transformer
from lm.optim import build_optimizer

from . import objectives, tasks
from .rollout import TOKENIZER, Sample, Sampling, collect, draw, judge
from .tasks import Problem

Example = tuple[Problem, str]  # a problem and a completion to learn, without END


def cold_start(name: str, seed: int, count: int) -> list[Example]:
    """Well-formed, right examples that think in the finest steps, as R1's cold start (R1 section 2.3.1)."""
    task, rng = tasks.find(name), random.Random(f"{name} cold {seed}")
    found: list[Example] = []
    while len(found) < count:
        problem, totals = tasks.drawn(name, rng, task.levels)
        text = tasks.answer(task, rng, totals, "each")
        if tasks.score(problem, text)[0]:
            found.append((problem, text))
    return found


def rejection(
    model: Transformer, problems: Sequence[Problem], size: int, seed: int, max_new_tokens: int = 64
) -> list[Example]:
    """The right completions among `size` for each problem, each text once a problem."""
    engine = Engine(model, max_batch=256)
    samples = draw(engine, problems, seed, Sampling(size, max_new_tokens))
    rollout = collect(problems, samples)
    right = (rollout.rewards > 0).flatten().tolist()
    chosen = dict.fromkeys(
        (rollout.problems[row // size], text.partition(tasks.END)[0])
        for row, (text, good) in enumerate(zip(rollout.completions, right))
        if good
    )
    return list(chosen)


def finetune(
    model: Transformer,
    examples: Sequence[Example],
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 8e-4,
    seed: int = 0,
) -> list[float]:
    """Maximise the likelihood of completions given their problems, in place -> the loss of each step

    Used for the cold start, for rejection sampling and for distillation: R1's students learn the teacher's
    completions by likelihood alone (R1 section 2.4).

    Raises:
        ValueError: there are no examples.
    """
    if not examples:
        raise ValueError("no examples to learn from: none of the completions was right")
    config = TrainConfig(learning_rate=learning_rate)
    optimizer = build_optimizer(model, config)
    order, losses = random.Random(seed), []
    queue: list[Example] = []
    model.train()
    for _ in range(steps):
        while len(queue) < batch_size:
            queue += order.sample(list(examples), len(examples))
        batch, queue = queue[:batch_size], queue[batch_size:]
        rollout = collect([problem for problem, _ in batch], [as_sample(*example) for example in batch])
        loss = objectives.mean(-judge(model, rollout).log_probs, rollout.mask, "token")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def as_sample(problem: Problem, completion: str) -> Sample:
    """An example in the form of a sampled completion."""
    tokens = TOKENIZER.encode(completion + tasks.END)
    return Sample(TOKENIZER.encode(problem.prompt), tokens, True, [0.0] * len(tokens), None)
