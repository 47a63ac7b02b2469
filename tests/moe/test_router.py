"""Routers against the papers' equations, written as plain Python loops over one token."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call

from moe import Routing, SigmoidRouter, SoftmaxRouter
from moe.router import sigmoid

ROUTERS = [SoftmaxRouter, SigmoidRouter]
SIZES = [  # num_experts, top_k, num_groups, top_groups
    (12, 3, 4, 2),
    (12, 4, 3, 1),  # all experts of the one group
    (6, 4, 3, 2),
    (12, 4, 4, 4),
    (7, 3, 1, 1),
    (5, 5, 1, 1),
    (8, 1, 2, 1),
    (1, 1, 1, 1),
]


def by_hand(router, logits, bias):
    """V2 eq. 21-22 and section 2.2.2, or V3 eq. 13-16: the experts of one token and their weights."""
    if isinstance(router, SigmoidRouter):
        scores = [1 / (1 + math.exp(-z)) for z in logits]
    else:
        scores = [math.exp(z) / sum(math.exp(other) for other in logits) for z in logits]
    best = 2 if isinstance(router, SigmoidRouter) else 1
    biased = [score + b for score, b in zip(scores, bias)]
    size = len(logits) // router.num_groups
    groups = [range(g * size, (g + 1) * size) for g in range(router.num_groups)]
    groups.sort(key=lambda group: sum(sorted(biased[i] for i in group)[-best:]))
    candidates = [i for group in groups[-router.top_groups :] for i in group]
    chosen = sorted(candidates, key=lambda i: biased[i])[-router.top_k :]
    total = sum(scores[i] for i in chosen) if router.normalize else 1
    return {i: router.routed_scaling_factor * scores[i] / total for i in chosen}


def make(kind, sizes, dim=5, bias=None, **options):
    """A router in float64 with a selection bias of both signs and the scores' magnitude."""
    num_experts, top_k, num_groups, top_groups = sizes
    router = kind(dim, num_experts, top_k, num_groups, top_groups, **options).double()
    if kind is SigmoidRouter:
        router.bias.copy_(torch.randn(num_experts) if bias is None else torch.tensor(bias))
    return router


def same(a: Routing, b: Routing) -> bool:
    """Equal to the last bit, with NaN equal to NaN."""
    return all(torch.equal(x.nan_to_num(nan=-7.0), y.nan_to_num(nan=-7.0)) for x, y in zip(a[:4], b[:4]))


def by_expert(routing: Routing, num_experts: int):
    """(tokens, experts): each expert's weight, 0 where not chosen."""
    weights = routing.weights.new_zeros(len(routing.weights), num_experts)
    return weights.scatter(1, routing.experts, routing.weights)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", ROUTERS)
def test_routing_equals_a_loop_over_the_equations(kind, sizes, normalize):
    router = make(kind, sizes, normalize=normalize, routed_scaling_factor=2.5)
    bias = router.bias.tolist() if kind is SigmoidRouter else [0] * sizes[0]
    x = torch.randn(3, 11, 5, dtype=torch.float64)
    routing = router(x)
    assert routing.logits.shape == routing.scores.shape == (3, 11, sizes[0])
    assert routing.experts.shape == routing.weights.shape == (3, 11, sizes[1])
    for token, experts, weights in zip(x.flatten(0, 1), *(f.flatten(0, 1) for f in routing[:2])):
        logits = [sum(w * u for w, u in zip(row, token.tolist())) for row in router.weight.tolist()]
        want = by_hand(router, logits, bias)
        assert dict(zip(experts.tolist(), weights.tolist())) == pytest.approx(want, rel=1e-12)


def test_the_papers_defaults_are_the_defaults():
    softmax, sig = SoftmaxRouter(4, 8, 2), SigmoidRouter(4, 8, 2)
    assert not softmax.normalize and sig.normalize
    assert softmax.routed_scaling_factor == sig.routed_scaling_factor == 1
    assert not sig.bias.any()
    assert SigmoidRouter(400, 64, 2).weight.std().item() == pytest.approx(0.05, rel=0.05)


def test_bias_chooses_but_never_weighs():
    router = make(SigmoidRouter, (6, 6, 1, 1))  # all are chosen: the bias could only change weights
    x = torch.randn(9, 5, dtype=torch.float64)
    before = by_expert(router(x), 6)
    router.bias.copy_(torch.tensor([9.0, -9, 0, 3, -2, 1e6]))
    torch.testing.assert_close(by_expert(router(x), 6), before, rtol=1e-12, atol=0)
    chooser = make(SigmoidRouter, (6, 1, 1, 1), bias=[0, 0, 9.0, 0, 0, 0], normalize=False)
    routing = chooser(x)
    assert (routing.experts == 2).all()
    assert torch.equal(routing.weights[:, 0], routing.scores[:, 2])


