"""Researchers' tools on the attentions: torch.func, torch.export, meta and fake tensors, print."""

import contextlib

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.func import functional_call, grad, jvp, vmap

from mla import GroupedQueryAttention, Linear, MultiheadLatentAttention, RMSNorm, RotaryEmbedding, YaRN

DIM, BATCH, TIME = 16, 3, 7


class Chunked(nn.Module):
    """An attention that reads the sequence in chunks, through a cache."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        cache = self.attention.new_cache(len(x), x.shape[1])
        return torch.cat([self.attention(part, cache) for part in x.split([3, 1, 3], dim=1)], dim=1)


class Masked(Chunked):
    """An attention with positions and a mask of its own."""

    def forward(self, x):
        positions = torch.arange(x.shape[1], device=x.device) * 2
        return self.attention(x, positions=positions, mask=x.new_ones(x.shape[:2]) > 0)


LAYERS = {
    "mla": lambda: MultiheadLatentAttention(DIM, 2, 8, 6, 4, 6),
    "mla, compressed query, wide value": lambda: MultiheadLatentAttention(
        DIM, 2, 8, 6, 4, 12, 8, qkv_bias=True
    ),
    "mla, cache": lambda: Chunked(MultiheadLatentAttention(DIM, 2, 8, 6, 4, 6, 8)),
    "mla, mask": lambda: Masked(MultiheadLatentAttention(DIM, 2, 8, 6, 4, 6, 8)),
    "gqa": lambda: GroupedQueryAttention(DIM, 4, 2, 4, qk_norm_eps=1e-6),
    "gqa, cache": lambda: Chunked(GroupedQueryAttention(DIM, 4, 2, 4)),
    "norm": lambda: RMSNorm(DIM),
}
EACH = pytest.mark.parametrize("name", LAYERS)


def loss_of(layer, x, parameters=None):
    parameters = dict(layer.named_parameters()) if parameters is None else parameters
    y = functional_call(layer, parameters, (x.unsqueeze(0),))
    return (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).square().sum()


@EACH
def test_torch_func_differentiates_a_layer_sample_by_sample(name):
    layer, x = LAYERS[name]().double(), torch.randn(BATCH, TIME, DIM, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    gradient = grad(lambda parameters, x: loss_of(layer, x, parameters))
    one, each = gradient(parameters, x[0]), vmap(gradient, (None, 0))(parameters, x)
    for index, sample in enumerate(x):
        want = torch.autograd.grad(loss_of(layer, sample), list(layer.parameters()))
        for key, theirs in zip(parameters, want, strict=True):
            torch.testing.assert_close(each[key][index], theirs, msg=key)
            assert index or torch.allclose(one[key], theirs)


@EACH
def test_torch_func_has_directional_and_second_derivatives_of_a_layer(name):
    layer, x = LAYERS[name]().double(), torch.randn(TIME, DIM, dtype=torch.float64)
    direction = torch.randn_like(x)
    _, along = jvp(lambda x: loss_of(layer, x), (x,), (direction,))
    _, curvature = jvp(grad(lambda x: loss_of(layer, x)), (x,), (direction,))
    ends = [(x + sign * 1e-5 * direction).requires_grad_() for sign in (1, -1)]
    values = [loss_of(layer, end) for end in ends]
    torch.testing.assert_close(along, (values[0] - values[1]) / 2e-5, rtol=1e-6, atol=1e-7)
    slopes = [torch.autograd.grad(value, end)[0] for value, end in zip(values, ends)]
    torch.testing.assert_close(curvature, (slopes[0] - slopes[1]) / 2e-5, rtol=1e-5, atol=1e-6)


@EACH
def test_dual_tensors_work_as_jvp_does(name):
    layer, x = LAYERS[name]().double(), torch.randn(TIME, DIM, dtype=torch.float64)
    direction = torch.randn_like(x)
    _, want = jvp(lambda x: loss_of(layer, x), (x,), (direction,))
    with torch.autograd.forward_ad.dual_level():
        y = loss_of(layer, torch.autograd.forward_ad.make_dual(x, direction))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(y).tangent, want)


@pytest.mark.long
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", [name for name in LAYERS if "cache" not in name])
def test_an_exported_layer_takes_any_batch_and_time(name, strict):
    layer, dynamic = LAYERS[name](), ({0: Dim("batch"), 1: Dim("time")},)
    program = torch.export.export(layer, (torch.randn(2, TIME, DIM),), dynamic_shapes=dynamic, strict=strict)
    for shape in ((2, 7), (1, 1), (5, 3), (1, 40), (3, 64)):
        x = torch.randn(*shape, DIM)
        torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("where", ["meta", "fake"])
@EACH
def test_a_layer_runs_without_numbers_and_leaves_none_behind(name, where):
    enter, device = (FakeTensorMode(), "cpu") if where == "fake" else (contextlib.nullcontext(), "meta")
    with enter, torch.device(device):
        layer, x = LAYERS[name](), torch.empty(BATCH, TIME, DIM, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.shape == x.grad.shape == x.shape and y.device.type == device
    real = LAYERS[name]()(torch.randn(BATCH, TIME, DIM))  # no fake frequency stays in the embedding's cache
    assert type(real) is torch.Tensor and real.isfinite().all()


SIZES = {
    MultiheadLatentAttention: {
        **dict(dim=16, num_heads=2, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=6),
        "q_lora_rank": 5,
    },
    GroupedQueryAttention: dict(dim=16, num_heads=4, num_kv_heads=2, head_dim=6),
    RotaryEmbedding: dict(dim=6, theta=500.0, interleaved=False, scaling=YaRN(4.0, 32)),
    RMSNorm: dict(dim=6, eps=1e-5),
}


@pytest.mark.parametrize("cls", SIZES)
def test_print_shows_the_sizes_that_a_layer_was_made_with(cls):
    layer = cls(**SIZES[cls])
    assert eval(f"dict({layer.extra_repr()})") == SIZES[cls]
    assert layer.extra_repr() in repr(nn.Sequential(layer))


def test_print_leaves_out_what_a_layer_has_not():
    layer = MultiheadLatentAttention(16, 2, 8, 6, 4, 6)
    assert "q_lora_rank" not in layer.extra_repr() and "None" not in repr(layer)
    assert "scaling=Linear(factor=2.0)" in repr(RotaryEmbedding(4, scaling=Linear(2.0)))
