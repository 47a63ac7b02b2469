"""What checks and `lm exercise watch` need from the operating system. The systems' differences are all here.

Without os.fork, as on Windows, a check starts new processes, which takes seconds longer. Their memory and
output are not limited, and processes that an answer starts are not stopped.
"""

import contextlib
import importlib
import os
import queue
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

FORKS = hasattr(os, "fork")
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # on Windows, os.kill ends a process with any signal
UNCONFINED = "warning: Windows limits neither the memory nor the processes of an answer; Linux and macOS do"


def python(function: str) -> list[str]:
    """The command that runs a function of server.py in a new process."""
    # -P and append: a statistics.py in the working folder must not shadow the standard library
    code = "import sys; sys.path.append(sys.argv[1]); from exercises.grader import server; server."
    return [sys.executable, "-P", "-X", "faulthandler", "-c", f"{code}{function}()", os.getcwd()]


def confine(memory: int, output: int) -> None:
    """Put this process into its own group, and limit the bytes that it may allocate and write to a file."""
    if resource is None:
        return
    os.setpgrp()
    statm = Path("/proc/self/statm")  # on Linux, the limit includes the memory in use
    used = int(statm.read_text("utf-8").split()[5]) * resource.getpagesize() if statm.exists() else 0
    for kind, most in ((resource.RLIMIT_DATA, used + memory), (resource.RLIMIT_FSIZE, output)):
        resource.setrlimit(kind, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def kill(pid: int, number: int = KILL) -> None:
    """End a process, and the others in its group where there are groups."""
    with contextlib.suppress(OSError):  # it has ended
        (os.killpg if FORKS else os.kill)(pid, number)


class Lines:
    """The lines of a pipe. A thread reads them, since Windows cannot wait for a pipe with a time limit."""

    def __init__(self, pipe: Any):
        self.lines: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self.read, args=(pipe,), daemon=True).start()

    def read(self, pipe: Any) -> None:
        with contextlib.suppress(OSError, ValueError):  # the pipe is closed
            for line in pipe:
                self.lines.put(line)
        self.lines.put(b"")

    def next(self, seconds: float) -> bytes | None:
        """The next line; b"" at the end, None if there is no line in time."""
        try:
            line = self.lines.get(timeout=seconds)
        except queue.Empty:
            return None
        if not line:
            self.lines.put(line)
        return line


@contextlib.contextmanager
def keys() -> Iterator[Callable[[float], str]]:
    """Read single keys from the terminal -> a function that waits some seconds for one; "" if none comes

    Raises:
        ValueError: standard input is not a terminal.
    """
    if not sys.stdin.isatty():
        raise ValueError("watch reads keys from a terminal; to check once: lm exercise check NAME")
    try:
        import termios
        import tty
    except ImportError:  # Windows
        console: Any = importlib.import_module("msvcrt")

        def pressed(seconds: float) -> str:
            end = time.monotonic() + seconds
            while not console.kbhit():
                if time.monotonic() > end:
                    return ""
                time.sleep(0.02)
            return console.getwch()

        yield pressed
        return
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield lambda seconds: sys.stdin.read(1) if select.select([sys.stdin], [], [], seconds)[0] else ""
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
