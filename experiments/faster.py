"""Does a mixture of experts train faster, with fewer parameters at work?

python -m experiments.faster [--steps N] [--seeds N] [--quick]  ->  experiments/results/faster.json and .png

Claim: "MoE trains models faster with fewer parameters" (of DeepSeek-V3, in the news); DeepSeekMoE (arXiv
2401.06066) table 1: at equal FLOPs a MoE reaches 1.808 where a dense model reaches 2.060.
Prediction: a MoE needs at most half of the FLOPs that a dense model of equal active width needs for the same
loss; in seconds less is left, since small products are slow.

Every budget of steps is a training of its own, with its own rise and fall of the learning rate. Losses and
seconds are measured apart: seconds are steps times the quickest step, all models taking turns.
"""

import dataclasses
import sys
from typing import Any

import matplotlib

from lm import count
from lm.config import Config, ModelConfig

from . import common

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BUDGETS = (1 / 8, 1 / 4, 1 / 2, 1)  # of the steps


def with_experts(config: ModelConfig, **changes: int) -> ModelConfig:
    """The model with experts in every layer, changed."""
    moe = dataclasses.replace(config.moe, **changes)
    return dataclasses.replace(config, moe=moe, num_dense_layers=0)


def dense(config: ModelConfig, hidden_dim: int) -> ModelConfig:
    """The model without experts."""
    return dataclasses.replace(config, num_dense_layers=config.num_layers, hidden_dim=hidden_dim)


def models(config: ModelConfig) -> dict[str, ModelConfig]:
    """The MoE, what it is compared with, and what of it is varied, at equal active width all but one."""
    moe = config.moe
    width = (moe.top_k + moe.num_shared_experts) * moe.hidden_dim  # what a token meets
    whole = (moe.num_experts + moe.num_shared_experts) * moe.hidden_dim
    found = {
        "MoE": with_experts(config),
        "dense": dense(config, width),
        "dense, as many parameters": dense(config, whole),
    }
    for number in (8, 32, 64, 128):
        found[f"{number} experts"] = with_experts(config, num_experts=number)
    for times in (2, 4):
        cut = {name: getattr(moe, name) * times for name in ("num_experts", "top_k", "num_shared_experts")}
        finer = with_experts(config, hidden_dim=moe.hidden_dim // times, **cut)
        found[f"{times} times as fine"] = finer
    found["no shared expert"] = with_experts(config, num_shared_experts=0, top_k=width // moe.hidden_dim)
    return found


def ratios(rows: list[dict[str, Any]], of: str, to: str, key: str) -> list[float]:
    """For each seed, what `of` needs for the loss that `to` has in the end, as a share of what `to` needs.

    Seeds for which its curve does not meet that loss are left out.
    """
    found = []
    for last in (row for row in rows if row["model"] == to):
        curve = sorted(
            (row for row in rows if row["model"] == of and row["seed"] == last["seed"]),
            key=lambda row: row["steps"],
        )
        longest = max(row["steps"] for row in rows if row["model"] == to)
        if last["steps"] == longest:
            xs, losses = ([row[name] for row in curve] for name in (key, "held_out_loss"))
            x = common.reach(xs, losses, last["held_out_loss"])
            found += [] if x is None else [x / last[key]]
    return found


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How much less a MoE needs, with the interval of the mean over seeds."""
    found: dict[str, Any] = {}
    for rival in ("dense", "dense, as many parameters"):
        for key in ("flops", "seconds"):
            values = ratios(rows, "MoE", rival, key)
            low, high = common.interval(values) if len(values) > 1 else (None, None)
            found[f"{key} that MoE needs for the loss of: {rival}"] = {
                "of_each_seed": [round(value, 3) for value in values],
                "mean": round(sum(values) / len(values), 3) if values else None,
                "interval_95": [None if end is None else round(end, 3) for end in (low, high)],
            }
    return found


def draw(rows: list[dict[str, Any]], path: Any) -> None:
    """Loss against FLOPs and against seconds, then what was varied."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), sharey=True)
    curves = common.by_model(rows)
    for axis, key in zip(axes, ("flops", "seconds")):
        for name, x in common.by_model(rows, key).items():
            if len(curves[name]) > 1:
                points = [common.mean_and_error(losses) for losses in curves[name].values()]
                means, errors = zip(*points)
                at = [values[0] for values in x.values()]
                axis.errorbar(at, means, errors, marker="o", ms=3, label=name)
        axis.set_xscale("log")
        axis.set_xlabel({"flops": "FLOPs of training", "seconds": "seconds of training"}[key])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out loss, nats a byte")
    axes[0].legend(frameon=False)
    last = {name: common.mean_and_error(list(by_steps.values())[-1]) for name, by_steps in curves.items()}
    means, errors = zip(*last.values())
    axes[2].errorbar(range(len(last)), means, errors, fmt="o", ms=4)
    axes[2].set_xticks(range(len(last)), last, rotation=60, ha="right")
    axes[2].grid(alpha=0.3)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main() -> None:
    """Train, time, compare, draw."""
    given = common.options(__doc__, 1600)
    config = Config.preset("nano" if given.quick else "toy")
    kinds = models(config.model)
    if given.quick:
        given.out.mkdir(parents=True, exist_ok=True)
        config = common.quick(config, given.out)
        kinds = {name: kinds[name] for name in ("MoE", "dense", "dense, as many parameters", "8 experts")}
    configs = {name: dataclasses.replace(config, model=model) for name, model in kinds.items()}
    seconds = common.step_seconds(configs, 2 if given.quick else 20)
    rows = []
    for seed in range(given.seeds):
        for name, one in configs.items():
            compared = name in ("MoE", "dense", "dense, as many parameters")
            for budget in BUDGETS if compared else (1,):
                row = common.trained(name, common.with_steps(one, round(given.steps * budget), seed))
                row["seconds"] = round(row["steps"] * seconds[name], 2)
                rows.append(row)
    found = {
        "claim": (__doc__ or "").split("\n\n")[2],
        "steps": given.steps,
        "seeds": given.seeds,
        "context": config.train.context,
        "models": {
            name: {
                **common.sizes(model),
                "flops_per_token": count.training_flops_per_token(model, config.train.context),
            }
            for name, model in kinds.items()
        },
        "milliseconds_a_step": {name: round(1e3 * value, 2) for name, value in seconds.items()},
        **summary(rows),
        "trainings": rows,
    }
    common.write("faster", found, given.out)
    draw(rows, given.out / "faster.png")
    for name, value in found.items():
        if name.startswith(("flops", "seconds")):
            print(name, value, file=sys.stdout)


if __name__ == "__main__":
    main()
