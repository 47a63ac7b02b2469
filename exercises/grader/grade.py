"""Grade a folder of submissions: one row for each student and exercise."""

import ast
import csv
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from lm import __version__
from lm.console import visible
from lm.files import write_file

from . import overlay, source, submissions, system
from .exercise import Exercise, load_all, named
from .homework import EXERCISES, Checker, origin
from .submissions import Submission
from .verdict import is_done, points, why

COLUMNS = (
    *("student", "exercise", "score", "max_score", "checks_passed", "checks", "tests_passed", "tests"),
    *("mistakes", "says", "hints", "solution", "flags", "seconds", "sha256"),
)
HARMLESS = {"torch", "einops", "math", "typing", "collections", "itertools", "functools", "__future__"}
HARMLESS |= set(overlay.PROJECT)


def run(
    folder: Path,
    only: Sequence[str],
    seed: int,
    json_file: Path | None,
    csv_file: Path | None,
    gradescope_file: Path | None,
) -> int:
    """Grade, print the rows and write the requested files -> 0 if all exercises are done, else 1

    Raises:
        ValueError: the folder does not exist or holds no submission.
    """
    if not system.FORKS:
        print(system.UNCONFINED, file=sys.stderr)
    every = load_all(EXERCISES)
    exercises = [named(name, every) for name in only] or list(every.values())
    with tempfile.TemporaryDirectory() as unpacked:
        students, loose = submissions.find(folder, list(every.values()), Path(unpacked))
        if gradescope_file and len(students) > 1:
            raise ValueError(f"{folder}: {len(students)} submissions; --gradescope takes one")
        for path in (json_file, csv_file, gradescope_file):
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
        rows = []
        with Checker() as checker, tempfile.TemporaryDirectory() as place:
            totals = {exercise.name: blank_total(exercise, checker, Path(place)) for exercise in exercises}
            for student, handed_in in students.items():
                for exercise in exercises:
                    row = graded(student, handed_in, exercise, checker, seed, totals[exercise.name])
                    rows.append(row)
                    print(line_of(row))
    remarks = {student: one.remarks for student, one in students.items() if one.remarks}
    for student, said in remarks.items():
        print(*(f"{student}: {remark}" for remark in said), sep="\n")
    if loose:
        print(f"not in a student's folder, not graded: {', '.join(loose)}")
    about = {
        "version": __version__, "commit": commit(), "torch": metadata.version("torch"), "seed": seed,
    }  # fmt: skip
    if json_file:
        write_file(
            json_file,
            json.dumps({**about, "remarks": remarks, "loose": loose, "rows": rows}, indent=1) + "\n",
        )
    if csv_file:
        with tempfile.TemporaryFile("w+", newline="", encoding="utf-8") as text:
            writer = csv.DictWriter(text, COLUMNS)
            writer.writeheader()
            writer.writerows(
                {
                    name: cell("; ".join(value) if isinstance(value, list) else value)
                    for name, value in row.items()
                }
                for row in rows
            )
            text.seek(0)
            write_file(csv_file, text.read())
    if gradescope_file:
        write_file(gradescope_file, json.dumps(gradescope(rows), indent=1) + "\n")
    return 0 if all(row["score"] == row["max_score"] for row in rows) else 1


def line_of(row: dict[str, Any]) -> str:
    """A row for the terminal: the points, the problem, and the flags."""
    flagged = f"  [{'; '.join(row['flags'])}]" if row["flags"] else ""
    score = f"{row['score']:6.2f} of {row['max_score']}"
    return visible(f"{row['student']:24}{row['exercise']:16}{score}  {row['says']}{flagged}")


def blank_total(exercise: Exercise, checker: Checker, place: Path) -> int:
    """The number of checks of an exercise."""
    path = place / exercise.file
    path.write_text(exercise.blank(origin(exercise).read_text("utf-8")), encoding="utf-8")
    for _ in range(2):  # a busy machine can exceed the time limit once
        report = checker.check(exercise, path)
        if report["checks"]:
            return points(report)[1]
    raise RuntimeError(f"{exercise.name}: its checks cannot be run here: {why(report)}")