def test_scores_near_1e_8_are_weighed_though_biases_near_12_choose():
    router = SigmoidRouter(dim=4, num_experts=4, top_k=3)
    router.weight.data.copy_(torch.diag(torch.tensor([-18.0, -18.5, -19.0, -17.5])))
    router.bias.copy_(torch.tensor([12.0, 12.25, 11.5, 11.75]))
    routing = router(torch.ones(4))
    want = by_hand(router, [-18.0, -18.5, -19.0, -17.5], router.bias.tolist())
    assert dict(zip(routing.experts.tolist(), routing.weights.tolist())) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    "bias, want",
    [
        ([1, 1, -9, -0.5, -0.5, -0.5], {0, 1, 2}),  # the open group's third is below 0 and the closed group
        ([-9, -9, -9, -20, -20, -20], {0, 1, 2}),
        ([-20, -20, 5, -9, -9, -9], {0, 1, 2}),  # -20 + 5 is more than -9 - 9
        ([-20, -20, 1, -9, -9, -9], {3, 4, 5}),
    ],
)
def test_closed_groups_stay_closed_however_negative_the_open_ones_are(bias, want):
    router = make(SigmoidRouter, (6, 3, 2, 1), bias=[float(b) for b in bias])
    router.weight.data.mul_(0.01)
    assert all(set(row) == want for row in router(torch.randn(8, 5, dtype=torch.float64)).experts.tolist())


@pytest.mark.parametrize("sizes", [(12, 3, 4, 2), (7, 3, 1, 1)])
def test_a_constant_on_every_bias_changes_nothing(sizes):
    router = make(SigmoidRouter, sizes)
    x = torch.randn(64, 5, dtype=torch.float64)
    before = router(x)
    for constant in (-3.0, 0.5, 100.0):
        router.bias.add_(constant)
        assert same(router(x), before)
        router.bias.sub_(constant)


@pytest.mark.parametrize("kind", ROUTERS)
def test_renaming_the_experts_renames_the_routing(kind):
    router = make(kind, (7, 3, 1, 1))
    other = make(kind, (7, 3, 1, 1))
    names = torch.randperm(7)  # expert i of `other` is expert names[i] of `router`
    other.load_state_dict({key: value[names] for key, value in router.state_dict().items()})
    x = torch.randn(20, 5, dtype=torch.float64)
    routing, renamed = router(x), other(x)
    assert torch.equal(names[renamed.experts], routing.experts)
    torch.testing.assert_close(renamed.weights, routing.weights, rtol=1e-12, atol=0)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", ROUTERS)
def test_gradients_equal_finite_differences(kind, normalize):
    router = make(kind, (6, 3, 3, 2), normalize=normalize, routed_scaling_factor=2.5)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def weights(x, weight):
        routing = functional_call(router, {"weight": weight}, (x,))
        assert not routing.experts.requires_grad
        return routing.weights, routing.scores, routing.logits

    assert torch.autograd.gradcheck(weights, (x, router.weight))


def test_top_1_gives_the_router_a_gradient_only_if_the_weight_is_not_normalized():
    x = torch.randn(9, 5, dtype=torch.float64)
    for kind in ROUTERS:
        raw, normalized = (make(kind, (6, 1, 1, 1), normalize=normalize) for normalize in (False, True))
        raw(x).weights.square().sum().backward()
        normalized(x).weights.square().sum().backward()
        assert raw.weight.grad.abs().sum() > 1e-3
        assert normalized.weight.grad.abs().max() < 1e-15
        assert (normalized(x).weights - 1).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sigmoid_equals_torch_and_has_a_finite_gradient_everywhere(dtype):
    points = [-1e4, -200, -90, -75, -18, -1, -1e-3, 0, 1e-3, 2, 90, 1e4]
    z = torch.tensor(points, dtype=dtype, requires_grad=True)
    other = z.detach().clone().requires_grad_()
    mine, theirs = sigmoid(z), other.sigmoid()
    mine.sum().backward()
    theirs.sum().backward()
    torch.testing.assert_close(mine, theirs, rtol=5e-7, atol=1e-30)
    torch.testing.assert_close(z.grad, other.grad, rtol=2e-6, atol=1e-30)


