"""Shared by the experiments: cached trainings over several seeds, interleaved timings, statistics, plots."""

import argparse
import concurrent.futures.process
import contextlib
import dataclasses
import hashlib
import inspect
import io
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
import matplotlib.ticker
import torch

from lm import checkpoint, count, data, files, history, machine, train
from lm import run as runs
from lm.config import Config, ModelConfig
from lm.model import Transformer
from lm.parts import find_class

from . import command

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 %, degrees of freedom 1..9
STOPPED: list[int] = []  # in a worker: the signal that stopped its training; it starts no other
K, R = TypeVar("K"), TypeVar("R")
Measure = Callable[[Transformer, Config], dict[str, Any]]


def base(given: argparse.Namespace) -> Config:
    """The config that an experiment changes: the preset mini, or with --quick nano on a short text."""
    if not given.quick:
        return Config.preset("mini")
    text = given.runs / "short.txt"
    if not text.exists():
        text.write_bytes((data.CORPUS / "validation.txt").read_bytes()[:40_000])
    return changed(
        Config.preset("nano"),
        model={"num_dense_layers": 0, "num_layers": 2},
        attention={"q_lora_rank": 0},
        moe={"num_groups": 1, "top_groups": 1, "num_experts": 15, "top_k": 3},
        train={"dtype": "float32", "log_every": 1},
        data={"path": str(text)},
    )


def changed(config: Config, **sections: Mapping[str, Any]) -> Config:
    """The config with changes in model=, attention=, rope=, moe=, train=, data=, each a table."""
    model = dict(sections.pop("model", {}))
    for name in {"attention", "rope", "moe"} & sections.keys():
        model[name] = dataclasses.replace(getattr(config.model, name), **sections.pop(name))
    sections["model"] = model
    parts = {name: dataclasses.replace(getattr(config, name), **table) for name, table in sections.items()}
    return dataclasses.replace(config, **parts)


