"""The options that experiments share, and where a run may write its results."""

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
RUNS = Path(__file__).parent.parent / "runs" / "experiments"
SEEDS = 3  # that a verdict needs
QUICK_STEPS, QUICK_SEEDS = 8, 2


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """A parser with --quick and --out."""
    made = argparse.ArgumentParser(
        f"lm experiment {name}", description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="only test that it runs; prints no verdict")
    made.add_argument(
        "--out",
        type=Path,
        help="folder for the result and its picture; experiments/results,\n"
        "or runs/experiments/quick with --quick, .../short without a verdict",
    )
    made.set_defaults(runs=RUNS)
    return made


def options(
    name: str, description: str | None, steps: int, arguments: Sequence[str] | None = None
) -> argparse.Namespace:
    """The options of an experiment -> .steps, .seeds, .jobs, .quick, .out, .runs, .no_verdict

    Args:
        steps: default of --steps, and the least that a verdict needs.
    """
    made = parser(name, description)
    quick = f"with --quick {QUICK_STEPS}"
    made.add_argument("--steps", type=int, help=f"steps of the longest training; {steps}, {quick}")
    quick = f"with --quick {QUICK_SEEDS}"
    made.add_argument("--seeds", type=int, help=f"trainings of each model, 2 to 10; {SEEDS}, {quick}")
    cores = os.cpu_count()
    made.add_argument("--jobs", type=int, default=cores, help=f"parallel trainings, one core each; {cores}")
    made.add_argument(
        "--runs",
        type=Path,
        default=RUNS,
        help="folder of the trainings, reused if their config is the same;\n"
        "use another one after a change of code; runs/experiments",
    )
    given = made.parse_args(arguments)
    if given.steps is None:
        given.steps = QUICK_STEPS if given.quick else steps
    if given.seeds is None:
        given.seeds = QUICK_SEEDS if given.quick else SEEDS
    for option, least, most in (("steps", 8, 10**9), ("seeds", 2, 10), ("jobs", 1, 10**4)):
        if not least <= getattr(given, option) <= most:
            made.error(f"--{option} {getattr(given, option)}: must be a whole number {least}..{most}")
    few = given.steps < steps or given.seeds < SEEDS
    needs = f"{given.steps} steps and {given.seeds} seeds; at least {steps} and {SEEDS} are needed"
    check_folders(made, given, needs if few else "")
    return given


def check_folders(made: argparse.ArgumentParser, given: argparse.Namespace, short: str = "") -> None:
    """Set .no_verdict, why there is none or "", and .out; create the folders.

    Only a run with a verdict may write to experiments/results.

    Args:
        short: why a run without --quick is too short for a verdict.
    """
    given.no_verdict = "--quick only tests that the experiment runs" if given.quick else short
    if given.out is None:
        given.out = given.runs / ("quick" if given.quick else "short") if given.no_verdict else RESULTS
    elif given.no_verdict and given.out.resolve().is_relative_to(RESULTS.resolve()):
        made.error(f"--out {given.out}: only for runs with a verdict ({given.no_verdict}); choose another")
    for option in ("out", "runs"):
        folder = getattr(given, option)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            made.error(f"--{option} {folder}: cannot be written to: {error.strerror}")


def place(path: Path) -> str:
    """A path to print: relative if it is below the current folder."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
