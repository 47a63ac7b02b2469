"""Dispatch against lists: which token each row holds, and where each result goes back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe import dispatch

NUM_EXPERTS = 5


@st.composite
def choices(draw):
    """(tokens, top_k) of experts 0..4 and empty slots"""
    top_k = draw(st.integers(1, 4))
    row = st.lists(st.integers(-1, NUM_EXPERTS - 1), min_size=top_k, max_size=top_k)
    rows = draw(st.lists(row, max_size=20))
    return torch.tensor(rows, dtype=torch.int64).view(-1, top_k)


multiples = st.sampled_from([1, 2, 3, 16])


@given(choices(), multiples)
def test_each_block_holds_its_experts_tokens_in_order(experts, multiple):
    order = dispatch.sort(experts, NUM_EXPERTS, multiple)
    blocks = order.source.split(order.sizes.tolist())
    for i, block in zip([*range(NUM_EXPERTS), -1], blocks):
        want = [token for token, row in enumerate(experts.tolist()) for expert in row if expert == i]
        assert block[: len(want)].tolist() == want
        if i >= 0:  # padded with token 0, by less than `multiple`
            assert len(block) % multiple == 0 and len(block) < len(want) + multiple
            assert not block[len(want) :].any()
        else:
            assert len(block) == len(want)


@given(choices(), multiples)
def test_target_is_the_row_of_each_slot(experts, multiple):
    order = dispatch.sort(experts, NUM_EXPERTS, multiple)
    ends = order.sizes.cumsum(0).tolist()
    for token, (row_of, chosen) in enumerate(zip(order.target.tolist(), experts.tolist())):
        for row, expert in zip(row_of, chosen):
            assert order.source[row] == token
            assert (0 if expert == 0 else ends[expert - 1]) <= row < ends[expert]
    assert len(order.target.unique()) == experts.numel()


@given(choices(), multiples)
def test_counts_add_up_to_tokens_times_top_k(experts, multiple):
    order = dispatch.sort(experts, NUM_EXPERTS, multiple)
    assert order.sizes.shape == (NUM_EXPERTS + 1,)
    assert order.sizes.sum() == len(order.source)
    if multiple == 1:
        assert order.sizes.sum() == experts.numel()


@given(choices(), multiples)
def test_gather_then_scatter_with_weight_1_is_top_k_times_the_identity(experts, multiple):
    order = dispatch.sort(experts, NUM_EXPERTS, multiple)
    x = torch.arange(1.0, len(experts) * 3 + 1).view(-1, 3)
    y = dispatch.scatter(dispatch.gather(x, order), order, torch.ones(experts.shape))
    assert torch.equal(y, x * experts.shape[1])


@pytest.mark.parametrize("multiple", [1, 4])
def test_scatter_multiplies_each_slot_by_its_weight(multiple):
    experts = torch.tensor([[3, 0], [0, 3], [1, 3], [3, 4]])
    weights = torch.tensor([[1.0, 10], [100, 1000], [2, 20], [200, 2000]])
    order = dispatch.sort(experts, NUM_EXPERTS, multiple)
    # expert i returns 2^i times the token: each combination of slots and weights has a different sum
    factors = torch.cat([torch.full((int(n), 1), 2.0**i) for i, n in enumerate(order.sizes)])
    y = dispatch.scatter(dispatch.gather(torch.ones(4, 1), order) * factors, order, weights)
    want = [[sum(w * 2.0**i for w, i in zip(*row))] for row in zip(weights.tolist(), experts.tolist())]
    assert y.tolist() == want


def test_scatter_keeps_the_dtype_of_the_rows():
    order = dispatch.sort(torch.tensor([[1, 0]]), NUM_EXPERTS)
    assert dispatch.scatter(torch.ones(2, 3).bfloat16(), order, torch.ones(1, 2)).dtype == torch.bfloat16
