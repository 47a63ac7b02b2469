"""A run: its folder and lock, log, progress output, signals and checkpoints. Used by every trainer."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import torch
from safetensors import SafetensorError
from tqdm import tqdm

from . import checkpoint, files
from .config import Config

SCALARS = ("loss", "val_loss", "learning_rate", "grad_norm", "max_violation")  # for TensorBoard


class RunFailed(RuntimeError):
    """A run cannot continue, as with a non-finite loss or a full disk. The last checkpoint is intact."""


class Run:
    """A training run in its folder.

    Attributes:
        signal: the number of the signal that asked it to stop after this step; 0 if none did.
        saved: the step of the last checkpoint.
    """

    def __init__(self, folder: Path, steps: int, keep: int, tensorboard: bool = False):
        self.folder = folder
        self.steps = steps
        self.keep = keep
        self.tensorboard = tensorboard
        self.signal = 0
        self.saved = 0
        self.board: Any = None

    @contextlib.contextmanager
    def at_work(self, done: int) -> Iterator[None]:
        """Set up the progress bar, the log and the signal handlers for the steps after `done`."""
        self.saved = done
        with self.signals(), self.progress(done) as self.bar, self.open_log() as self.metrics:
            yield

    def open_log(self) -> Any:
        """Open metrics.jsonl for appending."""
        return open(self.folder / "metrics.jsonl", "a", encoding="utf-8")

    def start(self, config: Config) -> None:
        """Write config.toml and an empty log."""
        files.write_file(self.folder / "config.toml", config.to_toml())
        files.write_file(self.folder / "metrics.jsonl", "")

    def go_on(self, config: Config, step: int) -> None:
        """Write config.toml and drop the log rows after `step`, the step of a checkpoint."""
        files.write_file(self.folder / "config.toml", config.to_toml())
        rows = [row for row in read_metrics(self.folder) if row["step"] <= step]
        files.write_file(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def log(self, row: dict[str, Any], shown: dict[str, str]) -> None:
        """Write a row to metrics.jsonl and, if enabled, TensorBoard; print the values in `shown`."""
        self.metrics.write(json.dumps(row, allow_nan=False) + "\n")
        self.metrics.flush()
        if self.bar.disable:
            left = row["seconds"] / row["step"] * (self.steps - row["step"])
            text = " ".join(f"{name} {value}" for name, value in shown.items())
            self.say(f"step {row['step']}/{self.steps} {text} left {left:.0f} s")
        else:
            self.bar.set_postfix(shown, refresh=False)
        if self.tensorboard:
            if self.board is None:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(self.folder / "tensorboard"))
            for key in SCALARS:
                if key in row:
                    self.board.add_scalar(key, row[key], row["step"])

    def say(self, line: str) -> None:
        """Print a line above the progress bar. If stdout is closed, stop after this step and save."""
        try:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self.signal = signal.SIGPIPE

    def save(self, model: Any, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Write a checkpoint, after syncing the log to disk.

        Raises:
            RunFailed: a weight is not finite, or writing failed; the previous checkpoint is intact.
        """
        largest = max(float(parameter.detach().abs().max()) for parameter in model.parameters())
        self.check_finite(state["step"], largest_weight=largest)
        try:
            os.fsync(self.metrics.fileno())
            checkpoint.save_checkpoint(self.folder, model, optimizer, state, self.keep)
        except (OSError, SafetensorError, RuntimeError) as error:
            kept = self.last_checkpoint()
            raise RunFailed(f"step {state['step']}: checkpoint not written ({error}); {kept}") from None
        self.saved = state["step"]

    def check_finite(self, step: int, **values: float) -> None:
        """Raise RunFailed if a value is NaN or infinite."""
        if not all(map(math.isfinite, values.values())):
            listed = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())
            raise RunFailed(f"step {step}: {listed}; {self.last_checkpoint()}")

    def last_checkpoint(self) -> str:
        """The part of an error message that names the last checkpoint."""
        found = checkpoint.checkpoints(self.folder)
        return f"the last checkpoint is {found[-1]}" if found else "no checkpoint yet"

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """On the first SIGINT or SIGTERM, finish the step and save; on the second, exit immediately."""

        def stop(number: int, frame: Any) -> None:
            if self.signal:
                os._exit(128 + number)  # safe: checkpoints are renamed into place when complete
            self.signal = number
            with contextlib.suppress(RuntimeError):  # the signal may interrupt another write
                self.say("stopping after this step; send the signal again to exit immediately")

        old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def progress(self, done: int) -> tqdm:
        """A progress bar, disabled where the output is not a terminal."""
        return tqdm(initial=done, total=self.steps, unit="step", dynamic_ncols=True, disable=None)


@contextlib.contextmanager
def open_run(run: Path, resume: bool) -> Iterator[None]:
    """Create a run folder, or with `resume` open one, and lock it for this process.

    Raises:
        ValueError: the folder cannot be written, is in use, or does not match `resume`.
    """
    is_run = (run / "config.toml").exists()
    if resume and not is_run:
        raise ValueError(f"{run}: no run to resume")
    if not resume and run.exists():
        if not run.is_dir():
            raise ValueError(f"{run}: is a file; expected a folder")
        if is_run:
            raise ValueError(f"{run}: already holds a run; use --resume, or another folder with --out-dir")
        if any(path.name not in (".lock", ".owner", ".config.toml.tmp") for path in run.iterdir()):
            raise ValueError(f"{run}: neither empty nor a run; use another folder with --out-dir")
    lock, owner = filelock.FileLock(run / ".lock"), run / ".owner"
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        owner.write_text(str(os.getpid()))
    except filelock.Timeout:
        raise ValueError(f"{run}: in use by process {owner.read_text()}") from None
    except OSError as error:
        raise ValueError(f"{run}: cannot be written: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without a last row that a crash cut short.

    Raises:
        ValueError: a row lacks the fields of a log row.
    """
    rows = []
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        keys = ("step", "tokens", "seconds", "loss")
        whole = isinstance(row, dict) and all(isinstance(row.get(key), int | float) for key in keys)
        if not whole or not isinstance(row.get("max_violations"), list):
            raise ValueError(f"{path}: line {number} is not a log row: {line:.80}")
        rows.append(row)
    return rows


def same_model(old: Config, new: Config) -> None:
    """Raise ValueError unless both configs have the same model and data, as resuming requires."""
    for section in ("model", "data"):
        before, after = (flat(dataclasses.asdict(getattr(config, section)), section) for config in (old, new))
        for name in before | after:
            old_value, new_value = before.get(name), after.get(name)
            if old_value != new_value:
                raise ValueError(
                    f"{name} is {old_value!r} in the run and {new_value!r} now; it must not change"
                )


def flat(table: dict[str, Any], path: str) -> dict[str, Any]:
    """Flatten nested tables into one with dotted names."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value, f"{path}.{key}") if isinstance(value, dict) else {f"{path}.{key}": value}
    return found
