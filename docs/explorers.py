"""Generate the interactive pages docs/explorers/cache.html and absorption.html from the packages' numbers.

python docs/explorers.py
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange

from lm import count
from lm.config import AttentionConfig, Config, ModelConfig
from lm.report import page
from mla import MultiheadLatentAttention

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "explorers"
MODELS = (
    *("deepseek-v3", "deepseek-v2", "deepseek-v2-lite", "moonlight", "kimi-k2", "deepseek-moe-16b"),
    *("llama-3.1-405b", "llama-3.1-70b", "llama-3.1-8b", "qwen2.5-72b", "qwen3-235b-a22b", "qwen3-30b-a3b"),
    *("mixtral-8x7b", "toy"),
)
CACHE_TYPES = ("bf16", "fp8", "fp32")
WEIGHT_TYPES = ("bf16", "fp8")
GROUPS = 8
TOKENS = 3  # on the absorption page; the last one attends
SEED = 272  # chosen for distinct columns and values near 1
SMALL = AttentionConfig(num_heads=2, kv_lora_rank=4, qk_nope_head_dim=3, qk_rope_head_dim=2, v_head_dim=3)
COUNTED = ("deepseek-v3", "deepseek-v2-lite")  # in addition to SMALL


def cache() -> dict[str, Any]:
    """The data of the cache page."""
    return {
        "weight_bytes": {dtype: count.BYTES[dtype] for dtype in WEIGHT_TYPES},
        "cache_types": CACHE_TYPES,
        "models": [measure(name) for name in MODELS],
    }


def measure(name: str) -> dict[str, Any]:
    """A preset's parameters and cache bytes per token: its own, and with other attentions."""
    config = Config.preset(name).model
    kind = attention_kind(config.attention)
    return {
        "name": name,
        "parameters": count.total_parameters(config),
        "max_length": config.max_length,
        "caches": {kind: cache_bytes(config)}
        | {other: cache_bytes(rival) for other, rival in rivals(config).items() if other != kind},
    }


def attention_kind(attention: AttentionConfig) -> str:
    """MLA, MHA, GQA with its groups, or MQA."""
    if attention.kind == "mla":
        return "MLA"
    names = {attention.num_heads: "MHA", 1: "MQA"}
    return names.get(attention.num_kv_heads, f"GQA, {attention.num_kv_heads} groups")


def rivals(config: ModelConfig) -> dict[str, ModelConfig]:
    """The same model with MHA, GQA and MQA of as many heads and the same value width (V2 table 1)."""
    heads, width = config.attention.num_heads, count.built_in_attention(config).value_dim
    found = {}
    for groups in (heads, min(heads, GROUPS), 1):
        attention = replace(config.attention, kind="gqa", num_kv_heads=groups, head_dim=width)
        found[attention_kind(attention)] = replace(config, attention=attention)
    return found


def cache_bytes(config: ModelConfig) -> dict[str, int]:
    """Cache bytes per token over all layers, for each cache dtype."""
    return {dtype: count.cache_bytes_per_token(config, dtype) for dtype in CACHE_TYPES}


def absorption() -> dict[str, Any]:
    """The data of the absorption page."""
    sizes = {"the matrices above": ModelConfig(attention=SMALL)}
    sizes |= {name: Config.preset(name).model for name in COUNTED}
    return {**attend(), "sizes": [{"name": name, **work(config)} for name, config in sizes.items()]}


def small_attention() -> tuple[MultiheadLatentAttention, torch.Tensor]:
    """A float64 attention whose weights are multiples of 1/4, and its input (1, TOKENS, dim)."""
    generator = torch.Generator().manual_seed(SEED)
    attention = MultiheadLatentAttention(
        4,
        SMALL.num_heads,
        SMALL.kv_lora_rank,
        SMALL.qk_nope_head_dim,
        SMALL.qk_rope_head_dim,
        SMALL.v_head_dim,
    ).double()
    with torch.no_grad():
        for projection in (attention.q, attention.kv_a, attention.kv_b, attention.out):
            weight = projection.weight
            weight.copy_(torch.randint(-4, 5, weight.shape, generator=generator) / 4)
    return attention, torch.randint(-4, 5, (1, TOKENS, 4), generator=generator).double() / 4


