"""Pages: one pool of memory for many texts that come, grow, share a common beginning, and go.

A text's cache entries lie in pages of 64 tokens anywhere in the pool, as virtual memory's do (PagedAttention,
arXiv 2309.06180). mla/paged.py computes attention over them.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from mla.paged import PAGE, pages_for


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


def digests(tokens: Sequence[int]) -> list[bytes]:
    """A name for each full page of a text that tells it from every other, with all that comes before."""
    names, last = [], b""
    for start in range(0, len(tokens) - PAGE + 1, PAGE):
        page = b"".join(int(token).to_bytes(8, "little") for token in tokens[start : start + PAGE])
        last = hashlib.blake2b(last + page, digest_size=16).digest()
        names.append(last)
    return names
