"""What the child process of a `command` does before it runs `lm`.

`command(..., before=("hide", "fastapi"))` calls hide("fastapi") in the child.
"""

import ctypes
import itertools
import os
import pkgutil
import resource
import signal
import subprocess
import sys
import time

import lm.data
import lm.report.run
import lm.train
from lm.run import Run


def quick():
    """Write short samples and no report: both take longer than training a small model."""
    stream = lm.train.stream
    lm.train.stream = lambda *a, **k: itertools.islice(stream(*a, **k), 10)
    lm.report.run.write = lambda run, **trust: run / "report.html"


def hide(module):
    """Make a module's import fail, as if it were not installed."""
    sys.modules[module] = None


def close(*streams):
    """Close standard streams by name, as `lm >&-` does."""
    for name in streams:
        getattr(sys, name).close()
        setattr(sys, name, None)


def encode(encoding):
    """The standard streams of a terminal with another encoding."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(encoding=encoding, errors="strict")


def kill_at_call(owner, name, number):
    """quick(), and kill the process at call `number` of owner.name, such as os.fsync."""
    quick()
    owner = pkgutil.resolve_name(owner)
    original, calls = getattr(owner, name), itertools.count(1)

    def counted(*a, **k):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*a, **k)

    setattr(owner, name, counted)


def slow_load():
    """Print "loading" and wait for a minute instead of loading the data."""
    lm.data.load = lambda *a: (print("loading", flush=True), time.sleep(60))


def slow_save():
    """Wait for a minute instead of saving after a signal."""
    save = Run.save
    Run.save = lambda self, *state: time.sleep(60) if self.signal else save(self, *state)


def full_disk(step, size):
    """From the checkpoint of `step` on, no file may grow beyond `size` bytes."""
    save = Run.save

    def limited(self, model, optimizer, state):
        if state["step"] == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        save(self, model, optimizer, state)

    Run.save = limited


def failing_at(folder, number, error):
    """quick(), and at change `number` of the files below `folder`: raise OSError(error), or if 0, kill."""
    quick()
    fsync, changes = os.fsync, itertools.count(1)
    events = ("os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "os.chmod")

    def change():
        if next(changes) == number:
            if not error:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(error, os.strerror(error))

    def hook(event, arguments):
        opens = event == "open" and str(arguments[0]).startswith(folder)
        if event in events or (opens and arguments[2] & os.O_CREAT):
            change()

    os.fsync = lambda handle: (change(), fsync(handle))
    sys.addaudithook(hook)


def traced(log, calls, injections):
    """quick(), and let strace log these system calls of this process and inject failures."""
    quick()
    with open("/proc/self/status") as status:
        ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER: a child may trace
        options = ["-q", "-y", "-s0", f"--output={log}", f"--trace={calls}", "--signal=none"]
        options += [f"--inject={injection}" for injection in injections]
        tracer = subprocess.Popen(["strace", *options, f"--attach={os.getpid()}"])
        while "TracerPid:\t0\n" in status.read():
            assert tracer.poll() is None, "strace cannot attach"
            time.sleep(0.001)
            status.seek(0)
