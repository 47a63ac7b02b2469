"""The paged cache: one pool of memory for many sequences that start, grow, share prefixes and end.

The cache entries of a sequence lie in pages of 64 tokens anywhere in the pool, as in virtual memory
(PagedAttention, arXiv 2309.06180). mla/paged.py computes attention over them.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mla.paged import PAGE, pages_for

from .. import machine

ENTRY = 128  # bytes of a page in the block table, whose numbers are Python objects


class Row:
    """A sequence's pages, in order, and the number of tokens in them."""

    def __init__(self, pages: list[int], length: int):
        self.pages = pages
        self.length = length


class Pages:
    """The block table: which rows hold which page. The memory is in `pools`, one per layer, with one table.

    A page held by several rows is never written: a row that has to write copies it first. A full page can be
    known by its tokens and all before them; it stays after its last row until its memory is needed.

    Raises:
        ValueError: num_pages is below 1.
    """

    def __init__(self, num_pages: int):
        if num_pages < 1:
            raise ValueError(f"num_pages={num_pages} must be at least 1")
        self.holders = [0] * num_pages
        self.free = list(range(num_pages))[::-1]  # taken from the end: low pages first, contiguous
        self.known: dict[bytes, int] = {}  # digest of a sequence up to a page's end -> the page
        self.names: dict[int, bytes] = {}  # the inverse
        self.idle: dict[int, None] = {}  # known pages held by no row, longest idle first
        self.pools: list[Tensor] = []

    @property
    def available(self) -> int:
        """Pages that a row can take."""
        return len(self.free) + len(self.idle)

    def new_pool(self, heads: int, width: int, dtype: torch.dtype | None = None, device=None) -> Tensor:
        """Memory for a layer, (pages, heads, 64, width); a page is zeroed when a row takes it."""
        if heads < 1 or width < 1:
            raise ValueError(f"heads={heads} and width={width} must be at least 1")
        self.pools.append(torch.empty(len(self.holders), heads, PAGE, width, dtype=dtype, device=device))
        return self.pools[-1]

    def open(self, tokens: Sequence[int] = ()) -> Row:
        """A new row that starts with the known pages of these tokens, without the last token."""
        row = Row([], 0)
        for name in digests(tokens[: max(0, len(tokens) - 1)]):
            if name not in self.known:
                break
            self.hold(self.known[name])
            row.pages.append(self.known[name])
            row.length += PAGE
        return row

    def fork(self, row: Row, length: int) -> Row:
        """A new row that shares the pages of another's first `length` tokens."""
        if not 0 <= length <= row.length:
            raise ValueError(f"length={length} must lie in 0..{row.length}, what the row holds")
        pages = row.pages[: pages_for(length)]
        for page in pages:
            self.hold(page)
        return Row(pages, length)

    def truncate(self, row: Row, length: int) -> None:
        """Drop all but the first `length` tokens and release the pages after them."""
        if not 0 <= length <= row.length:
            raise ValueError(f"length={length} must lie in 0..{row.length}, what the row holds")
        kept = pages_for(length)
        for page in row.pages[kept:]:
            self.release(page)
        del row.pages[kept:]
        row.length = length

    def remember(self, row: Row, tokens: Sequence[int]) -> None:
        """Make the row's full pages known by their tokens, for later rows."""
        for page, name in zip(row.pages, digests(tokens[: row.length])):
            if name not in self.known and page not in self.names:
                self.known[name], self.names[page] = page, name

    def forget(self) -> None:
        """Make all pages unknown."""
        self.free += self.idle
        self.known, self.names, self.idle = {}, {}, {}

    def grow(self, rows: Sequence[Row], time: int) -> None:
        """Add pages for `time` more tokens to each row; copy its last page first if it is shared.

        Raises:
            ValueError: not enough pages; nothing is changed.
        """
        needed = 0
        for row in rows:
            needed += pages_for(row.length + time) - len(row.pages) + self.is_shared(row)
        if needed > self.available:
            raise ValueError(f"cache full: {needed} pages needed, {self.available} available")
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
        """Whether the page of the row's next token must not be written: it is shared or known."""
        at = row.length // PAGE
        if at >= len(row.pages):
            return False
        return self.holders[row.pages[at]] > 1 or row.pages[at] in self.names

    def take(self) -> int:
        """Take a page and zero it: old entries could be NaN, and 0 x NaN is NaN."""
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
        """Count one more holder of the page."""
        self.idle.pop(page, None)
        self.holders[page] += 1

    def release(self, page: int) -> None:
        """Count one fewer holder; free or idle the page at 0."""
        self.holders[page] -= 1
        if self.holders[page] == 0:
            if page in self.names:
                self.idle[page] = None
            else:
                self.free.append(page)


def digests(tokens: Sequence[int]) -> list[bytes]:
    """A digest for each full page of the tokens: of the page and all tokens before it."""
    names, last = [], b""
    for start in range(0, len(tokens) - PAGE + 1, PAGE):
        page = b"".join(int(token).to_bytes(8, "little") for token in tokens[start : start + PAGE])
        last = hashlib.blake2b(last + page, digest_size=16).digest()
        names.append(last)
    return names


def capacity(max_tokens: int | None, default: int, size: int, device: torch.device) -> int:
    """max_tokens if a cache of pages of `size` bytes fits into memory; for None, the default or what fits.

    Raises:
        ValueError: max_tokens does not fit.
    """
    memory = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else machine.memory()
    if max_tokens is None:
        return min(default, max(1, memory // (size + ENTRY)) * PAGE) if memory else default
    needed = pages_for(max_tokens) * (size + ENTRY)
    if memory and needed > memory:
        raise ValueError(
            f"a cache of {max_tokens:,} tokens needs {needed // 2**20:,} MiB; "
            f"{device} has {memory // 2**20:,} MiB"
        )
    return max_tokens


def tensors_of(caches: Sequence[Any]) -> list[Tensor]:
    """The tensors that caches hold as attributes."""
    values = [value for cache in caches for value in getattr(cache, "__dict__", {}).values()]
    return [value for value in values if isinstance(value, Tensor)]
