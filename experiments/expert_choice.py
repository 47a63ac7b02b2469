"""Does expert choice see future tokens?

lm experiment expert_choice [--quick]  ->  experiments/results/expert_choice.json and .png

Claim: experts that choose their tokens also see future ones, so that a language model trained with them
reports too low a loss (said of Expert Choice, arXiv 2202.09368, by arXiv 2408.15664 section 5). Prediction:
its loss over whole sequences is lower than when each token is predicted from the preceding ones alone; for
a token-choice router the two are equal.

Three losses on the same held-out bytes: many windows in one call, each window in its own call, and each byte
in a call with only the preceding bytes, as in generation.
"""

import torch

from lm import loss
from lm.config import Config
from lm.model import Transformer

from . import command, common

WINDOWS = 16
WAYS = ("many texts in a call", "one text in a call", "nothing of what follows")


@torch.no_grad()
def losses(model: Transformer, config: Config) -> dict[str, float]:
    """The held-out loss of the second half of some windows, computed in each of the three ways."""
    windows = common.validation(config)
    step = len(windows) // WINDOWS
    batch = torch.stack([windows[index * step] for index in range(WINDOWS)])
    tokens, half = batch[:, :-1], config.train.context // 2
    targets = batch[:, half + 1 :]
    model.eval()
    together = model(tokens).logits[:, half:]
    apart = torch.cat([model(text.unsqueeze(0)).logits[:, half:] for text in tokens])
    last = [
        torch.stack([model(text[: stop + 1].unsqueeze(0)).logits[0, -1] for stop in range(half, len(text))])
        for text in tokens
    ]
    each = (together, apart, torch.stack(last))
    return {name: float(loss.cross_entropy(logits, targets)) for name, logits in zip(WAYS, each)}


def main(arguments: list[str] | None = None) -> None:
    """Train with both routers and compute the loss in each way."""
    given = command.options("expert_choice", __doc__, 600, arguments)
    config = common.base(given)
    choice = {"router": "expert_choice", "routed_scaling_factor": 1.0}
    configs = {
        "tokens choose": config,
        "experts choose": common.changed(config, moe=choice, train={"sequence_loss": 0.0}),
    }
    rows = common.train_all(configs, given, measure=losses)
    found = {f"{name}, {way}": common.last(rows, way)[name] for name in configs for way in WAYS}
    rises = {}
    for name in configs:
        before, _, after = (found[f"{name}, {way}"] for way in WAYS)
        rises[name] = common.shown([alone - whole for alone, whole in zip(after, before)], 4)
    answer = [
        f"Without future tokens in the call the loss rises by {rises['experts choose']} where experts "
        f"choose, by {rises['tokens choose']} where tokens choose."
    ]
    table = [["", *WAYS]]
    for name in configs:
        table.append([name, *(common.shown(found[f"{name}, {way}"]) for way in WAYS)])
    before, after = (found[f"experts choose, {way}"] for way in (WAYS[0], WAYS[-1]))
    claimed = common.as_claimed([alone - whole for alone, whole in zip(after, before)])
    common.write("expert_choice", given, claimed, answer, table, rows, configs)
    common.draw_losses("expert_choice", given, found)


if __name__ == "__main__":
    main()
