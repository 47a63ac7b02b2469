"""Pages: one pool of memory for many texts that come, grow, share what they have in common, and go.

A text's cache entries lie in pages of 64 tokens anywhere in the pool, as virtual memory's do (PagedAttention,
arXiv 2309.06180). Here a page is also the unit of arithmetic: a query meets 64 keys in one small product,
the same product whatever else is in the batch, so that neighbours cannot change a text's last bit.
"""

import hashlib
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .rope import RotaryEmbedding

PAGE = 64  # tokens a page
ROWS = 8  # a product's rows are filled up to a multiple of this: a CPU rounds a row by how many share one


class Row:
    """A text's place: the pages it lies in, in order, and how many tokens of it they hold."""

    def __init__(self, pages: list[int], length: int):
        self.pages = pages
        self.length = length


class Pages:
    """The block table: which page is whose. The memory is in `pools`, one for each layer, all paged alike.

    A page may be held by several rows and is then never written: who must write copies it first. A full page
    can be known by its tokens and all before them; it stays, held by nobody, until its memory is needed.

    Raises:
        ValueError: num_pages is below 1.
    """

    def __init__(self, num_pages: int):
        if num_pages < 1:
            raise ValueError(f"num_pages={num_pages} must be at least 1")
        self.holders = [0] * num_pages
        self.free = list(range(num_pages))[::-1]  # taken from the end: low pages first, neighbours together
        self.known: dict[bytes, int] = {}  # digest of a text up to a page's end -> the page
        self.names: dict[int, bytes] = {}  # the same the other way
        self.idle: dict[int, None] = {}  # known pages that nobody holds, the longest idle first
        self.pools: list[Tensor] = []

    @property
    def available(self) -> int:
        """Pages that a row could be given."""
        return len(self.free) + len(self.idle)

    def new_pool(self, heads: int, width: int, dtype: torch.dtype | None = None, device=None) -> Tensor:
        """Memory for a layer, (pages, heads, 64, width): a page is set to zero when it is given to a row."""
        if heads < 1 or width < 1:
            raise ValueError(f"heads={heads} and width={width} must be at least 1")
        self.pools.append(torch.empty(len(self.holders), heads, PAGE, width, dtype=dtype, device=device))
        return self.pools[-1]

    def open(self, tokens: Sequence[int] = ()) -> Row:
        """A new row. Known pages of its text are in it already; at least its last token is not."""
        row = Row([], 0)
        for name in digests(tokens[: max(0, len(tokens) - 1)]):
            if name not in self.known:
                break
            self.hold(self.known[name])
            row.pages.append(self.known[name])
            row.length += PAGE
        return row

    def fork(self, row: Row, length: int) -> Row:
        """A new row with the first length tokens of another, in the same pages."""
        if not 0 <= length <= row.length:
            raise ValueError(f"length={length} must lie in 0..{row.length}, what the row holds")
        pages = row.pages[: pages_for(length)]
        for page in pages:
            self.hold(page)
        return Row(pages, length)

    def truncate(self, row: Row, length: int) -> None:
        """Forget all but the first length tokens; pages that hold none of them are given back."""
        if not 0 <= length <= row.length:
            raise ValueError(f"length={length} must lie in 0..{row.length}, what the row holds")
        kept = pages_for(length)
        for page in row.pages[kept:]:
            self.release(page)
        del row.pages[kept:]
        row.length = length

    def remember(self, row: Row, tokens: Sequence[int]) -> None:
        """Make the row's full pages known by its tokens, for rows to come."""
        for page, name in zip(row.pages, digests(tokens[: row.length])):
            if name not in self.known and page not in self.names:
                self.known[name], self.names[page] = page, name

    def forget(self) -> None:
        """Know no page by its tokens any more."""
        self.free += self.idle
        self.known, self.names, self.idle = {}, {}, {}

    def grow(self, rows: Sequence[Row], time: int) -> None:
        """Make room for `time` more tokens in each row; its page is copied first if it is not its own.

        Raises:
            ValueError: there are not enough pages; nothing has changed.
        """
        needed = 0
        for row in rows:
            needed += pages_for(row.length + time) - len(row.pages) + self.is_shared(row)
        if needed > self.available:
            raise ValueError(f"cache full: {needed} pages asked for, {self.available} are left")
        for row in rows:
            if self.is_shared(row):
                theirs, ours = row.pages.pop(), self.take()
                for pool in self.pools:
                    pool[ours] = pool[theirs]
                self.release(theirs)
                row.pages.append(ours)
            while len(row.pages) * PAGE < row.length + time:
                row.pages.append(self.take())

    def is_shared(self, row: Row) -> bool:
        """Whether the page that the row's next token goes to is one that it must not write."""
        at = row.length // PAGE
        if at >= len(row.pages):
            return False
        return self.holders[row.pages[at]] > 1 or row.pages[at] in self.names

    def take(self) -> int:
        """A page of zeros, held once. What a page held before could be NaN, and 0 x NaN is NaN."""
        if self.free:
            page = self.free.pop()
        else:
            page = next(iter(self.idle))
            del self.idle[page], self.known[self.names.pop(page)]
        self.holders[page] = 1
        for pool in self.pools:
            pool[page].zero_()
        return page

    def hold(self, page: int) -> None:
        """One row more holds the page."""
        self.idle.pop(page, None)
        self.holders[page] += 1

    def release(self, page: int) -> None:
        """One row less does."""
        self.holders[page] -= 1
        if self.holders[page] == 0:
            if page in self.names:
                self.idle[page] = None
            else:
                self.free.append(page)


