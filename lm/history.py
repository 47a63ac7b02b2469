"""A run's checkpoints: their states, the newest that is whole, and those that are removed."""

import contextlib
import json
import math
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from . import files
from .config import FORMAT, NewerFormat, check_format
from .files import sha256

STATE = {
    "step": int,
    "tokens": int,
    "seconds": float,
    "dtype": str,
    "cpu_capability": str,
    "threads": int,
    "torch": str,
    "sha256": dict,
}
ADDED = {  # missing in the states of earlier versions
    "windows": int,  # training windows used so far: the place in the data
    "context": int,  # their length
    "seed": int,  # of their order
    "text": dict,  # fingerprints of the training and the held-out text
    "first_loss": float,
    "best_loss": float,  # of the next batch, at any save
    "diverged": bool,
}
LONGEST_STATE = 2**20  # bytes


def checkpoints(run: Path) -> list[Path]:
    """A run's checkpoint folders, in the order of their steps; differently named ones are not checkpoints."""
    found, folder = {}, run / "checkpoints"
    try:
        names = os.listdir(folder)  # unlike glob, no Python ignores its errors
    except (FileNotFoundError, NotADirectoryError):
        names = []
    for name in names:
        step = re.fullmatch("step-([0-9]+)", name)
        if step and name == name_of(int(step[1])) and (folder / name).is_dir():
            found[int(step[1])] = folder / name
    return [found[step] for step in sorted(found)]


def name_of(step: int) -> str:
    """The name of a step's checkpoint."""
    return f"step-{step:06d}"


def newest_checkpoint(run: Path) -> Path:
    """The first of `whole_checkpoints`. Checkpoints that a running training removes are not missed.

    Raises:
        ValueError: there is no intact checkpoint, or one has a newer format.
    """
    folder, quiet = run / "checkpoints", 0
    while quiet < 3:  # a listing misses checkpoints that are renamed meanwhile
        before, found = identity(folder), checkpoints(run)
        for path in whole_checkpoints(found):
            return path
        unchanged = identity(folder) == before
        if unchanged and any(path.is_dir() for path in found):
            raise ValueError(f"{run}: every checkpoint is damaged")
        quiet = quiet + 1 if unchanged else 0
        time.sleep(0.01)
    raise ValueError(f"{run}: no checkpoint yet")


def whole_checkpoints(found: list[Path]) -> Iterator[Path]:
    """The intact checkpoints among those found, newest first; those that have diverged come last.

    Warns of each one that is skipped.
    """
    diverged = []
    for path in reversed(found):
        try:
            state = check_whole(path)
        except NewerFormat:
            raise
        except ValueError as error:
            if path.is_dir():  # else a running training has removed it
                warnings.warn(f"damaged checkpoint skipped: {error}", stacklevel=3)
            continue
        if state.get("diverged"):
            warnings.warn(f"checkpoint skipped: {path}: training had diverged", stacklevel=3)
            diverged.append(path)
            continue
        yield path
    yield from diverged


def read_newest(run: Path, read: Callable[[Path], Any]) -> Any:
    """read(newest checkpoint), from one and the same checkpoint even while a training replaces it."""
    while True:
        newest = newest_checkpoint(run)
        before = identity(newest)
        try:
            found = read(newest)
        except (OSError, ValueError):
            if before is not None and identity(newest) == before:
                raise
            continue
        if before is not None and identity(newest) == before:
            return found


def identity(folder: Path) -> tuple[int, int] | None:
    """Tells a folder from another one at the same path; None if there is none."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def check_whole(checkpoint: Path) -> dict[str, Any]:
    """Raise ValueError unless a checkpoint is of its name's step, as written and finite -> its state"""
    state = read_state(checkpoint)
    if checkpoint.name != name_of(state["step"]):
        raise ValueError(f"{checkpoint / 'state.json'}: step is {state['step']}; expected the folder's")
    for name, digest in state["sha256"].items():
        if sha256(checkpoint / name) != digest:
            raise ValueError(f"{checkpoint / name}: is not what was written (its sha256 differs)")
    for name in state["sha256"]:
        path = checkpoint / name
        with files.guarded(path), safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(key)
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    raise ValueError(f"{path}: {key} holds NaN or infinite numbers")
    return state


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's state.json and check its fields.

    Raises:
        NewerFormat: only a newer version of lm can read it.
        ValueError: it is damaged; names the file.
    """
    path = checkpoint / "state.json"
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    try:
        if path.stat().st_size > LONGEST_STATE:
            raise ValueError(f"larger than {LONGEST_STATE} bytes")
        state = json.loads(path.read_text(encoding="utf-8"))
        check_format(state)
        for key, kind in STATE.items():
            if type(state[key]) is not kind:
                raise ValueError(f"{key} is {state[key]!r:.80}; expected {kind.__name__}")
        for key in ADDED.keys() & state.keys():
            if type(state[key]) is not ADDED[key]:
                raise ValueError(f"{key} is {state[key]!r:.80}; expected {ADDED[key].__name__}")
        if state["step"] < 1 or not math.isfinite(state["seconds"]):
            raise ValueError(f"step is {state['step']} and seconds is {state['seconds']}")
        for key in ("first_loss", "best_loss"):
            if not math.isfinite(state.get(key, 0)):
                raise ValueError(f"{key} is {state[key]}")
        if state.get("windows", 0) < 0 or state.get("context", 1) < 1:
            raise ValueError(f"windows is {state['windows']} and context is {state['context']}")
        if state["dtype"] not in ("torch.float32", "torch.bfloat16"):
            raise ValueError(f"dtype is {state['dtype']!r:.80}")
        if state["sha256"].keys() != {"model.safetensors", "optimizer.safetensors"}:
            raise ValueError(f"sha256 names {', '.join(state['sha256'])!r:.80}")
        return state
    except NewerFormat as error:
        raise NewerFormat(f"{path}: {error}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a valid state file: {error}") from None


def as_json(state: dict[str, Any]) -> str:
    """The text of state.json."""
    return json.dumps({"format": FORMAT, **state}, indent=1, allow_nan=False)


def mark_diverged(checkpoint: Path) -> None:
    """Mark a checkpoint whose next step failed, so that resuming uses an earlier one."""
    state = read_state(checkpoint)
    files.write_file(checkpoint / "state.json", as_json({**state, "diverged": True}))


def is_good(checkpoint: Path) -> bool:
    """Whether a checkpoint's state can be read and is not marked as diverged."""
    try:
        return not read_state(checkpoint).get("diverged", False)
    except ValueError:
        return False


def prune(run: Path, keep: int, newest: Path) -> None:
    """Remove all but the last `keep` checkpoints up to `newest`, and what a killed process left unfinished.

    If all of these have diverged, the last one that has not is kept too.
    """
    found = checkpoints(run)
    old, kept = found[: found.index(newest) + 1][:-keep], found[: found.index(newest) + 1][-keep:]
    if old and not any(map(is_good, kept)):
        good = next(filter(is_good, reversed(old)), None)
        old = [path for path in old if path != good]
    in_use = contextlib.suppress(PermissionError)  # by a reader, on Windows; the next call removes it
    for path in old:
        with in_use:
            discard(path)
    for path in newest.parent.glob(".step-*.tmp"):
        with in_use:
            shutil.rmtree(path)


def discard(path: Path) -> None:
    """Remove a checkpoint if it exists; a reader sees all of it or nothing."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        aside = path.with_name(f".{path.name}.old.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        files.rename(path, aside)
        shutil.rmtree(aside)
