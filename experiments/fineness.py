"""Are many small experts better than a few large ones?

lm experiment fineness [--quick]  ->  experiments/results/fineness.json and .png

Claim: at equal total and active parameters a shared expert lowers the loss, and so does each halving of the
experts: 2 of 16, 1 shared + 1 of 15, 1 + 3 of 31, 1 + 7 of 63 (DeepSeekMoE, arXiv 2401.06066 figure 3).
Prediction: the same order.

The paper starts from 16 experts, this experiment from 32. The single routed expert of "1 shared, 1 of 31"
is weighted by its plain sigmoid. Elsewhere the weights are divided by their sum, but a single weight
divided by itself would leave the router without a gradient. Two more models separate this effect from that
of sharing: the single expert weighted by the paper's softmax over all experts, and experts of half the
width, none shared.

Does not reproduce here, because the shared expert takes a choice away. The router selects one expert
instead of two, with sigmoid and with softmax, and a byte's second choice among 32 is worth more here than
an expert that serves all bytes. With three of four experts left to select, sharing neither helps nor hurts
in so short a training. Finer experts help as published; from the second step on the difference is within
the error.
"""

from typing import Any

from lm.config import Config

from . import command, common
from .gate_scale import gate_scale

BY_LOSS = {"bias_update_rate": 0.0, "sequence_loss": 0.0, "switch_loss": 0.01}


def models(config: Config) -> dict[str, Config]:
    """The four models of the claim and the two controls, with the config's total and active parameters."""
    moe = config.model.moe
    at_work = (moe.top_k + moe.num_shared_experts) * moe.hidden_dim
    number = (moe.num_experts + moe.num_shared_experts) * moe.hidden_dim * 2 // at_work  # two per token
    found = {f"2 of {number}": split(config, number, 2, 0, at_work // 2)}
    for times in (1, 2, 4):
        experts, top_k = number * times - 1, 2 * times - 1
        found[f"1 shared, {top_k} of {experts}"] = split(config, experts, top_k, 1, at_work // 2 // times)
    lone = f"1 shared, 1 of {number - 1}"
    return found | {
        f"{lone}, softmax": common.changed(found[lone], moe={"router": "softmax"}, train=BY_LOSS),
        f"4 of {2 * number}": split(config, 2 * number, 4, 0, at_work // 4),
    }


def split(config: Config, num_experts: int, top_k: int, shared: int, hidden_dim: int) -> Config:
    """The config with these experts, and weights scaled so that their sum has the size of one expert."""
    sizes: dict[str, Any] = {"num_experts": num_experts, "top_k": top_k, "hidden_dim": hidden_dim}
    if top_k == 1:  # a weight divided by itself leaves the router without a gradient
        more = {"normalize": False, "routed_scaling_factor": 1.0}
    else:
        more = {
            "normalize": True,
            "routed_scaling_factor": round(gate_scale(num_experts, top_k, 20000, 0), 2),
        }
    return common.changed(config, moe={**sizes, **more, "num_shared_experts": shared})


def main(arguments: list[str] | None = None) -> None:
    """Train all models."""
    given = command.options("fineness", __doc__, 600, arguments)
    configs = models(common.base(given))
    rows = common.train_all(configs, given)
    losses = common.last(rows)
    coarse, shared, half, quarter, softmax, unshared = configs
    steps = (shared, coarse), (half, shared), (quarter, half)
    others = (quarter, coarse), (softmax, coarse), (half, unshared)
    by_sharing, once, twice, in_all, by_softmax, among_halves = (
        common.shown(common.paired(rows, *pair), 4) for pair in (*steps, *others)
    )
    claimed = common.as_claimed(*(common.paired(rows, coarser, finer) for finer, coarser in steps))
    answer = [
        f"From {coarse} to {shared} the loss changes by {by_sharing}, then to {half} by {once}, then to "
        f"{quarter} by {twice}; from first to last by {in_all} (lower is better).",
        f"The shared expert changes it by {by_softmax} with the single routed one weighted by a softmax over "
        f"all, and by {among_halves} with experts of half the width, where all weights are normalised.",
    ]
    table = [["", "parameters", "active", "held-out loss"]]
    table += [[name, *common.size_cells(one), common.shown(losses[name])] for name, one in configs.items()]
    common.write("fineness", given, claimed, answer, table, rows, configs)
    common.draw_losses("fineness", given, losses)


if __name__ == "__main__":
    main()