def test_a_token_that_no_expert_wants_gets_weights_near_0_not_nan():
    router = SigmoidRouter(dim=1, num_experts=4, top_k=2)
    router.weight.data.fill_(-1)
    weights = router(torch.tensor([[1e3]])).weights
    assert weights.isfinite().all() and weights.abs().max() < 1e-10


@pytest.mark.parametrize("how", ["bf16 input", "bf16 module", "autocast"])
@pytest.mark.parametrize("kind", ROUTERS)
def test_logits_are_computed_in_fp32(kind, how):
    router = kind(dim=96, num_experts=8, top_k=2)
    x = torch.randn(33, 96).bfloat16()
    if how == "bf16 module":
        router = router.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        routing = router(x.float() if how == "autocast" else x)
    assert {f.dtype for f in routing[1:4]} == {torch.float32} and routing.experts.dtype == torch.int64
    exact = x.double() @ router.weight.double().T
    assert (routing.logits.double() - exact).abs().max() < 5e-6  # bf16 would be off by 1e-2


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_bias_is_a_saved_buffer_that_no_cast_can_narrow(cast):
    router = SigmoidRouter(dim=4, num_experts=3, top_k=1)
    values = torch.tensor([0.123456, 12.0001, -0.001])
    router.bias.copy_(values)
    router.to(cast)
    assert router.weight.dtype == cast
    assert router.bias.dtype == (torch.float64 if cast == torch.float64 else torch.float32)
    assert torch.equal(router.bias.float(), values)
    assert "bias" in router.state_dict() and "bias" not in dict(router.named_parameters())
    fresh = SigmoidRouter(dim=4, num_experts=3, top_k=1)
    fresh.load_state_dict(router.state_dict())
    assert torch.equal(fresh.bias, values)


@pytest.mark.parametrize("dim, num_experts", [(64, 8), (7, 5), (40, 33), (24, 80)])
@pytest.mark.parametrize("kind", ROUTERS)
def test_routing_does_not_depend_on_other_tokens_to_the_last_bit(kind, dim, num_experts):
    router = kind(dim, num_experts, top_k=3)
    if kind is SigmoidRouter:
        router.bias.copy_(torch.randn(num_experts))
    x = torch.randn(1000, dim)
    whole = router(x)
    for n in range(1, 41):
        assert same(router(x[:n]), whole.map(lambda field, n=n: field[:n])), n
    shuffle = torch.randperm(1000)
    assert same(router(x[shuffle]), whole.map(lambda field: field[shuffle]))
    for hostile in (1e30, -1e38, math.inf, math.nan):
        crowd = torch.cat((x[:5], torch.full((12, dim), hostile)))
        both = zip(router(crowd)[:4], whole[:4])
        assert all(torch.equal(field[:5], alone[:5]) for field, alone in both), hostile


@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4), (4,), (2, 1, 3, 4)])
def test_leading_axes_are_kept_and_may_be_empty(shape):
    for kind in ROUTERS:
        routing = kind(4, 6, 2)(torch.randn(shape, requires_grad=True))
        assert routing.experts.shape == routing.weights.shape == (*shape[:-1], 2)
        assert routing.scores.shape == routing.logits.shape == (*shape[:-1], 6)
        routing.weights.sum().backward()


@pytest.mark.parametrize(
    "sizes, options, message",
    [
        ((6, 2, 4, 1), {}, "num_groups=4 does not divide num_experts=6; 1, 2, 3, 6 do"),
        ((8, 2, 8, 9), {}, "top_groups=9 must lie in 1..8"),
        ((8, 2, 8, 0), {}, "top_groups=0 must lie in 1..8"),
        ((4, 3, 2, 1), {}, "top_k=3 must lie in 1..2"),
        ((4, 0, 1, 1), {}, "top_k=0 must lie in 1..4"),
        ((4, 5, 1, 1), {}, "top_k=5 must lie in 1..4"),
        ((0, 1, 1, 1), {}, "num_experts=0"),
        ((4, 1, 0, 1), {}, "num_groups=0"),
        ((4, 1, 1, 1), {"dim": 0}, "dim=0"),
        ((4, 1, 1, 1), {"routed_scaling_factor": math.nan}, "routed_scaling_factor=nan"),
        ((4, 1, 1, 1), {"routed_scaling_factor": 0.0}, "routed_scaling_factor=0"),
    ],
)
def test_inconsistent_sizes_are_refused_by_name_and_value(sizes, options, message):
    for kind in ROUTERS:
        with pytest.raises(ValueError, match=re.escape(message)):
            make(kind, sizes, **options)


