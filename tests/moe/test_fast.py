"""The experts' operator and the activation: what autograd saves for them, and what torch.compile sees.

The operator's values and gradients are compared with the equation in test_experts.py.
"""

import pytest
import torch

from moe import Experts, Routing, dispatch
from moe.fast import backward, by_block, forward, gated, gated_backward, reference_gated

TOKENS, DIM, HIDDEN, NUM_EXPERTS, TOP_K = 40, 6, 4, 5, 2


@pytest.fixture
def given():
    experts = torch.randint(-1, NUM_EXPERTS, (TOKENS, TOP_K))
    shapes = (TOKENS, DIM), (TOKENS, TOP_K), (NUM_EXPERTS, 2 * HIDDEN, DIM), (NUM_EXPERTS, DIM, HIDDEN)
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    return *tensors, *dispatch.sort(experts, NUM_EXPERTS, 16)


def test_only_gate_and_up_are_saved_for_backward():
    layer, x = Experts(NUM_EXPERTS, 64, 32), torch.randn(TOKENS, 64, requires_grad=True)
    experts, weights, kept = torch.randint(NUM_EXPERTS, (TOKENS, 2)), torch.rand(TOKENS, 2), {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        by_block(x, experts, weights, layer.gate_up, layer.down)
    rows = len(dispatch.sort(experts, NUM_EXPERTS, 8).source)
    new = sorted(t.shape for t in kept.values() if t.is_floating_point())
    assert new == sorted([x.shape, weights.shape, layer.gate_up.shape, layer.down.shape, (rows, 64)])


def test_in_bf16_no_copy_of_the_weights_is_saved():
    layer, x = Experts(NUM_EXPERTS, 16, 8), torch.randn(TOKENS, 16, requires_grad=True).bfloat16()
    experts, weights, kept = torch.randint(NUM_EXPERTS, (TOKENS, 2)), torch.rand(TOKENS, 2), {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x, Routing(experts, weights, weights, weights))
    assert not [t for t in kept.values() if t.shape == layer.down.shape and t.dtype == torch.bfloat16]


def test_the_operators_pass_opcheck(given):
    order = dispatch.sort(torch.randint(NUM_EXPERTS, (TOKENS, TOP_K)), NUM_EXPERTS, 16)  # no unwritten row
    given = *given[:4], *order
    torch.library.opcheck(forward, given)
    _, projected = forward(*given)
    given = [t.detach() for t in given]  # it has no double backward
    torch.library.opcheck(backward, (torch.randn_like(given[0]), projected, *given))


def test_double_backward_of_the_operator_is_an_error(given):
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


def kept(make):
    """Bytes that autograd saves while make() runs."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = make()
    assert y.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8), (0, 8)])
def test_value_and_gradient_equal_the_formula(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y, want = gated(x), reference_gated(x)
    direction = torch.randn_like(y)
    assert torch.equal(y, want)
    mine, theirs = (torch.autograd.grad(out, x, direction)[0] for out in (y, want))
    torch.testing.assert_close(mine, theirs, rtol=1e-14, atol=1e-15)
    hidden, again = gated_backward(direction, x.detach())
    assert torch.equal(hidden, want) and torch.equal(again, mine)


def test_the_gradient_equals_finite_differences():
    assert torch.autograd.gradcheck(gated, (torch.randn(3, 6, dtype=torch.float64, requires_grad=True),))


def test_double_backward_of_the_activation_is_an_error():
    x = torch.randn(3, 8, requires_grad=True)
    (d_x,) = torch.autograd.grad(gated(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="derivative for aten::silu_backward is not implemented"):
        d_x.sum().backward()


def test_only_the_input_is_saved():
    x = torch.randn(64, 32, requires_grad=True)
    assert kept(lambda: gated(x)) == x.nbytes
    assert kept(lambda: reference_gated(x)) > x.nbytes


def test_without_gradients_there_is_no_autograd_node():
    x = torch.randn(3, 8, requires_grad=True)
    with torch.no_grad():
        assert gated(x).grad_fn is None
    assert gated(x.detach()).grad_fn is None
