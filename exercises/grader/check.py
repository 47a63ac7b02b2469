"""The server that checks answers, each in its own process; started by homework.Checker.

It reads jobs from standard input, one line of JSON each, and writes two lines per job: the process id, then
the exit status. The server imports torch and pytest but none of the project's packages. It forks for every
job, so a check takes about a second. The fork patches the student's function into its module
(exercises/grader/overlay.py), runs the exercise's probe on it, and compares the outputs with those of the
original source and of the source with each known mistake. Then it runs the project's tests. The report is
written last: a missing report means that the check failed.
"""

import contextlib
import functools
import importlib
import itertools
import json
import os
import resource
import signal
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from . import exercise, overlay

PRELOADED = ("hypothesis.stateful", "torch._dynamo", "torch.utils.flop_counter")  # slow imports of the tests
MEMORY = 4 << 30  # bytes that an answer may allocate
OUTPUT = 1 << 20  # bytes that an answer may print
FORBIDDEN = (  # audit events of the interpreter that no answer needs
    *("os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "subprocess.Popen"),
    *("os.kill", "os.killpg", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink"),
    *("os.chmod", "os.truncate", "shutil.rmtree", "shutil.move", "shutil.copyfile"),
    *("socket.connect", "socket.bind", "ctypes.dlopen", "signal.pthread_kill", "os.setrlimit"),
)
# tolerances, relative to the largest value
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 4e-3, "float16": 1e-3}
Outcome = dict[str, Any]  # name -> tensor; or "raised" -> the error, described


def main() -> None:
    """Answer jobs until standard input ends."""
    torch.set_num_threads(1)
    for name in PRELOADED:
        importlib.import_module(name)
    torch.testing.assert_close(torch.ones(1), torch.ones(1))  # its first call imports more
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                run_job(job)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                LEAVE(status)
        print(json.dumps({"pid": child}), flush=True)
        _, status = os.waitpid(child, 0)
        with contextlib.suppress(ProcessLookupError):  # processes that it left running
            os.killpg(child, signal.SIGKILL)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), flush=True)


LEAVE = os._exit


def run_job(job: dict[str, Any]) -> None:
    """Run one job in the fork: set the limits, check, write the report."""
    os.setpgrp()
    out = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for stream in (1, 2):
        os.dup2(out, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.dont_write_bytecode = True
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize() if LINUX else 0
    for kind, most in ((resource.RLIMIT_DATA, used + MEMORY), (resource.RLIMIT_FSIZE, OUTPUT)):
        resource.setrlimit(kind, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir(job["root"])
    guard(job["file"])
    report = check(job)
    text = json.dumps(report)
    new = Path(job["report"] + ".new")
    new.write_text(text)
    new.replace(job["report"])


LINUX = sys.platform == "linux"


def guard(path: str) -> None:
    """Forbid FORBIDDEN operations and writing files wherever the student's code is on the call stack."""

    def refuse(what: str, *_: object) -> NoReturn:
        raise PermissionError(f"an answer may not use {what}")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in FORBIDDEN) and line_in(path) is not None:
            refuse(f"{event} {arguments[0]}" if writes else event)

    sys.addaudithook(hook)
    for name in ("_exit", "abort"):  # these raise no audit event
        setattr(os, name, functools.partial(refuse, f"os.{name}"))


def line_in(path: str, error: BaseException | None = None) -> int | None:
    """The innermost line of a file in an error's traceback, or on the current call stack."""
    if error is not None:
        lines = [
            line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == path
        ]
        return lines[-1] if lines else None
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == path:
            return frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]
    return None


