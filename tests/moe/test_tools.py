"""Researchers' tools on the layers: torch.func, torch.export, FLOP counts, meta and fake tensors, print."""

import contextlib
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

import moe
from moe import Experts, Gated, MoE, Routing, SigmoidRouter, SoftMoE, SwiGLU, balance, metrics
from moe.fast import everywhere
from tests.moe.test_mps import DIM, NUM_EXPERTS, ROUTERS, training_step

HIDDEN = 8


def make(name, num_experts=NUM_EXPERTS):
    """A layer with that router; one has a shared expert, one a gated one, one another matrix product."""
    if name == "soft":
        return SoftMoE(Experts(num_experts, DIM, HIDDEN), 2)
    shared = {"sigmoid": SwiGLU(DIM, HIDDEN), "softmax": Gated(SwiGLU(DIM, HIDDEN), DIM)}.get(name)
    layer = MoE(ROUTERS[name](), Experts(num_experts, DIM, HIDDEN), shared)
    if name == "capacity by score":
        layer.experts.product = F.linear
    return layer


def loss_of(layer, x, tokens, parameters=None):
    """A scalar of the output and, where they have a gradient, the balance losses."""
    parameters = dict(layer.named_parameters()) if parameters is None else parameters
    y, routing = functional_call(layer, parameters, (x.unsqueeze(0), tokens.unsqueeze(0)))
    losses = balance.sequence_loss(routing) + balance.switch_loss(routing)
    losses = losses + balance.device_loss(routing, 4) + balance.communication_loss(routing, 4, 2)
    return y.square().sum() + losses


@pytest.fixture(params=[*(name for name in ROUTERS if name not in ("random", "device dropping")), "soft"])
def layer(request):
    made = make(request.param).double()
    return made if "capacity" in request.param else made.eval()  # noise is drawn in training


@pytest.fixture
def x():
    return torch.randn(3, 6, DIM, dtype=torch.float64)


TOKENS = torch.arange(18).view(3, 6)


def test_torch_func_differentiates_a_layer_sample_by_sample(layer, x):
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    gradient = grad(lambda parameters, x, tokens: loss_of(layer, x, tokens, parameters))
    one, each = gradient(parameters, x[0], TOKENS[0]), vmap(gradient, (None, 0, 0))(parameters, x, TOKENS)
    for sample, tokens, index in zip(x, TOKENS, range(3)):
        loss = loss_of(layer, sample, tokens)
        want = torch.autograd.grad(loss, list(layer.parameters()), allow_unused=True)
        for (name, parameter), theirs in zip(layer.named_parameters(), want):
            theirs = torch.zeros_like(parameter) if theirs is None else theirs
            torch.testing.assert_close(each[name][index], theirs, msg=name)
            assert index or torch.allclose(one[name], theirs)


def test_torch_func_has_directional_and_second_derivatives_of_a_layer(layer, x):
    def loss(x):
        return loss_of(layer, x, TOKENS[0])

    at, direction = x[0], torch.randn(6, DIM, dtype=torch.float64)
    _, along = jvp(loss, (at,), (direction,))
    _, curvature = jvp(grad(loss), (at,), (direction,))
    step = 1e-5 * direction
    torch.testing.assert_close(along, (loss(at + step) - loss(at - step)) / 2e-5, rtol=1e-6, atol=1e-7)
    slopes = [
        torch.autograd.grad(loss(p), p)[0] for p in (z.requires_grad_() for z in (at + step, at - step))
    ]
    torch.testing.assert_close(curvature, (slopes[0] - slopes[1]) / 2e-5, rtol=1e-5, atol=1e-6)


def test_metrics_and_counts_are_batched_by_vmap(x):
    router = SigmoidRouter(DIM, NUM_EXPERTS, 2).double()
    domains = TOKENS % 3

    def measure(x, domains):
        routing = router(x)
        counts = balance.tokens_per_expert(routing)
        shares = metrics.domain_specialization(routing, domains, 3), metrics.coactivation(routing)
        return counts, balance.max_violation(counts), metrics.load_entropy(counts), *shares

    for found, *each in zip(vmap(measure)(x, domains), *map(measure, x, domains)):
        torch.testing.assert_close(found, torch.stack(each))


def test_every_expert_on_every_token_equals_the_equation():
    layer = Experts(NUM_EXPERTS, DIM, HIDDEN).double()
    x = torch.randn(7, DIM, dtype=torch.float64)
    experts = torch.randint(-1, NUM_EXPERTS, (7, 3))  # empty slots, and an expert twice
    weights = torch.rand(7, 3, dtype=torch.float64)
    y = everywhere(x, experts, weights, layer.gate_up, layer.down)
    torch.testing.assert_close(y, layer.reference(x, Routing(experts, weights, weights, weights)))


