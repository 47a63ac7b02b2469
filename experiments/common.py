"""What experiments share: models trained over several seeds, timed in turns, and what their curves say."""

import argparse
import contextlib
import dataclasses
import io
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lm import count, data, machine, runs, train
from lm.config import Config, ModelConfig
from lm.model import Transformer

RESULTS = Path(__file__).parent / "results"
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 %, 1 to 9 freedoms


def options(description: str | None, steps: int) -> argparse.Namespace:
    """The options of an experiment that trains -> .steps, .seeds, .quick, .out"""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=steps, help="of the longest training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a few steps of tiny models: does it run?")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder for the result")
    given = parser.parse_args()
    if given.quick:
        given.steps, given.seeds = 8, 2
    if given.steps < 8 or not 2 <= given.seeds <= 10:
        parser.error(f"steps={given.steps} must be at least 8, seeds={given.seeds} lie in 2..10")
    return given


def quick(config: Config, folder: Path) -> Config:
    """The training on a short text of its own, so that a run takes a second."""
    text = folder / "text.txt"
    text.write_bytes((data.CORPUS / "validation.txt").read_bytes()[:40_000])
    return dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(text)))


def with_steps(config: Config, steps: int, seed: int = 0) -> Config:
    """The same training for so many steps, with its own rise and fall of the learning rate."""
    settings = dataclasses.replace(
        config.train,
        steps=steps,
        seed=seed,
        warmup=min(config.train.warmup, steps // 4),
        eval_every=steps,
        sample_every=steps + 1,
        save_every=steps + 1,
    )
    return dataclasses.replace(config, train=settings)


def trained(name: str, config: Config) -> dict[str, Any]:
    """Train -> what came of it, a row of a result file."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        train.train(config, Path(folder) / "run")
        last = runs.read_metrics(Path(folder) / "run")[-1]
    row = {
        "model": name,
        "seed": config.train.seed,
        "steps": config.train.steps,
        "tokens": last["tokens"],
        "flops": last["tokens"] * count.training_flops_per_token(config.model, config.train.context),
        "held_out_loss": round(last["val_loss"], 5),
        "max_violations": [round(value, 4) for value in last["max_violations"]],
    }
    print(json.dumps(row), flush=True)
    return row


def trainer(config: Config, model: Transformer, folder: Path) -> train.Trainer:
    """A trainer of this model, to be led step by step, on the windows of the config's seed."""
    texts = data.load(config.data, config.model.vocab_size)
    windows = data.Windows(texts[0], config.train.context, config.train.seed)
    return train.Trainer(config, folder, model, windows, data.Windows(texts[1], config.train.context))


def step_seconds(configs: Mapping[str, Config], rounds: int) -> dict[str, float]:
    """The quickest step of each training: they take turns, so that a busy machine is busy for all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {}
        for name, config in configs.items():
            model = Transformer(config.model)
            model.initialize(torch.Generator().manual_seed(0))
            trainers[name] = trainer(config, model, Path(folder))
        for step in range(1, rounds + 2):
            for name, one in trainers.items():
                began = time.perf_counter()
                one.step(min(step, one.config.train.steps))
                seconds[name].append(time.perf_counter() - began)
    return {name: min(values[1:]) for name, values in seconds.items()}


def sizes(config: ModelConfig) -> dict[str, int]:
    """Parameters, all and active."""
    return {"parameters": count.total_parameters(config), "active": count.active_parameters(config)}


def reach(xs: Sequence[float], losses: Sequence[float], level: float) -> float | None:
    """The x at which a falling curve comes to a level, straight between points over log x.

    -> None if it starts below it, or never comes to it
    """
    for (x, loss), (next_x, next_loss) in zip(zip(xs, losses), zip(xs[1:], losses[1:])):
        if loss >= level >= next_loss and loss > next_loss:
            share = (loss - level) / (loss - next_loss)
            return math.exp(math.log(x) + share * (math.log(next_x) - math.log(x)))
    return None


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Where the mean of which these are 2 to 10 samples lies, 95 % (Student's t)."""
    mean, error = mean_and_error(values)
    away = STUDENT[len(values) - 2] * error
    return mean - away, mean + away


def by_model(rows: Iterable[dict[str, Any]], key: str = "held_out_loss") -> dict[str, dict[int, list[float]]]:
    """Rows -> {model: {steps: its values, a seed each}}"""
    found: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        found.setdefault(row["model"], {}).setdefault(row["steps"], []).append(row[key])
    return found


def write(name: str, found: dict[str, Any], folder: Path) -> None:
    """A result with its machine, as NAME.json."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"machine": machine.describe(), **found}
    (folder / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n")
