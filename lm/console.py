"""What the `lm` command writes: errors in one line, on streams that may be closed, broken or ASCII."""

import contextlib
import errno
import io
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

# C0 and C1 controls, DEL, and the marks that reorder the text after them
HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
EXTRAS = {  # package -> the extras that install it
    **dict.fromkeys(("filelock", "jinja2", "matplotlib", "safetensors", "tomli_w", "tqdm", "tyro"), "lm"),
    **dict.fromkeys(("fastapi", "pydantic", "starlette", "uvicorn"), "lm,serve"),
    "tokenizers": "lm,hf",
    "tensorboard": "lm,tensorboard",
}


def prepare() -> None:
    """Replace closed standard streams by the null device, and escape what an encoding cannot show.

    Standard input decodes any bytes: invalid ones become surrogates, as in file names.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream: Any = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115  takes the closed descriptor
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def visible(text: object, keep: str = "") -> str:
    r"""A text whose control characters are escaped, such as ESC as \x1b, except those in `keep`."""

    def escaped(found: re.Match[str]) -> str:
        return found[0] if found[0] in keep else found[0].encode("unicode_escape").decode()

    return HIDDEN.sub(escaped, str(text))


def reason(error: BaseException) -> str:
    """An error in one line; a missing optional package is named with the extra that installs it."""
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and package in EXTRAS:
        return f"needs {package}: pip install -c constraints.txt -e '.[{EXTRAS[package]}]'"
    if isinstance(error, MemoryError) and not str(error):
        return "out of memory"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def complain(line: str) -> None:
    """Print one line to standard error, or nothing if that fails too."""
    with contextlib.suppress(OSError):
        print(visible(line), file=sys.stderr, flush=True)
    discard(sys.stderr)


def discard(stream: Any) -> None:
    """Send what a failing stream still holds to the null device, so that Python's exit does not fail."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Tolerant:
    """A text stream that replaces what its encoding lacks and, once writing fails, drops its text.

    Attributes:
        broken: whether the reader of a pipe has gone.
    """

    def __init__(self, stream: Any):
        self.stream = open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115
        self.broken = False

    def write(self, text: str) -> int:
        """Write text -> its length, written or not"""
        try:
            self.stream.write(text)
        except UnicodeEncodeError:
            encoding = self.stream.encoding
            self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:
            self.lose(error)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self.lose(error)

    def lose(self, error: Exception) -> None:
        """Send all further text to the null device, also what Python flushes when it ends."""
        self.broken |= getattr(error, "errno", None) in (errno.EPIPE, errno.EINVAL)  # Windows: EINVAL
        with contextlib.suppress(OSError, ValueError):  # a closed file has no number
            handle = os.open(os.devnull, os.O_WRONLY)
            os.dup2(handle, self.stream.fileno())
            os.close(handle)
        if self.stream.closed:
            self.stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def streams() -> Iterator[None]:
    """Within it, writing to sys.stdout and sys.stderr never fails."""
    with (
        contextlib.redirect_stdout(Tolerant(sys.stdout)),
        contextlib.redirect_stderr(Tolerant(sys.stderr)),
    ):
        yield
