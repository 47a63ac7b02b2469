"""Is distilling a reasoning model better than reinforcement learning on the small model itself?

lm experiment distillation [--quick]  ->  experiments/results/distillation.json and .png

Claim: a small dense model that learns the completions of a large reasoning model, by likelihood alone, beats
the same model after reinforcement learning (R1, arXiv 2501.12948 section 4.1, table 6: Qwen-32B 0.726
distilled, 0.470 with RL). Here the student is dense, with MLPs a third as wide as the experts that a token of
the teacher uses. Both ways have as many completions: the student's own, or the right ones of the teacher's.
"""

import argparse
from pathlib import Path
from typing import Any

from lm import checkpoint
from rl import stages, tasks

from . import command, common, reasoning

UPDATES = 120  # as reinforcement learning makes
STUDENT = {"num_dense_layers": 2, "hidden_dim": 64}  # a token of the teacher uses 3 experts of 64


def distilled(teacher: Path, student: Path, seed: int, quick: bool) -> dict[str, Any]:
    """Teach a dense base the teacher's right completions -> a row"""
    problems = tasks.problems("sums", 100 + seed, 16 if quick else 960)
    examples = stages.rejection(checkpoint.load(teacher).float(), problems, 4 if quick else 8, seed)
    model = checkpoint.load(student).float()
    if examples:
        stages.finetune(model, examples, 2 if quick else UPDATES, seed=seed)
    held_out = reasoning.held_out(argparse.Namespace(quick=quick))
    return {"examples": len(examples), **reasoning.measured(model, held_out)}


def main(arguments: list[str] | None = None) -> None:
    """Train teachers and dense bases, then teach the dense ones in both ways."""
    given = command.options("distillation", __doc__, reasoning.STEPS, arguments)
    bases, dense = reasoning.bases(given), reasoning.bases(given, model=STUDENT)
    options = reasoning.options(given)
    learners = {
        (name, seed): reasoning.Learner(folders[seed], reasoning.seeded(options, seed))
        for name, folders in (("teacher", bases), ("dense, RL", dense))
        for seed in folders
    }
    found = reasoning.learn_all(learners, given)
    with common.processes(given.jobs) as pool:
        running = {
            ("dense, distilled", seed): pool.submit(
                distilled, given.runs / found["teacher", seed]["run"], folder, seed, given.quick
            )
            for seed, folder in dense.items()
        }
        found |= common.wait(running, lambda name, row: f"{name}: pass@1 {row['pass_at_1']:.3f}")
    names = ("teacher", "dense, RL", "dense, distilled")
    rows = [
        {"model": name, "seed": seed, "steps": given.steps, **found[name, seed]}
        for name in names
        for seed in bases
    ]
    value = {name: [found[name, seed]["pass_at_1"] for seed in bases] for name in names}
    before = [found["dense, RL", seed]["base"]["pass_at_1"] for seed in bases]
    table = [["", "pass@1", "length (tokens)"], ["dense base", common.shown(before), ""]]
    for name in names:
        lengths = [found[name, seed]["length"] for seed in bases]
        table.append([name, common.shown(value[name]), common.shown(lengths, 1)])
    answer = [
        f"The dense base solves {common.shown(before)}; reinforcement learning makes that "
        f"{common.shown(value['dense, RL'])}, and learning the completions of its teacher (at "
        f"{common.shown(value['teacher'])}) makes it {common.shown(value['dense, distilled'])}."
    ]
    gaps = [a - b for a, b in zip(value["dense, distilled"], value["dense, RL"])]
    common.write("distillation", given, common.as_claimed(gaps), answer, table, rows, {})
    figure, axis = common.plt.subplots(figsize=(5, 2.2))
    common.points(axis, {"dense base": before, **value}, "pass@1, held out")
    common.save(figure, "distillation", given)


if __name__ == "__main__":
    main()
