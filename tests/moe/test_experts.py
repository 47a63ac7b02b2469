"""The experts against V3 eq. 12, middle term, written token by token with separate gate and up."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe import Experts, Gated, Routing, SwiGLU, fast

NUM_EXPERTS, DIM, HIDDEN = 5, 7, 3
FIRST = torch.zeros(4, 2, dtype=torch.int64)
ROUTINGS = {  # (tokens, top_k); a few, 8, and 16 or more tokens take different paths
    "few tokens": torch.tensor([[0, 3], [3, 1], [4, 0]]),
    "many tokens": torch.tensor([[i % 5, (i + i // 5 % 4 + 1) % 5] for i in range(37)]),
    "8 tokens": torch.tensor([[0, 3], [3, 1], [4, 0], [3, 2]] * 2),
    "an expert without tokens": torch.tensor([[0, 4], [1, 4]] * 10),
    "all tokens to one expert": torch.full((20, 1), 3),
    "all experts": torch.arange(5).expand(18, 5),
    "empty slots": torch.tensor([[2, -1], [-1, 0], [-1, -1], [4, 1]] * 5),
    "all slots empty": torch.full((4, 3), -1),
    "the same expert twice": torch.tensor([[2, 2], [0, 2]]),
    "an empty slot": torch.tensor([[3, -1]]),
    "one token": torch.tensor([[4, 1, 2]]),
    "no token": torch.empty(0, 2, dtype=torch.int64),
}


def silu(z):
    return z / (1 + (-z).exp())


def by_hand(x, experts, weights, gate_up, down):
    """V3 eq. 12: the sum of g_it FFN_i(u_t), for each token over its slots."""
    rows = []
    for u, chosen, g in zip(x, experts.tolist(), weights):
        y = 0 * u
        for slot, i in enumerate(chosen):
            if i >= 0:
                hidden = gate_up.shape[1] // 2
                gate, up = gate_up[i, :hidden] @ u, gate_up[i, hidden:] @ u
                y = y + g[slot] * (down[i] @ (silu(gate) * up))
        rows.append(y)
    return torch.stack(rows) if rows else x * 0


def routing_of(experts, weights=None, num_experts=NUM_EXPERTS):
    scores = torch.zeros(*experts.shape[:-1], num_experts)
    return Routing(experts, torch.rand(experts.shape) if weights is None else weights, scores, scores)


def inputs(experts, dtype=torch.float64, dim=DIM):
    x = torch.randn(len(experts), dim, dtype=dtype, requires_grad=True)
    weights = torch.rand(experts.shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return x, weights.requires_grad_()


def gradients(y, of):
    """Of a loss that weights every output differently; 0 where autograd returns None."""
    direction = torch.arange(y.numel(), dtype=torch.float64).cos().view_as(y).to(y.dtype)
    found = torch.autograd.grad((y * direction).sum(), of, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, of)]


@pytest.mark.parametrize("experts", ROUTINGS.values(), ids=ROUTINGS)
@pytest.mark.parametrize("path", ["forward", "product", "reference", "by_block", "by_slot"])
def test_output_and_gradients_equal_the_equation(path, experts):
    layer = Experts(NUM_EXPERTS, DIM, HIDDEN).double()
    x, weights = inputs(experts)
    parameters = (x, weights, layer.gate_up, layer.down)
    want = by_hand(x, experts, weights, layer.gate_up, layer.down)
    if path in ("by_block", "by_slot"):
        y = getattr(fast, path)(x, experts, weights, layer.gate_up, layer.down)
    else:
        layer.product = torch.nn.functional.linear if path == "product" else None
        run = layer.reference if path == "reference" else layer
        y = run(x, routing_of(experts, weights))
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-14)
    if y.requires_grad:  # not where the reference loop has no iterations
        for mine, theirs in zip(gradients(y, parameters), gradients(want, parameters)):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("experts", ROUTINGS.values(), ids=ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grouped_matmul_equals_the_equation(dtype, experts):
    layer = Experts(NUM_EXPERTS, 16, 8).to(dtype)
    x, weights = inputs(experts, dtype, dim=16)
    parameters = (x, weights, layer.gate_up, layer.down)
    want = by_hand(x.double(), experts, weights.double(), layer.gate_up.double(), layer.down.double())
    y = fast.grouped(x, experts, weights, layer.gate_up, layer.down)
    close = 1e-6 if dtype == torch.float32 else 2e-2
    pairs = [(y, want), *zip(gradients(y, parameters), gradients(want, parameters))]
    for mine, theirs in pairs:
        assert (mine.double() - theirs.double()).norm() <= close * theirs.norm()


@pytest.mark.parametrize("name", ["no token", "all slots empty"])
def test_without_tokens_every_gradient_is_0(name):
    layer = Experts(NUM_EXPERTS, 16, 8)
    x, weights = inputs(ROUTINGS[name], torch.float32, dim=16)
    for run in (fast.by_block, fast.grouped):
        y = run(x, ROUTINGS[name], weights, layer.gate_up, layer.down)
        assert y.shape == x.shape and not y.any()
        for gradient in torch.autograd.grad(y.sum(), (x, weights, layer.gate_up, layer.down)):
            assert not gradient.any()


def test_product_is_called_for_every_expert_even_without_rows():
    layer, called = Experts(NUM_EXPERTS, 16, 8), []

    def product(rows, weight):
        called.append((len(rows), tuple(weight.shape)))
        return 2 * torch.nn.functional.linear(rows, weight)

    experts = torch.zeros(5, 1, dtype=torch.int64)
    x, weights = inputs(experts, torch.float32, dim=16)
    layer.product = product
    y = layer(x, routing_of(experts, weights))
    assert sorted(called) == sorted(
        [(5, (16, 16)), (5, (16, 8))] + (NUM_EXPERTS - 1) * [(0, (16, 16)), (0, (16, 8))]
    )
    gate, up = (4 * x @ layer.gate_up[0].T / 2).chunk(2, -1)
    want = 2 * (torch.nn.functional.silu(gate) * up) @ layer.down[0].T * weights
    torch.testing.assert_close(y, want)
    y.sum().backward()
    assert layer.gate_up.grad is not None and not layer.gate_up.grad[1:].any()


@pytest.mark.parametrize("name", ["an expert without tokens", "empty slots", "no token"])
def test_product_gets_each_experts_tokens_in_order_and_its_weights(name):
    layer, calls, experts = Experts(NUM_EXPERTS, DIM, HIDDEN).double(), [], ROUTINGS[name]
    x, weights = inputs(experts)

    def product(rows, weight):
        calls.append((rows, weight))
        return rows @ weight.T

    layer.product = product
    y = layer(x, routing_of(experts, weights))
    assert len(calls) == 2 * NUM_EXPERTS
    for i, ((rows, gate_up), (hidden, down)) in enumerate(zip(calls[::2], calls[1::2])):
        assert torch.equal(gate_up, layer.gate_up[i]) and torch.equal(down, layer.down[i])
        tokens = [token for token, chosen in enumerate(experts.tolist()) for e in chosen if e == i]
        assert torch.equal(rows, x[tokens]) and hidden.shape == (len(tokens), HIDDEN)
    want = layer.reference(x, routing_of(experts, weights))
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-14)
    layer.product = None
    torch.testing.assert_close(layer(x, routing_of(experts, weights)), y, rtol=1e-12, atol=1e-14)


def test_product_gets_rows_and_weights_in_the_computed_dtype():
    layer, dtypes = Experts(NUM_EXPERTS, 16, 8), set()
    layer.product = lambda rows, weight: dtypes.add((rows.dtype, weight.dtype)) or rows @ weight.T
    experts = torch.randint(NUM_EXPERTS, (20, 2))
    x, weights = inputs(experts, torch.bfloat16, dim=16)
    layer(x, routing_of(experts, weights)).sum().backward()
    assert dtypes == {(torch.bfloat16, torch.bfloat16)} and layer.gate_up.grad.dtype == torch.float32


def test_gradients_equal_finite_differences():
    layer = Experts(3, 4, 2).double()
    experts = torch.tensor([[0, 2], [2, -1]] * 9)
    x, weights = torch.randn(18, 4, dtype=torch.float64), torch.rand(18, 2, dtype=torch.float64)
    given = [t.detach().requires_grad_() for t in (x, weights, layer.gate_up, layer.down)]
    assert torch.autograd.gradcheck(lambda x, *rest: fast.by_block(x, experts, *rest), given)


@pytest.mark.parametrize(
    "dtype, error", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize("tokens", [3, 20])
def test_the_output_has_the_inputs_dtype(dtype, error, tokens):
    layer = Experts(NUM_EXPERTS, 16, 8)  # master weights stay fp32
    experts = torch.randint(NUM_EXPERTS, (tokens, 2))
    x, weights = inputs(experts, dtype, dim=16)
    y = layer(x, routing_of(experts, weights))
    want = by_hand(x.double(), experts, weights.double(), layer.gate_up.double(), layer.down.double())
    assert y.dtype == dtype
    assert (y.double() - want).abs().max() < error * want.abs().max()
    y.sum().backward()
    assert x.grad.dtype == dtype and layer.gate_up.grad.dtype == torch.float32


def test_autocast_overrides_the_inputs_dtype():
    layer, experts = Experts(NUM_EXPERTS, 16, 8), torch.randint(NUM_EXPERTS, (20, 2))
    x, weights = inputs(experts, torch.float32, dim=16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, routing_of(experts, weights))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x, routing_of(experts, weights)), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan, 1e38])
@pytest.mark.parametrize("bad_token", [0, 2])  # padding rows hold token 0
@pytest.mark.parametrize(
    "path, tokens", [("by_slot", 3), ("by_block", 12), ("by_block", 40), ("grouped", 12), ("grouped", 40)]
)
def test_a_token_that_is_not_finite_does_not_affect_the_others(path, tokens, bad_token, poison):
    layer = Experts(NUM_EXPERTS, 16, 8)
    experts = torch.randint(-1, NUM_EXPERTS, (tokens, 2))
    experts[bad_token, 0] = 1
    x, weights = inputs(experts, torch.float32, dim=16)
    clean = getattr(fast, path)(x, experts, weights, layer.gate_up, layer.down)
    bad = x.detach().clone()
    bad[bad_token] = poison
    y = getattr(fast, path)(bad, experts, weights, layer.gate_up, layer.down)
    others = torch.arange(tokens) != bad_token
    assert torch.equal(y[others], clean[others])
    assert not torch.equal(y[bad_token], clean[bad_token])


def test_leading_axes_are_kept():
    layer, experts = Experts(NUM_EXPERTS, DIM, HIDDEN), torch.randint(NUM_EXPERTS, (2, 3, 4, 2))
    x, weights = torch.randn(2, 3, 4, DIM), torch.rand(2, 3, 4, 2)
    flat = layer(x.view(24, DIM), routing_of(experts.view(24, 2), weights.view(24, 2)))
    assert torch.equal(layer(x, routing_of(experts, weights)), flat.view(2, 3, 4, DIM))
    one = layer(x[0, 0, 0], routing_of(experts[0, 0, 0], weights[0, 0, 0]))
    torch.testing.assert_close(one, flat[0])


@pytest.mark.parametrize(
    "x, experts, weights, message",
    [
        (torch.zeros(4, 7), torch.full((4, 2), -2), None, r"holds -2; expected 0..4, or -1"),
        (torch.zeros(4, 7), torch.full((4, 2), 5), None, r"holds 5; expected 0..4, or -1"),
        (torch.zeros(4, 7), torch.zeros(4, 2), None, r"torch.float32; it must be torch.int64"),
        (torch.zeros(4, 7), FIRST.int(), None, r"torch.int32"),
        (torch.zeros(4, 7), FIRST[:3], None, r"both must be \(4,\) \+ \(top_k >= 1,\)"),
        (torch.zeros(4, 7), FIRST[:, :0], None, r"both must be \(4,\)"),
        (torch.zeros(4, 7), FIRST, torch.zeros(4, 1), r"weights \(4, 1\)"),
        (torch.zeros(7), torch.tensor(0), None, r"both must be \(\)"),
        (torch.zeros(4, 8), FIRST, None, r"x is torch.float32 \(4, 8\).*dim=7"),
        (torch.zeros(()), FIRST, None, r"x is torch.float32 \(\)"),
        (torch.zeros(4, 7).long(), FIRST, None, r"x is torch.int64"),
    ],
)
def test_a_routing_that_does_not_fit_is_refused(x, experts, weights, message):
    layer = Experts(NUM_EXPERTS, DIM, HIDDEN)
    for run in (layer, layer.reference):
        with pytest.raises(ValueError, match=message):
            run(x, routing_of(experts, weights))


@given(st.lists(st.tuples(*[st.integers(-3, 6)] * 2), max_size=20))
def test_any_indices_are_run_or_refused(slots):
    layer = Experts(NUM_EXPERTS, 2, 1)
    experts = torch.tensor(slots, dtype=torch.int64).view(-1, 2)
    fits = all(-1 <= i < NUM_EXPERTS for row in slots for i in row)
    try:
        assert layer(torch.ones(len(slots), 2), routing_of(experts)).isfinite().all() and fits
    except ValueError:
        assert not fits


@pytest.mark.parametrize("sizes", [(0, 4, 4), (2, 0, 4), (2, 4, -1)])
def test_sizes_below_1_are_refused(sizes):
    with pytest.raises(ValueError, match="must be at least 1"):
        Experts(*sizes)
    if min(sizes[1:]) < 1:
        with pytest.raises(ValueError, match="must be at least 1"):
            SwiGLU(*sizes[1:])


def test_experts_are_initialized_like_linear_layers():
    layer = Experts(20, 100, 25)
    for weight, fan_in in ((layer.gate_up, 100), (layer.down, 25)):
        assert weight.abs().max() <= fan_in**-0.5
        assert weight.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.02)


def test_swiglu_equals_its_equation():
    layer = SwiGLU(DIM, HIDDEN).double()
    x = torch.randn(2, 9, DIM, dtype=torch.float64)
    gate, up = x @ layer.gate_up.weight[:HIDDEN].T, x @ layer.gate_up.weight[HIDDEN:].T
    torch.testing.assert_close(layer(x), (silu(gate) * up) @ layer.down.weight.T, rtol=1e-12, atol=1e-14)


def test_gated_weights_each_token_by_its_gate():
    layer = Gated(SwiGLU(DIM, HIDDEN), DIM).double()
    assert layer.state_dict().keys() == {"mlp.gate_up.weight", "mlp.down.weight", "gate.weight"}
    x = 3 * torch.randn(2, 9, DIM, dtype=torch.float64)
    weight = layer.mlp.gate_up.weight
    y = layer(x)
    for u, row in zip(x.flatten(0, 1), y.flatten(0, 1)):
        mlp = layer.mlp.down.weight @ (silu(weight[:HIDDEN] @ u) * (weight[HIDDEN:] @ u))
        share = 1 / (1 + math.exp(-sum((layer.gate.weight[0] * u).tolist())))
        torch.testing.assert_close(row, share * mlp, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(layer(x[0, 0]), y[0, 0])
