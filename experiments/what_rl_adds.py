"""What does reinforcement learning add to its own samples?

lm experiment what_rl_adds [--quick]  ->  experiments/results/what_rl_adds.json and .png

Claim: rewards make the model better than fine-tuning on the right ones among as many completions of the base
model does (R1, arXiv 2501.12948 section 2.3.3, uses both), and nothing is learned from a random reward. For
large models, RL raises pass@1 but hardly pass@k (arXiv 2504.13837). Prediction: GRPO is above one-shot
rejection fine-tuning by 0.1 in every seed, a random reward does not raise pass@1 by more than 0.03, and at
k = 16 the base model already solves most of what GRPO solves at k = 1.
"""

import argparse
import random
from pathlib import Path
from typing import Any

from lm import checkpoint
from lm.inference.engine import Engine
from rl import scaling, stages, tasks

from . import command, common, reasoning

UPDATES = 120  # as GRPO makes
COUNTS = (1, 2, 4, 8, 16)


def votes_of(model: Any, problems: list[tasks.Problem]) -> dict[str, Any]:
    """Majority vote and any of k."""
    found = scaling.votes(Engine(model, max_batch=256), problems, COUNTS)
    return {name: [round(value, 4) for value in values] for name, values in found.items()}


def finetuned(kind: str, base: Path, seed: int, quick: bool) -> dict[str, Any]:
    """Fine-tune a base model on examples, as often as GRPO updates it -> a row"""
    model = checkpoint.load(base).float()
    problems = tasks.problems("sums", seed, 16 if quick else 960)
    given = argparse.Namespace(quick=quick)
    if kind == "rejection, once":
        examples = stages.rejection(model, problems, 4 if quick else 8, seed)
    else:  # the base's own kind of text, for as many updates
        rng = random.Random(f"more {seed}")
        texts = [tasks.document("sums", rng) for _ in range(200 if quick else 7680)]
        split = [text.removesuffix(tasks.END).partition("=") for text in texts]
        examples = [(tasks.Problem(prompt + "=", ""), completion) for prompt, _, completion in split]
    if examples:
        stages.finetune(model, examples, 2 if quick else UPDATES, seed=seed)
    held_out = reasoning.held_out(given)
    return {
        "examples": len(examples),
        **reasoning.measured(model, held_out),
        **votes_of(model, held_out[:256]),
    }


def base_of(base: Path, quick: bool) -> dict[str, Any]:
    """The base model itself -> a row"""
    model, held_out = checkpoint.load(base).float(), reasoning.held_out(argparse.Namespace(quick=quick))
    return {**reasoning.measured(model, held_out), **votes_of(model, held_out[:256])}


def main(arguments: list[str] | None = None) -> None:
    """Compare GRPO with what needs no reinforcement learning, and with a reward that says nothing."""
    given = command.options("what_rl_adds", __doc__, reasoning.STEPS, arguments)
    bases = reasoning.bases(given)
    kinds = {
        "GRPO": reasoning.options(given),
        "rejection, each step": reasoning.options(given, objective="rft"),
        "random reward": reasoning.options(given, reward="random"),
    }
    learners = {
        (name, seed): reasoning.Learner(folder, reasoning.seeded(options, seed))
        for name, options in kinds.items()
        for seed, folder in bases.items()
    }
    problems = reasoning.held_out(given)[:256]
    found = reasoning.learn_all(learners, given)
    with common.processes(given.jobs) as pool:
        running = {
            ("base", seed): pool.submit(base_of, folder, given.quick) for seed, folder in bases.items()
        }
        for kind in ("rejection, once", "more of the base's text"):
            for seed, folder in bases.items():
                running[kind, seed] = pool.submit(finetuned, kind, folder, seed, given.quick)
        found |= common.wait(running, lambda name, row: f"{name}: pass@1 {row['pass_at_1']:.3f}")
    for row in found.values():
        if "majority" not in row:
            row |= votes_of(checkpoint.load(given.runs / row["run"]), problems)
    names = (
        "base",
        "GRPO",
        "rejection, each step",
        "rejection, once",
        "more of the base's text",
        "random reward",
    )
    rows = [
        {"model": name, "seed": seed, "steps": given.steps, **found[name, seed]}
        for name in names
        for seed in bases
    ]
    value = {name: [found[name, seed]["pass_at_1"] for seed in bases] for name in names}
    any16 = {name: [found[name, seed]["any"][-1] for seed in bases] for name in names}
    vote = {name: [found[name, seed]["majority"][-1] for seed in bases] for name in names}
    table = [["", "pass@1", "majority of 16", "any of 16", "length (tokens)"]]
    for name in names:
        lengths = [found[name, seed]["length"] for seed in bases]
        cells = [common.shown(part[name]) for part in (value, vote, any16)]
        table.append([name, *cells, common.shown(lengths, 1)])
    base, grpo, online, once, more, noise = (common.shown(value[name]) for name in names)
    answer = [
        f"pass@1 of the base is {base}. GRPO reaches {grpo}; fine-tuning on the right ones among as many "
        f"completions of the base, once, {once}; the same with new samples at each step, {online}. A random "
        f"reward ends at {noise}, the base's own text for as many updates at {more}. At least one of 16 "
        f"completions of the base is right for {common.shown(any16['base'])} of the problems, of GRPO's for "
        f"{common.shown(any16['GRPO'])}."
    ]
    claimed = common.as_claimed(
        [a - b - 0.1 for a, b in zip(value["GRPO"], value["rejection, once"])],
        [b + 0.03 - a for a, b in zip(value["random reward"], value["base"])],
        [a - 0.5 * b for a, b in zip(any16["base"], value["GRPO"])],
    )
    common.write("what_rl_adds", given, claimed, answer, table, rows, {}, counts=COUNTS)
    figure, axis = common.plt.subplots(figsize=(6, 4), layout="constrained")
    for name in names:
        for kind, line in (("any", "--"), ("majority", "-")):
            curves = [found[name, seed][kind] for seed in bases]
            mean = [common.mean(column) for column in zip(*curves)]
            colour = f"C{names.index(name)}"
            axis.plot(COUNTS, mean, line, color=colour, label=name if kind == "majority" else None)
    axis.set(xlabel="completions of a problem", ylabel="held-out problems solved")
    common.log_axis(axis, COUNTS)
    axis.set_title("majority vote (solid) and any (dashed)", fontsize=10)
    common.tidy(axis)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    common.save(figure, "what_rl_adds", given)


if __name__ == "__main__":
    main()