class Alone(nn.Module):
    """A layer's output without its Routing, for torch.export."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args):
        return self.layer(*args)[0]


def exported(layer, make_args):
    """The program of a layer whose batch and time are dynamic, exported from one shape."""
    args = make_args(2, 7)
    dynamic = ({0: Dim("batch"), 1: Dim("time")},) * len(args)
    return torch.export.export(layer, args, dynamic_shapes=(dynamic,)).module()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_experts", [8, 64])  # 64: few tokens take another path outside of export
@pytest.mark.parametrize("learns", [True, False])
def test_an_exported_layer_takes_any_batch_and_time(learns, num_experts, dtype):
    layer = MoE(SigmoidRouter(DIM, num_experts, 2, 4, 2), Experts(num_experts, DIM, HIDDEN), SwiGLU(DIM, 8))
    layer = Alone(layer).to(dtype)
    with torch.set_grad_enabled(learns):
        program = exported(layer, lambda *shape: (torch.randn(*shape, DIM, dtype=dtype),))
        for shape in ((2, 7), (1, 1), (5, 3), (1, 40), (3, 64)):
            x = torch.randn(*shape, DIM, dtype=dtype)
            torch.testing.assert_close(program(x), layer(x))


@pytest.mark.parametrize("name", [*(name for name in ROUTERS if name not in ("sigmoid", "random")), "soft"])
def test_an_exported_layer_with_any_router_takes_any_batch_and_time(name):
    layer = Alone(make(name).eval())
    program = exported(layer, lambda *shape: (torch.randn(*shape, DIM), torch.randint(18, shape)))
    for shape in ((2, 7), (5, 3), (1, 40)):
        args = torch.randn(*shape, DIM), torch.randint(18, shape)
        torch.testing.assert_close(program(*args), layer(*args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_experts, tokens, top_k", [(8, 24, 2), (64, 3, 2), (8, 1, 8)])
def test_flop_counter_counts_the_chosen_experts(num_experts, tokens, top_k, dtype):
    layer = MoE(SigmoidRouter(DIM, num_experts, top_k), Experts(num_experts, DIM, HIDDEN), SwiGLU(DIM, 24))
    x = torch.randn(tokens, DIM, requires_grad=True)
    chosen, shared, router = 3 * DIM * HIDDEN * top_k, 3 * DIM * 24, DIM * num_experts
    want = 2 * tokens * (chosen + shared + router)
    narrow = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with narrow, FlopCounterMode(display=False) as inference, torch.no_grad():
        layer(x)
    with FlopCounterMode(display=False) as training:
        with narrow:
            y, _ = layer(x)
        forward = training.get_total_flops()
        y.sum().backward()
    assert inference.get_total_flops() == forward == want
    assert training.get_total_flops() == 3 * want


def test_counting_flops_changes_no_output():
    layer, x = MoE(SigmoidRouter(DIM, 64, 2), Experts(64, DIM, HIDDEN)), torch.randn(3, DIM)
    with torch.no_grad(), FlopCounterMode(display=False):
        counted, _ = layer(x)
    torch.testing.assert_close(counted, layer(x)[0])


@pytest.mark.parametrize("where", ["meta", "fake"])
@pytest.mark.parametrize("name", [*ROUTERS, "soft"])
def test_a_training_step_runs_without_numbers(name, where):
    enter, device = (FakeTensorMode(), "cpu") if where == "fake" else (contextlib.nullcontext(), "meta")
    with enter, torch.device(device):
        x, tokens = torch.empty(2, 12, DIM), torch.zeros(2, 12, dtype=torch.int64)
        found = training_step(make(name), x, tokens)
    real = training_step(make(name), torch.randn(2, 12, DIM), torch.randint(18, (2, 12)))
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in real]
    assert {t.device.type for t in found} == {device}


@pytest.mark.parametrize("path", ["forward", "product"])
def test_experts_on_meta_need_no_numbers(path):
    with torch.device("meta"):
        layer = Experts(NUM_EXPERTS, DIM, HIDDEN)
        layer.product = F.linear if path == "product" else None
        experts, weights = torch.zeros(5, 2, dtype=torch.int64), torch.ones(5, 2)
        x = torch.empty(5, DIM, requires_grad=True)
        y = layer(x, Routing(experts, weights, weights, weights))
        y.sum().backward()
    assert y.shape == x.grad.shape == x.shape and y.is_meta and layer.down.grad.is_meta


@pytest.mark.parametrize(
    "cls, children, sizes",
    [
        (SigmoidRouter, (), dict(dim=4, num_experts=6, top_k=2, num_groups=3, top_groups=2)),
        (
            moe.SoftmaxRouter,
            (),
            dict(dim=4, num_experts=6, top_k=2, normalize=True, routed_scaling_factor=2.5),
        ),
        (moe.SwitchRouter, (), dict(dim=4, num_experts=6, top_k=1)),
        (moe.ExpertChoiceRouter, (), dict(dim=4, num_experts=6, capacity_factor=1.5)),
        (moe.HashRouter, (), dict(num_experts=6, vocab_size=20, seed=3)),
        (moe.RandomRouter, (), dict(num_experts=6, top_k=3)),
        (
            moe.Capacity,
            (moe.RandomRouter(6, 3),),
            dict(capacity_factor=1.5, priority="score", drop_in_eval=True),
        ),
        (moe.DeviceDropping, (moe.RandomRouter(6, 3),), dict(num_devices=3, capacity_factor=1.0, exempt=0.2)),
        (Experts, (), dict(num_experts=6, dim=4, hidden_dim=3)),
        (SoftMoE, (Experts(6, 4, 3),), dict(slots_per_expert=2)),
    ],
)
def test_print_shows_the_sizes_that_a_layer_was_made_with(cls, children, sizes):
    layer = cls(*children, **sizes)
    shown = eval(f"dict({layer.extra_repr()})")
    defaults = {key: p.default for key, p in inspect.signature(cls).parameters.items()}
    assert {key: shown[key] for key in sizes} == sizes
    assert {key: shown[key] for key in shown.keys() - sizes} == {
        key: defaults[key] for key in shown.keys() - sizes
    }
    assert layer.extra_repr() in repr(nn.Sequential(layer))
    again = cls(*children, **shown)
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in layer.state_dict().items()
    }


def test_a_custom_router_is_printed_with_its_own_arguments():
    class Mine(moe.Router):
        def __init__(self, dim, num_experts, width=2.0, rule="a", gate=None):
            super().__init__(dim, num_experts)
            self.width, self.rule, self.gate = width, rule, nn.Linear(1, 1) if gate is None else gate

    assert Mine(4, 6).extra_repr() == "dim=4, num_experts=6, width=2.0, rule='a'"
