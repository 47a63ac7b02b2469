"""Scaling of time and memory: experts, width and tokens of a MoE layer; context and batch of decoding.

python -m benchmarks.scaling [--rounds N] [--quick]  ->  benchmarks/results/scaling-CPU.json
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lm.inference.pages import Pages
from mla import GroupedQueryAttention, MultiheadLatentAttention
from mla.paged import Plan, entry_of, step_of
from moe import Experts, MoE, SigmoidRouter, SwiGLU

from . import record
from .peers import loop_over_experts
from .speed import copy_rate, in_turns, matmul_rate

TOP_K, WIDTH, DIM, TOKENS = 4, 128, 256, 4096  # the layer of benchmarks.speed; each axis changes one
CONTEXTS = (256, 1024, 2048, 4096, 8192, 16384, 32768)


def best(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each, best of the rounds."""
    return {name: round(1e3 * min(values), 4) for name, values in in_turns(calls, rounds).items()}


def layers(experts: int, dim: int, tokens: int, rounds: int) -> dict[str, float]:
    """Forward and backward of our layer, of a loop over its experts and of a dense MLP of equal width."""
    layer = MoE(SigmoidRouter(dim, experts, TOP_K), Experts(experts, dim, WIDTH))
    dense = SwiGLU(dim, TOP_K * WIDTH)
    x = torch.randn(tokens, dim, requires_grad=True)
    upstream = torch.randn(tokens, dim)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": lambda x: layer(x)[0],
        "loop over experts": lambda x: loop_over_experts(layer, x),
        "dense of equal width": dense,
    }
    return best({name: lambda way=way: way(x).backward(upstream) for name, way in ways.items()}, rounds)


def attentions() -> dict[str, Any]:
    """The attention of benchmarks.peers.speed_model and its rivals, with equal head width."""
    sizes = {"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
    return {
        "MLA": MultiheadLatentAttention(DIM, 8, **sizes, q_lora_rank=128),
        "MHA": GroupedQueryAttention(DIM, 8, 8, 48),
        "GQA, 2 heads": GroupedQueryAttention(DIM, 8, 2, 48),
    }


class Expanded(nn.Module):
    """MLA decoding that expands keys and values of the whole past at each step."""

    def __init__(self, attention: MultiheadLatentAttention):
        super().__init__()
        self.attention = attention
        attention.absorbed_is_cheaper = lambda time, total: False  # type: ignore[method-assign]


@torch.inference_mode()
def decode(context: int, batch: int, rounds: int) -> dict[str, Any]:
    """A decode step of one attention layer: time, and bytes of cache."""
    calls: dict[str, Callable[[], object]] = {}
    size: dict[str, int] = {}
    for name, attention in attentions().items():
        pages = Pages(batch * (context // 64 + 1))
        step = step_of(type(attention))
        pool = pages.new_pool(*entry_of(attention, step))
        rows = [pages.open() for _ in range(batch)]
        pages.grow(rows, context + 1)
        pool.normal_()
        plan = Plan([row.pages for row in rows], [context] * batch, 1, "cpu")
        x = torch.randn(plan.filled, DIM)
        label = "MLA absorbed" if name == "MLA" else name
        calls[label] = lambda a=attention, x=x, pool=pool, plan=plan, run=step.run: run(a, x, pool, plan)
        size[label] = pool[0, :, 0].nbytes
    if context <= 8192:  # beyond that, a step takes seconds
        attention = Expanded(attentions()["MLA"]).attention
        cache = attention.new_cache(batch, context + 1)
        cache.entries.normal_()
        one = torch.randn(batch, 1, DIM)

        def expanded() -> None:
            cache.lengths = [context] * batch
            attention(one, cache)

        calls["MLA expanded"] = expanded
        size["MLA expanded"] = 4 * cache.entries.shape[-1]
    return {"ms": best(calls, rounds), "cache_bytes": {n: b * batch * context for n, b in size.items()}}


@torch.inference_mode()
def crossing(past: int, queries: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Absorbed against expanded attention by number of queries: the measured and the predicted crossing."""
    attention = attentions()["MLA"]
    found: dict[str, Any] = {"past": past, "queries": {}}
    for time in queries:
        total = past + time
        q_nope, q_rope = torch.randn(1, time, 8, 32), torch.randn(1, time, 8, 16)
        entries = torch.randn(1, total, 80)
        latent, k_rope = entries.split([64, 16], dim=-1)
        visible = torch.arange(total) <= torch.arange(past, total).unsqueeze(-1)
        calls = {
            "absorbed": partial(attention.absorbed, q_nope, q_rope, entries, visible),
            "expanded": partial(attention.expanded, q_nope, q_rope, latent, k_rope, visible),
        }
        found["queries"][str(time)] = best(calls, rounds)
    cheaper = [time for time in range(1, past + 1) if attention.absorbed_is_cheaper(time, past + time)]
    found["absorbed_is_cheaper_up_to"] = max(cheaper, default=0)
    times = {int(time): value["absorbed"] < value["expanded"] for time, value in found["queries"].items()}
    found["absorbed_was_quicker_up_to"] = max((time for time, quicker in times.items() if quicker), default=0)
    return found


def main() -> None:
    """Run all measurements, print and save them."""
    options = record.options(__doc__, rounds=7)
    rounds = options.rounds
    some = slice(2) if options.quick else slice(None)
    found: dict[str, Any] = {"rounds": rounds, "copy_gb_per_second": copy_rate()}
    found["matmul_gflops"] = matmul_rate(torch.float32)
    found["experts"] = {
        str(experts): layers(experts, DIM, TOKENS, rounds) for experts in (8, 16, 32, 64, 128, 256)[some]
    }
    found["dim"] = {str(dim): layers(32, dim, TOKENS, rounds) for dim in (64, 128, 256, 512, 1024)[some]}
    found["tokens"] = {
        str(tokens): layers(32, DIM, tokens, rounds) for tokens in (16, 64, 256, 1024, 4096, 16384)[some]
    }
    for batch in (1, 8):
        found[f"decode, batch {batch}"] = {
            str(context): decode(context, batch, rounds)
            for context in CONTEXTS[some]
            if context * batch <= 2**17
        }
    found["crossing"] = crossing(1024, (1, 4, 16, 32, 64, 128, 192, 256, 384, 512)[some], rounds)
    for key, value in found.items():
        print(key, json.dumps(value))
    record.write("scaling", found, options.out)


if __name__ == "__main__":
    main()
