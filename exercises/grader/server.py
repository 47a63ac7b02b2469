"""The server that runs each stage of a check (check.py) in its own process; started by homework.Checker.

It reads jobs from standard input, one line of JSON each, and writes two lines per job: the process id, then
the exit status. The server imports torch and pytest but none of the project's packages. It forks for every
job, so a check takes about a second; where it cannot fork, it starts a new process.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import torch

from . import check, system

PRELOADED = ("hypothesis.stateful", "torch._dynamo", "torch.utils.flop_counter")  # slow imports of the tests
LEAVE = os._exit  # check.guard replaces it


def main() -> None:
    """Answer jobs until standard input ends."""
    if system.FORKS:
        load()
    for line in sys.stdin:
        pid, ended = (fork if system.FORKS else spawn)(line)
        print(json.dumps({"pid": pid}), flush=True)
        print(json.dumps({"status": ended()}), flush=True)


def load() -> None:
    """Load what most checks use."""
    torch.set_num_threads(1)
    for name in PRELOADED:
        importlib.import_module(name)
    torch.testing.assert_close(torch.ones(1), torch.ones(1))  # its first call imports more


def fork(line: str) -> tuple[int, Callable[[], int]]:
    """Run a job in a fork -> its process id, and a function that waits for its exit status"""
    child = os.fork()
    if child == 0:
        run_line(line)

    def ended() -> int:
        _, status = os.waitpid(child, 0)
        system.kill(child)  # processes that it left running
        return os.waitstatus_to_exitcode(status)

    return child, ended


def spawn(line: str) -> tuple[int, Callable[[], int]]:
    """Like `fork`, in a new process, which loads torch again."""
    child = subprocess.Popen(
        system.python("run_one"), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, encoding="utf-8"
    )
    assert child.stdin is not None
    with contextlib.suppress(OSError), child.stdin:
        child.stdin.write(line)
    return child.pid, child.wait


def run_one() -> None:
    """Run the job on standard input, in a process that `spawn` started."""
    line = sys.stdin.readline()
    load()
    run_line(line)


def run_line(line: str) -> NoReturn:
    """Run a job, and end this process."""
    status = 1
    try:
        check.run_job(json.loads(line))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        LEAVE(status)