def graded(
    student: str, handed_in: Submission, exercise: Exercise, checker: Checker, seed: int, total: int
) -> dict[str, Any]:
    """A student's row for one exercise; an answer that cannot be checked gets no points and the reason."""
    path = handed_in.files.get(exercise.name)
    notes = notes_of(handed_in.notes, exercise)
    row: dict[str, Any] = {
        "student": student, "exercise": exercise.name, "score": 0.0, "max_score": exercise.points,
        "checks_passed": 0, "checks": total, "tests_passed": 0, "tests": 0, "mistakes": [], "says": "",
        "hints": notes.get("hints", 0), "solution": notes.get("solution", False), "flags": [], "seconds": 0.0,
        "sha256": "",
    }  # fmt: skip
    if path is None:
        return {**row, "says": handed_in.problems.get(exercise.name, "not submitted")}
    try:
        text = source.read(path)
        report = checker.check(exercise, path, seed, every=True)
        row["flags"] = flags(text, exercise) + report["used"]
        function = source.find(ast.parse(text), exercise.function)
        row["sha256"] = hashlib.sha256(ast.unparse(function[1]).encode()).hexdigest() if function else ""
    except (ValueError, OSError, RecursionError, MemoryError) as error:
        says = str(error).replace(f"{path.absolute()}", visible(path.name)) or type(error).__name__
        return {**row, "says": visible(says)}
    passed, count = points(report)
    tests = report["tests"] or {"passed": 0, "total": 0}
    done = is_done(report)
    says = "" if done else "; ".join(report["mistakes"]) or why(report)
    return row | {
        "score": round(exercise.points * (passed / count if passed < count or done else 0), 2),
        "checks": count if report["checks"] else total, "checks_passed": passed,
        "tests_passed": tests["passed"], "tests": tests["total"],
        "mistakes": report["mistakes"], "says": visible(says), "seconds": report["seconds"],
    }  # fmt: skip


def notes_of(path: Path | None, exercise: Exercise) -> dict[str, Any]:
    """Hints and solutions that the student's folder records; {} if it has no readable record."""
    try:
        return source.notes(path).get(exercise.name, {}) if path else {}
    except ValueError:
        return {}


SUSPECT = {
    "open",
    "exec",
    "eval",
    "compile",
    "__import__",
    "globals",
    "__builtins__",
    "builtins",
    "__globals__",
}
SUSPECT |= {"read_text", "read_bytes", "getsource", "getsourcelines", "exec_module", "setattr", "modules"}


def flags(text: str, exercise: Exercise) -> list[str]:
    """Remarks for the teacher to look into; they cost no points."""
    theirs, tree = ast.parse(text), ast.parse(origin(exercise).read_text("utf-8"))
    found, ours = source.find(theirs, exercise.function), source.find(tree, exercise.function)
    if found is None or ours is None:
        return []
    said = []
    if bare(found[1]) == bare(ours[1]):
        said.append("identical to the package's")
    nodes = [node for part in [found[1], *overlay.additions(tree, theirs)] for node in ast.walk(part)]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    others = sorted({name.partition(".")[0] for name in modules} - HARMLESS - {""})
    said += [f"imports {', '.join(others)}"] if others else []
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    used |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    suspect = sorted(used & SUSPECT)
    return said + ([f"uses {', '.join(suspect)}"] if suspect else [])


def cell(value: Any) -> Any:
    """A cell that a spreadsheet does not take for a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value


def bare(node: source.Function) -> str:
    """A function's syntax tree as text, without its docstring."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return "\n".join(ast.dump(statement) for statement in body)


def gradescope(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rows in the format of Gradescope's results.json."""
    return {
        "tests": [
            {
                "name": row["exercise"], "score": row["score"], "max_score": row["max_score"],
                "output": row["says"] or "all checks and tests pass", "visibility": "visible",
            }
            for row in rows
        ]
    }  # fmt: skip


def commit() -> str:
    """The clone's git commit; empty if unknown."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, encoding="utf-8", timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
