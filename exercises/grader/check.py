"""Check an answer, in a process that `server.py` starts for one of three stages:

- answer: the process patches the student's function into its module (exercises/grader/overlay.py), runs the
  exercise's probe on it, and saves the outputs.
- judge: another process, which never loads the student's file, compares these outputs with those of the
  original source and of the source with each known mistake.
- tests: a process with the student's function again runs the project's tests.

The result of a stage is written last: a missing one means that the stage failed.
"""

import functools
import importlib
import inspect
import itertools
import json
import os
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from . import exercise, overlay, system, watch
from .compare import Outcome, compare, same

MEMORY = 4 << 30  # bytes that an answer may allocate
OUTPUT = 1 << 20  # bytes that an answer may print
FORBIDDEN = (  # audit events of the interpreter that no answer needs
    *("os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "subprocess.Popen"),
    *("os.kill", "os.killpg", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink"),
    *("os.chmod", "os.truncate", "shutil.rmtree", "shutil.move", "shutil.copyfile"),
    *("socket.connect", "socket.bind", "ctypes.dlopen", "signal.pthread_kill", "os.setrlimit"),
)
GUARDED = (
    "torch",
    "torch.testing",
    "torch.nn.functional",
    "torch.linalg",
    "torch.autograd",
    "builtins",
    "math",
)
DIAGNOSIS = 20  # seconds to look for the mistakes that explain a result


def run_job(job: dict[str, Any]) -> None:
    """Run one job in its process: set the limits, check, write the report."""
    out = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for stream in (1, 2):
        os.dup2(out, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.dont_write_bytecode = True
    system.confine(MEMORY, OUTPUT)
    os.chdir(job["root"])
    result = STAGES[job["stage"]](exercise.load(Path(job["exercise"])), job)
    new = Path(job["result"] + ".new")
    torch.save(result, new) if job["stage"] == "answer" else new.write_text(json.dumps(result), "utf-8")
    new.replace(job["result"])


def guard(path: str, root: str) -> list[str]:
    """Forbid FORBIDDEN operations and writing files wherever the student's code is on the call stack.

    Other threads than the caller's are the student's, even those that run a library's function.

    Returns:
        Notes for the teacher, added later: whether the code reads the original source or runs code from text.
    """
    notes: list[str] = []
    main = threading.get_ident()

    def is_source(name: object) -> bool:
        return isinstance(name, str) and name.endswith(".py") and os.path.realpath(name).startswith(root)

    def refuse(what: str, *_: object) -> NoReturn:
        raise PermissionError(f"an answer may not use {what}")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in FORBIDDEN) and (threading.get_ident() != main or line_in(path) is not None):
            refuse(f"{event} {arguments[0]}" if writes else event)
        said = ""
        if event in ("exec", "compile") and sys._getframe(1).f_code.co_filename == path:
            said = "runs code from text"
        elif event == "open" and is_source(arguments[0]) and line_in(path) is not None:
            said = "reads the package's source"
        if said and said not in notes:
            notes.append(said)

    sys.addaudithook(hook)
    for name in ("_exit", "abort"):  # these raise no audit event
        setattr(os, name, functools.partial(refuse, f"os.{name}"))
    return notes


def functions_now() -> dict[str, Any]:
    """The functions and classes that the checks rely on, by name."""
    names = [*GUARDED, *(name for name in sys.modules if name.startswith(("_pytest.", "exercises.grader.")))]
    found = {f"{name}.{key}": value for name in names for key, value in list(vars(sys.modules[name]).items())}
    found |= {f"torch.Tensor.{key}": inspect.getattr_static(torch.Tensor, key) for key in dir(torch.Tensor)}
    return {name: value for name, value in found.items() if callable(value)}


def replaced(before: dict[str, Any]) -> dict[str, Any] | None:
    """The first of these functions that is no longer itself, as an error of the report."""
    now = functions_now()
    for name, value in before.items():
        if now.get(name) is not value:
            return {"type": "PermissionError", "says": f"an answer may not replace {name}", "line": None}
    return None


def line_in(path: str, error: BaseException | None = None, origin: str = "") -> int | None:
    """The innermost line of a file in an error's traceback, or on the current call stack.

    Args:
        origin: the module whose top level holds the student's imports and helpers: its lines count too.
    """
    if error is not None:
        lines = [
            line
            for frame, line in traceback.walk_tb(error.__traceback__)
            if (file := frame.f_code.co_filename) == path
            or (file == origin and frame.f_code.co_name == "<module>")
        ]
        return lines[-1] if lines else None
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == path:
            return frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]
    return None


def run_answer(about: exercise.Exercise, job: dict[str, Any]) -> Outcome:
    """The probe's outputs with the student's function; "used": notes for the teacher."""
    probe, before = functions_of(about.path)["probe"], functions_now()
    notes = guard(job["file"], os.path.realpath(job["root"]) + os.sep)
    overlay.install([overlay.Piece(about.module, about.function, Path(job["file"]))])
    try:
        found = outcome(
            probe, importlib.import_module(about.module), about.function, job["seed"], job["file"]
        )
    except BaseException as error:
        found = {"raised": described(error, job["file"], job["origin"])}
    if (patched := replaced(before)) is not None:
        found = {"raised": patched}
    return {**found, "used": notes}


def judge(about: exercise.Exercise, job: dict[str, Any]) -> dict[str, Any]:
    """The outputs compared, and the mistakes that explain them; the student's file is not loaded."""
    try:
        found = torch.load(job["answer"], weights_only=True)
    except Exception as error:  # objects that only the student's process knows
        found = {
            "raised": {"type": "", "says": f"a result is not a plain tensor: {str(error)[:80]}", "line": None}
        }
    used = found.pop("used", [])
    probe, origin = functions_of(about.path)["probe"], Path(job["origin"])
    text = origin.read_text("utf-8")
    importlib.import_module(about.module)
    right = outcome(probe, fresh(about.module, origin, text), about.function, job["seed"], "")
    if "raised" in right:  # lack of memory, say
        raise RuntimeError(f"the package's own function failed: {right['raised']['says']}")
    rows = compare(found, right)
    report = {"raised": found.get("raised"), "checks": rows, "mistakes": [], "tests": None, "used": used}
    if any(not row["passed"] for row in rows) and not is_blank(found, about):
        report["mistakes"] = diagnose(about, probe, origin, text, found, job["seed"])
    return report


def diagnose(
    about: exercise.Exercise,
    probe: Callable[..., Outcome],
    origin: Path,
    text: str,
    found: Outcome,
    seed: int,
) -> list[str]:
    """The sentences of the one or two mistakes that reproduce the outcome; empty if none do."""
    numbers, end = range(len(about.mistakes)), time.monotonic() + DIAGNOSIS
    for some in [*itertools.combinations(numbers, 1), *itertools.combinations(numbers, 2)]:
        edited = about.with_mistakes(text, some)
        if time.monotonic() > end:
            break
        if edited is None:
            continue
        try:
            module = fresh(about.module, origin, edited)
        except SyntaxError:  # two edits that do not fit together
            continue
        if same(outcome(probe, module, about.function, seed, ""), found):
            return [about.mistakes[number][2] for number in some]
    return []


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


def outcome(
    probe: Callable[..., Outcome], module: types.ModuleType, function: str, seed: int, file: str
) -> Outcome:
    """The probe's output for a module, with the notes of watch.py: named tensors, or the error raised."""
    torch.manual_seed(seed)
    notes: dict[str, set[str]] = {}
    try:
        notes = watch.watch(module, function)
        values = probe(module, torch.Generator().manual_seed(seed))
        found = {name: plain(value) for name, value in values.items()}
    except BaseException as error:
        found = {"raised": described(error, file)}
    return {**found, **{name: sorted(said) for name, said in notes.items()}}


def plain(value: Any) -> Any:
    """A result as it is compared: detached and copied; the type's name of what is not a tensor."""
    if value is None:
        return None
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        return value.detach().clone()
    return type(value).__name__


def described(error: BaseException, file: str, origin: str = "") -> dict[str, Any]:
    """An error as an entry of the report."""
    text = str(error).strip().splitlines() or [""]
    return {"type": type(error).__name__, "says": text[0][:500], "line": line_in(file, error, origin)}


def is_blank(found: Outcome, about: exercise.Exercise) -> bool:
    """Whether the body is still missing."""
    raised = found.get("raised")
    return raised is not None and raised["says"] == f"exercise {about.name}"


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


def run_tests(about: exercise.Exercise, job: dict[str, Any]) -> dict[str, Any]:
    """Run the project's tests on the patched package -> the counts, the failures, and whether all passed"""
    root, every, before = Path(job["root"]), job["all"], functions_now()
    guard(job["file"], os.path.realpath(job["root"]) + os.sep)
    overlay.install([overlay.Piece(about.module, about.function, Path(job["file"]))])
    importlib.import_module(about.module)
    results = Results()
    options = ["-q", "-p", "no:cacheprovider", "-m", "not long", "--rootdir", str(root), "-k", about.which]
    options += ["-o", "pythonpath="]  # the root is at the end of sys.path already
    status = pytest.main(
        [*options, *([] if every else ["--maxfail=3"]), *(str(root / test) for test in about.tests)],
        plugins=[results],
    )
    total = results.total - results.skipped
    if (patched := replaced(before)) is not None:
        return {"total": total, "passed": 0, "failed": [{"test": "all", **patched}], "good": False}
    good = status == 0 and results.passed == total > 0
    return {"total": total, "passed": results.passed, "failed": results.failed, "good": good}


STAGES: dict[str, Callable[[exercise.Exercise, dict[str, Any]], dict[str, Any]]] = {
    "answer": run_answer,
    "judge": judge,
    "tests": run_tests,
}
