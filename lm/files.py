"""Atomic writes of files and folders, checked reads of JSON, and the headers of safetensors files.

Writes go to a temporary neighbour, which is synced and renamed into place. Imports torch only for tensors.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DTYPES = {  # safetensors' names -> torch's
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
}
LONGEST_HEADER = 64 * 2**20  # bytes; V3's 91,000 tensors need 13 MB


class Stored(NamedTuple):
    """A tensor in a file: where it is, its dtype and its shape."""

    file: Path
    dtype: "torch.dtype"
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def commit(final: Path, write: Callable[[Path], None]) -> None:
    """Create the folder `final` with what write(temporary) puts into it, completely or not at all."""
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed here
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        for path in [*temporary.iterdir(), temporary]:
            sync(path)
        if final.exists():
            shutil.rmtree(final)  # empty, or a damaged checkpoint of the same step
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(final.parent)


def write_file(path: Path, text: str, new: bool = False) -> None:
    """Write or replace a small file atomically. With `new`, raise FileExistsError if it exists."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="")
        sync(temporary)
        if new:
            os.link(temporary, path)  # unlike a rename, fails if the file exists
            temporary.unlink()
        else:
            temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_new(folder: Path) -> None:
    """Raise ValueError if the path is a file or a folder that is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: is not an empty folder; choose another (nothing was written)")


def sha256(path: Path) -> str:
    """A file's SHA-256 in hexadecimal, or "" if it cannot be read."""
    if not path.is_file():
        return ""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def write_json(path: Path, found: dict[str, Any]) -> None:
    """Write a JSON object into a folder that `commit` creates."""
    path.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path, longest: int = LONGEST_HEADER) -> dict[str, Any]:
    """Read a JSON object from an untrusted file.

    Raises:
        ValueError: not a JSON object, a duplicate key, or a number that is not finite; names the file.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"duplicate key {next(k for k in keys if keys.count(k) > 1)!r:.80}")
        return table

    def finite(text: str) -> float:
        if not math.isfinite(float(text)):
            raise ValueError(f"{text:.40} is not a finite number")
        return float(text)

    try:
        if os.path.getsize(path) > longest:
            raise ValueError(f"larger than {longest} bytes")
        text = path.read_text(encoding="utf-8")
        found = json.loads(text, object_pairs_hook=once, parse_float=finite, parse_constant=finite)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error) or type(error).__name__
        raise ValueError(f"{path}: not a readable JSON file: {reason}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds a {type(found).__name__}; expected an object")
    return found


def read_header(path: Path, longest: int = LONGEST_HEADER) -> dict[str, Stored]:
    """The tensors of a safetensors file, from its header alone.

    Args:
        longest: the longest header to accept, in bytes.

    Raises:
        ValueError: the file is damaged or holds an unsupported dtype; names the file.
    """
    import torch

    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    with guarded(path):
        with open(path, "rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
        if longest < length <= path.stat().st_size:
            raise ValueError(f"{path}: a header of {length} bytes is larger than needed (at most {longest})")
        found = {}
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                dtype, shape = part.get_dtype(), tuple(part.get_shape())
                if dtype not in DTYPES:
                    raise ValueError(f"{path}: {name} is {dtype}; expected one of {', '.join(DTYPES)}")
                found[name] = Stored(path, getattr(torch, DTYPES[dtype]), shape)
        return found


def read_tensor(name: str, stored: Stored) -> "Tensor":
    """A tensor, memory-mapped from its file; clone it if the file may change."""
    with guarded(stored.file), safe_open(stored.file, framework="pt") as file:
        return file.get_tensor(name)


@contextlib.contextmanager
def guarded(path: Path) -> Iterator[None]:
    """Turn the errors that a damaged safetensors file raises into a ValueError that names the file."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (SafetensorError, TypeError, RuntimeError, OverflowError, ValueError) as error:
        if isinstance(error, ValueError) and str(error).startswith(f"{path}: "):
            raise
        reason = str(error).partition("\n")[0]  # torch may append a C++ stack
        raise ValueError(f"{path}: not a safetensors file: {reason}") from None
