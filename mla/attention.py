"""Multi-head latent attention (V2 section 2.1, V3 section 2.1.1): keys and values from one small latent."""

import torch
from einops import rearrange
from torch import Tensor, nn

from .cache import LatentCache, cache_dtype
from .causal import check_positive, positions_and_visible, softmax_attention
from .norm import RMSNorm, settings
from .rope import RotaryEmbedding


class MultiheadLatentAttention(nn.Module):
    """Causal attention with keys and values expanded from a latent, and position in a few extra dims.

    x (batch, time, dim) -> y (batch, time, dim)

    Args:
        kv_lora_rank: width of the latent of keys and values (512 in V3).
        qk_nope_head_dim: query and key dims per head without rotary embedding (128 in V3).
        qk_rope_head_dim: query and key dims per head with it; all heads share the key's (64 in V3).
        v_head_dim: value dims per head (128 in V3).
        q_lora_rank: width of the query's latent (1536 in V3); None: no query compression, as in V2-Lite.
        rope: a module (x, positions) -> x over qk_rope_head_dim; None: RotaryEmbedding with its defaults.
        qkv_bias: add a bias to q_a and kv_a, the compressions; q, q_b and kv_b never have one.
        out_bias: add a bias to the output.

    Raises:
        ValueError: a size is below 1; x, positions, mask or cache do not match.
    """

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
        qkv_bias: bool = False,
        out_bias: bool = False,
    ):
        super().__init__()
        check_positive(
            dim=dim,
            num_heads=num_heads,
            kv_lora_rank=kv_lora_rank,
            qk_nope_head_dim=qk_nope_head_dim,
            qk_rope_head_dim=qk_rope_head_dim,
            v_head_dim=v_head_dim,
            q_lora_rank=1 if q_lora_rank is None else q_lora_rank,
        )
        self.dim = dim
        self.num_heads = num_heads
        self.kv_lora_rank = kv_lora_rank
        self.qk_nope_head_dim = qk_nope_head_dim
        self.qk_rope_head_dim = qk_rope_head_dim
        self.v_head_dim = v_head_dim
        self.q_lora_rank = q_lora_rank
        self.rope = RotaryEmbedding(qk_rope_head_dim) if rope is None else rope
        self.scale = (qk_nope_head_dim + qk_rope_head_dim) ** -0.5  # absorbed too, where vectors are wider
        self.scale *= getattr(self.rope, "softmax_factor", 1.0)

        q_width = num_heads * (qk_nope_head_dim + qk_rope_head_dim)
        if q_lora_rank is None:
            self.q = nn.Linear(dim, q_width, bias=False)
        else:
            self.q_a = nn.Linear(dim, q_lora_rank, bias=qkv_bias)  # W_DQ
            self.q_norm = RMSNorm(q_lora_rank)
            self.q_b = nn.Linear(q_lora_rank, q_width, bias=False)  # W_UQ, W_QR; each head: nope, rope rows
        self.kv_a = nn.Linear(dim, kv_lora_rank + qk_rope_head_dim, bias=qkv_bias)  # W_DKV, then W_KR
        self.kv_norm = RMSNorm(kv_lora_rank)
        kv_width = num_heads * (qk_nope_head_dim + v_head_dim)
        self.kv_b = nn.Linear(kv_lora_rank, kv_width, bias=False)  # W_UK, W_UV; each head: key, value rows
        self.out = nn.Linear(num_heads * v_head_dim, dim, bias=out_bias)  # W_O

    def extra_repr(self) -> str:
        return settings(self)

    def forward(
        self,
        x: Tensor,
        cache: LatentCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from x to the cached tokens and to itself, and append x to the cache.

        Args:
            cache: from `new_cache`; splitting a sequence into several calls does not change the outputs.
            positions: (time,) or (batch, time) for the rotary embedding; None: continue from the cache.
            mask: bool, True where attention is allowed, besides causality: (batch, total) for all queries, or
                (batch, time, total), where total is past + new tokens. A token always attends to itself.
        """
        positions, visible = positions_and_visible(x, self.dim, cache, positions, mask)
        q_nope, q_rope = self.query(x)
        latent, k_rope = self.compress(x)
        q_rope, k_rope = self.rotate(q_rope, k_rope, positions)
        if cache is not None:
            latent, k_rope = cache.append(latent, k_rope)  # the normed latent, the rotated key, nothing else
        if cache is not None and self.absorbed_is_cheaper(x.shape[1], latent.shape[1]):
            context = self.absorbed(q_nope, q_rope, cache.filled, visible)  # latent and k_rope side by side
        else:
            context = self.expanded(q_nope, q_rope, latent, k_rope, visible)
        return self.out(context.flatten(2))  # V3 eq. 11; (batch, time, heads x value) -> (batch, time, dim)

    def query(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (batch, time, dim) -> q_nope (batch, time, heads, nope), q_rope (batch, time, heads, rope)"""
        q = self.q(x) if self.q_lora_rank is None else self.q_b(self.q_norm(self.q_a(x)))  # V3 eq. 6, 7
        q = q.unflatten(-1, (self.num_heads, -1))  # (batch, time, heads, nope + rope)
        q_nope, q_rope = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        return q_nope, q_rope

    def compress(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Everything that later tokens need of x; k_rope is not yet rotated.

        x (batch, time, dim) -> latent (batch, time, latent), k_rope (batch, time, rope)
        """
        latent, k_rope = self.kv_a(x).split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        return self.kv_norm(latent), k_rope  # V3 eq. 1; the rope key stays unnormed

    def rotate(self, q_rope: Tensor, k_rope: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate query and key by their positions, in these dims only, so that the rest can be absorbed.

        q_rope (batch, time, heads, rope), k_rope (batch, time, rope) -> the same
        """
        both = torch.cat((q_rope, k_rope.unsqueeze(2)), dim=2)  # the shared key is rotated as one more head
        q_rope, k_rope = self.rope(both, positions).split([self.num_heads, 1], dim=2)  # V3 eq. 3, 8
        return q_rope, k_rope.squeeze(2)

    def expanded(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, visible: Tensor | None
    ) -> Tensor:
        """Attention as the paper writes it: every head's keys and values are expanded from the latents.

        q_nope (batch, time, heads, nope), q_rope (batch, time, heads, rope), latent (batch, total, latent),
        k_rope (batch, total, rope) -> (batch, time, heads, value)
        """
        kv = self.kv_b(latent)
        kv = rearrange(kv, "batch total (heads width) -> batch total heads width", heads=self.num_heads)
        k_nope, value = kv.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)  # V3 eq. 2, 5
        k_rope = k_rope.unsqueeze(2).expand(-1, -1, self.num_heads, -1)
        query = torch.cat((q_nope, q_rope), dim=-1)  # V3 eq. 9
        key = torch.cat((k_nope, k_rope), dim=-1)  # V3 eq. 4
        return softmax_attention(query, key, value, self.scale, visible)  # V3 eq. 10

    def absorbed(self, q_nope: Tensor, q_rope: Tensor, entries: Tensor, visible: Tensor | None) -> Tensor:
        """Attention in the latent space: W_UK is applied to the query, and W_UV to the output.

        q . (W_UK c) = (W_UK^T q) . c, so all heads share one key of latent + rope dims, whose latent is also
        the value: multi-query attention over the cache's entries (V2 section 2.1.2).

        q_nope (batch, time, heads, nope), q_rope (batch, time, heads, rope),
        entries (batch, total, latent + rope) -> (batch, time, heads, value)
        """
        _, time, heads, _ = q_nope.shape
        w_key, w_value = self.split_kv_b()  # (heads, nope, latent), (heads, value, latent)
        q_latent = torch.matmul(q_nope.transpose(1, 2), w_key)  # (batch, heads, time, latent); W_UK, W_UQ
        query = torch.cat((q_latent, q_rope.transpose(1, 2)), dim=-1) * self.scale
        scores = torch.matmul(query.flatten(1, 2), entries.transpose(1, 2))  # (batch, heads x time, total)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).unflatten(1, (heads, time))
        if visible is None and time > 1:  # no past: total == time
            visible = torch.ones(time, time, dtype=torch.bool, device=scores.device).tril()
        if visible is not None:
            visible = visible.unsqueeze(1) if visible.ndim == 3 else visible
            scores = scores.masked_fill(~visible, float("-inf"))
        weights = scores.softmax(-1).to(entries.dtype)
        latent = entries[..., : self.kv_lora_rank]
        context = torch.matmul(weights.flatten(1, 2), latent)  # (batch, heads x time, latent)
        context = context.unflatten(1, (heads, time))  # (batch, heads, time, latent)
        return torch.matmul(context, w_value.transpose(1, 2)).transpose(1, 2)  # W_UV joins W_O

    def absorbed_is_cheaper(self, time: int, total: int) -> bool:
        """Compare the two forms' multiply-adds per head, for `time` queries over `total` keys."""
        # expanded: compute total keys and values, then (nope + rope) + value for each pair of query and key;
        # absorbed: project time queries in and time outputs out, then (latent + rope) + latent for each pair.
        # V3: absorbed below about 170 queries over a long past. A sequence in one call: expanded.
        nope, rope, value = self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim
        latent = self.kv_lora_rank
        expanded = total * latent * (nope + value) + time * total * (nope + rope + value)
        absorbed = time * latent * (nope + value) + time * total * (latent + rope + latent)
        return time < total and absorbed < expanded

    def split_kv_b(self) -> tuple[Tensor, Tensor]:
        """-> W_UK (heads, nope, latent), W_UV (heads, value, latent)"""
        weight = self.kv_b.weight.unflatten(0, (self.num_heads, -1))  # (heads, nope + value, latent)
        w_key, w_value = weight.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
        return w_key, w_value

    def new_cache(self, batch: int, max_length: int, dtype: torch.dtype | None = None) -> LatentCache:
        """An empty cache on this module's device; dtype None: the weights', or autocast's if enabled."""
        weight = self.kv_a.weight
        dtype = cache_dtype(weight) if dtype is None else dtype
        return LatentCache(batch, max_length, self.kv_lora_rank, self.qk_rope_head_dim, dtype, weight.device)