def check(job: dict[str, Any]) -> dict[str, Any]:
    """The report of a job: the probe's outputs compared, the mistakes that explain them, the tests."""
    about = exercise.load(Path(job["exercise"]))
    file, seed = job["file"], job["seed"]
    probe = functions_of(about.path)["probe"]
    origin = Path(job["origin"])
    text = origin.read_text("utf-8")
    overlay.install([overlay.Piece(about.module, about.function, Path(file))])
    try:
        module = importlib.import_module(about.module)
        raised = None
    except BaseException as error:
        raised = described(error, file)
        overlay.remove(about.module)
    right = outcome(probe, fresh(about.module, origin, text), seed, file)
    found = {"raised": raised} if raised else outcome(probe, module, seed, file)
    report: dict[str, Any] = {"raised": found.get("raised"), "mistakes": [], "tests": None}
    report["checks"] = compare(found, right)
    wrong = any(not row["passed"] for row in report["checks"])
    if wrong and not is_blank(found, about):
        report["mistakes"] = diagnose(about, probe, origin, text, found, seed)
    if job["all"] or not wrong:
        report["tests"] = None if raised else run_tests(about, Path(job["root"]), job["all"])
    return report


def functions_of(path: Path) -> dict[str, Any]:
    """Run a file in exercises/ -> its globals"""
    names: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
    exec(compile(path.read_text("utf-8"), str(path), "exec", dont_inherit=True), names)
    return names


def fresh(name: str, origin: Path, text: str) -> types.ModuleType:
    """A separate module made from this source; the imported one stays in sys.modules."""
    module = types.ModuleType(name)
    module.__package__, module.__file__ = name.rpartition(".")[0], str(origin)
    before = sys.modules.get(name)
    sys.modules[name] = module  # dataclasses look up their module
    try:
        exec(compile(text, str(origin), "exec", dont_inherit=True), module.__dict__)
    finally:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
    return module


def outcome(probe: Callable[..., Outcome], module: types.ModuleType, seed: int, file: str) -> Outcome:
    """The probe's output for a module: named tensors, or the error raised."""
    torch.manual_seed(seed)
    try:
        return {
            name: value if value is None else value.detach().clone()
            for name, value in probe(module, torch.Generator().manual_seed(seed)).items()
        }
    except BaseException as error:
        return {"raised": described(error, file)}


def described(error: BaseException, file: str) -> dict[str, Any]:
    """An error as an entry of the report."""
    text = str(error).strip().splitlines() or [""]
    return {"type": type(error).__name__, "says": text[0][:500], "line": line_in(file, error)}


def is_blank(found: Outcome, about: exercise.Exercise) -> bool:
    """Whether the body is still missing."""
    raised = found.get("raised")
    return raised is not None and raised["says"] == f"exercise {about.name}"


def compare(found: Outcome, right: Outcome) -> list[dict[str, Any]]:
    """One row for each tensor: its stage, whether it passed, and the difference in words."""
    rows = []
    for name, expected in right.items():
        says = "not reached" if "raised" in found else difference(found[name], expected)
        stage = "gradients" if name.startswith("gradient") else "values"
        if says.startswith("its "):
            stage = "shapes, types"
        rows.append({"name": name, "stage": stage, "passed": not says, "says": says})
    return rows


