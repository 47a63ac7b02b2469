"""Pages against lists and plain attention: nothing lost, nothing of another's changed, all bits alike."""

import random

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mla import GroupedQueryAttention, MultiheadLatentAttention, PagedLatentCache, Pages, YaRN
from mla.pages import PAGE, Plan, digests, write
from mla.rope import RotaryEmbedding

SIZES = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 32}


def mla(heads=4, **options):
    return MultiheadLatentAttention(64, heads, **{**SIZES, **options})


ATTENTIONS = {
    "mla": mla,
    "mla, query compressed, biases": lambda: mla(q_lora_rank=24, qkv_bias=True, out_bias=True),
    "mla, one head": lambda: mla(1),
    "mla, halves turn, YaRN": lambda: mla(rope=RotaryEmbedding(8, 100.0, False, YaRN(4.0, 64, mscale=0.7))),
    "mha": lambda: GroupedQueryAttention(64, 4, 4, 16),
    "gqa, norms and biases": lambda: GroupedQueryAttention(64, 4, 2, 16, None, True, True, 1e-6),
    "mqa": lambda: GroupedQueryAttention(64, 8, 1, 16),
}


@pytest.fixture(params=ATTENTIONS.values(), ids=ATTENTIONS.keys())
def attention(request):
    made = request.param()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def steps(attention, texts, chunks, pages=None, order=None):
    """Each text (time, dim) read in its own chunks, one after another in turns -> what came out of each."""
    pages = Pages(200) if pages is None else pages
    pool = attention.new_pool(pages)
    rows, outs = [pages.open() for _ in texts], [[] for _ in texts]
    for turn in range(max(map(len, chunks))):
        todo = [i for i in range(len(texts)) if turn < len(chunks[i])]
        for time in sorted({chunks[i][turn] for i in todo}):
            mine = [i for i in todo if chunks[i][turn] == time]
            pages.grow([rows[i] for i in mine], time)
            plan = Plan([rows[i].pages for i in mine], [rows[i].length for i in mine], time, "cpu")
            x = torch.cat([texts[i][rows[i].length : rows[i].length + time] for i in mine])
            x = torch.cat([x, torch.randn(plan.filled - plan.tokens, x.shape[1], dtype=x.dtype)])
            y = attention.step(x, pool, plan)[: plan.tokens].unflatten(0, (len(mine), time))
            for i, out in zip(mine, y):
                outs[i].append(out)
                rows[i].length += time
    return [torch.cat(out) for out in outs]


