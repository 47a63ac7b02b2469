"""What does converting a trained model to MLA, or its MLPs to experts, cost, and what recovers it?

lm experiment convert [--quick]  ->  experiments/results/convert.json and .png

Claims: grouped-query attention is a special case of MLA, and an MLA with a smaller cache recovers after
little training (TransMLA, arXiv 2502.07864). Experts made from an MLP start at its loss and reach a lower
one than the MLP with equal further training (sparse upcycling, arXiv 2212.05055, in shards 2410.07524).
Prediction: at full rank, and for every split into experts, nothing is lost; a smaller cache costs some
loss, and most of it is recovered.

The toys with GQA and with dense MLPs are trained, converted and trained further, next to an unconverted copy.
These trainings are not kept.
"""

import copy
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lm import data
from lm.config import Config
from lm.model import Transformer
from mla import to_mla
from moe import upcycle

from . import command, common

MLA = {  # kv_lora_rank, qk_rope_head_dim (None: all), by a sample of inputs (True) or the weights alone
    "MLA, exact": (None, None, True),
    "MLA, half the cache": (32, 32, True),
    "MLA, half the cache, no sample": (32, 32, False),
    "MLA, half the cache, less that turns": (48, 16, True),
}
MOE = {
    "8 whole copies, top 2": {"num_experts": 8, "top_k": 2},
    "16 thirds, top 2, and a shared third": {
        "num_experts": 16, "top_k": 2, "num_shards": 3, "num_shared_shards": 1, "grouped": False,
    },
}  # fmt: skip
LEFT = {"toy-gqa": "GQA, left as it was", "toy-dense": "MLPs, left as they were"}


@torch.no_grad()
def attentions_to_mla(model: Transformer, tokens: torch.Tensor, rank, rope, sampled: bool) -> None:
    """Convert every layer's attention, with its inputs for these tokens as the sample."""
    hidden = model.embedding(tokens)
    for block in model.blocks:
        x = block.attention_norm(hidden)
        block.attention = to_mla(block.attention, rank, rope, x if sampled else None)
        hidden, _ = block(hidden, tokens, None, None, None)


def mlps_to_moe(model: Transformer, options: dict) -> None:
    """Convert every MLP except the first layer's."""
    generator = torch.Generator().manual_seed(0)
    for block in model.blocks[1:]:
        block.mlp = upcycle(block.mlp, **options, generator=generator)


def ways(preset: str, seed: int) -> dict[str, Callable[[nn.Module], None]]:
    """The conversions of a model of the preset, by name."""
    if preset == "toy-dense":
        return {name: functools.partial(mlps_to_moe, options=options) for name, options in MOE.items()}
    text = data.load(Config.preset(preset).data, 256)[0]
    tokens = torch.stack([data.Windows(text, 128, seed + 1).train(index)[:-1] for index in range(16)])
    return {
        name: functools.partial(attentions_to_mla, tokens=tokens, rank=rank, rope=rope, sampled=sampled)
        for name, (rank, rope, sampled) in MLA.items()
    }


def measure(preset: str, seed: int, steps: int, repair: int) -> list[dict[str, Any]]:
    """Train, convert in each way, train further -> a row each: the losses before, after, repaired."""
    settings = {"steps": steps, "seed": seed, "eval_tokens": 16384, "dtype": "float32"}
    config = common.changed(Config.preset(preset), train=settings)
    on = {"seed": seed + 1, "steps": repair, "learning_rate": 1e-3, "warmup": max(1, repair // 10)}
    again = common.changed(config, train=on)
    torch.manual_seed(seed)
    model = Transformer(config.model)
    model.initialize(torch.Generator().manual_seed(seed))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        first = common.trainer(config, model, Path(folder))
        for step in range(1, steps + 1):
            first.step(step)
        before = first.evaluate(config.train.eval_tokens)
        for name, make in {LEFT[preset]: lambda _: None, **ways(preset, seed)}.items():
            made = copy.deepcopy(model)
            make(made)
            second = common.trainer(again, made, Path(folder))
            after = second.evaluate(config.train.eval_tokens)
            for step in range(1, repair + 1):
                second.step(step)
            losses = {"before": before, "after": after, "repaired": second.evaluate(config.train.eval_tokens)}
            sizes = {"parameters": sum(parameter.numel() for parameter in made.parameters())}
            sizes["cache_bytes_per_token"] = sum(cache.nbytes for cache in made.new_caches(1, 1))
            kept = {key: round(value, 5) for key, value in losses.items()}
            rows.append({"model": name, "seed": seed, "steps": steps, **kept, **sizes})
    return rows


def answers(rows: list[dict[str, Any]]) -> list[str]:
    """The findings in sentences."""
    lost, ahead = {}, {}
    for names, left in ((MLA, LEFT["toy-gqa"]), (MOE, LEFT["toy-dense"])):
        for name in names:
            found = of(rows, name)
            lost[name] = common.shown([row["after"] - row["before"] for row in found])
            pairs = zip(of(rows, left), found)
            ahead[name] = common.shown([whole["repaired"] - row["repaired"] for whole, row in pairs])
    exact, half, *_ = MLA
    return [
        f"Converted at full rank, GQA loses {lost[exact]}; with half the cache it loses {lost[half]}, and "
        f"after a short training it is {ahead[half]} ahead of the unconverted model.",
        *(f"As {name}, an MLP loses {lost[name]}, and is then {ahead[name]} ahead." for name in MOE),
    ]


def of(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The rows of one model, by seed."""
    return sorted((row for row in rows if row["model"] == name), key=lambda row: row["seed"])


def main(arguments: list[str] | None = None) -> None:
    """Convert both models in every way."""
    given = command.options("convert", __doc__, 400, arguments)
    repair = max(4, given.steps // 4)
    jobs = [(preset, seed, given.steps, repair) for seed in range(given.seeds) for preset in LEFT]
    print(f"{len(jobs)} models to train and convert", flush=True)
    with common.processes(given.jobs) as pool:
        running = {job: pool.submit(measure, *job) for job in jobs}
        parts = common.wait(running, lambda job, _: f"{job[0]}, seed {job[1]}: trained and converted")
    rows = [row for part in parts.values() for row in part]
    names = [LEFT["toy-gqa"], *MLA, LEFT["toy-dense"], *MOE]
    table = [["", "parameters", "cache, bytes a token", "loss before", "after", "repaired"]]
    for name in names:
        found = of(rows, name)
        sizes = f"{found[0]['parameters']:,}", f"{found[0]['cache_bytes_per_token']}"
        stages = (common.shown([row[stage] for row in found]) for stage in ("before", "after", "repaired"))
        table.append([name, *sizes, *stages])
    configs = {left: Config.preset(preset) for preset, left in LEFT.items()}
    exact = [
        [1e-4 - abs(row["after"] - row["before"]) for row in of(rows, name)]
        for name in (next(iter(MLA)), *MOE)
    ]
    half = [row["after"] - row["repaired"] for row in of(rows, list(MLA)[1])]
    dense = of(rows, LEFT["toy-dense"])
    ahead = [[b["repaired"] - a["repaired"] for a, b in zip(of(rows, name), dense)] for name in MOE]
    common.write(
        "convert", given, common.as_claimed(*exact, half, *ahead), answers(rows), table, rows, configs
    )
    figure, axes = common.plt.subplots(1, 2, figsize=(10, 3), sharey=True)
    for axis, stage in zip(axes, ("after", "repaired")):
        values = {name: [row[stage] for row in of(rows, name)] for name in names}
        common.points(axis, values, f"held-out loss, {stage}")
    common.save(figure, "convert", given)


if __name__ == "__main__":
    main()