def pages_for(tokens: int) -> int:
    """How many pages so many tokens lie in."""
    return -(-tokens // PAGE)


def digests(tokens: Sequence[int]) -> list[bytes]:
    """A name for each full page of a text that tells it from every other, with all that comes before."""
    names, last = [], b""
    for start in range(0, len(tokens) - PAGE + 1, PAGE):
        page = b"".join(int(token).to_bytes(8, "little") for token in tokens[start : start + PAGE])
        last = hashlib.blake2b(last + page, digest_size=16).digest()
        names.append(last)
    return names


class Group(NamedTuple):
    """Rows next to each other in a step that lie in equally many pages."""

    rows: slice
    pages: Tensor  # (rows, pages)
    first: int  # from this page on, not every query sees every key
    hidden: Tensor  # (rows, pages - first, 1, 1, time, 64) bool, alike for all heads


class Plan:
    """Where the tokens of a step go and what they see: made once, used by every layer.

    The step is `time` tokens more of each row, behind what it holds, with room for them (`Pages.grow`). It is
    quickest when rows of equally many pages are neighbours.

    Args:
        tables: the pages of each row.
        lengths: how many tokens each holds.

    Attributes:
        tokens: rows x time; a row's tokens are neighbours.
        filled: tokens, rounded up to a multiple of 8: what a layer's input has.
        positions: (filled,) int64; of the filling 0.
        page, place: (tokens,) int64, the page that each goes to, and where in it.
    """

    def __init__(self, tables: Sequence[Sequence[int]], lengths: Sequence[int], time: int, device: Any):
        self.rows, self.time = len(lengths), time
        self.tokens = self.rows * time
        self.filled = -(-self.tokens // ROWS) * ROWS
        places = [at for length in lengths for at in range(length, length + time)]
        pages = [table[at // PAGE] for table, n in zip(tables, lengths) for at in range(n, n + time)]
        self.positions = torch.tensor(places + [0] * (self.filled - self.tokens), device=device)
        self.page = torch.tensor(pages, device=device)
        self.place = self.positions[: self.tokens] % PAGE
        self.groups: list[Group] = []
        self.turns: dict[Any, tuple[Tensor, Tensor]] = {}
        self.found: dict[tuple[int, int], Tensor] = {}
        start = 0
        for count, same in groupby(pages_for(length + time) for length in lengths):
            rows = slice(start, start + len(list(same)))
            start = rows.stop
            first = min(lengths[rows]) // PAGE
            table = torch.tensor([table[:count] for table in tables[rows]], device=device)
            keys = torch.arange(first * PAGE, count * PAGE, device=device)
            mine = self.positions[: self.tokens].view(self.rows, time, 1)[rows]
            hidden = (keys > mine).unflatten(-1, (-1, PAGE)).transpose(1, 2)  # (rows, pages, time, 64)
            self.groups.append(Group(rows, table, first, hidden.unsqueeze(2).unsqueeze(2)))

    def turn(self, rope: Any, x: Tensor) -> Tensor:
        """x (filled, heads, dim), turned; layers with the same embedding share the angles."""
        if not isinstance(rope, RotaryEmbedding):
            return rope(x.unsqueeze(0), self.positions).squeeze(0)
        key = (rope.dim, rope.theta, rope.scaling)
        if key not in self.turns:
            cos, sin = rope.cos_sin(self.positions)
            self.turns[key] = cos.unsqueeze(1), sin.unsqueeze(1)  # (filled, 1, dim/2)
        return rope.turn(x, *self.turns[key])

    def indices(self, group: Group, heads: int) -> Tensor:
        """The group's pages in a pool seen as (pages x heads, 64, width) -> (rows x pages x heads,) int64"""
        key = (group.rows.start, heads)
        if key not in self.found:
            of_head = torch.arange(heads, device=group.pages.device)
            self.found[key] = (group.pages.unsqueeze(-1) * heads + of_head).flatten()
        return self.found[key]


def write(pool: Tensor, entries: Tensor, plan: Plan) -> None:
    """Put a step's entries (filled, heads, width) into their places in the pool (pages, heads, 64, width)."""
    pool[plan.page, :, plan.place] = entries[: plan.tokens]


def attend(query: Tensor, pool: Tensor, plan: Plan, key: slice, value: slice, scale: float) -> Tensor:
    """softmax(scale x query key^T) value over each row's pages, softmax in fp32.

    query (filled, heads, width); pool (pages, kv_heads, 64, entry); `key` and `value` say which of an entry's
    numbers are which -> (filled, heads, value)
    """
    kv_heads, heads, width = pool.shape[1], query.shape[1], query.shape[2]
    query = query[: plan.tokens].view(plan.rows, plan.time, kv_heads, heads // kv_heads, width)
    query = query.permute(0, 2, 3, 1, 4).flatten(2, 3)  # (rows, kv_heads, queries, width): heads x time
    context = query.new_zeros(plan.filled, heads, pool[0, 0, 0, value].shape[0])  # the filling's stays 0
    found = context[: plan.tokens].view(plan.rows, plan.time, kv_heads, heads // kv_heads, -1)
    for group in plan.groups:
        mine = attend_group(query[group.rows], pool, plan, group, key, value, scale)
        found[group.rows] = mine.unflatten(2, (-1, plan.time)).permute(0, 3, 1, 2, 4)
    return context


def attend_group(
    query: Tensor, pool: Tensor, plan: Plan, group: Group, key: slice, value: slice, scale: float
) -> Tensor:
    """`attend` for rows of equally many pages: a product of fixed shape for each page, then their sum.

    query (rows, kv_heads, queries, width) -> (rows, kv_heads, queries, value)
    """
    rows, kv_heads, queries, _ = query.shape
    count = group.pages.shape[1]
    if queries % ROWS:
        query = F.pad(query, (0, 0, 0, -queries % ROWS))
    query = query.unsqueeze(1).expand(-1, count, -1, -1, -1).flatten(0, 2)
    entries = pool.flatten(0, 1).index_select(0, plan.indices(group, kv_heads))  # (pages of all, 64, entry)
    scores = torch.bmm(query, entries[..., key].transpose(1, 2))  # (pages of all, queries, 64)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    scores = scores.view(rows, count, kv_heads, -1, PAGE)
    newest = scores[:, group.first :, :, :queries].unflatten(3, (-1, plan.time))
    newest.masked_fill_(group.hidden, float("-inf"))
    weights = scores.permute(0, 2, 3, 1, 4).flatten(3).softmax(-1)  # (rows, kv_heads, queries, pages x 64)
    weights = weights.to(entries.dtype).unflatten(3, (count, PAGE)).permute(0, 3, 1, 2, 4)
    context = torch.bmm(weights.flatten(0, 2), entries[..., value])  # (pages of all, queries, value)
    return context.view(rows, count, kv_heads, -1, context.shape[-1]).sum(1)[:, :, :queries]
