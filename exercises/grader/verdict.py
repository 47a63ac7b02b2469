"""Interpret the report of a check: is the answer correct, how many points, and the text for the terminal."""

from pathlib import Path
from typing import Any

from lm.console import visible

from .exercise import STAGES, Exercise
from .homework import first_line


def is_done(report: dict[str, Any]) -> bool:
    """Whether all checks and all tests passed."""
    checks, tests = report["checks"], report["tests"]  # None: they ended without a result
    return bool(checks) and all(row["passed"] for row in checks) and bool(tests and tests["good"])


def points(report: dict[str, Any]) -> tuple[int, int]:
    """Checks passed, and how many there are; the project's tests count as one check."""
    rows, tests = report["checks"], report["tests"]
    return sum(row["passed"] for row in rows) + bool(tests and tests["good"]), len(rows) + 1


def shown(exercise: Exercise, path: Path, report: dict[str, Any]) -> str:
    """The report as text for the terminal."""
    passed, total = points(report)
    where = f"{path}:{first_line(exercise, path)}"
    lines = [f"{exercise.name:16}{passed} of {total}   {where:36}{exercise.equation}"]
    raised, tests = report["raised"], report["tests"]
    if raised:
        at = f"{path}:{raised['line']}: " if raised["line"] else ""
        blank = raised["says"] == f"exercise {exercise.name}"
        kind = f"{raised['type']}: " if raised["type"] else ""
        lines.append(f"  {at}{'not written yet' if blank else kind + raised['says']}")
        noted = [
            row for row in report["checks"] if row["name"] == row["stage"] and row["says"] != "not reached"
        ]
        lines += [f"  {row['stage']:16}{row['says']}" for row in noted]
    else:
        for stage in STAGES[:-1]:
            wrong = [row for row in report["checks"] if row["stage"] == stage and not row["passed"]]
            says = "ok" if not wrong else f"{wrong[0]['name']}: {wrong[0]['says']}"
            more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            if wrong and wrong[0]["name"] == stage:
                says = wrong[0]["says"]
            if wrong or stage not in ("memory", "precision"):
                lines.append(f"  {stage:16}{says}{more}")
    for sentence in report["mistakes"]:
        lines.append(f"     -> {sentence}")
    wrong = [row for row in report["checks"] if not row["passed"]]
    blank = bool(raised) and raised["says"] == f"exercise {exercise.name}"
    if wrong and not report["mistakes"] and not blank:
        what = "" if raised else f": look at {wrong[0]['name']}"
        lines.append(
            f"     -> no known mistake{what}; compare {exercise.equation}, or: lm exercise hint {exercise.name}"
        )
    if tests is None:
        lines.append(f"  {STAGES[-1]:16}run once the checks above pass")
    else:
        count = f"{tests['passed']} of {tests['total']}"
        lines.append(f"  {STAGES[-1]:16}" + ("ok, " if tests["good"] else "") + count)
        for failed in tests["failed"][:1]:
            lines.append(f"     first failure: {failed['test'].rpartition('::')[2]}: {failed['says']}")
    printed = report["output"].strip().splitlines() if not tests else []
    lines += [f"  | {line}" for line in printed[-8:] if not (raised and line.startswith(("Fatal", "  File")))]
    if is_done(report):
        lines.append(f"  {exercise.name} is done: {exercise.learn}")
    return visible("\n".join(lines), keep="\n")


def why(report: dict[str, Any]) -> str:
    """The first problem in a report."""
    if report["raised"]:
        return f"{report['raised']['type']} {report['raised']['says']}".strip()
    wrong = [f"{row['name']} {row['says']}" for row in report["checks"] if not row["passed"]]
    failed = [f"{row['test']}: {row['says']}" for row in (report["tests"] or {}).get("failed", [])]
    return (wrong + failed or ["all checks and tests pass"])[0]
