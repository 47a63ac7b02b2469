"""Atomic writes of files and folders, checked reads of JSON, and the headers of safetensors files.

Writes go to a temporary neighbour, which is synced and renamed into place. Imports torch only for tensors.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

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
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # the disk is full or failing; the path is not at fault
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
    """Create the folder `final` with what write(temporary) puts into it, completely or not at all.

    Raises:
        ValueError: another process is writing the folder, or has written it meanwhile.
    """
    temporary = final.with_name(f".{final.name}.tmp")
    with claimed(temporary, final):
        try:
            write(temporary)
            (temporary / ".mode").touch()
            mode = stat.S_IMODE((temporary / ".mode").stat().st_mode)
            (temporary / ".mode").unlink()
            for path in temporary.iterdir():
                path.chmod(mode)  # safetensors ignores the umask
                sync(path)
            sync(temporary)
            if fcntl is None and final.is_dir():
                final.rmdir()  # Windows never renames onto a folder
            rename(temporary, final)  # fails unless `final` is absent or an empty folder
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, SafetensorError) or type(error) is Exception:  # as `tokenizers` raises
                raise OSError(f"{final}: cannot be written: {str(error).splitlines()[0]}") from None
            if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise ValueError(f"{final}: was created by another process meanwhile; it is kept") from None
            raise
    sync(final.parent)


@contextlib.contextmanager
def claimed(temporary: Path, final: Path) -> Iterator[None]:
    """Create an empty folder that no other process uses; what a killed process left there is removed."""
    busy = f"{final}: another process is writing it; choose another folder"
    if fcntl is None:
        final.parent.mkdir(parents=True, exist_ok=True)
        with lock_beside(temporary, busy):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            yield
        return
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:  # renamed or removed by its owner just now
        raise ValueError(busy) from None
    try:
        if not lock(handle, temporary, wait=False):
            raise ValueError(busy)
        for path in temporary.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        yield
    finally:
        os.close(handle)


def lock(handle: int, path: Path, wait: bool) -> bool:
    """Lock an open file or folder until it is closed -> whether it is ours, and still at `path`"""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def lock_beside(path: Path, busy: str | None = None) -> Iterator[None]:
    """Lock path.lock, for Windows: it locks no folders, and renames no open files.

    Args:
        busy: raise ValueError with this message if another process holds the lock; None: wait for it.
    """
    import filelock

    lock = filelock.FileLock(f"{path}.lock", timeout=-1 if busy is None else 0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise ValueError(busy) from None
    try:
        yield
    finally:
        lock.release()


def rename(path: Path, target: Path) -> None:
    """Rename; on Windows, try for a second while another process, such as a virus scanner, has it open."""
    for _ in range(10 if fcntl is None else 0):
        with contextlib.suppress(PermissionError):
            path.rename(target)
            return
        time.sleep(0.1)
    path.rename(target)


def write_file(path: Path, text: str, new: bool = False) -> None:
    """Write or replace a small file atomically. With `new`, raise FileExistsError if it exists."""
    temporary = path.with_name(f".{path.name}.tmp")
    if fcntl is None:
        with lock_beside(temporary):
            try:
                temporary.write_text(text, encoding="utf-8", newline="")
                sync(temporary)
                temporary.rename(path) if new else temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        return
    while True:
        with open(temporary, "a", encoding="utf-8", newline="") as file:
            if not lock(file.fileno(), temporary, wait=True):
                continue  # another process renamed it; start again with a new one
            try:
                file.truncate(0)
                file.write(text)
                file.flush()
                sync(temporary)
                if new:
                    os.link(temporary, path)  # unlike a rename, fails if the file exists
                    temporary.unlink()
                else:
                    temporary.rename(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        break
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    if fcntl is None and path.is_dir():
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDWR if fcntl is None else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_new(folder: Path, source: Path | None = None) -> None:
    """Raise ValueError unless a path is free or an empty folder, and outside the folder `source`."""
    within = source is not None and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(source))
    if within:
        raise ValueError(f"{folder}: is inside {source}, the source; choose another (nothing was written)")
    if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: is not an empty folder; choose another (nothing was written)")


def sha256(path: Path, strict: bool = False) -> str:
    """A file's SHA-256 in hexadecimal. If it cannot be read, "", or with `strict` an OSError."""
    if not strict and not path.is_file():
        return ""
    try:
        if path.suffix == ".safetensors" and not strict:
            read_header(path)  # of the wrong size: perhaps too large to hash
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError):
        if strict:
            raise
        return ""


def read_text(path: Path, longest: int = LONGEST_HEADER, errors: str = "strict") -> str:
    """The UTF-8 text of a regular file from an untrusted source; never waits for a pipe or a device.

    Raises:
        ValueError: not a regular file, larger than `longest` bytes, or not UTF-8 (unless errors="replace").
        OSError: it cannot be opened or read.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("not a regular file")
        if found.st_size > longest:
            raise ValueError(f"larger than {longest} bytes")
        return file.read(longest).decode("utf-8", errors)


def read_own(path: Path, longest: int) -> str:
    """The text of a file that may have been cut off; any error is a ValueError that names the file."""
    try:
        return read_text(path, longest, "replace")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{path}: cannot be read: {reason}") from None


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
        text = read_text(path, longest)
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
        reason = "is not a regular file" if os.path.lexists(path) else "there is no such file"
        raise ValueError(f"{path}: {reason}")
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
