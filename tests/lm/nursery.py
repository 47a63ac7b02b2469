"""Forks a child for each `lm` command, to save it the seconds that importing torch takes.

Reads one JSON job per line; prints each child's process id and, when it ends, its exit status.
"""

import gc
import json
import os
import signal
import sys
import traceback

import torch._dynamo  # noqa: F401  building an optimizer imports it, which takes a second

import lm.cli
import lm.inference.generate
import lm.report.run
import lm.train
from tests.lm import before


def run(job):
    """Run a job in this process, which then ends."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    streams = (("stdin", "rb", "strict"), ("stdout", "wb", "strict"), ("stderr", "wb", "backslashreplace"))
    for number, (name, mode, errors) in enumerate(streams):
        with open(job[name], mode) as file:
            os.dup2(file.fileno(), number)
        setattr(sys, name, os.fdopen(number, mode[0], encoding="utf-8", errors=errors))
    os.chdir(job["cwd"])
    os.environ.update(job["env"])
    status = 70
    try:
        if job["before"]:
            function, *arguments = job["before"]
            getattr(before, function)(*arguments)
        status = lm.cli.main(job["arguments"])
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


gc.freeze()
print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        run(json.loads(line))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
