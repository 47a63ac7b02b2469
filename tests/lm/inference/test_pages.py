"""Pages against lists: no entry is lost, and no other row is changed."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lm.inference.pages import Pages, digests
from mla.paged import PAGE, Plan, write


def filled(pages, length, width=3):
    """A row of `length` tokens, and the pool that holds their entries: 1, 2, 3 ..."""
    pool, row = pages.new_pool(1, width), pages.open()
    pages.grow([row], length)
    plan = Plan([row.pages], [0], length, "cpu")
    entries = torch.arange(1.0, plan.filled + 1).view(-1, 1, 1).expand(-1, 1, width)
    write(pool, entries, plan)
    row.length = length
    return row, pool


def held(pool, row):
    return pool[row.pages].flatten(0, 2)[: row.length]


def test_growing_a_fork_never_changes_its_donor():
    pages = Pages(10)
    donor, pool = filled(pages, 100)
    before = held(pool, donor).clone()
    fork = pages.fork(donor, 90)
    assert fork.pages == donor.pages and pages.available == 8
    pages.grow([fork], 1)
    assert fork.pages[0] == donor.pages[0] and fork.pages[1] != donor.pages[1] and pages.available == 7
    assert torch.equal(pool[fork.pages[1]], pool[donor.pages[1]])
    pool[fork.pages[1]].fill_(7)
    assert torch.equal(held(pool, donor), before)
    pages.truncate(fork, 0)
    assert pages.available == 8 and torch.equal(held(pool, donor), before)
    pages.grow([donor], 1)  # alone again: no copy
    assert pages.available == 8


def test_the_donor_copies_a_shared_page_too():
    pages = Pages(4)
    pool = pages.new_pool(1, 3)
    donor = pages.open()
    pages.grow([donor], 10)
    donor.length = 10
    write(pool, torch.ones(16, 1, 3), Plan([donor.pages], [0], 10, "cpu"))
    fork = pages.fork(donor, 10)
    pages.grow([donor], 1)
    assert donor.pages != fork.pages and torch.equal(pool[donor.pages[0]], pool[fork.pages[0]])


def test_a_page_is_known_by_its_tokens_and_all_before_them():
    text = list(range(200))
    assert len(digests(text)) == 3 and len(set(digests([7] * 640))) == 10
    assert digests(text)[:2] == digests(text[:128] + [0] * 64)[:2]
    assert digests(text)[2] != digests(text[:128] + [0] * 64)[2]
    assert digests([1, *text[1:]])[1] != digests(text)[1]  # same second page, different first page
    assert digests([2**40 + 1, *text[1:]]) != digests([1, *text[1:]])


def test_common_prefixes_are_shared_and_kept_until_their_memory_is_needed():
    pages = Pages(5)
    first = pages.open()
    pages.grow([first], 130)
    first.length = 130
    text = list(range(130))
    pages.remember(first, text)
    second = pages.open([*text[:128], 9, 9])
    assert second.pages == first.pages[:2] and second.length == 128
    third = pages.open(text[:128])
    assert third.length == 64  # the last token is always read, for its logits
    pages.truncate(third, 0)
    pages.truncate(first, 0)
    pages.truncate(second, 0)
    again = pages.open(text)
    assert again.length == 128
    pages.truncate(again, 0)
    other = pages.open()
    pages.grow([other], 5 * 64)  # takes all memory, including idle pages
    assert pages.open(text).length == 0


@pytest.mark.parametrize("length", [64, 70, 127, 128])
def test_a_known_page_is_never_written_not_even_by_its_own_row(length):
    pages = Pages(5)
    row = pages.open()
    pages.grow([row], 130)
    row.length = 130
    pages.remember(row, [3] * 130)
    known = list(row.pages)
    pages.truncate(row, length)
    pages.grow([row], 1)
    at = length // PAGE
    assert row.pages[at] != known[at] or (at == 2 and row.pages[:at] == known[:at])
    assert pages.open([3] * 130).length == 128


def test_forget_keeps_pages_held_by_rows():
    pages = Pages(3)
    row = pages.open()
    pages.grow([row], 64)
    row.length = 64
    pages.remember(row, [1] * 64)
    pages.forget()
    assert pages.open([1] * 65).length == 0 and pages.available == 2
    pages.truncate(row, 0)
    assert pages.available == 3


def test_too_few_pages_change_nothing():
    pages = Pages(3)
    a, b = pages.open(), pages.open()
    pages.grow([a], 64)
    a.length = 64
    with pytest.raises(ValueError, match="cache full: 4 pages needed, 2 available"):
        pages.grow([a, b], 100)
    assert (a.pages, b.pages, pages.available) == ([0], [], 2)
    with pytest.raises(ValueError, match="num_pages=0 must be at least 1"):
        Pages(0)
    for call in (pages.fork, pages.truncate):
        with pytest.raises(ValueError, match=r"length=65 must lie in 0..64"):
            call(a, 65)


class PagesMachine(RuleBasedStateMachine):
    """Rows as lists of tokens; an entry depends on all tokens up to its own, so a wrong page always shows."""

    @initialize(num_pages=st.integers(4, 12))
    def start(self, num_pages):
        self.pages = Pages(num_pages)
        self.pool = self.pages.new_pool(1, 1)
        self.rows = []

    def entries(self, tokens):
        sums, total = [], 0
        for token in tokens:
            total = (total * 31 + token) % 1_000_003
            sums.append(float(total))
        return sums

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=3), length=st.integers(1, 200))
    def open(self, tokens, length):
        text = (tokens * length)[:length]
        row = self.pages.open(text)
        self.rows.append((row, text[: row.length]))

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), token=st.integers(0, 1), time=st.integers(1, 90))
    def grow(self, data, token, time):
        at = data.draw(st.integers(0, len(self.rows) - 1))
        row, text = self.rows[at]
        before = list(row.pages), self.pages.available
        try:
            self.pages.grow([row], time)
        except ValueError:
            assert before == (row.pages, self.pages.available)
            return
        plan = Plan([row.pages], [row.length], time, "cpu")
        text = text + [token] * time
        new = torch.tensor(self.entries(text)[row.length :] + [0.0] * (plan.filled - time))
        write(self.pool, new.view(-1, 1, 1), plan)
        row.length += time
        self.rows[at] = row, text

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), how=st.sampled_from(["fork", "truncate", "close", "remember"]))
    def change(self, data, how):
        at = data.draw(st.integers(0, len(self.rows) - 1))
        row, text = self.rows[at]
        if how == "remember":
            self.pages.remember(row, text)
            return
        length = 0 if how == "close" else data.draw(st.integers(0, len(text)))
        if how == "fork":
            self.rows.append((self.pages.fork(row, length), text[:length]))
            return
        self.pages.truncate(row, length)
        self.rows[at] = row, text[:length]
        if how == "close":
            del self.rows[at]

    @invariant()
    def every_row_holds_its_own_tokens(self):
        for row, text in getattr(self, "rows", []):
            assert row.length == len(text) and len(row.pages) == -(-len(text) // PAGE)
            held = self.pool[row.pages].flatten()[: len(text)].tolist()
            assert held == self.entries(text)

    @invariant()
    def every_page_is_either_held_or_available(self):
        if hasattr(self, "pages"):
            held = {page for row, _ in self.rows for page in row.pages}
            assert len(held) + self.pages.available == len(self.pages.holders)
            assert not held & {*self.pages.free, *self.pages.idle}
            assert sum(self.pages.holders) == sum(len(row.pages) for row, _ in self.rows)


PagesMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=30)
TestPagesEqualLists = PagesMachine.TestCase
