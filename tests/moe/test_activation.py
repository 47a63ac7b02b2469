"""The gated activation's own backward pass against autograd's of the formula."""

import pytest
import torch

from moe.activation import backward, gated, reference


def kept(make):
    """Bytes that autograd keeps while make() runs."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = make()
    assert y.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8), (0, 8)])
def test_value_and_gradient_are_the_formulas(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y, want = gated(x), reference(x)
    direction = torch.randn_like(y)
    assert torch.equal(y, want)
    mine, theirs = (torch.autograd.grad(out, x, direction)[0] for out in (y, want))
    torch.testing.assert_close(mine, theirs, rtol=1e-14, atol=1e-15)
    hidden, again = backward(direction, x.detach())
    assert torch.equal(hidden, want) and torch.equal(again, mine)


def test_the_gradient_equals_finite_differences():
    assert torch.autograd.gradcheck(gated, (torch.randn(3, 6, dtype=torch.float64, requires_grad=True),))


def test_a_gradient_of_the_gradient_is_an_error():
    x = torch.randn(3, 8, requires_grad=True)
    (d_x,) = torch.autograd.grad(gated(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="derivative for aten::silu_backward is not implemented"):
        d_x.sum().backward()


def test_the_input_alone_is_kept():
    x = torch.randn(64, 32, requires_grad=True)
    assert kept(lambda: gated(x)) == x.nbytes
    assert kept(lambda: reference(x)) > x.nbytes


def test_without_gradients_no_function_of_autograd_is_made():
    x = torch.randn(3, 8, requires_grad=True)
    with torch.no_grad():
        assert gated(x).grad_fn is None
    assert gated(x.detach()).grad_fn is None
