"""Is the shared expert irreplaceable?

lm experiment shared_expert [--quick]  ->  experiments/results/shared_expert.json and .png

Claim: with the shared expert disabled and one more routed expert in its place, the loss on the Pile rises
from 1.808 to 2.414 (DeepSeekMoE, arXiv 2401.06066 section 4.5). Prediction: the loss rises here too, by far
more than without one of the routed experts. Losses are over 65,536 held-out tokens.
"""

from collections.abc import Callable
from typing import Any

import torch

from lm.config import Config
from lm.evaluate import evaluate
from lm.model import Transformer

from . import command, common

TOKENS = 65536  # held-out tokens per evaluation


def without_shared(mlp: Any) -> None:
    mlp.shared = None


def one_more(mlp: Any) -> None:
    mlp.router.top_k += 1


def one_less(mlp: Any) -> None:
    mlp.router.top_k -= 1


CHANGES: dict[str, tuple[Callable[[Any], None], ...]] = {
    "as trained": (),
    "one routed expert less": (one_less,),
    "one routed expert more": (one_more,),
    "no shared expert": (without_shared,),
    "no shared expert, one routed expert more": (without_shared, one_more),
}


def losses(model: Transformer, config: Config) -> dict[str, float]:
    """The held-out loss with each of the changes."""
    windows, found = common.validation(config), {}
    for name, changes in CHANGES.items():
        kept = [(block.mlp.shared, block.mlp.router.top_k) for block in model.blocks]
        for block in model.blocks:
            for change in changes:
                change(block.mlp)
        found[name] = round(evaluate(model, windows, TOKENS, torch.float32, config.train.batch_size), 5)
        for block, (shared, top_k) in zip(model.blocks, kept):
            block.mlp.shared, block.mlp.router.top_k = shared, top_k
    return found


def main(arguments: list[str] | None = None) -> None:
    """Train, then disable experts."""
    given = command.options("shared_expert", __doc__, 600, arguments)
    configs = {"DeepSeekMoE": common.base(given)}
    rows = common.train_all(configs, given, measure=losses)
    values = {name: [row[name] for row in rows] for name in CHANGES}
    whole, less, _, _, swapped = (values[name] for name in CHANGES)
    answer = [
        f"With a routed expert more in place of the shared one the loss rises from {common.shown(whole)} to "
        f"{common.shown(swapped)} (published: from 1.808 to 2.414); with one routed expert less, to "
        f"{common.shown(less)}."
    ]
    table = [["", "held-out loss"], *([name, common.shown(values[name])] for name in CHANGES)]
    claimed = common.as_claimed(*([a - b for a, b in zip(swapped, other)] for other in (whole, less)))
    common.write("shared_expert", given, claimed, answer, table, rows, configs)
    common.draw_losses("shared_expert", given, values)


if __name__ == "__main__":
    main()
