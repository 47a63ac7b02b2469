"""Runs that are killed, or meet a full or failing disk, at any of their changes to files lose no bit.

The quick tests stop a process from inside, at calls that Python sees. The long ones inject the failures
into system calls with strace, and so reach those of compiled libraries too.
"""

import dataclasses
import errno
import hashlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import time
import warnings

import pytest

import lm
from lm import checkpoint, files, history, train
from tests.helpers import content
from tests.lm.command import one_line
from tests.lm.runs import equal_runs, state_of, stepped

CHANGES = [
    *("fsync", "fdatasync", "rename", "renameat", "renameat2", "link", "linkat"),
    *("unlink", "unlinkat", "rmdir", "mkdir", "mkdirat"),
]
WRITES = [*CHANGES, "openat", "write", "pwrite64", "ftruncate"]
ERRORS = ("ENOSPC", "EIO")


@dataclasses.dataclass
class Short:
    """A run that saves at each of its three steps and keeps two checkpoints, and its arguments."""

    whole: object  # the folder of the uninterrupted run
    command: object
    arguments: list

    def train(self, run, before=("quick",)):
        """Start or resume it in the folder `run`."""
        begun = (run / "config.toml").exists()
        arguments = ["--resume"] if begun else self.arguments
        return self.command("train", *arguments, "--out-dir", run, before=before)

    def check(self, run, ended, newest=None):
        """Assert that every visible checkpoint is whole, and that the run goes on as if uninterrupted."""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = history.checkpoints(run)
            for path in found:
                history.check_whole(path)
            if newest is not None:
                assert [path.name for path in found[-1:]] == newest
        if ended.code > 0:
            line = one_line(ended, "train", code=1)
            named = re.findall("the last checkpoint is (.*)", line)
            assert named in ([], [str(path) for path in found[-1:]])
            assert "no checkpoint yet" not in line or not found
        again = self.train(run)
        assert (again.code, again.err) == (0, "")
        equal_runs(run, self.whole)
        left = sorted(path.name for path in (run / "checkpoints").iterdir())
        assert left == ["step-000002", "step-000003"] and not list(run.glob(".*tmp"))


