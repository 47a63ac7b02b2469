"""A run: its folder and lock, log, progress output, signals and checkpoints. Used by every trainer."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import filelock
import torch
from safetensors import SafetensorError
from tqdm import tqdm

from . import checkpoint, files, history
from .config import Config

LONGEST_LOG = 2**30  # bytes of metrics.jsonl
GRACE = 10  # seconds that a step may take after a signal; then it is abandoned
SCALARS = ("loss", "val_loss", "learning_rate", "grad_norm", "max_violation")  # for TensorBoard


class RunFailed(RuntimeError):
    """A run cannot continue, as with a non-finite loss or a full disk. The last checkpoint is intact."""


class Abandoned(BaseException):
    """A signal asked the run to stop, and its step takes too long to wait for."""


class Run:
    """A training run in its folder.

    Attributes:
        signal: the number of the signal that asked it to stop after this step; 0 if none did.
        saved: the step of the last checkpoint.
        can_abandon: whether the running step has changed nothing yet.
    """

    def __init__(self, folder: Path, steps: int, keep: int, tensorboard: bool = False):
        self.folder = folder
        self.steps = steps
        self.keep = keep
        self.tensorboard = tensorboard
        self.signal = 0
        self.saved = 0
        self.can_abandon = False
        self.board: Any = None

    @contextlib.contextmanager
    def at_work(self, done: int) -> Iterator[None]:
        """Set up the progress bar, the log and the signal handlers for the steps after `done`.

        Raises:
            RunFailed: a file cannot be written, as on a full disk; the last checkpoint is intact.
        """
        self.saved = done
        try:
            with self.signals(), self.progress(done) as self.bar, self.open_log() as self.metrics:
                yield
        except BrokenPipeError:
            raise
        except OSError as error:
            raise RunFailed(f"{self.folder}: {error}; {self.last_checkpoint()}") from None

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
        """Print a line above the progress bar. If stdout is a broken pipe, stop after this step and save."""
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
        if getattr(sys.stdout, "broken", False) and not self.signal:
            self.signal = 13  # SIGPIPE, which Windows lacks

    def save(self, model: Any, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Write a checkpoint, after syncing the log to disk.

        Raises:
            RunFailed: a weight or moment is not finite, or writing failed; the last checkpoint is intact.
        """
        self.check_finite(state["step"], largest_weight=largest(model.parameters()))
        moments = (moment for moments in optimizer.state.values() for moment in moments.values())
        self.check_finite(state["step"], largest_moment=largest(moments))
        try:
            os.fsync(self.metrics.fileno())
            checkpoint.save_checkpoint(self.folder, model, optimizer, state, self.keep)
        except (OSError, SafetensorError, RuntimeError) as error:
            kept = self.last_checkpoint()
            raise RunFailed(f"step {state['step']}: checkpoint not written ({error}); {kept}") from None
        self.saved = state["step"]

    def check_finite(self, step: int, of_weights: bool = False, **values: float) -> None:
        """Raise RunFailed if a value is NaN or infinite.

        Args:
            of_weights: the values follow from the weights before this step. A checkpoint of these weights
                is marked, since every attempt to resume from it would fail here.
        """
        if not all(map(math.isfinite, values.values())):
            if of_weights and self.saved == step - 1 > 0:
                with contextlib.suppress(OSError, ValueError):
                    history.mark_diverged(self.folder / "checkpoints" / history.name_of(self.saved))
            listed = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())
            raise RunFailed(f"step {step}: {listed}; {self.last_checkpoint()}")

    def last_checkpoint(self) -> str:
        """The part of an error message that names the last checkpoint."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return f"the last checkpoint is {history.newest_checkpoint(self.folder)}"
            except ValueError:
                return "no checkpoint yet"

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """On the first SIGINT, SIGTERM or SIGHUP, finish the step and save; on the second, exit immediately.

        A step that takes longer than GRACE is abandoned. A closed terminal may send SIGHUP twice.
        """

        def stop(number: int, frame: Any) -> None:
            if self.signal and number == hangup:
                return
            if self.signal:
                os._exit(128 + number)  # safe: checkpoints are renamed into place when complete
            self.signal = number
            with contextlib.suppress(RuntimeError):  # the signal may interrupt another write
                self.say("stopping after this step; send the signal again to exit immediately")
            if alarm is not None:
                signal.setitimer(signal.ITIMER_REAL, GRACE)

        def give_up(number: int, frame: Any) -> None:
            if self.can_abandon:
                raise Abandoned

        hangup, alarm = getattr(signal, "SIGHUP", None), getattr(signal, "SIGALRM", None)
        handlers: dict[int, Any] = {signal.SIGINT: stop, signal.SIGTERM: stop}
        handlers |= {} if hangup is None else {hangup: stop}
        handlers |= {} if alarm is None else {alarm: give_up}
        if threading.current_thread() is not threading.main_thread():
            handlers = {}  # only the main thread may set them
        old = {number: signal.getsignal(number) for number in handlers}
        for number, handler in handlers.items():
            if number != hangup or old[number] != signal.SIG_IGN:  # which nohup sets
                signal.signal(number, handler)
        try:
            yield
        finally:
            if handlers and alarm is not None:
                signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in old.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def progress(self, done: int) -> tqdm:
        """A progress bar, disabled where the output is not a terminal."""
        return tqdm(initial=done, total=self.steps, unit="step", dynamic_ncols=True, disable=None)


def largest(tensors: Iterable[torch.Tensor]) -> float:
    """The largest absolute value, or the first that is not finite."""
    values = [float(tensor.detach().abs().max()) for tensor in tensors if tensor.numel()]
    return next((value for value in values if not math.isfinite(value)), max(values, default=0.0))


@contextlib.contextmanager
def open_run(run: Path, resume: bool) -> Iterator[None]:
    """Create a run folder, or with `resume` open one, and lock it for this process.

    Raises:
        ValueError: the folder cannot be written, is in use, or does not match `resume`.
        OSError: the disk is full or failing.
    """
    checkpoint.check_name(run)
    is_run = (run / "config.toml").exists()
    if resume and not is_run:
        raise ValueError(f"{run}: no run to resume")
    if not resume and run.exists():
        if not run.is_dir():
            raise ValueError(f"{run}: is a file; expected a folder")
        if is_run:
            raise ValueError(f"{run}: already holds a run; use --resume, or another folder with --out-dir")
        if any(not path.name.startswith((".lock", ".owner", ".config.toml.tmp")) for path in run.iterdir()):
            raise ValueError(f"{run}: neither empty nor a run; use another folder with --out-dir")
    lock, owner = filelock.FileLock(run / ".lock"), run / ".owner"
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        owner.write_text(str(os.getpid()), encoding="utf-8")
    except filelock.Timeout:
        raise ValueError(f"{run}: in use by process {owner.read_text('utf-8')}") from None
    except OSError as error:
        kind = OSError if error.errno in files.DISK else ValueError
        raise kind(f"{run}: cannot be written: {error.strerror}") from None
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
    lines = files.read_own(path, LONGEST_LOG).splitlines() if os.path.lexists(path) else []
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
