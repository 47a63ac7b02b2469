"""No float64 on a device: a Mac's GPU has none. The layers run on a pretended one, and under a mode."""

import copy

import pytest
import torch

from moe import (
    Capacity,
    DeviceDropping,
    ExpertChoiceRouter,
    Experts,
    GShardRouter,
    HashRouter,
    MixtralRouter,
    MoE,
    NoisyTopKRouter,
    RandomRouter,
    SigmoidRouter,
    SoftmaxRouter,
    SoftMoE,
    SwiGLU,
    SwitchRouter,
    balance,
    devices_visited,
    metrics,
    upcycle,
)
from tests.moe.pretend import NoFloat64, OnMPS, mps, to_mps

DIM, NUM_EXPERTS = 16, 8
ROUTERS = {
    "sigmoid": lambda: SigmoidRouter(DIM, NUM_EXPERTS, 2, 4, 2),
    "softmax": lambda: SoftmaxRouter(DIM, NUM_EXPERTS, 2, normalize=True),
    "capacity": lambda: Capacity(SigmoidRouter(DIM, NUM_EXPERTS, 2), 0.8),
    "capacity by score": lambda: Capacity(SoftmaxRouter(DIM, NUM_EXPERTS, 2), 0.8, "score"),
    "device dropping": lambda: DeviceDropping(SoftmaxRouter(DIM, NUM_EXPERTS, 2), 4, 0.8),
    "noisy": lambda: NoisyTopKRouter(DIM, NUM_EXPERTS, 2),
    "mixtral": lambda: MixtralRouter(DIM, NUM_EXPERTS, 2),
    "switch": lambda: SwitchRouter(DIM, NUM_EXPERTS),
    "gshard": lambda: GShardRouter(DIM, NUM_EXPERTS),
    "expert choice": lambda: ExpertChoiceRouter(DIM, NUM_EXPERTS),
    "hash": lambda: HashRouter(NUM_EXPERTS, 20),
    "random": lambda: RandomRouter(NUM_EXPERTS, 2),
}
COUNTS = torch.tensor([31, 0, 6, 12, 7, 11, 17, 12])
MODES = {"on MPS": (mps, to_mps, OnMPS), "without float64": (NoFloat64, lambda layer: layer, lambda x: x)}


def numbers_of(values):
    return [value.inner if isinstance(value, OnMPS) else value for value in values]


def training_step(layer, x, tokens):
    """Every loss and metric of a layer, its gradients, and its outputs in training and in evaluation."""
    torch.manual_seed(1)
    y, routing = layer(x, tokens=tokens)
    counts = balance.tokens_per_expert(routing, dropped=True)
    losses = [
        balance.sequence_loss(routing),
        balance.switch_loss(routing),
        balance.switch_loss(routing, None, counts),
        balance.z_loss(routing),
        balance.device_loss(routing, 4),
        balance.communication_loss(routing, 4, 2),
    ]
    weights = list(layer.parameters())
    gradients = torch.autograd.grad(y.square().sum() + sum(losses), weights, allow_unused=True)
    found = [y, *losses, *(g for g in gradients if g is not None), balance.max_violation(counts)]
    found += [metrics.load_entropy(counts), metrics.dead_experts(counts), devices_visited(routing, 4)]
    for take in (
        metrics.dropped_share,
        metrics.coactivation,
        metrics.router_confidence,
        metrics.score_entropy,
    ):
        found.append(take(routing))
    found.append(metrics.domain_specialization(routing, tokens % 3, 3))
    with torch.no_grad():
        layer.eval()
        found += [layer(x, tokens=tokens)[0], layer(x[:, :1], tokens=tokens[:, :1])[0]]
    return [value.detach() for value in found]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [*ROUTERS, "soft"])
def test_a_training_step_needs_no_float64(name, mode):
    experts = Experts(NUM_EXPERTS, DIM, 8)
    layer = SoftMoE(experts) if name == "soft" else MoE(ROUTERS[name](), experts, SwiGLU(DIM, 8))
    x, tokens = torch.randn(2, 12, DIM), torch.randint(20, (2, 12))
    want = training_step(copy.deepcopy(layer), x, tokens)
    enter, move, put = MODES[mode]
    with enter():
        got = training_step(move(layer), put(x), put(tokens))
    assert {value.device.type for value in got} == {"mps" if mode == "on MPS" else "cpu"}
    for mine, theirs in zip(numbers_of(got), want, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", [{}, {"centred": True}, {"proportional": True}])
@pytest.mark.parametrize("counts_on", ["the same device", "the CPU"])
def test_a_bias_update_needs_no_float64(how, mode, counts_on):
    enter, move, put = MODES[mode]
    router, want = SigmoidRouter(DIM, NUM_EXPERTS, 2), SigmoidRouter(DIM, NUM_EXPERTS, 2)
    balance.update_bias_(want, COUNTS, 0.01, **how)
    with enter():
        counts = COUNTS if counts_on == "the CPU" else put(COUNTS)
        balance.update_bias_(move(router), counts, 0.01, **how)
    (bias,) = numbers_of([router.bias])
    assert torch.equal(bias, want.bias) and bias.any()


@pytest.mark.parametrize("mode", MODES)
def test_upcycling_needs_no_float64(mode):
    enter, move, put = MODES[mode]
    mlp, x = SwiGLU(DIM, 8), torch.randn(5, DIM)
    want = mlp(x)
    with enter():
        y, _ = upcycle(move(mlp), NUM_EXPERTS, 4, num_shards=2)(put(x))
    torch.testing.assert_close(*numbers_of([y]), want)


@pytest.mark.parametrize(
    "dtype, times",
    [
        (torch.uint8, 8),
        (torch.int32, 1),
        (torch.int32, 10**7 + 1),
        (torch.int64, 10**12 + 1),
        (torch.float32, 1000),
        (torch.float64, 10**12 + 1),
    ],
)
def test_violations_are_exact_at_the_mean_however_many_tokens(dtype, times):
    got = balance.violations((COUNTS * times).to(dtype))
    assert got.sign().tolist() == [1, -1, -1, 0, -1, -1, 1, 0]
    want = [(count - 12) / 12 for count in COUNTS.tolist()]
    assert got.tolist() == pytest.approx(want, rel=1e-6)
    wide = balance.violations((COUNTS * times).to(dtype), torch.float64)
    assert wide.tolist() == pytest.approx(want, rel=1e-12)


def test_the_mode_and_the_pretended_device_refuse_float64():
    for mode, x in ((NoFloat64, torch.ones(2)), (mps, OnMPS(torch.ones(2)))):
        for widen in (torch.Tensor.double, lambda x: x.to("cpu", torch.float64)):
            with mode(), pytest.raises(TypeError, match="float64"):
                widen(x)
    with mps(), pytest.raises(RuntimeError, match="one device"):
        OnMPS(torch.ones(2)) + torch.ones(2)
    assert OnMPS(torch.ones(2)).cpu().double().tolist() == [1, 1]
