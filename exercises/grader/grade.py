"""Grade a folder of submissions: one row for each student and exercise."""

import ast
import csv
import hashlib
import json
import subprocess
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from lm import __version__
from lm.files import write_file

from . import source
from .exercise import Exercise
from .homework import Checker, Homework, origin
from .verdict import is_done, points, why

COLUMNS = (
    *("student", "exercise", "score", "max_score", "checks_passed", "checks", "tests_passed", "tests"),
    *("mistakes", "says", "hints", "solution", "flags", "seconds", "sha256"),
)
HARMLESS = {"torch", "einops", "math", "typing", "collections", "itertools", "functools", "__future__"}


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
    homework = Homework()
    exercises = [homework.named(name) for name in only] or list(homework.exercises.values())
    students = submissions(folder, exercises)
    if gradescope_file and len(students) > 1:
        raise ValueError(f"{folder}: {len(students)} submissions; --gradescope takes one")
    for path in (json_file, csv_file, gradescope_file):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    with Checker() as checker, tempfile.TemporaryDirectory() as place:
        totals = {exercise.name: blank_total(exercise, checker, Path(place)) for exercise in exercises}
        for student, files in students.items():
            for exercise in exercises:
                row = graded(student, files, exercise, checker, seed, totals[exercise.name])
                rows.append(row)
                print(
                    f"{student:24}{exercise.name:16}{row['score']:6.2f} of {exercise.points}  {row['says']}"
                )
    about = {
        "version": __version__, "commit": commit(), "torch": metadata.version("torch"), "seed": seed,
    }  # fmt: skip
    if json_file:
        write_file(json_file, json.dumps({**about, "rows": rows}, indent=1) + "\n")
    if csv_file:
        with tempfile.TemporaryFile("w+", newline="", encoding="utf-8") as text:
            writer = csv.DictWriter(text, COLUMNS)
            writer.writeheader()
            writer.writerows(
                {**row, "mistakes": "; ".join(row["mistakes"]), "flags": "; ".join(row["flags"])}
                for row in rows
            )
            text.seek(0)
            write_file(csv_file, text.read())
    if gradescope_file:
        write_file(gradescope_file, json.dumps(gradescope(rows), indent=1) + "\n")
    return 0 if all(row["score"] == row["max_score"] for row in rows) else 1


def submissions(folder: Path, exercises: Sequence[Exercise]) -> dict[str, Path]:
    """Each student's folder by name: the subfolders, or this folder itself if it holds answers."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if any(
        (place / exercise.file).exists() for place in (folder, folder / "homework") for exercise in exercises
    ):
        return {folder.resolve().name: folder}
    found = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir()}
    if not found:
        raise ValueError(f"{folder}: no submissions found; expected one folder for each student")
    return found


def blank_total(exercise: Exercise, checker: Checker, place: Path) -> int:
    """The number of checks of an exercise."""
    path = place / exercise.file
    path.write_text(exercise.blank(origin(exercise).read_text("utf-8")), encoding="utf-8")
    return points(checker.check(exercise, path))[1]


def graded(
    student: str, folder: Path, exercise: Exercise, checker: Checker, seed: int, total: int
) -> dict[str, Any]:
    """A student's row for one exercise; an answer that cannot be checked gets no points and the reason."""
    homework = folder / "homework" if (folder / "homework").is_dir() else folder
    path, notes = homework / exercise.file, notes_of(homework, exercise)
    row: dict[str, Any] = {
        "student": student, "exercise": exercise.name, "score": 0.0, "max_score": exercise.points,
        "checks_passed": 0, "checks": total, "tests_passed": 0, "tests": 0, "mistakes": [], "says": "",
        "hints": notes.get("hints", 0), "solution": bool(notes.get("solution")), "flags": [], "seconds": 0.0,
        "sha256": "",
    }  # fmt: skip
    if not path.exists() and not path.is_symlink():
        return {**row, "says": "not submitted"}
    try:
        text = source.read(path)
        report = checker.check(exercise, path, seed, every=True)
    except ValueError as error:
        return {**row, "says": str(error).replace(f"{path.absolute()}", exercise.file)}
    passed = points(report)[0]
    tests = report["tests"] or {"passed": 0, "total": 0}
    done = is_done(report)
    row |= {
        "score": round(exercise.points * (passed / total if passed < total or done else 0), 2),
        "checks_passed": passed, "tests_passed": tests["passed"], "tests": tests["total"],
        "mistakes": report["mistakes"], "says": "" if done else "; ".join(report["mistakes"]) or why(report),
        "flags": flags(text, exercise), "seconds": report["seconds"],
    }  # fmt: skip
    found = source.find(ast.parse(text), exercise.function)
    if found:
        row["sha256"] = hashlib.sha256(ast.unparse(found[1]).encode()).hexdigest()
    return row


def notes_of(folder: Path, exercise: Exercise) -> dict[str, Any]:
    """Hints and solutions that the student's folder records; {} if it has no record."""
    try:
        notes = json.loads((folder / ".progress.json").read_text("utf-8")).get(exercise.name, {})
    except (OSError, ValueError, AttributeError):
        return {}
    return notes if isinstance(notes, dict) else {}


def flags(text: str, exercise: Exercise) -> list[str]:
    """Remarks for the teacher to look into; they cost no points."""
    tree = ast.parse(text)
    found = source.find(tree, exercise.function)
    ours = source.find(ast.parse(origin(exercise).read_text("utf-8")), exercise.function)
    if found is None or ours is None:
        return []
    said = []
    if bare(found[1]) == bare(ours[1]):
        said.append("identical to the package's")
    names = {
        alias.name for node in ast.walk(found[1]) if isinstance(node, ast.Import) for alias in node.names
    }
    names |= {node.module or "" for node in ast.walk(found[1]) if isinstance(node, ast.ImportFrom)}
    others = sorted({name.partition(".")[0] for name in names} - HARMLESS - {""})
    said += [f"imports {', '.join(others)}"] if others else []
    calls = {
        node.func.id
        for node in ast.walk(found[1])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    used = sorted(calls & {"open", "exec", "eval", "compile", "__import__", "globals"})
    return said + ([f"calls {', '.join(used)}"] if used else [])


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
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
