"""Grouped-query attention (arXiv 2305.13245), including MHA (a key per head) and MQA (one key for all)."""

import torch
from einops import rearrange
from torch import Tensor, nn

from .cache import KVCache, cache_dtype
from .causal import check_positive, positions_and_visible, softmax_attention
from .norm import RMSNorm, settings
from .rope import RotaryEmbedding


class GroupedQueryAttention(nn.Module):
    """Causal attention in which groups of query heads share a key-value head.

    x (batch, time, dim) -> y (batch, time, dim), with the same call as MultiheadLatentAttention

    Args:
        num_kv_heads: num_heads is MHA, 1 is MQA, a divisor between them is GQA.
        rope: a module (x, positions) -> x over head_dim; None: RotaryEmbedding with its defaults.
        qkv_bias: add a bias to query, key and value, as in Qwen2.
        out_bias: add a bias to the output.
        qk_norm_eps: the eps of an RMSNorm over each head's query and key, as in Qwen3; None: no norm.

    Raises:
        ValueError: a size is below 1, num_kv_heads does not divide num_heads, or x, positions, mask or cache
            do not match.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rope: nn.Module | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm_eps: float | None = None,
    ):
        super().__init__()
        check_positive(dim=dim, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads={num_kv_heads} does not divide num_heads={num_heads}")
        self.dim = dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.rope = RotaryEmbedding(head_dim) if rope is None else rope
        self.q = nn.Linear(dim, num_heads * head_dim, bias=qkv_bias)
        self.k = nn.Linear(dim, num_kv_heads * head_dim, bias=qkv_bias)
        self.v = nn.Linear(dim, num_kv_heads * head_dim, bias=qkv_bias)
        self.out = nn.Linear(num_heads * head_dim, dim, bias=out_bias)
        self.q_norm, self.k_norm = (  # each shared by all heads
            nn.Identity() if qk_norm_eps is None else RMSNorm(head_dim, qk_norm_eps) for _ in range(2)
        )

    def extra_repr(self) -> str:
        return settings(self)

    def forward(
        self,
        x: Tensor,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Arguments as in `MultiheadLatentAttention.forward`."""
        positions, visible = positions_and_visible(x, self.dim, cache, positions, mask)
        heads = "batch time (heads head_dim) -> batch time heads head_dim"
        query = self.rope(self.q_norm(rearrange(self.q(x), heads, head_dim=self.head_dim)), positions)
        key = self.rope(self.k_norm(rearrange(self.k(x), heads, head_dim=self.head_dim)), positions)
        value = rearrange(self.v(x), heads, head_dim=self.head_dim)
        if cache is not None:
            key, value = cache.append(key, value)
        context = softmax_attention(query, key, value, self.head_dim**-0.5, visible)
        return self.out(rearrange(context, "batch time heads head_dim -> batch time (heads head_dim)"))

    def new_cache(self, batch: int, max_length: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache on this module's device; dtype None: the weights', or autocast's if enabled."""
        weight = self.k.weight
        dtype = cache_dtype(weight) if dtype is None else dtype
        return KVCache(batch, max_length, self.num_kv_heads, self.head_dim, dtype, weight.device)
