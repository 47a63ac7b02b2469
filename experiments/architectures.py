"""Dense, Hash, Switch, GShard, DeepSeekMoE: is that the order of their losses?

lm experiment architectures [--quick]  ->  experiments/results/architectures.json and .png

Claim: with 16 experts of a dense model's width, or as many parts of them, trained on 100 B tokens, the loss
on the Pile is 2.060 (dense), 1.932 (Hash), 1.881 (Switch), 1.867 (GShard), 1.808 (DeepSeekMoE) (DeepSeekMoE,
arXiv 2401.06066 table 1). Prediction: the same order.

As there, all but the dense model have the same parameters, GShard and DeepSeekMoE the same at work (two of
the dense model's MLP), dense, Hash and Switch half of that; nothing is dropped.
"""

import itertools

from lm.config import Config

from . import common

PUBLISHED = {"Dense": 2.060, "Hash": 1.932, "Switch": 1.881, "GShard": 1.867, "DeepSeekMoE": 1.808}


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


def main(arguments: list[str] | None = None) -> None:
    """Train the five."""
    given = common.options(__doc__, 600, arguments)
    configs = models(common.base(given))
    rows = common.train_all(configs, given)
    losses = common.last(rows)
    order = sorted(losses, key=lambda name: -common.mean_and_error(losses[name])[0])
    steps = [
        f"{worse} above {better} by {common.shown(common.paired(rows, worse, better), 4)}"
        for worse, better in itertools.pairwise(order)
    ]
    same = (
        "the published one" if order == list(PUBLISHED) else f"not the published one, {', '.join(PUBLISHED)}"
    )
    common.write("architectures", given, {
        "answer": [f"From the highest loss to the lowest: {', '.join(order)}: {same}.", f"{'; '.join(steps)}."],
        "table": [
            ["", "parameters", "active", "held-out loss", "published, of another text"],
            *(
                [name, *(f"{size:,}" for size in common.sizes(configs[name].model).values()),
                 common.shown(losses[name]), f"{PUBLISHED[name]:.3f}"]
                for name in configs
            ),
        ],
        "trainings": rows,
    })  # fmt: skip
    figure, axis = common.plt.subplots(figsize=(5, 2.4))
    common.points(axis, losses, "held-out loss, nats a byte")
    common.save(figure, "architectures", given)


if __name__ == "__main__":
    main()
