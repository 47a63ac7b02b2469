"""Pages: one pool of memory for many texts that come, grow, share what they have in common, and go.

A text's cache entries lie in pages of 64 tokens anywhere in the pool, as virtual memory's do (PagedAttention,
arXiv 2309.06180). Here a page is also the unit of arithmetic: a query meets 64 keys in one small product,
the same product whatever else is in the batch, so that neighbours cannot change a text's last bit.
"""

import hashlib
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

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


class Plan:
    """Where the tokens of a step go and what they see: made once, used by every layer.

    The step is `time` tokens more of each row, behind what it holds, with room for them (`Pages.grow`).

    Args:
        tables: the pages of each row.
        lengths: how many tokens each holds.
        compiled: for a compiled step, which needs no filling, and at least one page more than rows:
            torch.compile would take sizes that are equal, or 1, for always so.

    Attributes:
        positions: (filled,) int64, of the tokens, those of a row next to each other. Filled up to a multiple
            of 8 by zeros, as a layer's input is by rows that mean nothing.
        page: (tokens,) int64, the page that each token goes to.
        seen: (seen,) int64, the pages that are read, a row's one after the other; some by several rows.
        reader: (seen,) int64, the row that reads each.
        keys: (seen,) int64, the position of each one's first key.
        order: (seen,) int64, 0, 1, 2 ...
        starts: (rows,) int64, where a row's begin in `seen`.
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
            if len(seen) == len(lengths):  # the last text's only page once more: softmax stays the same
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
        """Tokens of the step, of all rows."""
        return self.rows * self.time

    @property
    def filled(self) -> int:
        """`tokens`, rounded up to a multiple of 8: the rows of a layer's input."""
        return len(self.positions)

    @property
    def rows(self) -> int:
        """Texts of the step."""
        return len(self.starts)

    def turn(self, rope: Any, x: Tensor) -> Tensor:
        """x (filled, heads, dim), turned; layers with the same embedding share the angles."""
        if not isinstance(rope, RotaryEmbedding):
            return rope(x.unsqueeze(0), self.positions).squeeze(0)
        key = (rope.dim, rope.theta, rope.scaling)
        if key not in self.turns:
            cos, sin = rope.cos_sin(self.positions)
            self.turns[key] = cos.unsqueeze(1), sin.unsqueeze(1)  # (filled, 1, dim/2)
        return rope.turn(x, *self.turns[key])

    def indices(self, heads: int) -> Tensor:
        """The pages that are read in a pool seen as (pages x heads, 64, width) -> (seen x heads,) int64"""
        if heads not in self.found:
            of_head = torch.arange(heads, device=self.seen.device)
            self.found[heads] = (self.seen.unsqueeze(-1) * heads + of_head).flatten()
        return self.found[heads]

    def mask(self, dtype: torch.dtype) -> Tensor:
        """What is added to scores, minus infinity where a key comes after the query -> (seen, time, 64)"""
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
    """Put a step's entries (filled, heads, width) into their places in the pool (pages, heads, 64, width)."""
    pool[plan.page, :, plan.positions[: plan.tokens] % PAGE] = entries[: plan.tokens]


def attend(query: Tensor, pool: Tensor, plan: Plan, key: slice, value: slice, scale: float) -> Tensor:
    """softmax(scale x query key^T) value over each row's pages, softmax in fp32.

    A product of fixed shape for each page; a row's softmax is put together from its pages.

    query (filled, heads, width); pool (pages, kv_heads, 64, entry); `key` and `value` say which of an entry's
    numbers are which -> (filled, heads, value)
    """
    kv_heads, heads, width = pool.shape[1], query.shape[1], query.shape[2]
    rows, time = plan.rows, plan.time
    query = query[: plan.tokens].view(rows, time, kv_heads, heads // kv_heads, width)
    query = query.permute(0, 2, 3, 1, 4).flatten(2, 3)  # (rows, kv_heads, queries, width): heads x time
    filling = (0, 0, 0, -query.shape[2] % ROWS)
    query = F.pad(query, filling).index_select(0, plan.reader).flatten(0, 1)  # (parts, queries, width)
    entries = pool.flatten(0, 1).index_select(0, plan.indices(kv_heads))  # (parts, 64, entry)
    mask = plan.mask(entries.dtype).view(-1, 1, 1, time, PAGE)
    mask = mask.expand(-1, kv_heads, heads // kv_heads, -1, -1).reshape(len(entries), -1, PAGE)
    if filling[3]:
        mask = F.pad(mask, filling)
    scores = torch.baddbmm(mask, query, entries[..., key].mT, alpha=scale)  # (parts, queries, 64)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    highest = plan.of_rows(scores.amax(-1), "max").index_select(0, plan.reader)
    weights = scores.sub_(highest.view(*scores.shape[:2], 1)).exp_()
    context = torch.bmm(weights.to(entries.dtype), entries[..., value])  # (parts, queries, value)
    total = plan.of_rows(weights.sum(-1), "sum").view(rows, kv_heads, -1, 1)
    context = plan.of_rows(context, "sum").view(rows, kv_heads, -1, context.shape[-1]) / total
    context = context[:, :, : time * heads // kv_heads].to(query.dtype)
    context = context.unflatten(2, (-1, time)).permute(0, 3, 1, 2, 4).reshape(plan.tokens, heads, -1)
    return F.pad(context, (0, 0, 0, 0, 0, plan.filled - plan.tokens))