@pytest.fixture(scope="module")
def short(tiny, text_file, command, options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("short")
    (folder / "held-out.txt").write_text(text_file.read_text()[:40])  # evaluated in a moment
    changes = {"steps": 3, "save_every": 1, "keep": 2, "eval_every": 3, "batch_size": 1}
    data = {"validation": str(folder / "held-out.txt")}
    config = tiny(model={"num_layers": 2}, train=changes, data=data)
    made = Short(folder / "run", command, options(config))
    assert made.train(made.whole).code == 0
    return made


@pytest.mark.parametrize("number", [4, 12, 26, 38, 46])
def test_killed_at_a_change_of_files_it_equals_an_uninterrupted_run(short, tmp_path, number):
    run = tmp_path / "run"
    ended = short.train(run, ("failing_at", str(run), number, 0))
    assert ended.code == -signal.SIGKILL
    short.check(run, ended)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("number", [1, 9, 36])
def test_an_error_of_the_disk_is_one_line_and_the_run_can_resume(short, tmp_path, number, error):
    run = tmp_path / "run"
    ended = short.train(run, ("failing_at", str(run), number, getattr(errno, error)))
    assert ended.code == 1 and os.strerror(getattr(errno, error)) in ended.err
    short.check(run, ended)


def test_a_checkpoint_that_cannot_be_read_back_is_not_written(tiny, run, monkeypatch):
    model, optimizer = stepped(tiny())
    checkpoint.save_checkpoint(run, model, optimizer, state_of(1), keep=1)
    before = content(run)
    for number in (1, 2):
        read, calls = hashlib.file_digest, itertools.count(1)

        def failing(*arguments, read=read, calls=calls, number=number):
            if next(calls) == number:
                raise OSError(errno.EIO, "Input/output error")
            return read(*arguments)

        with monkeypatch.context() as patched, pytest.raises(OSError, match="Input/output error"):
            patched.setattr(hashlib, "file_digest", failing)
            checkpoint.save_checkpoint(run, model, optimizer, state_of(2), keep=1)
        assert content(run) == before


def test_checkpoints_that_cannot_be_listed_are_not_missing(tiny, trained, monkeypatch):
    def forbidden(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    before = content(trained)
    with monkeypatch.context() as patched, pytest.raises(PermissionError, match="checkpoints"):
        patched.setattr(os, "listdir", forbidden)
        patched.setattr(os, "scandir", forbidden)
        train.train(tiny(train={"steps": 15}), trained, resume=True)
    assert content(trained) | {".owner": b""} == before | {".owner": b""}


def test_a_compiled_writer_without_its_own_error_is_one_line(tmp_path):
    def write(into):
        raise Exception("No space left on device (os error 28)\nand more")  # as `tokenizers` does

    with pytest.raises(OSError, match=r"out: cannot be written: No space left on device \(os error 28\)$"):
        files.commit(tmp_path / "out", write)
    assert list(tmp_path.iterdir()) == []


# --- at every system call


@dataclasses.dataclass
class Call:
    """A system call as strace logs it; `number` counts the process's calls of this name."""

    name: str
    number: int
    line: str

    def fail(self, how):
        """The option of strace that injects a failure: signal=... or error=..."""
        return f"{self.name}:{how}:when={self.number}"


class Strace:
    """Logs system calls of a `command`, or makes them fail."""

    def __init__(self, log):
        self.log = log

    def before(self, *injections):
        """What the command does first."""
        self.log.unlink(missing_ok=True)
        return ("traced", str(self.log), ",".join(f"?{name}" for name in WRITES), injections)

    def text(self):
        """The log of a process that has ended."""
        until = time.monotonic() + 60
        while not (self.log.exists() and (text := self.log.read_text()).endswith((" +++\n", "= ?\n"))):
            assert time.monotonic() < until, "strace goes on"
            time.sleep(0.002)
        return text

    def calls(self, folder, names):
        """The calls that change what is below the folder."""
        numbers = dict.fromkeys(WRITES, 0)
        for line in self.text().splitlines():
            name = line.partition("(")[0]
            if name in numbers:
                numbers[name] += 1
                changes = name != "openat" or "O_CREAT" in line
                if changes and name in names and str(folder) in line:
                    yield Call(name, numbers[name], line)

    def newest(self):
        """The name of the last checkpoint that was renamed into place, in a list, or an empty list."""
        done = r"^rename\w*\(.*/\.(step-\d+)\.tmp\", .*/\1\"[^\"]*= 0$"
        return re.findall(done, self.text(), re.MULTILINE)[-1:]


@pytest.fixture
def strace(tmp_path):
    try:
        subprocess.run(["strace", "-qq", "-o", os.devnull, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs strace and the permission to trace")
    return Strace(tmp_path / "log")


@pytest.fixture
def prepared(short, strace, tmp_path):
    """prepared(begun): make a run folder ready, either absent or killed at its third save -> a `newest`"""
    run = tmp_path / "run"

    def make(begun):
        shutil.rmtree(run, ignore_errors=True)
        if not begun:
            return []
        if not (tmp_path / "begun").exists():
            assert short.train(run, strace.before()).code == 0
            calls = [*strace.calls(run, ["fsync"])]
            call = next(call for call in calls if ".step-000003.tmp" in call.line)
            shutil.rmtree(run)
            assert short.train(run, strace.before(call.fail("signal=SIGKILL"))).code == -signal.SIGKILL
            run.rename(tmp_path / "begun")
        shutil.copytree(tmp_path / "begun", run)
        return ["step-000002"]

    return make


@pytest.mark.long
@pytest.mark.parametrize("begun", [False, True], ids=["new", "resumed"])
def test_killed_at_every_system_call_it_equals_an_uninterrupted_run(short, strace, prepared, tmp_path, begun):
    run = tmp_path / "run"
    prepared(begun)
    assert short.train(run, strace.before()).code == 0
    calls = [*strace.calls(run, CHANGES)]
    assert {"fsync", "rename", "mkdir", "unlink"} <= {call.name.removesuffix("at") for call in calls}
    for call in calls:
        earlier = prepared(begun)
        ended = short.train(run, strace.before(call.fail("signal=SIGKILL")))
        assert ended.code == -signal.SIGKILL, call
        short.check(run, ended, strace.newest() or earlier)


@pytest.mark.long
def test_an_error_of_any_system_call_loses_nothing(short, strace, tmp_path):
    run = tmp_path / "run"
    assert short.train(run, strace.before()).code == 0
    calls = [call for call in strace.calls(run, WRITES) if ".step-000002.tmp" not in call.line]
    failed = 0
    for call, error in zip(calls, itertools.cycle(ERRORS)):
        shutil.rmtree(run)
        ended = short.train(run, strace.before(call.fail(f"error={error}")))
        assert ended.code in (0, 1), (call, ended)  # 0: mkdir of a folder that exists, for example
        failed += ended.code
        short.check(run, ended)
    assert failed > 40


@pytest.mark.long
@pytest.mark.parametrize("name", ["export", "import"])
def test_an_error_of_any_system_call_leaves_no_half_folder(command, strace, served_folder, tmp_path, name):
    source, into = served_folder, tmp_path / "into"
    into.mkdir()
    if name == "import":
        source = tmp_path / "source"
        lm.to_hf(lm.load(served_folder), source, tokenizer_from=served_folder)
    assert command(name, source, into / "out", before=strace.before()).code == 0
    whole = content(into / "out")
    for call, error in zip([*strace.calls(into, WRITES)], itertools.cycle(ERRORS)):
        shutil.rmtree(into / "out", ignore_errors=True)
        ended = command(name, source, into / "out", before=strace.before(call.fail(f"error={error}")))
        one_line(ended, name, code=1)
        if (into / "out").exists():
            assert content(into / "out") == whole, call
            shutil.rmtree(into / "out")
        assert command(name, source, into / "out").code == 0, call
        assert content(into) == {"out": None} | {f"out/{key}": value for key, value in whole.items()}, call
