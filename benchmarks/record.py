"""Options of a benchmark, and the file of its result."""

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

from lm import machine

RESULTS = Path(__file__).parent / "results"


def options(description: str | None, rounds: int) -> argparse.Namespace:
    """Parse the options of a benchmark that runs in rounds -> .rounds (1 if quick), .quick, .out"""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--quick", action="store_true", help="one round at small sizes, as a test")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    given = parser.parse_args()
    given.rounds = 1 if given.quick else given.rounds
    return given


def commit() -> str:
    """The current commit; "" outside a clone."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS)
    except OSError:
        return ""
    return found.stdout.strip()


def write(name: str, found: dict[str, Any], folder: Path = RESULTS) -> None:
    """Write a result with its machine as NAME-CPU.json."""
    facts = machine.describe()
    kind = str(facts["cpu_capability"]).lower().replace(" ", "-")
    whole = {"machine": facts, "commit": commit(), **found}
    (folder / f"{name}-{kind}.json").write_text(json.dumps(whole, indent=1) + "\n")
