"""The caches against a list of lists, under any sequence of appends and truncations."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mla import KVCache, LatentCache

LATENT, ROPE, KV_HEADS, HEAD_DIM = 3, 2, 2, 4


def latent_cache(batch, max_length, **options):
    return LatentCache(batch, max_length, LATENT, ROPE, **options)


def kv_cache(batch, max_length, **options):
    return KVCache(batch, max_length, KV_HEADS, HEAD_DIM, **options)


def parts(kind, values):
    """Arguments of `append`, made from one number per token: values (batch, time)."""
    shapes = [(KV_HEADS, HEAD_DIM)] * 2 if kind is kv_cache else [(LATENT,), (ROPE,)]
    # all features of a token differ, within and between the two parts
    features = [torch.arange(1.0, torch.Size(shape).numel() + 1).view(shape) for shape in shapes]
    first, second = (values.view(*values.shape, *[1] * f.ndim) * 100 + f for f in features)
    return first, -second


class CacheMachine(RuleBasedStateMachine):
    """Rows are lists of numbers; each number stands for a token."""

    kind = staticmethod(latent_cache)

    @initialize(batch=st.integers(1, 3), max_length=st.integers(1, 8))
    def start(self, batch, max_length):
        self.cache = self.kind(batch, max_length)
        self.rows = [[] for _ in range(batch)]
        self.max_length = max_length
        self.written = 0

    @rule(time=st.integers(1, 4))
    def append(self, time):
        values = torch.arange(self.written, self.written + len(self.rows) * time).view(-1, time).float()
        self.written += values.numel()
        total = max(map(len, self.rows)) + time
        if total > self.max_length:
            before = self.cache.filled.clone()
            with pytest.raises(ValueError, match=f"cache full: position {total - 1} .*={self.max_length}"):
                self.cache.append(*parts(self.kind, values))
            assert torch.equal(self.cache.filled, before)
            return
        returned = self.cache.append(*parts(self.kind, values))
        self.rows = [row + new for row, new in zip(self.rows, values.tolist())]
        assert all(part.shape[:2] == (len(self.rows), total) for part in returned)
        for i, row in enumerate(self.rows):
            for found, want in zip(returned, parts(self.kind, torch.tensor([row]))):
                assert torch.equal(found[i, : len(row)], want[0])

    @rule(data=st.data(), how=st.sampled_from(["int", "tensor", "list", "scalar tensor"]))
    def truncate(self, data, how):
        if how in ("int", "scalar tensor"):
            length = data.draw(st.integers(0, min(map(len, self.rows))))
            self.cache.truncate(length if how == "int" else torch.tensor(length))
            lengths = [length] * len(self.rows)
        else:
            lengths = [data.draw(st.integers(0, len(row))) for row in self.rows]
            self.cache.truncate(lengths if how == "list" else torch.tensor(lengths))
        self.rows = [row[:length] for row, length in zip(self.rows, lengths)]

    @rule(data=st.data(), beyond=st.sampled_from([-1, 1, 100]))
    def truncate_beyond(self, data, beyond):
        row = data.draw(st.integers(0, len(self.rows) - 1))
        lengths = [len(r) for r in self.rows]
        lengths[row] = -1 if beyond < 0 else lengths[row] + beyond
        with pytest.raises(ValueError, match=rf"length={lengths[row]} for row {row} must lie in 0\.\."):
            self.cache.truncate(lengths)

    @invariant()
    def lengths_agree(self):
        if hasattr(self, "cache"):
            assert self.cache.length.tolist() == [len(row) for row in self.rows]


class KVCacheMachine(CacheMachine):
    kind = staticmethod(kv_cache)


for machine in (CacheMachine, KVCacheMachine):
    machine.TestCase.settings = settings(max_examples=50)
TestLatentCacheEqualsAList = CacheMachine.TestCase
TestKVCacheEqualsAList = KVCacheMachine.TestCase


@pytest.mark.parametrize("dtype, size", [(None, 4), (torch.bfloat16, 2), (torch.float64, 8)])
def test_nbytes_is_the_numbers_per_token_times_their_size(dtype, size):
    assert latent_cache(2, 7, dtype=dtype).nbytes == 2 * 7 * (LATENT + ROPE) * size
    assert kv_cache(2, 7, dtype=dtype).nbytes == 2 * 7 * 2 * KV_HEADS * HEAD_DIM * size
    assert latent_cache(2, 7).max_length == 7


@pytest.mark.parametrize("kind", [latent_cache, kv_cache])
def test_appending_does_not_disturb_the_backward_of_earlier_chunks(kind):
    cache, given, losses = kind(2, 6), [], 0
    for time in (2, 1, 3):
        given += [part.requires_grad_() for part in parts(kind, torch.rand(2, time))]
        losses = losses + sum((part * part).sum() for part in cache.append(*given[-2:]))
    losses.backward()
    for step, part in enumerate(given):  # the first chunk is in all three returned pasts, the last in one
        assert torch.equal(part.grad, 2 * part.detach() * (3 - step // 2))


@pytest.mark.parametrize("kind", [latent_cache, kv_cache])
def test_without_gradients_the_memory_is_allocated_once(kind):
    cache = kind(2, 6)
    address = cache.entries.data_ptr()
    with torch.no_grad():
        for time in (2, 1, 3):
            cache.append(*parts(kind, torch.rand(2, time)))
    assert cache.entries.data_ptr() == address


@pytest.mark.parametrize("make", [LatentCache, KVCache])
@pytest.mark.parametrize("sizes", [(0, 4, 3, 2), (2, 0, 3, 2), (2, 4, -9, 2)])
def test_sizes_below_1_are_refused(make, sizes):
    with pytest.raises(ValueError, match="must be at least 1"):
        make(*sizes)


@pytest.mark.parametrize(
    "latent, k_rope, message",
    [
        (torch.zeros(2, 1, 2), torch.zeros(2, 1, 3), r"widths \(2, 3\); the cache was made for \(3, 2\)"),
        (torch.zeros(3, 1, 3), torch.zeros(3, 1, 2), r"shape \(3, 1, 5\); .* was made for \(2, time, 5\)"),
        (torch.zeros(2, 3), torch.zeros(2, 2), r"shape \(2, 5\)"),
        (torch.zeros(2, 1, 3).double(), torch.zeros(2, 1, 2).double(), r"torch.float64 on cpu; the cache is"),
        (torch.zeros(2, 1, 3).to("meta"), torch.zeros(2, 1, 2).to("meta"), r"on meta; the cache is"),
    ],
)
def test_entries_that_do_not_fit_are_refused(latent, k_rope, message):
    with pytest.raises(ValueError, match=message):
        latent_cache(2, 4).append(latent, k_rope)


@pytest.mark.parametrize(
    "key, value", [((2, 1, 4, 2), (2, 1, 4, 2)), ((2, 1, 2, 4), (2, 1, 2, 3)), ((2, 1, 8), (2, 1, 8))]
)
def test_keys_and_values_that_do_not_fit_are_refused(key, value):
    with pytest.raises(ValueError, match=r"\(heads, head_dim\) .*; the cache was made for \(2, 4\)"):
        kv_cache(2, 4).append(torch.zeros(key), torch.zeros(value))


@pytest.mark.parametrize("length", [[1], [0, 0, 0], torch.zeros(1, 2, dtype=torch.int64), 0.5, [0.5, 1.0]])
def test_lengths_that_do_not_fit_are_refused(length):
    with pytest.raises(ValueError, match=r"expected whole numbers, one or \(2,\)"):
        latent_cache(2, 4).truncate(length)
