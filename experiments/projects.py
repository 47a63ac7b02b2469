"""How do custom routers and attentions compare with the built-in ones?

lm experiment projects [--quick]  ->  experiments/results/projects.json and .png

Claim: each file in exercises/projects states what it should improve. Prediction for all: they beat a router
that draws experts at random.

Each project's config is trained as it is, but on the same batches of the same text as the preset mini, which
has DeepSeek-V3's router and attention. GShard's router and multi-head attention with heads of equal width are
trained for comparison.
"""

import argparse

from exercises.grader.new import FOLDER as PROJECTS
from lm.config import Config
from lm.model import Transformer
from lm.parts import try_parts

from . import command, common
from .architectures import models

OURS, RANDOM = "DeepSeek-V3", "random router"


def built_in(config: Config) -> dict[str, Config]:
    """The built-in models to compare with."""
    a = config.model.attention
    heads = {"num_kv_heads": a.num_heads, "head_dim": a.qk_nope_head_dim + a.qk_rope_head_dim}
    return {
        OURS: config,
        "GShard's router": models(config)["GShard"],
        "multi-head attention": common.changed(config, attention={"kind": "gqa", **heads}),
        RANDOM: common.changed(
            config,
            moe={"router": "random", "routed_scaling_factor": 1.0, "num_groups": 1, "top_groups": 1},
            train={"bias_update_rate": 0.0, "sequence_loss": 0.0},
        ),
    }


def projects(given: argparse.Namespace) -> dict[str, Config]:
    """The configs in exercises/projects by name; with --quick, their custom parts in the quick model.

    Raises:
        ValueError: there is no project, one cannot be built, or has the name of a built-in row.
    """
    base, found = common.base(given), {}
    same = {name: getattr(base.train, name) for name in ("batch_size", "accumulation", "context")}
    for path in sorted(PROJECTS.glob("*.toml")):
        own = Config.load(path)
        if given.quick:
            moe, attention = own.model.moe, own.model.attention
            router = {"router": moe.router, "arguments": moe.arguments}
            kind = {"kind": attention.kind, "arguments": attention.arguments}
            own = common.changed(base, moe=router, attention=kind)
        own = common.changed(own, train=same, data=vars(base.data))
        if path.stem in built_in(base):
            raise ValueError(f"{path}: the name of a built-in row of the table; choose another")
        try:
            try_parts(Transformer(own.model))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        found[path.stem] = own
    if not found:
        raise ValueError(f"{PROJECTS}: no project; lm new router NAME creates one")
    return found


def main(arguments: list[str] | None = None) -> None:
    """Train all models and print them in order of loss."""
    given = command.options("projects", __doc__, 600, arguments)
    own = projects(given)
    configs = built_in(common.base(given)) | own
    rows = common.train_all(configs, given)
    losses, violations = common.last(rows), common.last(rows, "batch_max_violation")
    order = sorted(configs, key=lambda name: common.mean(losses[name]))
    table = [["", "parameters", "MaxVio of a batch, worst layer", "held-out loss", f"above {OURS}'s"]]
    for name in order:
        parameters = sum(weight.numel() for weight in Transformer(configs[name].model).parameters())
        worst = common.shown([max(layers, default=0) for layers in violations[name]], 2)
        above = common.shown(common.paired(rows, name, OURS), 4)
        table.append([name, f"{parameters:,}", worst, common.shown(losses[name], 4), above])
    answer = [f"From the lowest loss to the highest: {', '.join(order)}."]
    claimed = common.as_claimed(*(common.paired(rows, RANDOM, name) for name in own))
    if not given.no_verdict:  # else `write` prints it
        print(*common.aligned(table), sep="\n")
    common.write("projects", given, claimed, answer, table, rows, configs)
    common.draw_losses("projects", given, losses)


if __name__ == "__main__":
    main()
