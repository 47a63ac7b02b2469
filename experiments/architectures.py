"""Dense, Hash, Switch, GShard, DeepSeekMoE: is that the order of their losses?

lm experiment architectures [--quick]  ->  experiments/results/architectures.json and .png

Claim: with 16 experts as wide as the dense model's MLP, or the same width split finer, trained on 100 B
tokens, the loss on the Pile is 2.060 (dense), 1.932 (Hash), 1.881 (Switch), 1.867 (GShard), 1.808
(DeepSeekMoE) (DeepSeekMoE, arXiv 2401.06066 table 1). Prediction: the same order.

As in the paper, all but the dense model have the same parameters (within 1 %, rows of the router). GShard and
DeepSeekMoE have the same active parameters (within 4 %: two MLPs of the dense model); dense, Hash and Switch
have half of them. Here there are 32 such experts, in the paper 16. No expert has a capacity limit; GShard
drops a second expert at random, as in its paper. DeepSeekMoE uses V3's sigmoid router with a bias, so a
control has GShard's shape with that router.

Does not reproduce here, because tokens are bytes: the paper's Hash sends thousands of arbitrary tokens to
each expert, this one two or three letters, so that each letter nearly has its own MLP and a router has
nothing to learn. The others follow the published order. Three seeds do not separate neighbours among
GShard, Hash and DeepSeekMoE, and most of DeepSeekMoE's lead over GShard comes from its router.
"""

import itertools

from lm import data
from lm.config import Config

from . import command, common
from .fineness import split

PUBLISHED = {"Dense": 2.060, "Hash": 1.932, "Switch": 1.881, "GShard": 1.867, "DeepSeekMoE": 1.808}
ASIDE = "GShard's shape, DeepSeekMoE's router"


def models(config: Config) -> dict[str, Config]:
    """The five models, from a DeepSeekMoE: half of its active experts are as wide as one other MLP."""
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
        ASIDE: split(config, number, 2, 0, width),
    }


def main(arguments: list[str] | None = None) -> None:
    """Train the five models and the control."""
    given = command.options("architectures", __doc__, 600, arguments)
    configs = models(common.base(given))
    rows = common.train_all(configs, given)
    losses = common.last(rows)
    order = sorted(PUBLISHED, key=lambda name: -common.mean(losses[name]))
    same = "as published" if order == list(PUBLISHED) else f"published: {', '.join(PUBLISHED)}"
    steps = [
        f"{worse} is {common.shown(common.paired(rows, worse, better), 4)} above {better}"
        for worse, better in itertools.pairwise(order)
    ]
    alone = common.shown(common.paired(rows, "GShard", ASIDE), 4)
    model, text = configs["Hash"].model, configs["Hash"].data
    number = len(set(data.load(text, model.vocab_size)[0].tolist()))
    each = number / model.moe.num_experts
    answer = [
        f"From the highest loss to the lowest: {', '.join(order)} ({same}). {'; '.join(steps)}.",
        f"DeepSeekMoE's router alone lowers GShard's loss by {alone}.",
        f"The text has {number} different bytes: {each:.1f} per expert of Hash on average.",
    ]
    table = [["", "parameters", "active", "held-out loss", "published, of another text"]]
    for name, config in configs.items():
        published = f"{PUBLISHED[name]:.3f}" if name in PUBLISHED else ""
        table.append([name, *common.size_cells(config), common.shown(losses[name]), published])
    claimed = common.as_claimed(*(common.paired(rows, *pair) for pair in itertools.pairwise(PUBLISHED)))
    common.write("architectures", given, claimed, answer, table, rows, configs)
    common.draw_losses("architectures", given, losses)


if __name__ == "__main__":
    main()
