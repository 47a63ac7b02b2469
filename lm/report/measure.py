"""What a page shows of a model, as numbers: its counts, its cache, its experts' load, a passage's experts."""

import json
from typing import Any

import torch
from einops import rearrange

from mla import GroupedQueryAttention
from moe import balance

from .. import checkpoint, count, data
from ..config import Config
from ..model import Transformer
from ..tokenizer import ByteTokenizer

PASSAGE = 384  # tokens shown coloured by their expert
LOAD_TOKENS = 16384  # tokens that the load is counted on


def read_baseline(config: Config) -> dict[str, Any] | None:
    """The n-gram models' losses, where the run is on the text that they were made for."""
    path = data.CORPUS / "baselines.json"
    return json.loads(path.read_text()) if not config.data.path and not config.data.validation else None


def counts(config: Config, model: Transformer) -> dict[str, int | None]:
    """Parameters: in all, counted from the model; active, by arithmetic (None for parts of your own)."""
    total = sum(tensor.numel() for tensor in checkpoint.model_tensors(model).values())
    try:
        return {"total": total, "active": count.active_parameters(config.model)}
    except ValueError:
        return {"total": total, "active": None}


def cache_bytes(model: Transformer, config: Config) -> dict[str, int]:
    """Bytes that a token takes in all layers' caches, measured on live ones: this model, MHA, GQA and MQA."""
    length = 64
    ours = sum(cache.nbytes for cache in model.new_caches(1, length)) // length
    attention = config.model.attention
    heads = attention.num_heads
    width = attention.head_dim if attention.kind == "gqa" else attention.v_head_dim
    dtype = next(model.parameters()).dtype
    found = {f"this model ({attention.kind})": ours}
    groups = {"MHA": heads, "GQA": max(1, heads // 4) if heads % 4 == 0 else 1, "MQA": 1}
    for name, kv_heads in groups.items():
        rival = GroupedQueryAttention(config.model.dim, heads, kv_heads, width + width % 2)
        found[name] = rival.new_cache(1, length, dtype).nbytes // length * config.model.num_layers
    return found


@torch.no_grad()
def expert_load(model: Transformer, text: data.Windows) -> torch.Tensor:
    """Share of the held-out text's slots that each expert took -> (layers, experts), 1 / experts when even"""
    windows = range(0, len(text), max(1, len(text) * text.context // LOAD_TOKENS))
    tokens = torch.stack([text[index][:-1] for index in windows])
    loads = [balance.tokens_per_expert(routing).double() for routing in model(tokens).routings]
    return torch.stack([load / load.sum() for load in loads])


def passage(text: data.Windows, length: int) -> torch.Tensor:
    """A held-out passage from where a speech begins, at most so many tokens -> (time,) int64"""
    some = bytes(text.tokens[:4000])
    start = max(0, some.find(b"\n\n", 2000) + 2 if len(some) > 2000 + PASSAGE else 0)
    return torch.from_numpy(text.tokens[start : start + length].astype("int64"))


@torch.no_grad()
def passage_experts(model: Transformer, text: data.Windows) -> list[list[dict[str, Any]]]:
    """For each MoE layer: the tokens of a held-out passage as shown, each with its expert of most weight."""
    tokens = passage(text, PASSAGE)
    shown = [show(token) for token in tokens.tolist()]
    layers = []
    for routing in model(tokens.unsqueeze(0)).routings:
        strongest = routing.weights.argmax(-1, keepdim=True)
        experts = rearrange(routing.experts.gather(-1, strongest), "1 time 1 -> time").tolist()
        layers.append([{"text": text, "expert": expert} for text, expert in zip(shown, experts)])
    return layers


def show(token: int) -> str:
    """A byte as something that can be seen."""
    if token == ByteTokenizer.end_of_text:
        return "∎"
    return {10: "↵", 32: "␣"}.get(token, chr(token) if 33 <= token < 127 else f"{token:02x}")


def hue(expert: int) -> int:
    """Degrees on the colour wheel; neighbours in number are far apart in colour."""
    return round(expert * 137.508) % 360
