"""The loss that a preset reaches: the summary of a finished run, to be committed.

lm experiment training RUN ...  ->  experiments/results/train-NAME.json for each
"""

import argparse
import json
from pathlib import Path

from lm import checkpoint, count, data, machine
from lm.config import Config
from lm.run import read_metrics

RESULTS = Path(__file__).parent / "results"


def summary(run: Path) -> dict:
    """Losses, time and sizes of a run, with the machine of this process."""
    config = Config.load(run / "config.toml")
    state = checkpoint.read_state(checkpoint.newest_checkpoint(run))
    rows = read_metrics(run)
    if not rows or "val_loss" not in rows[-1]:
        raise ValueError(f"{run / 'metrics.jsonl'}: has no last row with val_loss; is the run done?")
    baseline = json.loads((data.CORPUS / "baselines.json").read_text())
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


def main(arguments: list[str] | None = None) -> None:
    """Write the file of each run."""
    shown = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser("lm experiment training", description=__doc__, formatter_class=shown)
    parser.add_argument("runs", nargs="+", type=Path)
    for run in parser.parse_args(arguments).runs:
        found = json.dumps(summary(run), indent=1)
        (RESULTS / f"train-{run.resolve().name}.json").write_text(found + "\n")
        print(found)


if __name__ == "__main__":
    main()
