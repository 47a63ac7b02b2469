"""Latent attention over a sliding window: each token sees itself and the `window - 1` tokens before it.

Mistral 7B (arXiv 2310.06825) does this with grouped-query attention. After two layers, information travels up
to two windows. Only the mask changes here: the cache still keeps every entry, so it saves no memory yet. A
ring buffer of `window` entries would be the next project. It overrides forward, so it decodes without pages.
"""

import torch
from torch import Tensor, nn

from mla import LatentCache, MultiheadLatentAttention


class SlidingWindowMLA(MultiheadLatentAttention):
    """x (batch, time, dim) -> y (batch, time, dim); arguments of `MultiheadLatentAttention`, and window"""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        q_lora_rank: int | None = None,
        rope: nn.Module | None = None,
        window: int = 32,
    ):
        sizes = (dim, num_heads, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim)
        super().__init__(*sizes, q_lora_rank, rope)
        self.window = window

    def forward(self, x: Tensor, cache: LatentCache | None = None, positions=None, mask=None) -> Tensor:
        start = torch.tensor([0] * len(x) if cache is None else cache.lengths, device=x.device)
        query = start.unsqueeze(1) + torch.arange(
            x.shape[1], device=x.device
        )  # (batch, time), positions of x
        key = torch.arange(int(query.max()) + 1, device=x.device)
        near = key > query.unsqueeze(2) - self.window  # (batch, time, total), on top of causality
        if mask is not None:
            near = near & (mask.unsqueeze(1) if mask.ndim == 2 else mask)
        return super().forward(x, cache, positions, near)
