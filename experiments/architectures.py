"""Dense, Hash, Switch, GShard, DeepSeekMoE: is that the order of their losses?

lm experiment architectures [--quick]  ->  experiments/results/architectures.json and .png

Claim: with 16 experts of a dense model's width, or as many parts of them, trained on 100 B tokens, the loss
on the Pile is 2.060 (dense), 1.932 (Hash), 1.881 (Switch), 1.867 (GShard), 1.808 (DeepSeekMoE) (DeepSeekMoE,
arXiv 2401.06066 table 1). Prediction: the same order.

As there, all but the dense model have the same parameters, GShard and DeepSeekMoE the same at work (two of
the dense model's MLP), dense, Hash and Switch half of that; nothing is dropped. Trained twice, once four
times as long: a table needs no training, a router does.
"""

import itertools
from typing import Any

from lm.config import Config

from . import common

PUBLISHED = {"Dense": 2.060, "Hash": 1.932, "Switch": 1.881, "GShard": 1.867, "DeepSeekMoE": 1.808}
BUDGETS = (1 / 4, 1)  # of the steps


def models(config: Config) -> dict[str, Config]:
    """The five, from the DeepSeekMoE, of whose experts half of a token's are one MLP of the others."""
    moe = config.model.moe
    parts = (moe.top_k + moe.num_shared_experts) // 2
    width, number = parts * moe.hidden_dim, (moe.num_experts + moe.num_shared_experts) // parts
    dense = {"num_dense_layers": config.model.num_layers, "hidden_dim": width}
    whole = {
        "num_experts": number,
        "hidden_dim": width,
        "num_shared_experts": 0,
        "routed_scaling_factor": 1.0,
    }
    by_loss = {"switch_loss": 0.01, "sequence_loss": 0.0}
    return {
        "Dense": common.changed(config, model=dense),
        "Hash": common.changed(
            config, moe=whole | {"router": "hash", "top_k": 1}, train={"sequence_loss": 0.0}
        ),
        "Switch": common.changed(config, moe=whole | {"router": "switch", "top_k": 1}, train=by_loss),
        "GShard": common.changed(config, moe=whole | {"router": "gshard", "top_k": 2}, train=by_loss),
        "DeepSeekMoE": config,
    }


def ranked(rows: list[dict[str, Any]]) -> str:
    """Trainings of equal length -> the order of their losses, and how far each is above the next."""
    losses = common.last(rows)
    order = sorted(losses, key=lambda name: -common.mean(losses[name]))
    same = "as published" if order == list(PUBLISHED) else f"published: {', '.join(PUBLISHED)}"
    gaps = [
        f"{worse} is {common.shown(common.paired(rows, worse, better), 4)} above {better}"
        for worse, better in itertools.pairwise(order)
    ]
    return f"from the highest loss to the lowest: {', '.join(order)} ({same}). {'; '.join(gaps)}."


def main(arguments: list[str] | None = None) -> None:
    """Train the five, for each of the budgets."""
    given = common.options(__doc__, 2400, arguments)
    configs = models(common.base(given))
    rows = common.train_all(configs, given, dict.fromkeys(configs, BUDGETS))
    lengths = sorted({row["steps"] for row in rows})
    answer = [
        f"After {steps:,} steps, {ranked([row for row in rows if row['steps'] == steps])}"
        for steps in reversed(lengths)
    ]
    losses = common.by_model(rows)
    heads = [f"held-out loss, {steps:,} steps" for steps in lengths]
    table = [["", "parameters", "active", *heads, "published, of another text"]]
    for name, config in configs.items():
        here = (common.shown(losses[name][steps]) for steps in lengths)
        table.append([name, *common.size_cells(config), *here, f"{PUBLISHED[name]:.3f}"])
    common.write("architectures", given, answer, table, rows, configs)
    common.draw_losses("architectures", given, common.last(rows))


if __name__ == "__main__":
    main()
