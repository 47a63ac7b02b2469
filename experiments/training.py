"""The loss that a preset reaches: the summary of a finished run, to be committed.

lm experiment training RUN ... [--quick]  ->  experiments/results/train-NAME.json for each

NAME is the run's folder. A run that is not the whole training of the preset NAME goes to
runs/experiments/short.
"""

import argparse
import copy
import json
from pathlib import Path

from lm import count, data, files, history, machine
from lm.config import Config, preset_names
from lm.run import read_metrics

from . import command, common


def summary(run: Path) -> dict:
    """Losses, time and sizes of a run, with the machine of this process."""
    config = Config.load(run / "config.toml")
    state = history.read_state(history.newest_checkpoint(run))
    rows = read_metrics(run)
    if not rows or "val_loss" not in rows[-1] or rows[-1]["step"] != config.train.steps:
        missing = f"has no row of step {config.train.steps} with val_loss; is the run finished?"
        raise ValueError(f"{run / 'metrics.jsonl'}: {missing}")
    baseline = json.loads((data.CORPUS / "baselines.json").read_text("utf-8"))
    return {
        "machine": machine.describe(),
        "dtype": state["dtype"],
        "threads": state["threads"],
        "cpu_capability": state["cpu_capability"],
        "steps": state["step"],
        "tokens": state["tokens"],
        "seconds": round(state["seconds"], 1),
        "parameters": count.total_parameters(config.model),
        "active_parameters": count.active_parameters(config.model),
        "cache_elements_per_token": count.cache_elements_per_token(config.model),
        "held_out_loss": rows[-1]["val_loss"],
        "best_ngram_loss": baseline["best"],
        "held_out_losses": {row["step"]: round(row["val_loss"], 4) for row in rows if "val_loss" in row},
    }


def cut_short(run: Path) -> str:
    """Why a run is not the whole training of the preset of its name, or ""."""
    name, config = run.resolve().name, Config.load(run / "config.toml")
    if name not in preset_names():
        return f"{name} is not a preset"
    preset = Config.preset(name)
    if (config.model, config.data) != (preset.model, preset.data):
        return f"{run}: its model or text differs from that of the preset {name}"
    few = config.train.steps < preset.train.steps
    return f"{run}: {config.train.steps} of the preset's {preset.train.steps} steps" if few else ""


def quick_run(given: argparse.Namespace) -> Path:
    """A run of a few steps of a tiny model."""
    config = common.with_steps(common.base(given), command.QUICK_STEPS, 0)
    common.trained(config, given.runs, None)
    return given.runs / common.key(config)


def main(arguments: list[str] | None = None) -> None:
    """Write the file of each run."""
    made = command.parser("training", __doc__)
    made.add_argument("run", nargs="*", type=Path, help="a finished run; with --quick, a new one of 8 steps")
    given = made.parse_args(arguments)
    if not given.run and not given.quick:
        made.error("a run is missing; runs/toy, for example")
    if given.quick:
        given.runs.mkdir(parents=True, exist_ok=True)
    for run in given.run or [quick_run(given)]:
        found, mine = summary(run), copy.copy(given)
        command.check_folders(made, mine, cut_short(run))
        path = mine.out / f"train-{run.resolve().name}.json"
        files.write_file(path, json.dumps(found, indent=1) + "\n")
        print(json.dumps(found, indent=1), f"Result: {command.place(path)}", sep="\n")


if __name__ == "__main__":
    main()
