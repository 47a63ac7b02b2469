"""Shared by the experiments on reinforcement learning: bases and runs over several seeds, kept and reused."""

import argparse
import contextlib
import dataclasses
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lm import checkpoint
from lm import run as runs
from lm.config import Config
from lm.inference.engine import Engine
from lm.model import Transformer
from rl import scaling, tasks, train
from rl.config import ReasonConfig
from rl.rollout import Sampling

from . import common

STEPS = 4000  # of the base model
HELD_OUT = 512  # problems
Measure = Callable[[Transformer], dict[str, Any]]


class Learner(NamedTuple):
    """A run of reinforcement learning to do."""

    base: Path
    config: ReasonConfig


def bases(given: argparse.Namespace, **changes: Mapping[str, Any]) -> dict[int, Path]:
    """The base model of each seed, trained if it is not there: the preset reason -> seed -> its run folder"""
    config = common.changed(Config.preset("reason"), **{"train": {"dtype": "float32"}, **changes})
    common.train_all({"base": config}, given)
    seeds = range(given.seeds)
    return {seed: given.runs / common.key(common.with_steps(config, given.steps, seed)) for seed in seeds}


def options(given: argparse.Namespace, **changes: Any) -> ReasonConfig:
    """GRPO's options with changes, or with --quick two tiny steps."""
    fixed: dict[str, Any] = {"eval_problems": HELD_OUT, "eval_every": 10, "save_every": 60, "keep": 1}
    if given.quick:
        fixed |= {"steps": 2, "prompts": 4, "size": 4, "eval_problems": 8, "eval_every": 1}
        changes = {key: value for key, value in changes.items() if key not in ("steps", "updates")}
    return ReasonConfig(**{**fixed, **changes})


def compare(
    given: argparse.Namespace, kinds: Mapping[str, Mapping[str, Any]]
) -> dict[tuple[str, int], dict[str, Any]]:
    """Train the base of each seed in each way, changes of GRPO's options -> a row for each (name, seed)"""
    folders = bases(given)
    learners = {
        (name, seed): Learner(folder, seeded(options(given, **changes), seed))
        for name, changes in kinds.items()
        for seed, folder in folders.items()
    }
    return learn_all(learners, given)


def learn_all(
    learners: Mapping[Any, Learner], given: argparse.Namespace, measure: Measure | None = None
) -> dict[Any, dict[str, Any]]:
    """Run each -> a row for each; those found in `given.runs` are reused."""
    different = {key(one): (name, one) for name, one in learners.items()}  # two names may share a run
    with common.processes(given.jobs) as pool:
        running = {name: pool.submit(learned, one, given.runs, measure) for name, one in different.values()}
        done = common.wait(running, lambda name, row: f"{name}: pass@1 {row['pass_at_1']:.3f}")
    return {name: dict(done[different[key(one)][0]]) for name, one in learners.items()}


def key(one: Learner) -> str:
    """The folder name of a run: a hash of its base and its options."""
    return hashlib.sha256(f"{one.base.name} {one.config.to_toml()}".encode()).hexdigest()[:16]


def learned(one: Learner, folder: Path, measure: Measure | None = None) -> dict[str, Any]:
    """Run, resume or reuse -> a row of a result file"""
    run = folder / key(one)
    kept = (run / "config.toml").exists()
    with contextlib.redirect_stdout(io.StringIO()):
        if train.train(one.config, None if kept else one.base, run, resume=kept):
            raise KeyboardInterrupt
    log = runs.read_metrics(run)
    evaluated = [{"step": 0, **log[0]["base"]}] + [
        {"step": row["step"], **row["held_out"]} for row in log if "held_out" in row
    ]
    shown = ("pass_at_1", "in_form", "length")
    row = {
        "run": run.name,
        **{name: round(evaluated[-1][name], 4) for name in shown},
        "base": {name: round(evaluated[0][name], 4) for name in shown},
        "evaluated_after": [found["step"] for found in evaluated],
        "curve": {name: [round(found[name], 4) for found in evaluated] for name in shown},
        **{name: log[-1][name] for name in ("responses", "tokens", "length_right", "length_wrong")},
        "entropy": round(log[-1]["entropy"], 4),
        "flat": round(sum(found["flat"] for found in log[-10:]) / len(log[-10:]), 4),
        "experts_moved": [found["experts_moved"] for found in log if "experts_moved" in found],
        "seconds": log[-1]["seconds"],
    }
    return row | (measure(checkpoint.load(run)) if measure else {})


def held_out(given: argparse.Namespace, task: str = "sums", level: int | None = None) -> list[tasks.Problem]:
    """The held-out problems that every model of an experiment is measured on."""
    return tasks.problems(task, 0, 8 if given.quick else HELD_OUT, level, held_out=True)


def measured(model: Transformer, problems: Sequence[tasks.Problem]) -> dict[str, float]:
    """pass@1, form and length of a model."""
    found = scaling.measure(Engine(model, max_batch=256), list(problems), Sampling(1))
    return {name: round(found[name], 4) for name in ("pass_at_1", "in_form", "length")}


def seeded(config: ReasonConfig, seed: int) -> ReasonConfig:
    return dataclasses.replace(config, seed=seed)
