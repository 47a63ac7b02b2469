"""RMSNorm's backward pass against autograd of the formula."""

import pytest
import torch

from mla import RMSNorm
from mla.norm import rms_norm


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7), (2, 3, 4, 7), (0, 7)])
def test_value_and_gradients_equal_the_formula(shape):
    norm = RMSNorm(7, eps=0.1).double()
    with torch.no_grad():
        norm.weight.uniform_(-2, 2)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y, want = norm(x), rms_norm(x, norm.weight, 0.1)[0]
    direction = torch.randn_like(y)
    assert torch.equal(y, want)
    for mine, theirs in zip(*(torch.autograd.grad(out, (x, norm.weight), direction) for out in (y, want))):
        torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-14)


def test_first_and_second_gradients_equal_finite_differences():
    norm = RMSNorm(5, eps=1e-3).double()
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def run(x, weight):
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(run, (x, weight))
    assert torch.autograd.gradgradcheck(run, (x, weight))


@pytest.mark.parametrize("dtype, weight_dtype", [("bfloat16", "float32"), ("bfloat16", "bfloat16")])
def test_narrow_gradients_are_summed_in_fp32(dtype, weight_dtype):
    norm = RMSNorm(300).to(getattr(torch, weight_dtype))
    x = torch.randn(500, 300).to(getattr(torch, dtype)).requires_grad_()
    direction = torch.randn(500, 300).to(x.dtype)
    d_x, d_weight = torch.autograd.grad(norm(x), (x, norm.weight), direction)
    assert d_x.dtype == x.dtype and d_weight.dtype == norm.weight.dtype
    wide, weight = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    wanted = torch.autograd.grad(rms_norm(wide, weight, norm.eps)[0], (wide, weight), direction.double())
    for mine, theirs in zip((d_x, d_weight), wanted):
        assert (mine.double() - theirs).norm() < 3e-3 * theirs.norm()


def test_only_one_tensor_of_the_inputs_size_is_saved():
    norm, x, sizes = RMSNorm(64), torch.randn(100, 64, requires_grad=True), {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        norm(x)
    assert sum(sizes.values()) == x.nbytes + norm.weight.nbytes + 100 * 4
