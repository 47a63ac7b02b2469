"""The run folder: held by one process, read back, gone on with."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from .config import Config


@contextlib.contextmanager
def open_run(run: Path, resume: bool) -> Iterator[None]:
    """Hold a run folder for this process alone.

    Raises:
        ValueError: it cannot be made or written, is in use, or is not what `resume` says it is.
    """
    is_run = (run / "config.toml").exists()
    if resume and not is_run:
        raise ValueError(f"{run}: no run to resume")
    if not resume and run.exists():
        if not run.is_dir():
            raise ValueError(f"{run}: is a file; a run needs a folder")
        if is_run:
            raise ValueError(
                f"{run}: holds a run already; --resume goes on with it, --out-dir names another place"
            )
        if any(path.name not in (".lock", ".owner", ".config.toml.tmp") for path in run.iterdir()):
            raise ValueError(f"{run}: is not empty and no run; --out-dir names another place")
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
    """The rows of metrics.jsonl; a last one that was cut short by a crash is left out.

    Raises:
        ValueError: a row is something else.
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
            raise ValueError(f"{path}: line {number} is no row of a log: {line:.80}")
        rows.append(row)
    return rows


def same_model(old: Config, new: Config) -> None:
    """Raise ValueError unless a run of one config can go on with the other."""
    for section in ("model", "data"):
        before, after = (flat(dataclasses.asdict(getattr(config, section)), section) for config in (old, new))
        for name in before | after:
            old_value, new_value = before.get(name), after.get(name)
            if old_value != new_value:
                raise ValueError(f"{name} is {old_value!r} in the run and {new_value!r} now; it must stay")


def flat(table: dict[str, Any], path: str) -> dict[str, Any]:
    """Nested tables as one, with dotted names."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value, f"{path}.{key}") if isinstance(value, dict) else {f"{path}.{key}": value}
    return found
