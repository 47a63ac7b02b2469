"""A decode step of attention over a paged cache, for many sequences at once.

The equations of attention.py and grouped_query.py again, on tensors of another layout: read those first. A
sequence's entries are in pages of 64 tokens anywhere in one pool (PagedAttention, arXiv 2309.06180). A page
is also the unit of computation: a query is multiplied with 64 keys at a time, in a matmul of the same shape
whatever else is in the batch, so that other sequences cannot change a sequence's last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import MultiheadLatentAttention
from .cache import cache_dtype
from .grouped_query import GroupedQueryAttention
from .rope import RotaryEmbedding

PAGE = 64  # tokens per page
ROWS = 8  # rows of a matmul are padded to a multiple of this: a CPU's rounding depends on their number


class Step(NamedTuple):
    """How an attention class computes a decode step over pages."""

    run: Callable[[Any, Tensor, Tensor, Plan], Tensor]  # attention, x (filled, dim), pool, plan -> y
    entry: Callable[[Any], tuple[int, int, Tensor]]  # attention -> heads, width, a weight of its dtype
    repeats: tuple[str, ...]  # methods that `run` replaces: a subclass that overrides one cannot use it


def latent_step(attention: MultiheadLatentAttention, x: Tensor, pool: Tensor, plan: Plan) -> Tensor:
    """`MultiheadLatentAttention.absorbed` over pages, to which x is written first; no gradient.

    x (filled, dim), pool (pages, 1, 64, latent + rope) -> y (filled, dim)
    """
    heads, rank = attention.num_heads, attention.kv_lora_rank
    q_nope, q_rope = attention.query(x)  # (filled, heads, nope), (filled, heads, rope)
    latent, k_rope = attention.compress(x)
    both = plan.turn(attention.rope, torch.cat((q_rope, k_rope.unsqueeze(1)), dim=1))  # as V3 eq. 3, 8
    q_rope, k_rope = both.split([heads, 1], dim=1)
    write(pool, torch.cat((latent.unsqueeze(1), k_rope), dim=-1), plan)
    w_key, w_value = attention.split_kv_b()  # (heads, nope, latent), (heads, value, latent)
    q_latent = torch.bmm(q_nope.transpose(0, 1), w_key).transpose(0, 1)  # W_UK joins W_UQ
    query = torch.cat((q_latent, q_rope), dim=-1)  # as V3 eq. 9; (filled, heads, latent + rope)
    context = attend(query, pool, plan, slice(None), slice(rank), attention.scale)  # as V3 eq. 10
    context = torch.bmm(context.transpose(0, 1), w_value.transpose(1, 2)).transpose(0, 1)  # W_UV joins W_O
    return attention.out(context.flatten(1))  # as V3 eq. 11


def grouped_step(attention: GroupedQueryAttention, x: Tensor, pool: Tensor, plan: Plan) -> Tensor:
    """`GroupedQueryAttention.forward` over pages, to which x is written first; no gradient.

    x (filled, dim), pool (pages, kv_heads, 64, 2 head_dim) -> y (filled, dim)
    """
    heads, kv_heads, width = attention.num_heads, attention.num_kv_heads, attention.head_dim
    query = attention.q_norm(attention.q(x).unflatten(-1, (heads, -1)))
    key = attention.k_norm(attention.k(x).unflatten(-1, (kv_heads, -1)))
    value = attention.v(x).unflatten(-1, (kv_heads, -1))
    both = plan.turn(attention.rope, torch.cat((query, key), dim=1))
    query, key = both.split([heads, kv_heads], dim=1)
    write(pool, torch.cat((key, value), dim=-1), plan)
    context = attend(query, pool, plan, slice(width), slice(width, None), width**-0.5)
    return attention.out(context.flatten(1))


STEPS: dict[type[nn.Module], Step] = {  # add your own class here; its subclasses inherit the step
    MultiheadLatentAttention: Step(
        latent_step,
        lambda mla: (1, mla.kv_lora_rank + mla.qk_rope_head_dim, mla.kv_a.weight),
        ("forward", "query", "compress", "rotate", "expanded", "absorbed", "split_kv_b", "new_cache"),
    ),
    GroupedQueryAttention: Step(
        grouped_step,
        lambda gqa: (gqa.num_kv_heads, 2 * gqa.head_dim, gqa.k.weight),
        ("forward", "new_cache"),
    ),
}


def step_of(kind: type[nn.Module]) -> Step | None:
    """The step of an attention class; None if it has none, or overrides a method that the step replaces."""
    bases = [base for base in kind.__mro__ if base in STEPS]
    return None if not bases or changed(kind) else STEPS[bases[0]]


def changed(kind: type[nn.Module]) -> list[str]:
    """The methods that a class overrides among those that its base's step replaces."""
    for at, base in enumerate(kind.__mro__):
        if base in STEPS:
            own = {name for cls in kind.__mro__[:at] for name in vars(cls)}
            return [name for name in STEPS[base].repeats if name in own]
    return []


