"""Does accuracy grow with the tokens spent at test time?

lm experiment thinking [--quick]  ->  experiments/results/thinking.json and .png

Claim: accuracy rises with the time spent thinking (OpenAI o1, 2024) and with the number of votes
(self-consistency, arXiv 2203.11171). Prediction: after GRPO, accuracy rises by at least 0.5 from no thought
to free thought, a majority of 16 is above one completion by 0.1 before GRPO and by 0.05 after, and one
completion after GRPO beats a vote of 16 before. A thought is closed after a number of bytes, or kept open
until it has that number; 256 held-out problems, one completion each.
"""

from typing import Any

from lm import checkpoint
from lm.inference.engine import Engine
from lm.model import Transformer
from rl import scaling

from . import command, common, reasoning

BUDGETS = (0, 2, 4, 6, 8, 10, 12, 14, None)  # bytes of thought, at most; None: free
WITHHELD = (4, 8, 12, 16, 20)  # bytes of thought, at least
COUNTS = (1, 2, 4, 8, 16)


def curves(model: Transformer, problems: list[Any]) -> dict[str, Any]:
    """Accuracy by length of thought and by number of votes."""
    withheld = [
        scaling.accuracy(problems, scaling.think(model, problems, max(24, least), least))
        for least in WITHHELD
    ]
    found = {"budget": scaling.budget_curve(model, problems, BUDGETS), "withheld": withheld}
    found |= scaling.votes(Engine(model, max_batch=256), problems, COUNTS)
    return {name: [round(value, 4) for value in values] for name, values in found.items()}


def main(arguments: list[str] | None = None) -> None:
    """Train as in r1_zero, then measure each base and its trained model."""
    given = command.options("thinking", __doc__, reasoning.STEPS, arguments)
    bases = reasoning.bases(given)
    options = reasoning.options(given)
    learners = {
        seed: reasoning.Learner(folder, reasoning.seeded(options, seed)) for seed, folder in bases.items()
    }
    trained = reasoning.learn_all(learners, given)
    problems = reasoning.held_out(given)[:256]
    rows: list[dict[str, Any]] = []
    for seed, folder in bases.items():
        for name, path in (("before", folder), ("after", given.runs / trained[seed]["run"])):
            rows.append({"model": name, "seed": seed, "steps": given.steps}
                        | curves(checkpoint.load(path).float(), problems))  # fmt: skip
            print(f"{name} GRPO, seed {seed}: {rows[-1]['budget']}", flush=True)
    of = {name: [row for row in rows if row["model"] == name] for name in ("before", "after")}

    def column(name: str, kind: str, at: int) -> list[float]:
        return [row[kind][at] for row in of[name]]

    head = ["", *("free" if budget is None else f"{budget} bytes" for budget in BUDGETS)]
    table = [head]
    for name in of:
        cells = [common.shown(column(name, "budget", at)) for at in range(len(BUDGETS))]
        table.append([f"{name} GRPO", *cells])
    gain = [b - a for a, b in zip(column("after", "budget", 0), column("after", "budget", -1))]
    vote = {
        name: [b - a for a, b in zip(column(name, "majority", 0), column(name, "majority", -1))]
        for name in of
    }
    better = [a - b for a, b in zip(column("after", "majority", 0), column("before", "majority", -1))]
    votes = {name: common.shown(values) for name, values in vote.items()}
    answer = [
        f"After GRPO accuracy rises by {common.shown(gain)} from no thought to free thought. A majority of "
        f"16 adds {votes['before']} before and {votes['after']} after GRPO. One completion after GRPO solves "
        f"{common.shown(better)} more than a vote of 16 before."
    ]
    claimed = common.as_claimed(
        [value - 0.5 for value in gain],
        [value - 0.1 for value in vote["before"]],
        [value - 0.05 for value in vote["after"]],
        better,
    )
    more = {"budgets": BUDGETS, "withheld_until": WITHHELD, "counts": COUNTS}
    common.write("thinking", given, claimed, answer, table, rows, {}, **more)
    figure, axes = common.plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", sharey=True)
    for name, colour in (("before", "C0"), ("after", "C1")):
        budget = [common.mean(column(name, "budget", at)) for at in range(len(BUDGETS) - 1)]
        axes[0].plot(BUDGETS[:-1], budget, "o-", color=colour, label=f"{name} GRPO, closed")
        withheld = [common.mean(column(name, "withheld", at)) for at in range(len(WITHHELD))]
        axes[0].plot(WITHHELD, withheld, "s:", color=colour, label=f"{name} GRPO, kept open")
        majority = [common.mean(column(name, "majority", at)) for at in range(len(COUNTS))]
        axes[1].plot(COUNTS, majority, "o-", color=colour, label=f"{name} GRPO, majority")
        some = [common.mean(column(name, "any", at)) for at in range(len(COUNTS))]
        axes[1].plot(COUNTS, some, "s:", color=colour, label=f"{name} GRPO, any")
    axes[0].set(xlabel="bytes of thought", ylabel="accuracy, held out")
    axes[1].set(xlabel="completions")
    common.log_axis(axes[1], COUNTS)
    for axis in axes:
        common.tidy(axis)
        axis.legend(frameon=False, fontsize=8)
    common.save(figure, "thinking", given)


if __name__ == "__main__":
    main()
