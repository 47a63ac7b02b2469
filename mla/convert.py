"""Convert grouped-query attention to MLA (TransMLA: arXiv 2502.07864, MHA2MLA: arXiv 2502.14837)."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from .attention import MultiheadLatentAttention
from .grouped_query import GroupedQueryAttention
from .rope import RotaryEmbedding

DISTANCE = 1024  # distances between query and key to average over if there is no sample


class ChosenPairs(nn.Module):
    """A rotary embedding with chosen frequencies: pair i rotates as the embedding's pair `pairs[i]`.

    x (batch, time, [heads,] 2 pairs), positions (time,) or (batch, time) -> rotated x
    """

    def __init__(self, rope: RotaryEmbedding, pairs: Tensor):
        super().__init__()
        self.rope = rope
        self.pairs: Tensor
        self.register_buffer("pairs", pairs)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        cos, sin = (part[..., self.pairs] for part in self.rope.cos_sin(positions))
        if x.ndim == 4:
            cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # the same for all heads
        return self.rope.turn(x, cos, sin)


class Turning(NamedTuple):
    """The directions of all heads' keys that stay rotated, in MLA's shared rope key."""

    pairs: Tensor  # (kept,) int64, the embedding's pair that each rotates with
    mixes: Tensor  # (kept, kv_heads), each a unit vector: its coefficients over the heads


@torch.no_grad()
def to_mla(
    gqa: GroupedQueryAttention,
    kv_lora_rank: int | None = None,
    qk_rope_head_dim: int | None = None,
    x: Tensor | None = None,
) -> MultiheadLatentAttention:
    """An MLA that computes the same function: exactly at the default sizes, approximately at smaller ones.

    gqa, x (batch, time, dim) -> mla

    GQA rotates every feature of every key-value head. MLA rotates one key that all heads share: it takes the
    pairs of all heads side by side, each with its own frequency, and a query is zero in the other heads'
    pairs. The cache then holds one number more per token than GQA's (fewer if dim is below the value width).

    With fewer rotated pairs: pair j of all heads is mixed across heads by an orthogonal matrix, which changes
    no score and concentrates the variance (TransMLA's RoRoPE). The mixtures that matter most for the scores
    stay rotated (MHA2MLA's 2-norm, here times how far the pair rotates). The rest of the keys is not rotated
    and comes from the latent, as the values do: one joint SVD, balanced so that neither outweighs the other.

    kv_norm would divide the latent by its root mean square. The latent's first number is therefore a constant
    so large that it alone determines the root mean square, and kv_norm's weight multiplies by it again: an
    identity up to rounding, in training too. kv_norm maps the constant itself to 0.

    Args:
        kv_lora_rank: of the MLA, including the constant; None: enough to be exact.
        qk_rope_head_dim: of the MLA, even; None: all pairs of all heads.
        x: sample inputs of gqa; the SVD then keeps what matters for them, not for all inputs equally.

    Raises:
        ValueError: gqa has a bias on query, key and value, a qk norm, or no RotaryEmbedding; a size or x
            is invalid.
    """
    rope = check_supported(gqa)
    kv_heads, head_dim = gqa.num_kv_heads, gqa.head_dim
    kv_lora_rank, qk_rope_head_dim = sizes_of(gqa, kv_lora_rank, qk_rope_head_dim)
    root, distance = inputs(gqa, x)  # (dim, dim)
    query, key = by_pair(gqa.q.weight, rope, gqa.num_heads), by_pair(gqa.k.weight, rope, kv_heads)
    value = gqa.v.weight.cpu().double()  # (kv_heads x value, dim)
    turning = choose(query @ root, key @ root, turned(rope, distance), qk_rope_head_dim // 2)
    q_rope, k_rope, rest = turn_some(query, key, turning)
    q_rope, k_rope = join_pairs(q_rope, rope), join_pairs(k_rope.unsqueeze(0), rope)[0]
    still = turning.pairs.bincount(minlength=head_dim // 2) < kv_heads  # (pairs,) whether any rest remains
    q_nope, k_nope = (part[:, still].flatten(1, 2) for part in (query * rope.cos_sin_factor**2, rest))
    if not still.any():  # MLA needs at least one nope dim
        q_nope, k_nope = (part.new_zeros(len(part), 1, gqa.dim) for part in (query, key))
    down, up_key, up_value = joint_svd(k_nope.flatten(0, 1), value, root, kv_lora_rank - 1)

    mla = MultiheadLatentAttention(
        gqa.dim, gqa.num_heads, kv_lora_rank, q_nope.shape[1], qk_rope_head_dim, head_dim,
        rope=ChosenPairs(rope, turning.pairs), qkv_bias=True, out_bias=gqa.out.bias is not None,
    ).double()  # fmt: skip
    scale = head_dim**-0.5 / mla.scale  # the softmax scale is MLA's; the query compensates
    mla.q.weight.copy_(scale * torch.cat((q_nope, q_rope), dim=1).flatten(0, 1))
    mla.kv_a.weight.copy_(F.pad(torch.cat((down, k_rope)), (0, 0, 1, 0)))  # the constant's row: zeros
    up = torch.cat([part.unflatten(0, (kv_heads, -1)) for part in (up_key, up_value)], dim=1)
    up = up.repeat_interleave(gqa.num_heads // kv_heads, dim=0)  # (heads, nope + value, latent)
    mla.kv_b.weight.copy_(F.pad(up.flatten(0, 1), (1, 0)))
    keep_length(mla, constant(down, root, gqa.q.weight.dtype))
    mla.out.load_state_dict({name: part.cpu() for name, part in gqa.out.state_dict().items()})
    return mla.to(gqa.q.weight.dtype).to(gqa.q.weight.device)  # narrowed first: MPS has no float64


@torch.no_grad()
def relative_error(before: nn.Module, after: nn.Module, x: Tensor) -> float:
    """|after(x) - before(x)| / |before(x)|, over all tokens and features of x (batch, time, dim)"""
    wanted = before(x).cpu().double()  # on the CPU: MPS has no float64
    return float((after(x).cpu().double() - wanted).norm() / wanted.norm())


def choose(query: Tensor, key: Tensor, far: Tensor, kept: int) -> Turning:
    """Which directions stay rotated: those without whose rotation the scores would change most.

    query (heads, pairs, 2, samples), key (kv_heads, pairs, 2, samples), far (pairs,)
    """
    kv_heads = len(key)
    together = einsum(key, key, "a pairs two n, b pairs two n -> pairs a b")
    sizes, mixes = torch.linalg.eigh(together)  # (pairs, mixes), (pairs, kv_heads, mixes): RoRoPE
    asked = query.square().sum((-2, -1)).unflatten(0, (kv_heads, -1)).sum(1)  # (kv_heads, pairs)
    asked = einsum(mixes.square(), asked, "pairs heads mixes, heads pairs -> pairs mixes")
    contribution = sizes * asked * far.unsqueeze(1)  # (pairs, mixes)
    best = contribution.flatten().topk(kept).indices.sort().values
    of_pair = best // kv_heads
    return Turning(of_pair, mixes[of_pair, :, best % kv_heads])


def turn_some(query: Tensor, key: Tensor, turning: Turning) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and the shared key of the rotated directions, and the rest of each head's key.

    query (heads, pairs, 2, dim), key (kv_heads, pairs, 2, dim)
    -> q_rope (heads, kept, 2, dim), k_rope (kept, 2, dim), rest (kv_heads, pairs, 2, dim)
    """
    pairs, mixes = turning
    k_rope = einsum(mixes, key[:, pairs], "kept heads, heads kept two dim -> kept two dim")
    share = mixes.T.repeat_interleave(len(query) // len(key), dim=0)  # (heads, kept)
    q_rope = share[:, :, None, None] * query[:, pairs]
    back = einsum(mixes, k_rope, "kept heads, kept two dim -> heads kept two dim")
    rest = key.index_add(1, pairs, back, alpha=-1)
    return q_rope, k_rope, rest.where(rest.abs() > 1e-12 * key.abs().max(), 0)  # drop rounding errors


def joint_svd(key: Tensor, value: Tensor, root: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """One latent for keys and values: the best of its rank for inputs with the covariance root root^T.

    key (keys, dim), value (values, dim), root (dim, dim)
    -> down (rank, dim), up_key (keys, rank), up_value (values, rank), where key is about up_key @ down
    """
    sizes = [(part @ root).norm() for part in (key, value)]
    balance = sizes[1] / sizes[0] if all(sizes) else 1.0  # TransMLA: else the larger keys take it all
    both = torch.cat((balance * key, value))
    up = torch.linalg.svd(both @ root).U[:, :rank]  # orthonormal, so the best down is its transpose
    return up.T @ both, up[: len(key)] / balance, up[len(key) :]


def keep_length(mla: MultiheadLatentAttention, size: float) -> None:
    """Make kv_norm an identity, except on the latent's first number: a constant, which it maps to 0.

    With l the latent's other numbers, the root mean square is size / sqrt(rank) (1 + |l|^2 / 2 size^2).
    """
    mla.kv_a.bias.zero_()
    mla.kv_a.bias[0] = size
    mla.kv_norm.weight.fill_(size / mla.kv_lora_rank**0.5)
    mla.kv_norm.weight[0] = 0


def constant(down: Tensor, root: Tensor, dtype: torch.dtype) -> float:
    """A power of two whose square hides that of any usual latent down @ x in rounding."""
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps  # kv_norm computes at least in fp32
    # far above the latent of an x of mean square 1, and of a whole sample
    usual = max(float(down.norm()) * down.shape[1] ** 0.5, float((down @ root).norm())) + 1e-6
    return 2.0 ** min(math.ceil(math.log2(usual / eps**0.5)), int(math.log2(torch.finfo(dtype).max)))


def inputs(gqa: GroupedQueryAttention, x: Tensor | None) -> tuple[Tensor, int]:
    """A square root (dim, dim) of the inputs' covariance, and the number of distances between tokens."""
    every = torch.eye(gqa.dim, dtype=torch.float64)
    if x is None:
        return every, DISTANCE
    if x.ndim != 3 or x.shape[-1] != gqa.dim or not x.numel():
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (batch, time, dim={gqa.dim})")
    rows = x.cpu().double().flatten(0, 1)
    if not rows.isfinite().all() or not rows.any():
        raise ValueError("x holds infinities, NaN or only zeros; expected sample inputs of gqa")
    # a small sample leaves most directions undetermined: add a little of each
    rows = torch.cat((rows, 1e-4 * rows.norm() / gqa.dim**0.5 * every))
    return torch.linalg.qr(rows, mode="r").R.T, x.shape[1]


def turned(rope: RotaryEmbedding, distance: int) -> Tensor:
    """Mean squared displacement of each pair when rotated, over the distances -> (pairs,)"""
    cos, _ = rope.cos_sin(torch.arange(distance))
    return 2 - 2 * cos.double().mean(0) / rope.cos_sin_factor + 1e-12


def by_pair(weight: Tensor, rope: RotaryEmbedding, heads: int) -> Tensor:
    """weight (heads x head_dim, dim) -> (heads, pairs, 2, dim) float64, whatever the layout of the pairs"""
    layout = "(heads pairs two)" if rope.interleaved else "(heads two pairs)"
    return rearrange(weight.cpu().double(), f"{layout} dim -> heads pairs two dim", heads=heads, two=2)


def join_pairs(weight: Tensor, rope: RotaryEmbedding) -> Tensor:
    """weight (heads, pairs, 2, dim) -> (heads, 2 pairs, dim), in the embedding's layout"""
    layout = "(pairs two)" if rope.interleaved else "(two pairs)"
    return rearrange(weight, f"heads pairs two dim -> heads {layout} dim")


def sizes_of(
    gqa: GroupedQueryAttention, kv_lora_rank: int | None, qk_rope_head_dim: int | None
) -> tuple[int, int]:
    """The MLA's kv_lora_rank and qk_rope_head_dim, or ValueError."""
    width = gqa.num_kv_heads * gqa.head_dim
    rope = width if qk_rope_head_dim is None else qk_rope_head_dim
    for name, size in (("kv_lora_rank", kv_lora_rank), ("qk_rope_head_dim", rope)):
        if not isinstance(size, int | None):
            raise ValueError(f"{name}={size!r} must be a whole number")
    if rope not in range(2, width + 1, 2):
        raise ValueError(f"qk_rope_head_dim={rope} must be even and in 2..{width}, the width of all keys")
    full = 1 + min(gqa.dim, 2 * width - rope)
    rank = full if kv_lora_rank is None else kv_lora_rank
    if not 2 <= rank <= full:
        raise ValueError(f"kv_lora_rank={rank} must lie in 2..{full}; {full} is exact")
    return rank, rope


def check_supported(gqa: GroupedQueryAttention) -> RotaryEmbedding:
    """Raise ValueError for what MLA cannot represent -> the rotary embedding"""
    if not isinstance(gqa, GroupedQueryAttention):
        raise ValueError(f"gqa={type(gqa).__name__} must be a GroupedQueryAttention")
    if gqa.q.bias is not None:
        raise ValueError("qkv_bias=True cannot be converted: MLA's query has no bias")
    if not isinstance(gqa.q_norm, nn.Identity):
        raise ValueError("a qk norm cannot be converted: MLA has no norm over a head's whole key")
    if not isinstance(gqa.rope, RotaryEmbedding):
        raise ValueError(f"rope={type(gqa.rope).__name__} must be a RotaryEmbedding, whose pairs are known")
    return gqa.rope