@torch.no_grad()
def test_steps_of_many_texts_are_attention_to_each(attention):
    attention.double()
    texts = [torch.randn(length, 64, dtype=torch.float64) for length in (150, 1, 64, 65, 130)]
    chunks = [[100, 1, 1, 48], [1], [63, 1], [64, 1], [1, 1, 1, 127]]
    for text, found in zip(texts, steps(attention, texts, chunks)):
        torch.testing.assert_close(found, attention(text.unsqueeze(0))[0], rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_neighbours_and_chunks_change_no_bit(attention):
    draw = random.Random(0)
    texts = [torch.randn(draw.randint(1, 200), 64) for _ in range(12)]
    alone = [steps(attention, [text], [[1] * len(text)])[0] for text in texts]
    for _ in range(3):
        chunks = []
        for text in texts:
            cuts = sorted(draw.sample(range(1, len(text)), min(len(text) - 1, draw.randint(0, 6))))
            chunks.append([b - a for a, b in zip([0, *cuts], [*cuts, len(text)])])
        for one, many in zip(alone, steps(attention, texts, chunks)):
            assert torch.equal(one, many)


@torch.no_grad()
def test_a_text_that_is_not_finite_harms_no_other(attention):
    pages = Pages(6)
    text = torch.randn(70, 64)
    (clean,) = steps(attention, [text], [[70]])
    pool = attention.new_pool(pages)
    pool.fill_(float("nan"))  # as another's pages could be
    row = pages.open()
    pages.grow([row], 70)
    plan = Plan([row.pages], [0], 70, "cpu")
    filled = torch.cat([text, torch.full((2, 64), torch.nan)])
    assert torch.equal(attention.step(filled, pool, plan)[:70], clean)


@torch.no_grad()
def test_a_rope_of_ones_own_turns_the_steps_too():
    class Shift(torch.nn.Module):
        def forward(self, x, positions):
            return x + positions.double().view(1, -1, *[1] * (x.ndim - 2))

    attention, text = mla(rope=Shift()).double(), torch.randn(70, 64, dtype=torch.float64)
    (found,) = steps(attention, [text], [[3, 66, 1]])
    torch.testing.assert_close(found, attention(text.unsqueeze(0))[0])


@torch.no_grad()
@pytest.mark.parametrize("heads", [1, 4])
def test_the_paged_cache_has_the_same_call(heads):
    attention, x = mla(heads).double(), torch.randn(2, 140, 64, dtype=torch.float64)
    whole = attention(x)
    cache = PagedLatentCache(2, 140, 32, 8, torch.float64)
    parts = [attention(part, cache) for part in x.split([60, 1, 10, 69], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    assert cache.length.tolist() == [140, 140]
    with pytest.raises(ValueError, match="cache full: position 140 asked for, max_length=140 ends at 139"):
        attention(x[:, :1], cache)
    assert cache.length.tolist() == [140, 140]
    cache.truncate([139, 20])
    y = attention(torch.stack([x[0, 139:], x[1, 20:21]]), cache)
    torch.testing.assert_close(y, torch.stack([whole[0, 139:], whole[1, 20:21]]))


@torch.no_grad()
@pytest.mark.parametrize(
    "sizes, dtype, said",
    [
        ((31, 8), None, r"new entries have shape \(2, 3, 40\); the cache was made for \(2, time, 39\)"),
        ((32, 8), torch.float64, "new entries are torch.float32 on cpu; the cache is torch.float64 on cpu"),
    ],
)
def test_a_paged_cache_made_for_another_attention_is_refused_and_left_alone(sizes, dtype, said):
    cache = PagedLatentCache(2, 100, *sizes, dtype)
    with pytest.raises(ValueError, match=said):
        mla()(torch.randn(2, 3, 64), cache)
    assert cache.length.tolist() == [0, 0] and cache.nbytes == 0


@torch.no_grad()
def test_a_step_that_fails_is_not_counted(monkeypatch):
    attention, cache, x = mla(), PagedLatentCache(1, 100, 32, 8), torch.randn(1, 70, 64)
    first = attention(x[:, :60], cache)
    monkeypatch.setattr(attention.out, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attention(x[:, 60:], cache)
    monkeypatch.undo()
    assert cache.length.tolist() == [60]
    whole = torch.cat([first, attention(x[:, 60:], cache)], dim=1)
    torch.testing.assert_close(whole, attention(x))


@torch.no_grad()
def test_the_paged_cache_takes_positions_and_a_mask():
    attention, x = mla().double(), torch.randn(2, 70, 64, dtype=torch.float64)
    mask = torch.rand(2, 70) < 0.7
    positions = torch.arange(70) + 5
    want = attention(x, positions=positions, mask=mask)
    cache = PagedLatentCache(2, 100, 32, 8, torch.float64)
    first = attention(x[:, :30], cache, positions[:30], mask[:, :30])
    second = attention(x[:, 30:], cache, positions[30:], mask)
    torch.testing.assert_close(torch.cat([first, second], dim=1), want)


@torch.no_grad()
def test_a_fork_shares_pages_and_its_growth_never_changes_its_donor():
    attention, x = mla(), torch.randn(1, 200, 64)
    cache = PagedLatentCache(1, 300, 32, 8, pages=Pages(10))
    attention(x[:, :100], cache)
    pages, donor = cache.pages, cache.rows[0]
    fork = pages.fork(donor, 90)
    assert fork.pages == donor.pages and pages.available == 8
    before = cache.filled.clone()
    pages.grow([fork], 1)
    assert fork.pages[0] == donor.pages[0] and fork.pages[1] != donor.pages[1] and pages.available == 7
    assert torch.equal(cache.pool[fork.pages[1]], cache.pool[donor.pages[1]])
    cache.pool[fork.pages[1]].fill_(7)
    assert torch.equal(cache.filled, before)
    pages.truncate(fork, 0)
    assert pages.available == 8 and torch.equal(cache.filled, before)
    pages.grow([donor], 1)  # alone again: no copy
    assert pages.available == 8


def test_the_donor_too_copies_what_it_shares():
    pages = Pages(4)
    pool = pages.new_pool(1, 3)
    donor = pages.open()
    pages.grow([donor], 10)
    donor.length = 10
    write(pool, torch.ones(16, 1, 3), Plan([donor.pages], [0], 10, "cpu"))
    fork = pages.fork(donor, 10)
    pages.grow([donor], 1)
    assert donor.pages != fork.pages and torch.equal(pool[donor.pages[0]], pool[fork.pages[0]])


def test_a_text_is_known_by_all_its_tokens():
    text = list(range(200))
    assert len(digests(text)) == 3 and len(set(digests([7] * 640))) == 10
    assert digests(text)[:2] == digests(text[:128] + [0] * 64)[:2]
    assert digests(text)[2] != digests(text[:128] + [0] * 64)[2]
    assert digests([1, *text[1:]])[1] != digests(text)[1]  # the same second page, another first one
    assert digests([2**40 + 1, *text[1:]]) != digests([1, *text[1:]])


def test_what_texts_begin_with_is_shared_and_kept_until_its_memory_is_needed():
    pages = Pages(5)
    first = pages.open()
    pages.grow([first], 130)
    first.length = 130
    text = list(range(130))
    pages.remember(first, text)
    second = pages.open([*text[:128], 9, 9])
    assert second.pages == first.pages[:2] and second.length == 128
    third = pages.open(text[:128])
    assert third.length == 64  # the last token is always read: its logits are wanted
    pages.truncate(third, 0)
    pages.truncate(first, 0)
    pages.truncate(second, 0)
    again = pages.open(text)
    assert again.length == 128
    pages.truncate(again, 0)
    other = pages.open()
    pages.grow([other], 5 * 64)  # takes all memory, also the kept
    assert pages.open(text).length == 0


@pytest.mark.parametrize("length", [64, 70, 127, 128])
def test_a_known_page_is_not_written_by_its_own_row_either(length):
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


def test_forgetting_keeps_what_rows_hold():
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
    with pytest.raises(ValueError, match="cache full: 4 pages asked for, 2 are left"):
        pages.grow([a, b], 100)
    assert (a.pages, b.pages, pages.available) == ([0], [], 2)
    with pytest.raises(ValueError, match="num_pages=0 must be at least 1"):
        Pages(0)
    for call in (pages.fork, pages.truncate):
        with pytest.raises(ValueError, match=r"length=65 must lie in 0..64"):
            call(a, 65)


class PagesMachine(RuleBasedStateMachine):
    """Rows are lists of tokens; an entry is its token and all before it, so a wrong page always shows."""

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
    def every_row_holds_its_own_text(self):
        for row, text in getattr(self, "rows", []):
            assert row.length == len(text) and len(row.pages) == -(-len(text) // PAGE)
            held = self.pool[row.pages].flatten()[: len(text)].tolist()
            assert held == self.entries(text)

    @invariant()
    def no_page_is_lost_or_held_in_secret(self):
        if hasattr(self, "pages"):
            held = {page for row, _ in self.rows for page in row.pages}
            assert len(held) + self.pages.available == len(self.pages.holders)
            assert not held & {*self.pages.free, *self.pages.idle}
            assert sum(self.pages.holders) == sum(len(row.pages) for row, _ in self.rows)


PagesMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=30)
TestPagesEqualLists = PagesMachine.TestCase
