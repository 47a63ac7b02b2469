"""Folders of safetensors as Hugging Face lays them out: one file, or many with an index."""

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
LONGEST_HEADER = 64 * 2**20  # bytes; V3's 91,000 tensors need 13 MB


class Stored(NamedTuple):
    """Where a tensor lies, and what it is, before it is read."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def survey(folder: Path, most: int = 200_000) -> dict[str, Stored]:
    """All tensors of a folder's safetensors files, by name; only headers are read.

    Args:
        most: tensors that are wanted at most; headers that are much longer than theirs are not read.

    Raises:
        ValueError: no safetensors, a file that is not whole, an index that does not fit its files or leads
            out of the folder; names the file.
    """
    index = folder / INDEX
    if not index.is_file() and not (folder / ONE).is_file():
        pickled = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)]
        if pickled:
            raise ValueError(f"{folder / pickled[0]}: pickle is never read: convert to safetensors")
        raise ValueError(f"{folder}: holds no {ONE} and no {INDEX}")
    longest = min(4096 + 400 * most, LONGEST_HEADER)
    placed = read_index(index, longest) if index.is_file() else None
    files = sorted(set(placed.values())) if placed is not None else [ONE]
    for name in files:
        check_place(folder, name)
    found: dict[str, Stored] = {}
    for name in files:
        for tensor, stored in read_header(folder / name, longest).items():
            if placed is not None and placed.get(tensor) != name:
                says = placed.get(tensor)
                where = f"the index has it in {says}" if says else "it is not in the index"
                raise ValueError(f"{folder / name}: holds {tensor}, but {where}")
            found[tensor] = stored
    for tensor, name in (placed or {}).items():
        if tensor not in found:
            raise ValueError(f"{folder / name}: lacks {tensor}, which {INDEX} has there")
    return found


def read_index(path: Path, longest: int) -> dict[str, str]:
    """The index's map from tensor to file."""
    placed = read_json(path, longest).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(v, str) for v in placed.values()):
        raise ValueError(f"{path}: weight_map must name a file for each tensor")
    return placed


def check_place(folder: Path, name: str) -> None:
    """Raise ValueError unless a shard is a file in the folder itself."""
    if not re.fullmatch(r"[\w\-][\w.\-]*\.safetensors", name):
        raise ValueError(f"{folder / INDEX}: {name!r:.200} is not a safetensors file in this folder")
    if not (folder / name).is_file():
        raise ValueError(f"{folder / name}: there is no such file; {INDEX} names it")
    check_link(folder / name)


def check_link(path: Path) -> None:
    """Raise ValueError for a link out of the folder, but for one into the hub's own cache beside it."""
    home, target = path.parent.resolve(), path.resolve()
    if target.parent not in (home, home.parent.parent / "blobs"):
        raise ValueError(f"{path}: is a link that leads out of the folder, to {target}")


def read_header(path: Path, longest: int = LONGEST_HEADER) -> dict[str, Stored]:
    """What a safetensors file holds."""
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
                found[name] = Stored(path, DTYPES[dtype], shape)
        return found


def read(name: str, stored: Stored) -> Tensor:
    """One tensor, mapped from its file: what it needs of memory is given back when it is dropped."""
    with guarded(stored.file), safe_open(stored.file, framework="pt") as file:
        return file.get_tensor(name)


@contextlib.contextmanager
def guarded(path: Path) -> Iterator[None]:
    """Turn what a damaged file raises into a ValueError that names it."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (SafetensorError, TypeError, RuntimeError, OverflowError, ValueError) as error:
        if isinstance(error, ValueError) and str(error).startswith(f"{path}: "):
            raise
        reason = str(error).partition("\n")[0]  # torch may add where in its C++ that was
        raise ValueError(f"{path}: not a safetensors file: {reason}") from None


def write(
    folder: Path,
    tensors: Iterable[tuple[str, int, Callable[[], Tensor]]],
    shard_bytes: int,
    stem: str = "model",
) -> None:
    """Write tensors, each made when its turn comes, to one file or to several of up to shard_bytes.

    Args:
        tensors: name, size in bytes, and a function that makes it.
    """
    shards: list[list[tuple[str, Callable[[], Tensor]]]] = [[]]
    room, total = shard_bytes, 0
    for name, size, make in tensors:
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append((name, make))
        room, total = room - size, total + size
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        several = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        file = f"{stem}.safetensors" if len(shards) == 1 else several
        made = {name: make().contiguous() for name, make in shard}
        save_file(made, folder / file, metadata={"format": "pt"})
        placed |= {name: file for name, _ in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        write_json(folder / f"{stem}.safetensors.index.json", index)


def write_json(path: Path, found: dict[str, Any]) -> None:
    """Write a JSON object."""
    path.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path, longest: int = LONGEST_HEADER) -> dict[str, Any]:
    """A JSON object from a file that may be anything.

    Raises:
        ValueError: it is none, holds a key twice or a number that is not finite; names the file.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r:.80} stands there twice")
        return table

    def finite(text: str) -> float:
        if not math.isfinite(float(text)):
            raise ValueError(f"{text:.40} is not a finite number")
        return float(text)

    try:
        if os.path.getsize(path) > longest:
            raise ValueError("it is too large to be one")
        text = path.read_text(encoding="utf-8")
        found = json.loads(text, object_pairs_hook=once, parse_float=finite, parse_constant=finite)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error) or type(error).__name__
        raise ValueError(f"{path}: not a readable JSON file: {reason}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds a {type(found).__name__}; expected an object")
    return found