def with_steps(config: Config, steps: int, seed: int) -> Config:
    """The training with this number of steps and seed, and its own learning-rate schedule."""
    never = steps + 1
    warmup = min(config.train.warmup, steps // 4)
    return changed(
        config,
        train={"steps": steps, "seed": seed, "warmup": warmup}
        | {"eval_every": never, "sample_every": never, "save_every": never},
    )


def train_all(
    configs: Mapping[str, Config],
    given: argparse.Namespace,
    budgets: Mapping[str, Sequence[float]] | None = None,
    measure: Measure | None = None,
) -> list[dict[str, Any]]:
    """Train each config with each seed -> a row for each

    Trainings run in separate processes with one thread each, so that results do not depend on the number of
    jobs. Trainings found in `given.runs`, of this experiment or another, are reused.

    Args:
        budgets: by name, the shares of the steps to train for, each separately; default: all steps.
        measure: returns further entries of a row from the trained model.
    """
    jobs = [
        (name, with_steps(config, max(1, round(given.steps * share)), seed))
        for seed in range(given.seeds)
        for name, config in configs.items()
        for share in (budgets or {}).get(name, (1,))
    ]
    names: dict[str, str] = {}
    different: dict[str, Config] = {}  # two names may share a training
    for name, config in jobs:
        names.setdefault(key(config), name)
        different[key(config)] = config
    print(f"{len(different)} trainings in {command.place(given.runs)}", flush=True)
    with processes(given.jobs) as pool:
        running = {
            one: pool.submit(trained, config, given.runs, measure) for one, config in different.items()
        }
        found = wait(running, lambda one, row: finished(names[one], row))
    rows = [{"model": name, **found[key(config)]} for name, config in jobs]
    return [{key: value for key, value in row.items() if key != "kept"} for row in rows]


def wait(running: Mapping[K, concurrent.futures.Future[R]], said: Callable[[K, R], str]) -> dict[K, R]:
    """Wait for all calls, and print a line said(key, result) for each as it ends -> their results."""
    keys = {future: key for key, future in running.items()}
    for number, done in enumerate(concurrent.futures.as_completed(keys), 1):
        print(f"[{number}/{len(keys)}] {said(keys[done], done.result())}", flush=True)
    return {key: future.result() for key, future in running.items()}


def finished(name: str, row: dict[str, Any]) -> str:
    """The line for a finished training."""
    said = f"{name}, {row['steps']} steps, seed {row['seed']}: loss {row['held_out_loss']:.4f}"
    return said + (f" (kept since {row['kept']})" if "kept" in row else "")


def key(config: Config) -> str:
    """The folder name of a training: a hash of its config and of the source of its custom parts."""
    own = [find_class(name, path) for name, path in config.model.own_parts().items()]
    code = [inspect.getsource(sys.modules[part.__module__]) for part in own]
    return hashlib.sha256("".join([config.to_toml(), *code]).encode()).hexdigest()[:16]


@contextlib.contextmanager
def processes(jobs: int, calls: int | None = None) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """A pool of new processes with one thread each, replaced after `calls` calls; None: never.

    They end with the block. On Ctrl-C, SIGTERM or a closed terminal they first finish their step and save.
    """
    spawn = multiprocessing.get_context("spawn")
    ends = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows: one
    before = [signal.signal(number, lambda number, frame: sys.exit(128 + number)) for number in ends]
    try:
        with concurrent.futures.ProcessPoolExecutor(
            jobs, spawn, stand_alone, max_tasks_per_child=calls
        ) as pool:
            try:
                yield pool
            except BaseException as error:
                for child in multiprocessing.active_children():
                    child.terminate()
                pool.shutdown(cancel_futures=True)
                if isinstance(error, KeyboardInterrupt | SystemExit):
                    print("stopped; trainings are kept, and the same command resumes them", file=sys.stderr)
                if isinstance(error, concurrent.futures.process.BrokenProcessPool):
                    said = "a training was killed, perhaps out of memory; the same command resumes"
                    raise RuntimeError(f"{said}, with --jobs 1 in less memory") from None
                raise
    finally:
        for number, handler in zip(ends, before):
            signal.signal(number, handler)


def stand_alone() -> None:
    """Initialise a worker: one thread, and a process group of its own, since the parent handles Ctrl-C.

    The worker stops itself when the parent is gone.
    """
    torch.set_num_threads(1)
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def trained(config: Config, folder: Path, measure: Measure | None) -> dict[str, Any]:
    """Train, resume or reuse a training -> a row of a result file"""
    if STOPPED:
        raise KeyboardInterrupt
    run = folder / key(config)
    kept = run / "config.toml"
    if kept.exists() and kept.read_text("utf-8") != config.to_toml():
        raise ValueError(f"{run}: holds a different training than its name says; remove it to train again")
    since = history.newest_checkpoint(run).stat().st_mtime if kept.exists() else None
    with contextlib.redirect_stdout(io.StringIO()):
        status = train.train(config, run, resume=kept.exists())
    if status:  # stopped by a signal, and saved
        STOPPED.append(status)
        raise KeyboardInterrupt
    log = runs.read_metrics(run)
    if not log or log[-1]["step"] != config.train.steps or "val_loss" not in log[-1]:
        missing = f"has no row of step {config.train.steps} with val_loss"
        raise ValueError(f"{run / 'metrics.jsonl'}: {missing}; remove {run} to train again")
    late = [row["max_violations"] for row in log if row["step"] > config.train.steps * 3 / 4]
    try:
        flops = log[-1]["tokens"] * count.training_flops_per_token(config.model, config.train.context)
    except ValueError:  # custom parts are not counted
        flops = None
    row = {
        "seed": config.train.seed,
        "steps": config.train.steps,
        "tokens": log[-1]["tokens"],
        "flops": flops,
        "held_out_loss": round(log[-1]["val_loss"], 5),
        "batch_max_violation": [
            round(statistics.fmean(layer), 4) for layer in zip(*late)
        ],  # of the last quarter
    }
    row |= {"kept": time.strftime("%Y-%m-%d %H:%M", time.localtime(since))} if since else {}
    return row | (measure(checkpoint.load(run, trust_code=True), config) if measure else {})


def validation(config: Config) -> data.Windows:
    """The held-out windows of a config's text."""
    return data.Windows(data.load(config.data, config.model.vocab_size)[1], config.train.context)


def trainer(config: Config, model: Transformer, folder: Path) -> train.Trainer:
    """A trainer of this model, to call step by step, on the windows of the config's seed."""
    text = data.load(config.data, config.model.vocab_size)[0]
    windows = data.Windows(text, config.train.context, config.train.seed)
    return train.Trainer(config, folder, model, windows, validation(config))


def new_trainer(config: Config, folder: str) -> train.Trainer:
    """A trainer of a new model."""
    model = Transformer(config.model)
    model.initialize(torch.Generator().manual_seed(0))
    return trainer(config, model, Path(folder))


def step_seconds(configs: Mapping[str, Config], rounds: int) -> dict[str, float]:
    """The fastest step of each training, measured in turns, so that other load affects all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: new_trainer(config, folder) for name, config in configs.items()}
        for step in range(1, rounds + 2):
            for name, one in trainers.items():
                began = time.perf_counter()
                one.step(min(step, one.config.train.steps))
                seconds[name].append(time.perf_counter() - began)
    return {name: min(values[1:]) for name, values in seconds.items()}


def peak_bytes(config: Config) -> int:
    """Peak memory that three steps of a training add to this process; call it in a new process."""
    idle = peak_resident()
    with tempfile.TemporaryDirectory() as folder:
        one = new_trainer(config, folder)
        for _ in range(3):
            one.step(1)
    return peak_resident() - idle


def peak_resident() -> int:
    """Peak resident memory of this process, in bytes."""
    status = Path("/proc/self/status")  # unlike getrusage, not inherited from the parent process
    if status.exists():
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    try:
        import resource
    except ImportError:  # Windows
        raise RuntimeError("peak memory is measured only on Linux and macOS") from None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def sizes(config: ModelConfig) -> dict[str, int]:
    """Total and active parameters."""
    return {"parameters": count.total_parameters(config), "active": count.active_parameters(config)}


def reach(xs: Sequence[float], losses: Sequence[float], level: float) -> float | None:
    """The x at which a falling curve reaches a level, interpolated linearly over log x.

    -> None if the curve starts below the level or never reaches it
    """
    for (x, loss), (next_x, next_loss) in zip(zip(xs, losses), zip(xs[1:], losses[1:])):
        if loss >= level >= next_loss and loss > next_loss:
            share = (loss - level) / (loss - next_loss)
            return math.exp(math.log(x) + share * (math.log(next_x) - math.log(x)))
    return None


mean = statistics.fmean


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    return mean(values), statistics.stdev(values) / len(values) ** 0.5


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % confidence interval of the mean of 2 to 10 samples (Student's t)."""
    middle, error = mean_and_error(values)
    away = STUDENT[len(values) - 2] * error
    return middle - away, middle + away


def paired(rows: Iterable[dict[str, Any]], one: str, other: str, key: str = "held_out_loss") -> list[float]:
    """`one` minus `other`, seed by seed: both saw the same tokens in the same order."""
    by_name: dict[str, dict[int, float]] = {one: {}, other: {}}
    for row in rows:
        if row["model"] in by_name:
            by_name[row["model"]][row["seed"]] = row[key]
    return [by_name[one][seed] - by_name[other][seed] for seed in sorted(by_name[one])]


def by_model(rows: Iterable[dict[str, Any]], key: str = "held_out_loss") -> dict[str, dict[int, list[float]]]:
    """Rows -> {model: {steps: values, one per seed}}"""
    found: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        found.setdefault(row["model"], {}).setdefault(row["steps"], []).append(row[key])
    return found


def last(rows: Iterable[dict[str, Any]], key: str = "held_out_loss") -> dict[str, list[float]]:
    """Rows -> {model: values of its longest trainings, one per seed}"""
    return {name: by_steps[max(by_steps)] for name, by_steps in by_model(rows, key).items()}


def as_claimed(*claims: Sequence[float]) -> str | None:
    """Claims, each a number per seed, above 0 if it holds -> "yes", "no" or "seeds differ"

    None, no verdict, without claims or if a claim has fewer than `command.SEEDS` numbers.
    """
    if min(map(len, claims), default=0) < command.SEEDS:
        return None
    if all(value > 0 for claim in claims for value in claim):
        return "yes"
    return "no" if any(all(value <= 0 for value in claim) for claim in claims) else "seeds differ"


def shown(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard error, as a table cell."""
    middle, error = mean_and_error(values)
    return f"{middle:.{digits}f} ± {error:.{digits}f}"


def size_cells(config: Config) -> list[str]:
    """Total and active parameters, as table cells."""
    return [f"{size:,}" for size in sizes(config.model).values()]


def write(
    name: str,
    given: argparse.Namespace,
    claimed: str | None,
    answer: Sequence[str],
    table: Sequence[Sequence[str]],
    rows: Sequence[dict[str, Any]],
    configs: Mapping[str, Config],
    **more: Any,
) -> None:
    """Write a result with its machine, configs and trainings as NAME.json; print it.

    A run that is too short for a verdict prints its table instead of the answer.

    Args:
        claimed: from `as_claimed`.
        answer: the findings in sentences.
        table: rows of cells, the header first.
    """
    no_verdict = given.no_verdict or ("" if claimed else "too few seeds reach the losses compared")
    how = {"machine": machine.describe(), "steps": given.steps, "seeds": given.seeds}
    differ = {name: differences(config) for name, config in configs.items()}
    found = {
        **how,
        "as_claimed": None if no_verdict else claimed,
        **({"no_verdict": no_verdict} if no_verdict else {}),
        "answer": answer,
        "table": table,
        **more,
        "differ_from_mini": differ,
    }
    head = json.dumps(found, indent=1, ensure_ascii=False).removesuffix("\n}")
    lines = ",\n  ".join(json.dumps(row) for row in rows)  # one training per line
    path = given.out / f"{name}.json"
    files.write_file(path, f'{head},\n "trainings": [\n  {lines}\n ]\n}}\n')
    if given.no_verdict:
        print(f"No verdict: {no_verdict}.", *aligned(table), sep="\n")
    else:
        print(f"As claimed: {claimed}." if claimed else f"No verdict: {no_verdict}.", *answer, sep="\n")
    print(f"Result: {command.place(path)}")


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, its columns aligned."""
    widths = [max(map(len, column)) for column in zip(*table)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table]


def differences(config: Config) -> dict[str, Any]:
    """The fields that differ from the preset mini, by dotted name; files without their folder."""
    mini, here = (runs.flat(dataclasses.asdict(one), "") for one in (Config.preset("mini"), config))
    found = {name.lstrip("."): value for name, value in here.items() if (name, value) not in mini.items()}
    return {name: Path(value).name if name.startswith("data.") else value for name, value in found.items()}


def draw_losses(name: str, given: argparse.Namespace, losses: Mapping[str, Sequence[float]]) -> None:
    """Plot losses, as NAME.png."""
    figure, axis = plt.subplots(figsize=(5, 0.6 + 0.35 * len(losses)))
    points(axis, losses, "held-out loss, nats a byte")
    save(figure, name, given)


def points(axis: Any, values: Mapping[str, Sequence[float]], label: str) -> None:
    """Plot a point with its standard error over seeds for each name."""
    names = list(values)[::-1]
    means, errors = zip(*(mean_and_error(values[name]) for name in names))
    axis.errorbar(means, range(len(names)), xerr=errors, fmt="o", ms=4, capsize=2)
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel(label)
    tidy(axis)


def log_axis(axis: Any, ticks: Sequence[float] | None = None) -> None:
    """Make the x axis logarithmic, with these ticks or powers of ten."""
    axis.set_xscale("log")
    axis.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    if ticks is not None:
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])


def tidy(axis: Any) -> None:
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def save(figure: Any, name: str, given: argparse.Namespace) -> None:
    """Save a picture as NAME.png."""
    path = given.out / f"{name}.png"
    figure.savefig(path, dpi=100, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    print(f"Picture: {command.place(path)}")