def difference(found: torch.Tensor | None, expected: torch.Tensor | None) -> str:
    """The difference between two tensors in words; empty if they agree."""
    if found is None:
        return "" if expected is None else "no gradient reaches it"
    if expected is None:
        return "should have no gradient"
    if found.shape != expected.shape:
        return f"its shape is {tuple(found.shape)}, expected {tuple(expected.shape)}"
    if found.dtype != expected.dtype:
        return f"its dtype is {found.dtype}, expected {expected.dtype}".replace("torch.", "")
    if is_close(found, expected):
        return ""
    if not found.is_floating_point():
        return f"differs in {int((found != expected).sum())} of {found.numel()} elements"
    if not found.isfinite().all() and expected.isfinite().all():
        return f"is infinite or NaN in {int((~found.isfinite()).sum())} of {found.numel()} elements"
    if is_close(found, -expected):
        return "has the wrong sign"
    if not found.any():
        return "is zero everywhere"
    ratio = (found / expected)[(expected != 0) & expected.isfinite()].double()
    middle = float(ratio.median()) if len(ratio) else 1.0
    if abs(middle - 1) > 1e-3 and is_close(found, expected * middle):
        return f"is {middle:.4g} times what it should be"
    if found.ndim > 1 and found.shape[-1] == found.shape[-2] and is_close(found.transpose(-1, -2), expected):
        return "is transposed: its last two axes are swapped"
    if found.ndim and is_close(found.sort(-1).values, expected.sort(-1).values):
        return "has the right values in a different order along its last axis"
    for axis, name in enumerate(("first axis", "second axis")[: max(0, found.ndim - 1)]):
        ours, theirs = expected.transpose(0, axis), found.transpose(0, axis)
        if len(ours) > 2 and (is_close(theirs[1:], ours[:-1]) or is_close(theirs[:-1], ours[1:])):
            return f"is shifted by one along its {name}"
        if len(ours) > 1 and is_close(theirs[0], ours[0]):
            return f"is correct only at index 0 of its {name}"
    wrong = f"differs in {int(mismatches(found, expected).sum())} of {found.numel()} elements"
    return wrong + (f" (ratio {float(ratio.min()):.3g} to {float(ratio.max()):.3g})" if len(ratio) else "")


def is_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal up to the rounding of a different summation order."""
    return not mismatches(found, expected).any()


def mismatches(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Where two tensors of the same shape differ by more than the tolerance."""
    if not expected.is_floating_point():
        return found != expected
    most = TOLERANCE[str(expected.dtype).removeprefix("torch.")]
    finite = expected.isfinite()
    size = float(expected[finite].abs().max()) if finite.any() else 1.0
    return ~torch.isclose(found.double(), expected.double(), rtol=0, atol=most * size, equal_nan=True)


def diagnose(
    about: exercise.Exercise,
    probe: Callable[..., Outcome],
    origin: Path,
    text: str,
    found: Outcome,
    seed: int,
) -> list[str]:
    """The sentences of the one or two mistakes that reproduce the outcome; empty if none do."""
    numbers = range(len(about.mistakes))
    for some in [*itertools.combinations(numbers, 1), *itertools.combinations(numbers, 2)]:
        edited = about.with_mistakes(text, some)
        if edited is not None and same(outcome(probe, fresh(about.module, origin, edited), seed, ""), found):
            return [about.mistakes[number][2] for number in some]
    return []


def same(one: Outcome, other: Outcome) -> bool:
    """Whether two outcomes agree."""
    if "raised" in one or "raised" in other:
        keys = ("type", "says")
        return all((one.get("raised") or {}).get(key) == (other.get("raised") or {}).get(key) for key in keys)
    return all(not difference(other[name], value) for name, value in one.items())


class Results:
    """A pytest plugin that collects the results for the report."""

    def __init__(self) -> None:
        self.total, self.passed, self.skipped = 0, 0, 0
        self.failed: list[dict[str, str]] = []

    def pytest_collection_finish(self, session) -> None:
        self.total = len(session.items)

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            says = (crash.message if crash else str(report.longrepr)).splitlines() or [""]
            self.failed.append({"test": report.nodeid, "says": says[0][:300]})
        elif report.when == "call" or report.skipped:
            self.passed += report.passed
            self.skipped += report.skipped


def run_tests(about: exercise.Exercise, root: Path, every: bool) -> dict[str, Any]:
    """Run the project's tests on the patched package -> the counts, the failures, and whether all passed"""
    results = Results()
    options = ["-q", "-p", "no:cacheprovider", "-m", "not long", "--rootdir", str(root), "-k", about.which]
    options += ["-o", "pythonpath="]  # the root is at the end of sys.path already
    status = pytest.main(
        [*options, *([] if every else ["--maxfail=3"]), *(str(root / test) for test in about.tests)],
        plugins=[results],
    )
    total = results.total - results.skipped
    good = status == 0 and results.passed == total > 0
    return {"total": total, "passed": results.passed, "failed": results.failed, "good": good}
