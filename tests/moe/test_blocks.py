"""The experts' operator: what autograd keeps of it, and what torch.compile is told of it.

Its values and gradients are held against the equation in test_experts.py.
"""

import pytest
import torch

from moe import Experts, Routing, dispatch
from moe.blocks import backward, forward

TOKENS, DIM, HIDDEN, NUM_EXPERTS, TOP_K = 40, 6, 4, 5, 2


@pytest.fixture
def given():
    experts = torch.randint(-1, NUM_EXPERTS, (TOKENS, TOP_K))
    shapes = (TOKENS, DIM), (TOKENS, TOP_K), (NUM_EXPERTS, 2 * HIDDEN, DIM), (NUM_EXPERTS, DIM, HIDDEN)
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    return *tensors, *dispatch.sort(experts, NUM_EXPERTS, 16)


def test_of_all_intermediates_only_gate_and_up_are_kept():
    layer, x = Experts(NUM_EXPERTS, 64, 32), torch.randn(TOKENS, 64, requires_grad=True)
    experts, weights, kept = torch.randint(NUM_EXPERTS, (TOKENS, 2)), torch.rand(TOKENS, 2), {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer.by_block(x, experts, weights, layer.gate_up, layer.down)
    rows = len(dispatch.sort(experts, NUM_EXPERTS, 8).source)
    new = sorted(t.shape for t in kept.values() if t.is_floating_point())
    assert new == sorted([x.shape, weights.shape, layer.gate_up.shape, layer.down.shape, (rows, 64)])


def test_in_bf16_no_copy_of_the_weights_is_kept():
    layer, x = Experts(NUM_EXPERTS, 16, 8), torch.randn(TOKENS, 16, requires_grad=True).bfloat16()
    experts, weights, kept = torch.randint(NUM_EXPERTS, (TOKENS, 2)), torch.rand(TOKENS, 2), {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x, Routing(experts, weights, weights, weights))
    assert not [t for t in kept.values() if t.shape == layer.down.shape and t.dtype == torch.bfloat16]


def test_the_operators_do_what_they_tell_the_compiler(given):
    order = dispatch.sort(torch.randint(NUM_EXPERTS, (TOKENS, TOP_K)), NUM_EXPERTS, 16)  # no row unwritten
    given = *given[:4], *order
    torch.library.opcheck(forward, given)
    _, projected = forward(*given)
    given = [t.detach() for t in given]  # it has no gradient of its own
    torch.library.opcheck(backward, (torch.randn_like(given[0]), projected, *given))


def test_a_gradient_of_the_gradient_is_an_error(given):
    y, _ = forward(*given)
    (d_x,) = torch.autograd.grad(y.sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"moe.run_blocks_backward.* no autograd formula"):
        d_x.sum().backward()


def test_under_compile_the_number_of_rows_does_not_depend_on_the_routing(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    orders = [
        dispatch.sort(experts, NUM_EXPERTS, 16)
        for experts in (torch.randint(-1, NUM_EXPERTS, (TOKENS, TOP_K)), torch.zeros(TOKENS, TOP_K).long())
    ]
    monkeypatch.undo()
    for order in orders:
        assert len(order.source) == TOKENS * TOP_K + NUM_EXPERTS * 15 == order.sizes.sum()
    want = dispatch.sort(torch.zeros(TOKENS, TOP_K).long(), NUM_EXPERTS, 16)
    assert torch.equal(orders[1].target, want.target) and torch.equal(orders[1].sizes[:-1], want.sizes[:-1])
    assert torch.equal(orders[1].source[: len(want.source)], want.source)
