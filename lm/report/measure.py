"""The numbers on the pages: parameters, cache size, expert load, and the experts of a passage's tokens."""

import json
from typing import Any

import torch
from einops import rearrange

from moe import balance

from .. import count, data
from ..config import Config
from ..model import Transformer
from ..tokenizer import ByteTokenizer
from . import info

PASSAGE = 384  # tokens shown in the colour of their expert
LOAD_TOKENS = 16384  # tokens that the expert load is measured on


def read_baseline(config: Config) -> dict[str, Any] | None:
    """The n-gram models' losses if the run uses the bundled text, which they were fitted to."""
    if config.data.path or config.data.validation:
        return None
    return json.loads((data.CORPUS / "baselines.json").read_text(encoding="utf-8"))


def counts(config: Config, model: Transformer) -> dict[str, int | None]:
    """Parameters: the total counted from the model, the active ones computed (None with custom parts)."""
    total = count.built_parameters(model)
    try:
        return {"total": total, "active": count.active_parameters(config.model)}
    except ValueError:
        return {"total": total, "active": None}


def cache_bytes(model: Transformer, config: Config) -> dict[str, int]:
    """Cache bytes per token over all layers in bf16: this model (measured), MHA, GQA and MQA."""
    length = 64
    caches = model.new_caches(1, length, torch.bfloat16)
    found = info.cache_bytes(config.model, "bf16", sum(cache.nbytes for cache in caches) // length)
    del found[info.LARGEST_DENSE]  # its bar would hide the others
    return {f"this model ({config.model.attention.kind})": found.pop("this model"), **found}


@torch.no_grad()
def expert_load(model: Transformer, text: data.Windows) -> torch.Tensor:
    """Share of the held-out text's slots that each expert takes -> (layers, experts), 1 / experts if even"""
    windows = range(0, len(text), max(1, len(text) * text.context // LOAD_TOKENS))
    tokens = torch.stack([text[index][:-1] for index in windows])
    loads = [balance.tokens_per_expert(routing).float() for routing in model(tokens).routings]
    return torch.stack([load / load.sum() for load in loads])


def passage(text: data.Windows, length: int) -> torch.Tensor:
    """A held-out passage that starts after a blank line, of at most `length` tokens -> (time,) int64"""
    some = bytes(text.tokens[:4000])
    start = max(0, some.find(b"\n\n", 2000) + 2 if len(some) > 2000 + PASSAGE else 0)
    return torch.from_numpy(text.tokens[start : start + length].astype("int64"))


@torch.no_grad()
def passage_experts(model: Transformer, text: data.Windows) -> list[list[dict[str, Any]]]:
    """For each MoE layer, a held-out passage's displayed tokens, each with the expert of largest weight."""
    tokens = passage(text, PASSAGE)
    shown = [show(token) for token in tokens.tolist()]
    layers = []
    for routing in model(tokens.unsqueeze(0)).routings:
        strongest = routing.weights.argmax(-1, keepdim=True)
        experts = rearrange(routing.experts.gather(-1, strongest), "1 time 1 -> time").tolist()
        layers.append([{"text": text, "expert": expert} for text, expert in zip(shown, experts)])
    return layers


def show(token: int) -> str:
    """A byte as visible text."""
    if token == ByteTokenizer.end_of_text:
        return "∎"
    return {10: "↵", 32: "␣"}.get(token, chr(token) if 33 <= token < 127 else f"{token:02x}")


def hue(expert: int) -> int:
    """Degrees on the colour wheel; experts with neighbouring numbers have distant hues."""
    return round(expert * 137.508) % 360
