"""What does a trained model lose when its attention becomes MLA, or its MLPs experts? What brings it back?

lm experiment convert [--quick]  ->  experiments/results/convert.json

Claims. TransMLA (arXiv 2502.07864): grouped-query attention is an MLA, and one with a smaller cache comes
back after little training. Sparse upcycling (arXiv 2212.05055, in shards: 2410.07524): experts made from an
MLP begin where it stood, and go on to a lower loss than the MLP trained as long. The toys with GQA and with
dense MLPs are trained, converted, and trained on a little, beside the same model left as it was.

The first holds, if half the numbers go to turning pairs; where too few turn, most is lost. Of the second the
start holds; after 100 steps whole copies are ahead by less, and shards behind by less, than 0.005: one seed,
too short to tell.
"""

import argparse
import copy
import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from lm import data
from lm.config import Config
from lm.model import Transformer
from mla import to_mla
from moe import upcycle

from . import common

MLA = {  # kv_lora_rank and qk_rope_head_dim (None: all), from a sample of inputs or from the weights alone
    "mla, exact": (None, None, True),
    "mla, half the cache": (32, 32, True),
    "mla, half the cache, no sample": (32, 32, False),
    "mla, half the cache, less that turns": (48, 16, True),
}
MOE = {
    "8 whole copies, top 2": {"num_experts": 8, "top_k": 2},
    "16 thirds, top 2, and a shared third": {
        "num_experts": 16, "top_k": 2, "num_shards": 3, "num_shared_shards": 1, "grouped": False,
    },
}  # fmt: skip


@torch.no_grad()
def attentions_to_mla(model: Transformer, tokens: torch.Tensor, rank, rope, sampled: bool) -> None:
    """Every layer's attention, by the inputs that these tokens bring it."""
    hidden = model.embedding(tokens)
    for block in model.blocks:
        x = block.attention_norm(hidden)
        block.attention = to_mla(block.attention, rank, rope, x if sampled else None)
        hidden, _ = block(hidden, tokens, None, None, None)


def mlps_to_moe(model: Transformer, options: dict) -> None:
    """Every MLP but the first layer's."""
    generator = torch.Generator().manual_seed(0)
    for block in model.blocks[1:]:
        block.mlp = upcycle(block.mlp, **options, generator=generator)


def measure(preset: str, makes: dict[str, Callable], steps: int, repair: int) -> dict:
    """Train, convert in each way, train on -> the losses of each: before, after, repaired."""
    config = Config.preset(preset)
    train = dataclasses.replace(config.train, steps=steps, eval_tokens=16384, dtype="float32")
    config = dataclasses.replace(config, train=train)
    again = dataclasses.replace(train, seed=1, steps=repair, learning_rate=1e-3, warmup=max(1, repair // 10))
    torch.manual_seed(0)
    model = Transformer(config.model)
    model.initialize(torch.Generator().manual_seed(0))
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        first = common.trainer(config, model, Path(folder))
        for step in range(1, steps + 1):
            first.step(step)
        before = first.evaluate(train.eval_tokens)
        for name, make in {"left as it was": lambda _: None, **makes}.items():
            made = copy.deepcopy(model)
            make(made)
            second = common.trainer(dataclasses.replace(config, train=again), made, Path(folder))
            after = second.evaluate(train.eval_tokens)
            for step in range(1, repair + 1):
                second.step(step)
            losses = {"before": before, "after": after, "repaired": second.evaluate(train.eval_tokens)}
            sizes = {"parameters": sum(parameter.numel() for parameter in made.parameters())}
            sizes["cache_bytes_per_token"] = sum(cache.nbytes for cache in made.new_caches(1, 1))
            found[name] = {key: round(value, 5) for key, value in losses.items()} | sizes
            print(name, found[name], flush=True)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Both models, every way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    quick = parser.parse_args(arguments).quick
    steps, repair = (10, 5) if quick else (400, 100)
    texts = data.load(Config.preset("toy-gqa").data, 256)
    tokens = torch.stack([data.Windows(texts[0], 128, seed=2).train(i)[:-1] for i in range(16)])
    to: dict[str, Callable[[nn.Module], None]] = {}
    for name, (rank, rope, sampled) in MLA.items():
        to[name] = lambda model, a=(rank, rope, sampled): attentions_to_mla(model, tokens, *a)
    ex = {name: lambda model, options=options: mlps_to_moe(model, options) for name, options in MOE.items()}
    found = {
        "steps": steps,
        "repair_steps": repair,
        "held_out_loss": {
            "gqa": measure("toy-gqa", to, steps, repair),
            "dense": measure("toy-dense", ex, steps, repair),
        },
    }
    if not quick:
        common.write("convert", found, common.RESULTS)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