def test_groups_of_one_expert_suit_v2_and_are_refused_by_v3():
    assert SoftmaxRouter(4, 4, 2, num_groups=4, top_groups=2)(torch.randn(3, 4)).experts.shape == (3, 2)
    with pytest.raises(ValueError, match=r"leaves 1 expert a group.*needs 2 a group"):
        SigmoidRouter(4, 4, 2, num_groups=4, top_groups=2)


@settings(max_examples=300)
@given(
    st.sampled_from(ROUTERS),
    st.tuples(*[st.integers(0, 4)] * 5),
    st.sampled_from([0] * 8 + [1, -1]),
    st.booleans(),
    st.sampled_from([2.5, 1, 16.0, 1e-3, 1e30, 0.0, -1.0, math.inf, math.nan]),
)
def test_any_numbers_build_a_router_that_works_or_a_value_error(kind, sizes, odd, normalize, scale):
    dim, groups, per_group, top, k = sizes
    n = groups * per_group + odd
    torch.manual_seed(0)
    try:
        router = kind(dim, n, k, groups, top, normalize, scale)
    except ValueError:
        return
    if kind is SigmoidRouter:
        router.bias.copy_(torch.randn(n))
    routing = router(torch.randn(6, dim))
    assert routing.weights.isfinite().all() and (routing.weights >= 0).all()
    assert ((routing.experts >= 0) & (routing.experts < n)).all()
    for row in routing.experts.tolist():
        assert len(set(row)) == k and len({i // (n // groups) for i in row}) <= top
    if normalize:
        torch.testing.assert_close(routing.weights.sum(-1), torch.full((6,), float(scale)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("x", [torch.zeros(3, 5), torch.zeros(3, 4, dtype=torch.int64), torch.tensor(1.0)])
def test_wrong_x_is_refused(x):
    for kind in ROUTERS:
        with pytest.raises(ValueError, match=r"x is .*expected floating-point \(..., dim=4\)"):
            kind(4, 6, 2)(x)


@pytest.mark.parametrize("num_groups, top_groups", [(1, 1), (4, 2)])
@pytest.mark.parametrize("version", ["V2", "V3"])
def test_routing_equals_transformers(version, num_groups, top_groups):
    pytest.importorskip("transformers")
    options = {"hidden_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 3}
    options |= {"n_group": num_groups, "topk_group": top_groups}
    if version == "V3":
        from transformers.models.deepseek_v3 import modeling_deepseek_v3 as module
        from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config as Config

        theirs = module.DeepseekV3TopkRouter(Config(routed_scaling_factor=2.5, **options))
        theirs.e_score_correction_bias.copy_(torch.randn(8))
        ours = SigmoidRouter(32, 8, 3, num_groups, top_groups, routed_scaling_factor=2.5)
        ours.bias.copy_(theirs.e_score_correction_bias)
    else:
        from transformers.models.deepseek_v2 import modeling_deepseek_v2 as module
        from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config as Config

        options["topk_method"] = "greedy" if num_groups == 1 else "group_limited_greedy"
        theirs = module.DeepseekV2TopkRouter(Config(routed_scaling_factor=16.0, **options))
        ours = SoftmaxRouter(32, 8, 3, num_groups, top_groups, routed_scaling_factor=16.0)
    theirs.weight.data.copy_(ours.weight.data)
    x = torch.randn(50, 32)
    logits, weights, experts = theirs(x)
    routing = ours(x)
    want = by_expert(Routing(experts, weights, logits, logits), 8)
    torch.testing.assert_close(routing.logits, logits, rtol=0, atol=5e-6)
    torch.testing.assert_close(by_expert(routing, 8), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.parametrize("tokens", [0, 1, 48, 100])
def test_gradients_of_the_logits_are_those_of_a_matmul(kind, tokens):
    router = kind(5, 7, 2).double()
    x = torch.randn(tokens, 5, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(tokens, 7, dtype=torch.float64)
    mine = torch.autograd.grad(router(x).logits, (x, router.weight), direction)
    theirs = torch.autograd.grad(x @ router.weight.T, (x, router.weight), direction)
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


def test_a_narrow_input_is_saved_in_its_own_dtype():
    router, kept = SoftmaxRouter(32, 8, 2), []

    def pack(tensor):
        kept.append((tensor.dtype, tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        router(torch.randn(100, 32, requires_grad=True).bfloat16())
    assert (torch.bfloat16, (100, 32)) in kept and (torch.float32, (100, 32)) not in kept
