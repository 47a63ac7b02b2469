"""What balances the expert load, and at what cost in loss?

lm experiment balance [--quick]  ->  experiments/results/balance.json and .png

Claim: the selection bias alone balances the load, at no cost in loss: MaxVio over a held-out text goes from
0.72 with a balance loss to 0.04, perplexity from 9.56 to 9.50 (arXiv 2408.15664 table 2; DeepSeek-V3 section
2.1.2). Prediction: with the bias update the global MaxVio is at most 0.1 and the loss is not above that with
the Switch loss; without any method both are worse. V3's update, by the sign of the gap, has a fixed step, and
the bias keeps fluctuating by that much. In so short a training only a step proportional to the gap converges.

The global MaxVio counts the whole held-out text, a batch's only one training batch: batches that are each
uneven in a different way are balanced together. Dead experts receive no token of the held-out text; both
layers are counted, in the worst seed.
"""

from typing import Any

import torch

from lm.config import Config
from lm.model import Transformer
from moe import balance, metrics

from . import command, common

OFF = {"bias_update_rate": 0.0, "sequence_loss": 0.0}
QUARTERS = {"accumulation": 4}  # the step in four passes: a pass has a different load than the step
METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "Switch loss, 0.001": {"switch_loss": 0.001},
    "Switch loss, 0.01": {"switch_loss": 0.01},
    "Switch loss, 0.01, in quarters": {"switch_loss": 0.01, **QUARTERS},
    "global-batch loss, 0.01, in quarters": {"global_batch_loss": 0.01, **QUARTERS},
    "sequence loss, 0.01": {"sequence_loss": 0.01},
    "V2's three losses": {
        "sequence_loss": 0.003, "device_loss": 0.05, "communication_loss": 0.02,
        "num_devices": 7, "top_devices": 3,
    },
    "z-loss, 0.001": {"z_loss": 0.001},
    "bias, by sign": {"bias_update_rate": 0.01},
    "bias, by sign, a tenth of the step": {"bias_update_rate": 0.001},
    "bias, by sign, centred": {"bias_update_rate": 0.01, "bias_update": "centred"},
    "bias, proportional": {"bias_update_rate": 0.01, "bias_update": "proportional"},
    "bias, by sign, and sequence loss, 0.0001": {"bias_update_rate": 0.01, "sequence_loss": 0.0001},
}  # fmt: skip
AUXILIARY, SIGN, GAP = "Switch loss, 0.01", "bias, by sign", "bias, proportional"


@torch.no_grad()
def load(model: Transformer, config: Config) -> dict[str, Any]:
    """How the held-out text is distributed over the experts of each layer."""
    windows = common.validation(config)
    counts: list[torch.Tensor] = []
    model.eval()
    for first in range(0, len(windows), config.train.batch_size):
        stop = min(first + config.train.batch_size, len(windows))
        batch = torch.stack([windows[index][:-1] for index in range(first, stop)])
        here = [balance.tokens_per_expert(routing) for routing in model.trunk(batch)[1]]
        counts = [a + b for a, b in zip(counts, here)] if counts else here
    return {
        "max_violation": max(float(balance.max_violation(count)) for count in counts),
        "load_entropy": min(float(metrics.load_entropy(count)) for count in counts),
        "dead_experts": sum(int(metrics.dead_experts(count)) for count in counts),
    }


def in_quarters(config: Config) -> Config:
    """Split the batch over the passes of a step."""
    return common.changed(config, train={"batch_size": config.train.batch_size // config.train.accumulation})


def main(arguments: list[str] | None = None) -> None:
    """Train with each method and measure the load."""
    given = command.options("balance", __doc__, 600, arguments)
    base = common.base(given)
    few = ("none", AUXILIARY, "global-batch loss, 0.01, in quarters", SIGN, GAP)
    names = few if given.quick else tuple(METHODS)
    configs = {name: in_quarters(common.changed(base, train=OFF | METHODS[name])) for name in names}
    rows = common.train_all(configs, given, measure=load)
    for row in rows:
        row["batch_max_violation"] = max(row["batch_max_violation"])
    keys = ("held_out_loss", "max_violation", "batch_max_violation", "dead_experts")
    losses, worst, of_batch, dead = (common.last(rows, key) for key in keys)
    none, auxiliary, sign, gap = (common.shown(worst[name], 2) for name in ("none", AUXILIARY, SIGN, GAP))
    less = [common.shown(common.paired(rows, AUXILIARY, name), 4) for name in (SIGN, GAP)]
    answer = [
        f"Global MaxVio of the worse layer is {none} without any method, {auxiliary} with the Switch loss of "
        f"weight 0.01, {sign} with a fixed bias step, {gap} with a bias step proportional to the gap.",
        f"The loss with the Switch loss is above those with these bias updates by {less[0]} and {less[1]}.",
    ]
    table = [["", "global MaxVio", "MaxVio of a batch", "dead experts", "held-out loss"]]
    for name in names:
        each = common.shown(worst[name], 2), common.shown(of_batch[name], 2), f"{max(dead[name])}"
        table.append([name, *each, common.shown(losses[name], 4)])
    even = [0.1 - value for value in worst[GAP]]
    claimed = common.as_claimed(even, common.paired(rows, AUXILIARY, GAP), common.paired(rows, "none", GAP))
    common.write("balance", given, claimed, answer, table, rows, configs)
    figure, axes = common.plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    common.points(axes[0], worst, "global MaxVio, worse layer")
    axes[0].set_xscale("log")
    common.points(axes[1], losses, "held-out loss, nats a byte")
    common.save(figure, "balance", given)


if __name__ == "__main__":
    main()
