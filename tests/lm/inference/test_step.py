"""The MoE layer in a decode step, where padding takes no token's capacity; and checksums of weights."""

import pytest
import torch

from lm.inference.step import mark, moe_step
from moe import Capacity, ExpertChoiceRouter, Experts, HashRouter, MoE, SoftmaxRouter, SwiGLU
from moe.router import described

ROUTERS = {
    "softmax": lambda: SoftmaxRouter(4, 8, 2),
    "expert choice": lambda: ExpertChoiceRouter(4, 8),
    "capacity in evaluation": lambda: Capacity(SoftmaxRouter(4, 8, 2), 0.4, drop_in_eval=True),
    "hash": lambda: HashRouter(8, 20),
}


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("shared", [True, False])
def test_padding_changes_no_token(name, shared):
    router = ROUTERS[name]()
    layer = MoE(router, Experts(8, 4, 3), SwiGLU(4, 5) if shared else None).double().eval()
    x, tokens = torch.randn(16, 4, dtype=torch.float64), torch.randint(20, (16,))
    mixes = described(router).mixes_tokens
    y, routing = moe_step(layer, x, 5, tokens, mixes)
    assert len(routing.experts) == 5
    torch.testing.assert_close(y[:5], layer(x[:5], tokens[:5])[0])
    assert mixes == (name in ("expert choice", "capacity in evaluation"))


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 8), (4, 0)])
def test_a_mark_detects_every_single_bit_change(dtype, shape):
    tensor = torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.randint(9, shape)
    before = mark(tensor)
    assert torch.equal(before, mark(tensor.clone()))
    for index in range(tensor.numel()):
        changed = tensor.clone()
        flat = changed.view(-1).view(torch.uint8)
        flat[index * tensor.itemsize] ^= 1  # the lowest bit
        assert not torch.equal(before, mark(changed))


def test_a_mark_detects_permutations_and_a_transposition():
    matrix = torch.randn(6, 6)
    for other in (matrix.flip(0), matrix.flip(1), matrix.T, matrix.roll(1, 0)):
        assert not torch.equal(mark(matrix), mark(other))
