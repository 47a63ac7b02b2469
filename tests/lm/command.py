"""`lm` as a process: forked from one that has imported torch, or started from scratch."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

from tests.helpers import ROOT

SCRIPT = "import sys; from lm.cli import main; sys.exit(main())"  # what the installed `lm` script runs
PATH = {"PYTHONPATH": str(ROOT)}


@dataclass
class Ended:
    """A finished process."""

    code: int  # exit status, or minus the signal that killed it
    out: bytes
    err: str


class Command:
    """`lm ...` in its own process: `command(...)` waits for it, `command.start(...)` returns its id."""

    def __init__(self, folder):
        self.folder = folder
        nursery = [sys.executable, "-P", ROOT / "tests" / "lm" / "nursery.py"]  # -P, as in the `lm` script
        self.nursery = subprocess.Popen(
            nursery,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            cwd=folder,
        )
        assert self.nursery.stdout.readline() == "ready\n"
        self.pid = None

    def start(self, *arguments, cwd=None, stdin=os.devnull, before=(), env=None):
        """before: the name of a function in before.py and its arguments; the child calls it first."""
        if self.pid is not None:  # left by a test that failed before it waited
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
        job = {
            "arguments": [str(argument) for argument in arguments],
            "cwd": str(cwd or self.folder),
            "stdin": str(stdin),
            "stdout": str(self.folder / "stdout"),
            "stderr": str(self.folder / "stderr"),
            "before": before,
            "env": env or {},
        }
        for name in ("stdout", "stderr"):
            (self.folder / name).unlink(missing_ok=True)
        self.nursery.stdin.write(json.dumps(job) + "\n")
        self.nursery.stdin.flush()
        self.pid = int(self.nursery.stdout.readline())
        return self.pid

    def wait(self):
        """Wait for the process to end -> Ended"""
        code = int(self.nursery.stdout.readline())
        self.pid = None
        out, err = (self.folder / "stdout").read_bytes(), (self.folder / "stderr").read_text()
        return Ended(code, out, err)

    def wait_for(self, found, seconds=60):
        """Poll until found() is true; the process may have ended by then."""
        until = time.monotonic() + seconds
        while not found():
            assert time.monotonic() < until, "timed out"
            time.sleep(0.002)

    def __call__(self, *arguments, **how):
        self.start(*arguments, **how)
        return self.wait()


def lm(*arguments, env=None, **how):
    """Run `lm` in a new process; -P keeps the working folder off the path, as the `lm` script does."""
    how = {"capture_output": True, "env": {**os.environ, **PATH, **(env or {})}, **how}
    return subprocess.run([sys.executable, "-P", "-c", SCRIPT, *arguments], **how)


def lm_into_head(*arguments):
    """Run `lm ... | head -1` -> the process; its exit status is that of lm."""
    pipe = ["bash", "-c", '"$@" | head -1; exit "${PIPESTATUS[0]}"', "bash"]
    command = [*pipe, sys.executable, "-P", "-c", SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **PATH})


def run_python(code, *options, cwd=None):
    """Run Python code in a new process, which must succeed -> the process"""
    command = [sys.executable, *options, "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **PATH}, cwd=cwd)
    assert ended.returncode == 0, ended.stderr
    return ended


def one_line(ended, name, code=2):
    """The process ended with that status and one line -> the line"""
    assert ended.code == code, ended.err
    assert ended.err.startswith(f"lm {name}: ") and ended.err.endswith("\n"), ended.err
    assert ended.err.count("\n") == 1, ended.err
    return ended.err
