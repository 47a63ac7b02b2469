"""Multi-head latent attention (DeepSeek-V2 section 2.1, V3 section 2.1.1): keys and values from one small latent."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .cache import Cache, LatentCache, slots
from .rope import RotaryEmbedding


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in fp32, then back to x's dtype (arXiv 1910.07467 eq. 4).

    x (..., dim) -> (..., dim)
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight).to(x.dtype)


class MultiheadLatentAttention(nn.Module):
    """Causal attention whose keys and values are expanded from a latent, with position in a few shared dims.

    x (batch, time, dim) -> y (batch, time, dim)

    Args:
        kv_lora_rank: width of the latent that keys and values come from (512 in V3).
        qk_nope_head_dim: a head's query and key dims without position (128 in V3).
        qk_rope_head_dim: a head's query and key dims with position; the key's are one for all heads (64 in V3).
        v_head_dim: a head's value dims (128 in V3).
        q_lora_rank: width of the query's latent (1536 in V3); None: no compression, as in V2-Lite.
        rope: a module (x, positions) -> x over qk_rope_head_dim; None: plain RotaryEmbedding.

    Raises:
        ValueError: a size is below 1; x, positions, mask or cache do not fit.
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
        self.scale = (qk_nope_head_dim + qk_rope_head_dim) ** -0.5  # absorbed too, though its dot product is longer
        self.rope = RotaryEmbedding(qk_rope_head_dim) if rope is None else rope

        q_width = num_heads * (qk_nope_head_dim + qk_rope_head_dim)
        if q_lora_rank is None:
            self.q = nn.Linear(dim, q_width, bias=False)
        else:
            self.q_a = nn.Linear(dim, q_lora_rank, bias=False)  # W_DQ
            self.q_norm = RMSNorm(q_lora_rank)
            self.q_b = nn.Linear(q_lora_rank, q_width, bias=False)  # W_UQ and W_QR; a head: nope rows, then rope rows
        self.kv_a = nn.Linear(dim, kv_lora_rank + qk_rope_head_dim, bias=False)  # W_DKV, then W_KR
        self.kv_norm = RMSNorm(kv_lora_rank)
        self.kv_b = nn.Linear(kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim), bias=False)  # W_UK and W_UV
        self.out = nn.Linear(num_heads * v_head_dim, dim, bias=False)  # W_O

    def forward(
        self, x: Tensor, cache: LatentCache | None = None, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Attend from x to itself and to what the cache holds; the cache then holds x too.

        Args:
            cache: from `new_cache`; any chunking of a text gives what one call gives.
            positions: (time,) or (batch, time) for the rotary embedding; None: counted on from the cache's length.
            mask: bool, True may be attended to, on top of causality: (batch, total) for all queries alike, or
                (batch, time, total), where total is past and new tokens. A token always sees itself.
        """
        positions, visible = where_and_what(x, self.dim, cache, positions, mask)
        q_nope, q_rope = self.query(x, positions)
        latent, k_rope = self.compress(x, positions)
        if cache is not None:
            latent, k_rope = cache.append(latent, k_rope)
        attend = self.absorbed if self.absorbed_is_cheaper(x.shape[1], latent.shape[1]) else self.expanded
        context = attend(q_nope, q_rope, latent, k_rope, visible)
        return self.out(rearrange(context, "batch time heads value -> batch time (heads value)"))  # V3 eq. 11

    def query(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """x (batch, time, dim) -> q_nope (batch, time, heads, nope), q_rope (batch, time, heads, rope)"""
        q = self.q(x) if self.q_lora_rank is None else self.q_b(self.q_norm(self.q_a(x)))  # V3 eq. 6, 7
        q = rearrange(q, "batch time (heads width) -> batch time heads width", heads=self.num_heads)
        q_nope, q_rope = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        return q_nope, self.rope(q_rope, positions)  # V3 eq. 8

    def compress(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """All that later tokens will need of x: what the cache holds, to the byte.

        x (batch, time, dim) -> latent (batch, time, latent), k_rope (batch, time, rope)
        """
        latent, k_rope = self.kv_a(x).split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        latent = self.kv_norm(latent)  # V3 eq. 1; the rope key stays unnormed
        return latent, self.rope(k_rope, positions)  # V3 eq. 3; one key for all heads

    def expanded(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, visible: Tensor | None) -> Tensor:
        """Attention as the paper writes it: every head's keys and values are made from the latents.

        q_nope (batch, time, heads, nope), q_rope (batch, time, heads, rope), latent (batch, total, latent),
        k_rope (batch, total, rope) -> (batch, time, heads, value)
        """
        kv = rearrange(self.kv_b(latent), "batch total (heads width) -> batch total heads width", heads=self.num_heads)
        k_nope, value = kv.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)  # V3 eq. 2, 5
        k_rope = k_rope.unsqueeze(2).expand(-1, -1, self.num_heads, -1)
        query = torch.cat((q_nope, q_rope), dim=-1)  # V3 eq. 9
        key = torch.cat((k_nope, k_rope), dim=-1)  # V3 eq. 4
        return softmax_attention(query, key, value, self.scale, visible)  # V3 eq. 10

    def absorbed(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, visible: Tensor | None) -> Tensor:
        """Attention inside the latent space: each head's key and value matrices move to the query and output side.

        All heads then read the same keys, the cache's entries, as in multi-query attention (V2 section 2.1.2).
        Shapes as in `expanded`.
        """
        _, time, heads, _ = q_nope.shape
        w_key, w_value = self.split_kv_b()  # (heads, nope, latent), (heads, value, latent)
        q_latent = torch.matmul(q_nope.transpose(1, 2), w_key)  # (batch, heads, time, latent); W_UK joins W_UQ
        q_latent, q_rope = q_latent.flatten(1, 2), q_rope.transpose(1, 2).flatten(1, 2)  # (batch, heads x time, ...)
        scores = torch.matmul(q_rope, k_rope.transpose(1, 2))  # (batch, heads x time, total)
        scores = torch.baddbmm(scores, q_latent, latent.transpose(1, 2), beta=self.scale, alpha=self.scale)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).unflatten(1, (heads, time))
        if visible is None and time > 1:
            visible = torch.ones(time, time, dtype=torch.bool, device=scores.device).tril()
        if visible is not None:
            visible = visible.unsqueeze(1) if visible.ndim == 3 else visible
            scores = scores.masked_fill(~visible, float("-inf"))
        weights = scores.softmax(-1).to(latent.dtype)  # V3 eq. 10
        context = torch.matmul(weights.flatten(1, 2), latent).unflatten(1, (heads, time))  # (batch, heads, time, latent)
        return torch.matmul(context, w_value.transpose(1, 2)).transpose(1, 2)  # W_UV joins W_O

    def absorbed_is_cheaper(self, time: int, total: int) -> bool:
        """Compare the multiply-adds a head of the two forms, for `time` queries over `total` keys."""
        # expanded: make total keys and values, then (nope + rope) + value for each pair of query and key;
        # absorbed: move time queries in and time results out, then (latent + rope) + latent for each pair.
        # V3: absorbed for less than about 170 queries over a long past. A whole text at once: expanded.
        move = self.kv_lora_rank * (self.qk_nope_head_dim + self.v_head_dim)
        expanded = total * move + time * total * (self.qk_nope_head_dim + self.qk_rope_head_dim + self.v_head_dim)
        absorbed = time * move + time * total * (2 * self.kv_lora_rank + self.qk_rope_head_dim)
        return time < total and absorbed < expanded

    def split_kv_b(self) -> tuple[Tensor, Tensor]:
        """-> W_UK (heads, nope, latent), W_UV (heads, value, latent); in kv_b each head has its key rows, then its value rows"""
        weight = rearrange(self.kv_b.weight, "(heads width) latent -> heads width latent", heads=self.num_heads)
        w_key, w_value = weight.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
        return w_key, w_value

    def new_cache(self, batch: int, max_length: int, dtype: torch.dtype | None = None) -> LatentCache:
        """An empty cache on this module's device; dtype None: that of its weights."""
        weight = self.kv_a.weight
        dtype = weight.dtype if dtype is None else dtype
        return LatentCache(batch, max_length, self.kv_lora_rank, self.qk_rope_head_dim, dtype, weight.device)


def where_and_what(
    x: Tensor, dim: int, cache: Cache | None, positions: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Check a call's arguments, and find where the new tokens stand and what they may see.

    -> positions (time,) or (batch, time); visible (time, total) or (batch, time, total) bool, or None where plain
    causality says it all: query i of as many keys sees the first i + 1, a single query sees everything
    """
    if x.ndim != 3 or x.shape[-1] != dim or x.shape[1] < 1 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; expected floating-point (batch, time >= 1, dim={dim})")
    batch, time, _ = x.shape
    start = [0] * batch if cache is None else cache.lengths
    if len(start) != batch:
        raise ValueError(f"x has batch {batch}; the cache was made for batch {len(start)}")
    place = slots(start or [0], time, x.device)  # (time,) or (batch, time)
    if positions is None:
        positions = place
    elif positions.shape not in (x.shape[1:2], x.shape[:2]):
        raise ValueError(f"positions have shape {tuple(positions.shape)}; expected ({time},) or ({batch}, {time})")
    longest = max(start, default=0)
    if mask is None and place.ndim == 1 and (longest == 0 or time == 1):
        return positions, None
    total = longest + time
    keys = torch.arange(total, device=x.device)
    visible = keys <= place.unsqueeze(-1)  # (time, total) or (batch, time, total)
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape not in ((batch, total), (batch, time, total)):
            raise ValueError(
                f"mask is {mask.dtype} {tuple(mask.shape)}; expected torch.bool ({batch}, {total}) or "
                f"({batch}, {time}, {total}), True where a key may be seen"
            )
        mask = mask.unsqueeze(1) if mask.ndim == 2 else mask
        visible = visible & mask | (keys == place.unsqueeze(-1))  # a token sees itself: no row of softmax is empty
    return positions, visible


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, visible: Tensor | None) -> Tensor:
    """softmax(query key^T x scale) value over the visible keys, softmax in fp32, by PyTorch's fused kernels.

    query (batch, time, heads, width), key (batch, total, kv_heads, width), value (batch, total, kv_heads, value)
    -> (batch, time, heads, value)
    """
    value_width = value.shape[-1]
    # On a CPU a value narrower than the key would fall back to a path three times slower: pad it, cut the result.
    padding = key.shape[-1] - value_width
    if padding > 0 and value.device.type == "cpu":
        value = F.pad(value, (0, padding))
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    if visible is not None and visible.ndim == 3:
        visible = visible.unsqueeze(1)
    causal = visible is None and query.shape[2] > 1
    grouped = key.shape[1] != query.shape[1]
    y = F.scaled_dot_product_attention(query, key, value, visible, is_causal=causal, scale=scale, enable_gqa=grouped)
    return y.transpose(1, 2)[..., :value_width]


def check_positive(**sizes: int) -> None:
    """Raise ValueError for a size below 1, by its name."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")