@torch.no_grad()
def attend() -> dict[str, Any]:
    """Every matrix that the two forms compute for the last token, and the module's own outputs.

    Each column of c is a token, as in the papers; per-head matrices have the head as their first axis.
    """
    attention, x = small_attention()
    q_nope, q_rope = attention.query(x)
    latent, k_rope = attention.compress(x)
    q_rope, k_rope = attention.rotate(q_rope, k_rope, torch.arange(TOKENS))
    q_nope, q_rope = q_nope[:, -1:], q_rope[:, -1:]  # the last token's
    w_key, w_value = attention.split_kv_b()
    c, shared_key = latent[0].T, k_rope[0].T  # (latent, total), (rope, total)
    query, rope_query = q_nope[0].transpose(0, 1), q_rope[0].transpose(0, 1)  # (heads, 1, nope), ... rope)

    w_out = rearrange(attention.out.weight, "dim (heads value) -> heads dim value", heads=SMALL.num_heads)

    keys, values = w_key @ c, w_value @ c  # V3 eq. 2, 5; (heads, nope, total), (heads, value, total)
    content_scores, rope_scores = query @ keys, rope_query @ shared_key  # (heads, 1, total)
    scores = (content_scores + rope_scores) * attention.scale
    weights = scores.softmax(-1)
    column = weights.transpose(1, 2)  # (heads, total, 1)
    out = values @ column  # V3 eq. 10; (heads, value, 1)
    latent_query, context = query @ w_key, c @ column  # (heads, 1, latent), (heads, latent, 1)
    latent_out = w_value @ context
    matrices = {
        "c": c,
        "k_rope": shared_key,
        "q": query,
        "q_rope": rope_query,
        "w_key": w_key,
        "w_value": w_value,
        "w_out": w_out,
        "k": keys,
        "content": content_scores,
        "rope": rope_scores,
        "scores": scores,
        "weights": weights,
        "column": column,
        "v": values,
        "o": out,
        "q_latent": latent_query,
        "content_latent": latent_query @ c,
        "context": context,
        "o_latent": latent_out,
        "u_head": w_out @ latent_out,
        "u_expanded": (w_out @ out).sum(0),  # V3 eq. 11; (dim, 1)
        "u_absorbed": (w_out @ latent_out).sum(0),
    }
    entries = torch.cat((latent, k_rope), dim=-1)
    module = {
        "expanded": attention.expanded(q_nope, q_rope, latent, k_rope, None)[0, 0],  # (heads, value)
        "absorbed": attention.absorbed(q_nope, q_rope, entries, None)[0, 0],
        "y": attention(x)[0, -1],
    }
    return {
        "scale": attention.scale,
        "matrices": {name: matrix.tolist() for name, matrix in matrices.items()},
        "module": {name: output.tolist() for name, output in module.items()},
    }


def work(config: ModelConfig) -> dict[str, Any]:
    """The cost of decoding a token in one layer, as [constant, per token of context].

    Multiplications are per head, as in `absorbed_is_cheaper`; bytes are in bf16, for all heads' keys and
    values or for the cache entries.
    """
    a, counted, width = config.attention, count.built_in_attention(config), count.BYTES["bf16"]
    expansion = a.kv_lora_rank * (a.qk_nope_head_dim + a.v_head_dim)
    return {
        "expanded": {
            "multiplications": [0, expansion + counted.per_key // a.num_heads],
            "bytes": [0, width * counted.per_key],
        },
        "absorbed": {
            "multiplications": [expansion, counted.cache + a.kv_lora_rank],
            "bytes": [0, width * counted.cache],
        },
    }


def made(name: str) -> str:
    """The content of docs/explorers/{name}.html."""
    data = {"cache": cache, "absorption": absorption}[name]()
    return page.render(FOLDER / f"{name}.template.html", data=data)


if __name__ == "__main__":
    for name in ("cache", "absorption"):
        (FOLDER / f"{name}.html").write_text(made(name), encoding="utf-8")
