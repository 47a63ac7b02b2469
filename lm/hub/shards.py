"""Safetensors in Hugging Face's layout: one file, or several with an index."""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ..files import LONGEST_HEADER, Stored, read_header, read_json, write_json

INDEX = "model.safetensors.index.json"


def survey(folder: Path, most: int = 200_000, stem: str = "model") -> dict[str, Stored]:
    """All tensors in a folder's safetensors files, by name; only the headers are read.

    As in transformers, the files that an index names are not read if there is a model.safetensors.

    Args:
        most: the number of tensors expected at most; a header too long for that is not read.
        stem: how the names of the files begin.

    Raises:
        ValueError: there are no safetensors, a file is damaged, or the index does not match the files or
            leads out of the folder; names the file.
    """
    one, index = f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if not index.is_file() and not (folder / one).is_file():
        pickled = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)]
        if pickled:
            raise ValueError(f"{folder / pickled[0]}: pickle files are never read; convert it to safetensors")
        raise ValueError(f"{folder}: holds no {one} and no {index.name}")
    longest = min(4096 + 400 * most, LONGEST_HEADER)
    placed = None if (folder / one).is_file() else read_index(index, longest)
    files = sorted(set(placed.values())) if placed is not None else [one]
    for name in files:
        check_place(index, name)
    found: dict[str, Stored] = {}
    for name in files:
        for tensor, stored in read_header(folder / name, longest).items():
            if placed is not None and placed.get(tensor) != name:
                says = placed.get(tensor)
                where = f"the index lists it in {says}" if says else "it is not in the index"
                raise ValueError(f"{folder / name}: holds {tensor}, but {where}")
            found[tensor] = stored
    for tensor, name in (placed or {}).items():
        if tensor not in found:
            raise ValueError(f"{folder / name}: lacks {tensor}, which {index.name} lists there")
    return found


def read_index(path: Path, longest: int) -> dict[str, str]:
    """An index's map from tensor to file."""
    placed = read_json(path, longest).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(v, str) for v in placed.values()):
        raise ValueError(f"{path}: weight_map must name a file for each tensor")
    return placed


def check_place(index: Path, name: str) -> None:
    """Raise ValueError unless a shard lies directly in its index's folder."""
    folder = index.parent
    if not re.fullmatch(r"[\w\-][\w.\-]*\.safetensors", name):
        raise ValueError(f"{index}: {name!r:.200} is not a safetensors file in this folder")
    if not (folder / name).is_file():
        raise ValueError(f"{folder / name}: no such file, but {index.name} names it")
    check_link(folder / name)


def check_link(path: Path) -> None:
    """Raise ValueError for a link out of the folder, unless into the blobs of the Hugging Face cache."""
    home, target = path.parent.resolve(), Path(os.path.realpath(path))  # which accepts loops
    if target.parent not in (home, home.parent.parent / "blobs"):
        raise ValueError(f"{path}: is a link out of the folder, to {target}")


def write(
    folder: Path,
    tensors: Iterable[tuple[str, int, Callable[[], Tensor]]],
    shard_bytes: int,
    stem: str = "model",
) -> None:
    """Write tensors to one file, or to several of up to shard_bytes; each is made when its file is written.

    Args:
        tensors: (name, bytes, function that makes it) for each.
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
