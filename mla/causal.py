"""Shared by MLA and GQA: positions, the keys visible to each query, and softmax attention."""

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .norm import transformed


def positions_and_visible(
    x: Tensor, dim: int, cache: Any, positions: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Check a call's arguments, and compute the new tokens' positions and the keys visible to each.

    -> positions (time,) or (batch, time); visible (time, total) or (batch, time, total) bool, or None where
    plain causality is enough: time == total, where query i sees keys 0..i, or a single query, which sees all
    """
    if x.ndim != 3 or x.shape[-1] != dim or x.shape[1] < 1 or not x.is_floating_point():
        wanted = f"floating-point (batch, time >= 1, dim={dim})"
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; expected {wanted}")
    batch, time, _ = x.shape
    start = [0] if cache is None else cache.lengths
    if cache is not None and len(start) != batch:
        raise ValueError(f"x has batch {batch}; the cache was made for batch {len(start)}")
    place = slots(start, time, x.device)  # (time,) or (batch, time)
    if positions is None:
        positions = place
    elif positions.shape not in (x.shape[1:2], x.shape[:2]):
        shape = tuple(positions.shape)
        raise ValueError(f"positions have shape {shape}; expected ({time},) or ({batch}, {time})")
    longest = max(start)
    if mask is None and place.ndim == 1 and (longest == 0 or time == 1):
        return positions, None
    total = longest + time
    keys = torch.arange(total, device=x.device)
    visible = keys <= place.unsqueeze(-1)  # (time, total) or (batch, time, total)
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape not in ((batch, total), (batch, time, total)):
            raise ValueError(
                f"mask is {mask.dtype} {tuple(mask.shape)}; expected torch.bool ({batch}, {total}) or "
                f"({batch}, {time}, {total}), True where a key is visible"
            )
        mask = mask.unsqueeze(1) if mask.ndim == 2 else mask
        visible = visible & mask | (keys == place.unsqueeze(-1))  # itself: softmax needs a key
    return positions, visible


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, visible: Tensor | None
) -> Tensor:
    """softmax(query key^T x scale) value over the visible keys, softmax in fp32, by PyTorch's fused kernels.

    query (batch, time, heads, width), key (batch, total, kv_heads, width),
    value (batch, total, kv_heads, value) -> (batch, time, heads, value)
    """
    value_width = value.shape[-1]
    # On a CPU a value narrower than the key takes a path three times slower: pad it, and cut the result.
    padding = key.shape[-1] - value_width
    if padding > 0 and value.device.type == "cpu":
        value = F.pad(value, (0, padding))
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    if visible is not None and visible.ndim == 3:
        visible = visible.unsqueeze(1)
    causal = visible is None
    if query.shape[2] != key.shape[2]:  # a single query, which sees all keys
        causal = False
    grouped = key.shape[1] != query.shape[1]
    with sdpa_kernel(SDPBackend.MATH) if transformed() else nullcontext():  # a fused one has no jvp
        y = F.scaled_dot_product_attention(
            query, key, value, visible, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    return y.transpose(1, 2)[..., :value_width]


def slots(start: list[int], time: int, device: torch.device) -> Tensor:
    """Cache index of each new token -> (time,) if all rows have the same start, else (batch, time)"""
    steps = torch.arange(time, device=device)
    if min(start) == max(start):
        return steps + start[0]
    return torch.tensor(start, device=device).unsqueeze(1) + steps


def check_positive(**sizes: int) -> None:
    """Raise ValueError for a size below 1, with its name."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")
