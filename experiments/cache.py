"""Does MLA store more with less memory?

lm experiment cache [--quick]  ->  experiments/results/cache.json and .png

Claim: "MLA stores more data with less memory" (of DeepSeek-V3, in the news); with a cache of 4 to 14 % of
MHA's it is better than MHA, while GQA and MQA are worse (DeepSeek-V2, arXiv 2405.04434 tables 8 and 9).
Prediction: at equal parameters there is a rank at which MLA's loss is MHA's within one standard error, with
at most 0.15 of its bytes, and fewer than GQA needs for the same.

8 heads of 16. The MLPs are dense, and wider where the attention has fewer weights. At this size that makes
GQA and MQA better than MHA, while they are worse in V2's table 8, at 7 B. Neither kind of small cache costs
any loss here, and MLA's is the smaller one.
"""

import argparse
import time
from typing import Any

import torch

from lm import count
from lm.config import Config
from lm.model import Transformer

from . import command, common

HEADS = 8
GROUPS = {"MHA": 8, "GQA, 4 groups": 4, "GQA, 2 groups": 2, "MQA": 1}
RANKS = (8, 16, 26)
ROPE = 12  # dims of MLA's shared key
THETA = 100.0  # so that the slowest pairs rotate within 128 bytes, too
BATCH, CONTEXT = 8, 2048  # of the timed decoding


def models(config: Config) -> dict[str, Config]:
    """The model with each attention, all with MHA's parameters."""
    dense = {"num_dense_layers": config.model.num_layers, "hidden_dim": 256}
    base = common.changed(config, model=dense, rope={"theta": THETA})
    heads = {"num_heads": HEADS, "head_dim": 16, "q_lora_rank": 0}
    latent = {"qk_nope_head_dim": 8, "qk_rope_head_dim": ROPE, "v_head_dim": 16}
    found = {
        name: common.changed(base, attention={"kind": "gqa", "num_kv_heads": groups, **heads})
        for name, groups in GROUPS.items()
    }
    for rank in RANKS:
        sizes = {"kind": "mla", "kv_lora_rank": rank, **heads, **latent}
        found[f"MLA, rank {rank}"] = common.changed(base, attention=sizes)
    goal = count.total_parameters(found["MHA"].model)
    return {name: filled_up(one, goal) for name, one in found.items()}


def filled_up(config: Config, parameters: int) -> Config:
    """The model with its MLPs widened to come closest to `parameters`."""
    model = config.model
    a_column = 3 * model.dim * model.num_dense_layers
    wider = round((parameters - count.total_parameters(model)) / a_column)
    return common.changed(config, model={"hidden_dim": model.hidden_dim + wider})


def bytes_per_token(config: Config) -> int:
    """Bytes of all layers' caches per token, measured on real caches."""
    model = Transformer(config.model)
    one, many = (sum(cache.nbytes for cache in model.new_caches(1, length)) for length in (1, 1001))
    return (many - one) // 1000


@torch.no_grad()
def decode_seconds(configs: dict[str, Config], context: int, rounds: int) -> dict[str, float]:
    """The fastest decode step at a context length, with the models measured in turns."""
    prepared: dict[str, tuple[Any, Any]] = {}
    for name, config in configs.items():
        model = Transformer(config.model).eval()
        caches = model.new_caches(BATCH, context + rounds)
        model(torch.zeros(BATCH, context, dtype=torch.int64), caches)
        prepared[name] = model, caches
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    for _ in range(rounds):
        for name, (model, caches) in prepared.items():
            began = time.perf_counter()
            model(torch.zeros(BATCH, 1, dtype=torch.int64), caches)
            seconds[name].append(time.perf_counter() - began)
    return {name: min(values) for name, values in seconds.items()}


def smallest_as_good(losses: dict[str, list[float]], sizes: dict[str, int], kind: str) -> str | None:
    """A kind's model with the smallest cache whose loss is at most MHA's, within one standard error.

    The error is that of the difference, seed by seed.
    """
    for name in sorted((name for name in losses if name.startswith(kind)), key=lambda name: sizes[name]):
        more, error = common.mean_and_error([a - b for a, b in zip(losses[name], losses["MHA"])])
        if more <= error:
            return name
    return None


def answers(losses: dict[str, list[float]], sizes: dict[str, int]) -> list[str]:
    """The findings in sentences."""
    found = []
    for kind in ("MLA", "GQA", "MQA"):
        name = smallest_as_good(losses, sizes, kind)
        if name is None:
            found.append(f"No {kind} here has MHA's loss within one standard error.")
        else:
            share = sizes[name] / sizes["MHA"]
            comma = "," if "," in name else ""
            same = f"{name}{comma} has MHA's loss or less within one standard error"
            found.append(f"{same}, with {share:.3f} of its bytes.")
    return found


def draw(losses: dict[str, list[float]], sizes: dict[str, int], given: argparse.Namespace) -> None:
    """Plot loss against bytes per token."""
    figure, axis = common.plt.subplots(figsize=(6, 3.6))
    of_mla = [name for name in losses if name.startswith("MLA")]
    for kind, names in (("MLA", of_mla), ("MHA, GQA, MQA", [name for name in losses if name in GROUPS])):
        means, errors = zip(*(common.mean_and_error(losses[name]) for name in names))
        axis.errorbar([sizes[name] for name in names], means, errors, marker="o", ms=4, capsize=2, label=kind)
        for name, mean in zip(names, means):
            label = name.replace("MLA, ", "")
            axis.annotate(label, (sizes[name], mean), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("bytes of cache per token, fp32")
    axis.set_ylabel("held-out loss, nats a byte")
    axis.legend(frameon=False)
    common.tidy(axis)
    common.save(figure, "cache", given)


def main(arguments: list[str] | None = None) -> None:
    """Train with each attention, measure its cache, time its decoding."""
    given = command.options("cache", __doc__, 2400, arguments)
    configs = models(common.base(given))
    if given.quick:
        few = ("MHA", "GQA, 2 groups", "MQA", "MLA, rank 8", "MLA, rank 16")
        configs = {name: configs[name] for name in few}
    sizes = {name: bytes_per_token(config) for name, config in configs.items()}
    print(f"decode times of {len(configs)} models", flush=True)
    seconds = decode_seconds(configs, *((64, 2) if given.quick else (CONTEXT, 20)))
    rows = common.train_all(configs, given)
    losses = common.last(rows)
    head = ["", "parameters", "bytes a token", "of MHA's", "million tokens a GiB", "ms per decode step"]
    table = [[*head, "held-out loss"]]
    for name, config in configs.items():
        share, tokens = f"{sizes[name] / sizes['MHA']:.3f}", f"{2**30 / sizes[name] / 1e6:.2f}"
        cells = f"{count.total_parameters(config.model):,}", f"{sizes[name]}", share, tokens
        table.append([name, *cells, f"{1e3 * seconds[name]:.2f}", common.shown(losses[name], 4)])
    mla, gqa = (smallest_as_good(losses, sizes, kind) for kind in ("MLA", "GQA"))
    small = mla is not None and sizes[mla] <= 0.15 * sizes["MHA"] and (not gqa or sizes[mla] < sizes[gqa])
    decoding = {"batch": BATCH, "context": CONTEXT, "seconds": seconds}
    common.write(
        "cache",
        given,
        "yes" if small else "no",
        answers(losses, sizes),
        table,
        rows,
        configs,
        bytes_per_token=sizes,
        decoding=decoding,
    )
    draw(losses, sizes, given)


if __name__ == "__main__":
    main()