def entry_of(attention: nn.Module, step: Step) -> tuple[int, int, torch.dtype, torch.device]:
    """What a page holds for each of its 64 tokens -> heads, width, dtype, device"""
    heads, width, weight = step.entry(attention)
    return heads, width, cache_dtype(weight), weight.device


def pages_for(tokens: int) -> int:
    """The number of pages that hold this many tokens."""
    return -(-tokens // PAGE)


class Plan:
    """Where a decode step's tokens are written and what they attend to: built once, used by every layer.

    The step appends `time` tokens to each row, whose pages must have space for them.

    Args:
        tables: the pages of each row.
        lengths: the number of tokens in each row before the step.
        compiled: for a compiled step, which needs no padding, but more pages than rows: torch.compile would
            specialize on sizes that are equal, or 1.

    Attributes:
        positions: (filled,) int64, of the tokens, row by row. Padded with zeros to a multiple of 8, as a
            layer's input is padded with arbitrary rows.
        page: (tokens,) int64, the page that each token is written to.
        seen: (seen,) int64, the pages that are read, row by row; rows may share pages.
        reader: (seen,) int64, the row that reads each page.
        keys: (seen,) int64, the position of each page's first key.
        order: (seen,) int64, 0, 1, 2 ...
        starts: (rows,) int64, where each row's pages begin in `seen`.
    """

    def __init__(
        self,
        tables: Sequence[Sequence[int]],
        lengths: Sequence[int],
        time: int,
        device: Any,
        compiled: bool = False,
    ):
        self.time = time
        positions = [at for length in lengths for at in range(length, length + time)]
        pages = [table[at // PAGE] for table, n in zip(tables, lengths) for at in range(n, n + time)]
        counts = [pages_for(length + time) for length in lengths]
        seen = [page for table, count in zip(tables, counts) for page in table[:count]]
        reader = [row for row, count in enumerate(counts) for _ in range(count)]
        keys = [first for count in counts for first in range(0, count * PAGE, PAGE)]
        starts = [0, *accumulate(counts[:-1])]
        filling = [0] * (-len(positions) % ROWS)
        if compiled:
            filling = []
            if len(seen) == len(lengths):  # repeat the last row's only page: softmax stays the same
                seen, reader, keys = ([*part, part[-1]] for part in (seen, reader, keys))
        order = range(len(seen))
        parts = (positions + filling, pages, seen, reader, keys, order, starts)
        self.positions, self.page, self.seen, self.reader, self.keys, self.order, self.starts = (
            torch.tensor(part, device=device) for part in parts
        )
        self.turns: dict[Any, tuple[Tensor, Tensor]] = {}
        self.found: dict[Any, Tensor] = {}

    @property
    def tokens(self) -> int:
        """Number of tokens in the step, over all rows."""
        return self.rows * self.time

    @property
    def filled(self) -> int:
        """`tokens`, rounded up to a multiple of 8: the rows of a layer's input."""
        return len(self.positions)

    @property
    def rows(self) -> int:
        """Number of sequences in the step."""
        return len(self.starts)

    def turn(self, rope: Any, x: Tensor) -> Tensor:
        """x (filled, heads, dim) -> rotated x; layers with the same embedding share the angles."""
        if not isinstance(rope, RotaryEmbedding):
            return rope(x.unsqueeze(0), self.positions).squeeze(0)
        key = (rope.dim, rope.theta, rope.scaling)
        if key not in self.turns:
            cos, sin = rope.cos_sin(self.positions)
            self.turns[key] = cos.unsqueeze(1), sin.unsqueeze(1)  # (filled, 1, dim/2)
        return rope.turn(x, *self.turns[key])

    def indices(self, heads: int) -> Tensor:
        """The pages that are read, in a pool viewed as (pages x heads, 64, width) -> (seen x heads,) int64"""
        if heads not in self.found:
            of_head = torch.arange(heads, device=self.seen.device)
            self.found[heads] = (self.seen.unsqueeze(-1) * heads + of_head).flatten()
        return self.found[heads]

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Added to the scores: minus infinity where a key is later than the query -> (seen, time, 64)"""
        if dtype not in self.found:
            device = self.keys.device
            keys = self.keys.view(-1, 1, 1) + torch.arange(PAGE, device=device)
            queries = self.positions[: self.tokens].view(self.rows, self.time, 1).index_select(0, self.reader)
            zero, never = (torch.tensor(x, dtype=dtype, device=device) for x in (0.0, -torch.inf))
            self.found[dtype] = torch.where(keys > queries, never, zero)
        return self.found[dtype]

    def of_rows(self, parts: Tensor, mode: str) -> Tensor:
        """The sum or max of each row's parts (seen x heads, ...), in order -> (rows, heads x ...)"""
        return F.embedding_bag(self.order, parts.reshape(len(self.order), -1), self.starts, mode=mode)


def write(pool: Tensor, entries: Tensor, plan: Plan) -> None:
    """Write a step's entries (filled, heads, width) into the pool (pages, heads, 64, width)."""
    pool[plan.page, :, plan.positions[: plan.tokens] % PAGE] = entries[: plan.tokens]


def attend(query: Tensor, pool: Tensor, plan: Plan, key: slice, value: slice, scale: float) -> Tensor:
    """softmax(scale x query key^T) value over each row's pages, softmax in fp32.

    One matmul of fixed shape for each page; each row's softmax is combined from its pages.

    query (filled, heads, width); pool (pages, kv_heads, 64, entry), where `key` and `value` slice an entry
    -> (filled, heads, value)
    """
    kv_heads, heads, width = pool.shape[1], query.shape[1], query.shape[2]
    rows, time = plan.rows, plan.time
    query = query[: plan.tokens].view(rows, time, kv_heads, heads // kv_heads, width)
    query = query.permute(0, 2, 3, 1, 4).flatten(2, 3)  # (rows, kv_heads, queries, width): heads x time
    filling = (0, 0, 0, -query.shape[2] % ROWS)
    query = F.pad(query * scale, filling)
    query = query.index_select(0, plan.reader).flatten(0, 1)  # (parts, queries, width)
    entries = pool.flatten(0, 1).index_select(0, plan.indices(kv_heads))  # (parts, 64, entry)
    mask = plan.mask(entries.dtype).view(-1, 1, 1, time, PAGE)
    mask = mask.expand(-1, kv_heads, heads // kv_heads, -1, -1).reshape(len(entries), -1, PAGE)
    if filling[3]:
        mask = F.pad(mask, filling)
    # not baddbmm: on some CPUs its rounding depends on the number of rows
    scores = torch.bmm(query, entries[..., key].mT).add_(mask)  # (parts, queries, 64)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    highest = plan.of_rows(scores.amax(-1), "max").index_select(0, plan.reader)
    weights = scores.sub_(highest.view(*scores.shape[:2], 1)).exp_()
    context = torch.bmm(weights.to(entries.dtype), entries[..., value])  # (parts, queries, value)
    total = plan.of_rows(weights.sum(-1), "sum").view(rows, kv_heads, -1, 1)
    context = plan.of_rows(context, "sum").view(rows, kv_heads, -1, context.shape[-1]) / total
    context = context[:, :, : time * heads // kv_heads].to(query.dtype)
    context = context.unflatten(2, (-1, time)).permute(0, 3, 1, 2, 4).reshape(plan.tokens, heads, -1)
    return F.pad(context, (0, 0, 0, 0, 0, plan.filled - plan.tokens))
