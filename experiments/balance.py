"""Does the selection bias keep experts busy? The toy, trained twice from one seed: with its update, without.

python -m experiments.balance [--steps N]  ->  experiments/results/balance.json and .png

Claim (DeepSeek-V3 section 2.1.2, arXiv 2408.15664): the bias alone balances the load, with no auxiliary loss
and at no cost in loss. Both runs train without the sequence-wise loss, so that nothing else balances.
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import matplotlib

from lm import machine, runs, train
from lm.config import Config

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
LAST = 100  # steps at the end that are averaged


def run(config: Config, rate: float) -> list[dict]:
    """The log of a training with that step of the bias, a row a step."""
    settings = dataclasses.replace(
        config.train,
        bias_update_rate=rate,
        sequence_loss=0.0,
        log_every=1,
        sample_every=config.train.steps,
        save_every=config.train.steps,
    )
    with tempfile.TemporaryDirectory() as folder:
        train.train(dataclasses.replace(config, train=settings), Path(folder) / "run")
        return runs.read_metrics(Path(folder) / "run")


def by_layer(rows: list[dict]) -> list[float]:
    """Mean MaxVio of each MoE layer over the last steps."""
    last = [row["max_violations"] for row in rows[-LAST:]]
    return [round(sum(values) / len(values), 4) for values in zip(*last)]


def main() -> None:
    """Both runs, the figures and the picture."""
    config = Config.preset("toy")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=config.train.steps)
    steps = parser.parse_args().steps
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))
    logs = {"bias update": run(config, config.train.bias_update_rate), "none": run(config, 0.0)}
    found = {
        "machine": machine.describe(),
        "preset": "toy",
        "steps": steps,
        "seed": config.train.seed,
        "bias_update_rate": config.train.bias_update_rate,
        "max_violation_by_layer_last_100_steps": {name: by_layer(rows) for name, rows in logs.items()},
        "held_out_loss": {name: round(rows[-1]["val_loss"], 4) for name, rows in logs.items()},
    }
    with_bias, without = found["max_violation_by_layer_last_100_steps"].values()
    found["ratio_by_layer"] = [round(a / b, 3) for a, b in zip(with_bias, without)]
    (RESULTS / "balance.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))

    layers = len(with_bias)
    figure, axes = plt.subplots(1, layers, figsize=(4 * layers, 3), sharey=True, squeeze=False)
    for layer, axis in enumerate(axes[0]):
        for name, rows in logs.items():
            values = [row["max_violations"][layer] for row in rows]
            axis.plot([row["step"] for row in rows], values, label=name)
        axis.set_title(f"MoE layer {layer + 1}")
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("MaxVio of the batch")
    axes[0][0].set_ylim(bottom=0)
    axes[0][0].legend()
    figure.savefig(RESULTS / "balance.png", dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
