"""Latent attention that sees a window: each token itself and the `window - 1` before it.

Mistral 7B (arXiv 2310.06825) does so with grouped-query attention. After two layers a token knows of two
windows. Who sees whom is all that changes here: the cache still keeps every entry, so that it saves no memory
yet. A ring of `window` entries would be the next project.
"""

import torch
from torch import Tensor, nn

from mla import LatentCache, MultiheadLatentAttention


class SlidingWindowMLA(MultiheadLatentAttention):
    """x (batch, time, dim) -> y (batch, time, dim); arguments as `MultiheadLatentAttention`'s, and window"""

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
        query = start.unsqueeze(1) + torch.arange(x.shape[1], device=x.device)  # (batch, time), places of x
        key = torch.arange(int(query.max()) + 1, device=x.device)
        near = key > query.unsqueeze(2) - self.window  # (batch, time, total), on top of causality
        if mask is not None:
            near = near & (mask.unsqueeze(1) if mask.ndim == 2 else mask)
        return super().forward(x, cache, positions, near)
