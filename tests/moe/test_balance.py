"""Balance losses against plain Python loops on uneven loads, and the loss-free bias update."""

import math

import pytest
import torch
from torch import nn

from moe import Routing, SigmoidRouter, SoftmaxRouter, balance

BATCH, TIME, NUM_EXPERTS, TOP_K, DEVICES, TOP_DEVICES = 3, 7, 6, 2, 3, 2
LOSSES = {
    "sequence": balance.sequence_loss,
    "switch": balance.switch_loss,
    "device": lambda routing, mask=None: balance.device_loss(routing, DEVICES, mask),
    "communication": lambda r, *mask: balance.communication_loss(r, DEVICES, TOP_DEVICES, *mask),
}


def uneven(empty_slots=False):
    """Sequences of different load, expert 5 unused; scores that do not sum to 1, as a sigmoid's."""
    experts = torch.rand(BATCH, TIME, 5).topk(TOP_K).indices
    experts[0, :4] = torch.tensor([1, 3])
    experts[2] = torch.tensor([0, 1])
    if empty_slots:
        experts[1, 2, 0] = experts[1, 3, 1] = -1
        experts[2, 5] = -1
    scores = torch.rand(BATCH, TIME, NUM_EXPERTS, dtype=torch.float64)
    weights = scores.gather(-1, experts.clamp(min=0))
    return Routing(experts, weights, scores, torch.randn(BATCH, TIME, NUM_EXPERTS, dtype=torch.float64))


def some_mask():
    mask = torch.ones(BATCH, TIME, dtype=torch.bool)
    mask[0, 4:] = False
    mask[1, :3] = False
    return mask


def load_and_share(tokens):
    """f and P of V3 eq. 18-20 over (experts, scores) of each token of one sequence."""
    slots = sum(i >= 0 for experts, _ in tokens for i in experts)
    load = [NUM_EXPERTS / slots * sum(i in experts for experts, _ in tokens) for i in range(NUM_EXPERTS)]
    share = [sum(scores[i] / sum(scores) for _, scores in tokens) / len(tokens) for i in range(NUM_EXPERTS)]
    return load, share


def by_hand(name, tokens):
    load, share = load_and_share(tokens)
    size = NUM_EXPERTS // DEVICES
    groups = [range(d * size, (d + 1) * size) for d in range(DEVICES)]
    device_share = [sum(share[i] for i in group) for group in groups]
    if name == "device":  # V2 eq. 26-28
        return sum(sum(load[i] for i in group) / size * p for group, p in zip(groups, device_share))
    if name == "communication":  # V2 eq. 29-31
        sent = [sum(any(i in group for i in experts) for experts, _ in tokens) for group in groups]
        return sum(DEVICES / (TOP_DEVICES * len(tokens)) * n * p for n, p in zip(sent, device_share))
    return sum(f * p for f, p in zip(load, share))  # V3 eq. 17


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("empty_slots", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_equals_a_loop_over_the_equations(name, empty_slots, masked):
    routing, mask = uneven(empty_slots), some_mask() if masked else None
    keep = torch.ones(BATCH, TIME, dtype=torch.bool) if mask is None else mask
    sequences = [
        [(e, s) for e, s, real in zip(*rows) if real]
        for rows in zip(routing.experts.tolist(), routing.scores.tolist(), keep.tolist())
    ]
    if name == "switch":
        sequences = [[token for tokens in sequences for token in tokens]]
    want = sum(by_hand(name, tokens) for tokens in sequences) / len(sequences)
    assert LOSSES[name](routing, mask).item() == pytest.approx(want, rel=1e-12)


def test_one_loss_a_sequence_is_not_one_loss_a_batch():
    experts = torch.tensor([[[0]] * 4, [[1]] * 4])
    scores = torch.tensor([[[1.0, 0.0]] * 4, [[0.0, 1.0]] * 4])
    routing = Routing(experts, torch.ones(2, 4, 1), scores, scores)
    assert balance.sequence_loss(routing) == 2  # each sequence uses one expert only: the worst value
    assert balance.switch_loss(routing) == 1  # together they are balanced


@pytest.mark.parametrize("masked", [False, True])
def test_given_counts_replace_the_load_but_not_the_share(masked):
    routing, mask = uneven(empty_slots=True), some_mask() if masked else None
    keep = torch.ones(BATCH, TIME, dtype=torch.bool) if mask is None else mask
    tokens = list(zip(routing.experts[keep].tolist(), routing.scores[keep].tolist()))
    _, share = load_and_share(tokens)
    counts = [7, 0, 1, 40, 2, 5]  # 55 slots
    want = sum(NUM_EXPERTS * count / 55 * p for count, p in zip(counts, share))
    got = balance.switch_loss(routing, mask, torch.tensor(counts))
    assert got.item() == pytest.approx(want, rel=1e-12)
    run = lambda v: balance.switch_loss(routing._replace(scores=v), mask, torch.tensor(counts))  # noqa: E731
    assert torch.autograd.gradcheck(run, routing.scores.requires_grad_())


def test_parts_with_global_counts_have_the_loss_and_gradient_of_the_whole():
    whole = uneven()
    parts = [whole.map(lambda field, i=i: field[i]) for i in range(BATCH)]
    counts = balance.tokens_per_expert(whole)

    def mean_of_parts(scores, counts):
        losses = [balance.switch_loss(p._replace(scores=s), None, counts) for p, s in zip(parts, scores)]
        return sum(losses) / BATCH

    values, gradients = [], []
    for loss in (
        lambda scores: balance.switch_loss(whole._replace(scores=scores)),
        lambda scores: mean_of_parts(scores, counts),
        lambda scores: mean_of_parts(scores, None),
    ):
        scores = whole.scores.clone().requires_grad_()
        values.append(loss(scores))
        gradients.append(torch.autograd.grad(values[-1], scores)[0])
    torch.testing.assert_close(values[1], values[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-15)
    assert abs(values[2] - values[0]) > 0.01  # the parts' own loads give another loss


def test_counts_for_a_wrong_number_of_experts_are_refused():
    with pytest.raises(ValueError, match=r"tokens_per_expert has shape \(5,\); the router expects \(6,\)"):
        balance.switch_loss(uneven(), None, torch.ones(5))


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("scale", [0.01, 1, 7])
def test_every_loss_is_1_at_perfect_balance(top_k, scale):
    slots = torch.arange(2 * 6 * top_k)  # a token's experts are 2 apart: each on a different device
    experts = ((slots // top_k) + 2 * (slots % top_k)).remainder(6).view(2, 6, top_k)
    scores = torch.full((2, 6, 6), scale, dtype=torch.float64)
    routing = Routing(experts, scores[..., :top_k], scores, scores)
    for loss in (
        balance.sequence_loss(routing),
        balance.switch_loss(routing),
        balance.device_loss(routing, 3),
        balance.communication_loss(routing, 3, top_k),
    ):
        assert loss.item() == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("logit", [-3.0, 0.0, 2.0])
def test_z_loss_of_n_equal_logits_is_their_value_plus_log_n_squared(logit):
    routing = uneven()._replace(logits=torch.full((BATCH, TIME, NUM_EXPERTS), logit, dtype=torch.float64))
    assert balance.z_loss(routing).item() == pytest.approx((logit + math.log(NUM_EXPERTS)) ** 2, rel=1e-12)


def test_z_loss_is_the_mean_over_real_tokens():
    routing, mask = uneven(), some_mask()
    values = [math.log(sum(math.exp(z) for z in row)) ** 2 for row in routing.logits[mask].tolist()]
    assert balance.z_loss(routing, mask).item() == pytest.approx(sum(values) / len(values), rel=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", [*LOSSES, "z"])
def test_gradients_equal_finite_differences(name, masked):
    routing, mask = uneven(empty_slots=True), some_mask() if masked else None
    if name == "z":
        run, values = lambda v: balance.z_loss(routing._replace(logits=v), mask), routing.logits
    else:
        run, values = lambda v: LOSSES[name](routing._replace(scores=v), mask), routing.scores
    assert torch.autograd.gradcheck(run, values.requires_grad_())


@pytest.mark.parametrize("garbage", [0.0, 1e300, math.inf, math.nan])
@pytest.mark.parametrize("name", [*LOSSES, "z"])
def test_values_of_masked_tokens_make_no_difference(name, garbage):
    loss = {**LOSSES, "z": balance.z_loss}[name]
    routing, mask = uneven(), some_mask()
    clean = loss(routing, mask)
    values = {f: getattr(routing, f).masked_fill(~mask.unsqueeze(-1), garbage) for f in ("scores", "logits")}
    values = {f: v.requires_grad_() for f, v in values.items()}
    dirty = loss(routing._replace(experts=routing.experts.where(mask.unsqueeze(-1), 5), **values), mask)
    assert torch.equal(clean, dirty)
    (gradient,) = torch.autograd.grad(dirty, values["logits" if name == "z" else "scores"])
    assert gradient.isfinite().all() and not gradient[~mask].any()


@pytest.mark.parametrize("how", ["all masked", "no token"])
@pytest.mark.parametrize("garbage", [0.5, math.inf, math.nan])
@pytest.mark.parametrize("name", [*LOSSES, "z"])
def test_without_tokens_a_loss_is_0_with_gradient_0(name, garbage, how):
    time = TIME if how == "all masked" else 0
    values = torch.full((BATCH, time, NUM_EXPERTS), garbage, requires_grad=True)
    experts = torch.zeros(BATCH, time, TOP_K, dtype=torch.int64)
    routing = Routing(experts, values[..., :TOP_K], values, values)
    mask = torch.zeros(BATCH, time, dtype=torch.bool) if time else None
    loss = {**LOSSES, "z": balance.z_loss}[name](routing, mask)
    assert loss == 0
    assert not torch.autograd.grad(loss, values)[0].any()
    assert not balance.tokens_per_expert(routing, mask).any()


def test_a_sequence_that_is_all_padding_does_not_count():
    routing = uneven()
    mask = torch.ones(BATCH, TIME, dtype=torch.bool)
    mask[1] = False
    others = routing.map(lambda field: field[[0, 2]])
    for name, loss in LOSSES.items():
        assert loss(routing, mask).item() == pytest.approx(loss(others).item(), rel=1e-12), name


def test_leading_axes_before_time_are_sequences():
    routing = uneven()
    deep = routing.map(lambda field: field.unsqueeze(1).expand(-1, 2, -1, -1))
    first = routing.map(lambda field: field[0])
    token = routing.map(lambda field: field[0, 0])
    for loss in LOSSES.values():
        assert loss(deep).item() == pytest.approx(loss(routing).item(), rel=1e-12)
        assert torch.equal(loss(first), loss(routing.map(lambda field: field[:1])))
        assert torch.equal(loss(token), loss(routing.map(lambda field: field[:1, :1])))


@pytest.mark.parametrize("name", [*LOSSES, "z"])
def test_autocast_does_not_round_a_loss(name):
    loss, routing = {**LOSSES, "z": balance.z_loss}[name], uneven()
    routing = Routing(routing.experts, *(field.float() for field in routing[1:4]))
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(routing)
    assert torch.equal(inside, loss(routing)) and inside.dtype == torch.float32


@pytest.mark.parametrize("masked", [False, True])
def test_tokens_per_expert_counts_real_slots_that_are_not_empty(masked):
    routing, mask = uneven(empty_slots=True), some_mask() if masked else None
    want = [0] * NUM_EXPERTS
    kept = routing.experts[some_mask()] if masked else routing.experts
    for i in kept.flatten().tolist():
        if i >= 0:
            want[i] += 1
    counts = balance.tokens_per_expert(routing, mask)
    assert counts.tolist() == want and counts.dtype == torch.int64


@pytest.mark.parametrize(
    "load, want",
    [([4, 4, 4], 0), ([6, 3, 3], 0.5), ([0, 12, 0, 0], 3), ([0, 0], 0), ([1.5, 0.5], 0.5), ([3], 0)],
)
def test_max_violation_is_the_excess_of_the_busiest_over_the_mean(load, want):
    assert balance.max_violation(torch.tensor(load)).item() == pytest.approx(want, rel=1e-12)


def test_imbalances_of_different_batches_cancel():
    counts = torch.tensor([[[6, 0, 3, 3], [1, 1, 1, 5]], [[0, 6, 3, 3], [2, 2, 2, 2]]])  # 2 batches, 2 layers
    assert balance.max_violation(counts).tolist() == [[1, 1.5], [1, 0]]
    assert balance.max_violation(counts.sum(0)).tolist() == [0, 0.75]  # MaxVio_global of each layer


def router(num_experts=4, **options):
    return SigmoidRouter(dim=3, num_experts=num_experts, top_k=2, **options)


@pytest.mark.parametrize(
    "load, steps",
    [
        ([5, 1, 3, 3], [-1, 1, 0, 0]),
        ([900, 1, 1, 2], [-1, 1, 1, 1]),  # the sign only, however large the gap; relative to the mean
        ([0, 0, 0, 0], [0, 0, 0, 0]),
        ([3, 2, 2, 2], [-1, 1, 1, 1]),
    ],
)
def test_bias_moves_by_rate_towards_the_mean_load(load, steps):
    plain, centred = router(), router()
    start = torch.tensor([0.5, -0.25, 1.0, 2.0])
    for one, is_centred in ((plain, False), (centred, True)):
        saved = one.state_dict()["bias"]  # the tensor itself, as a checkpoint holds it
        one.bias.copy_(start)
        balance.update_bias_(one, torch.tensor(load), rate=0.125, centred=is_centred)
        mean = sum(steps) / 4 if is_centred else 0
        assert one.bias.tolist() == [b + 0.125 * (s - mean) for b, s in zip(start.tolist(), steps)]
        assert saved is not None and torch.equal(saved, one.bias) and not one.bias.requires_grad
    assert centred.bias.sum() == pytest.approx(start.sum().item(), abs=1e-6)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("load", [[5, 1, 3, 3], [900, 1, 1, 2], [0, 0, 0, 0], [0, 7, 0, 0]])
def test_a_proportional_bias_moves_by_the_relative_excess_load(load, centred):
    one, tenfold = router(), router()
    start = torch.tensor([0.5, -0.25, 1.0, 2.0])
    mean = sum(load) / 4 or 1
    for target, times in ((one, 1), (tenfold, 10)):
        target.bias.copy_(start)
        balance.update_bias_(target, times * torch.tensor(load), 0.125, centred, proportional=True)
    want = [b + 0.125 * (mean - c) / mean if sum(load) else b for b, c in zip(start.tolist(), load)]
    assert one.bias.tolist() == pytest.approx(want, rel=1e-6)
    assert torch.equal(one.bias, tenfold.bias)  # independent of the batch size
    assert one.bias.sum() == pytest.approx(start.sum().item(), abs=1e-6)


def test_rate_0_leaves_the_bias_alone():
    one = router()
    balance.update_bias_(one, torch.tensor([5, 1, 3, 3]), rate=0)
    assert not one.bias.any()


@pytest.mark.parametrize(
    "target, load, rate, message",
    [
        (router(), [1, 2, 3], 0.1, r"has shape \(3,\); the router expects \(4,\)"),
        (router(), [[1, 2, 3, 4]], 0.1, r"has shape \(1, 4\)"),
        (router(), [1, 2, 3, 4], -1, r"rate=-1 must be finite and at least 0"),
        (router(), [1, 2, 3, 4], math.nan, r"rate=nan"),
        (router(), [1, 2, 3, 4], math.inf, r"rate=inf"),
        (SoftmaxRouter(3, 4, 2), [1, 2, 3, 4], 0.1, r"SoftmaxRouter has no selection bias"),
        (nn.Linear(3, 4, bias=False), [1, 2, 3, 4], 0.1, r"Linear has no selection bias"),
        (nn.Linear(3, 4), [1, 2, 3, 4], 0.1, r"Linear has no selection bias"),  # trained by gradients
    ],
)
def test_bias_update_refuses_what_does_not_fit(target, load, rate, message):
    with pytest.raises(ValueError, match=message):
        balance.update_bias_(target, torch.tensor(load), rate)


@pytest.mark.parametrize("how", [{}, {"centred": True}, {"proportional": True}])
def test_bias_updates_balance_a_router_that_prefers_few_experts(how):
    one = SigmoidRouter(dim=16, num_experts=8, top_k=2)
    x = torch.randn(2048, 16) + 3 * one.weight[:2].detach().sum(0)  # most tokens prefer experts 0 and 1
    load = lambda: balance.tokens_per_expert(one(x))  # noqa: E731
    assert balance.max_violation(load()) > 1.5
    for _ in range(300):
        balance.update_bias_(one, load(), rate=0.005, **how)
    assert balance.max_violation(load()) < 0.15
    assert not how or one.bias.sum().abs() < 1e-4


@pytest.mark.parametrize("mask", [torch.ones(TIME, BATCH, dtype=torch.bool), torch.ones(BATCH, TIME)])
@pytest.mark.parametrize("loss", [*LOSSES.values(), balance.z_loss, balance.tokens_per_expert])
def test_a_mask_of_wrong_shape_or_dtype_is_refused(loss, mask):
    with pytest.raises(ValueError, match=r"mask is .*expected torch.bool \(3, 7\)"):
        loss(uneven(), mask)


@pytest.mark.parametrize("num_devices", [0, 4, 7, -1])
def test_devices_that_do_not_divide_the_experts_are_refused(num_devices):
    for loss in (balance.device_loss, lambda *args: balance.communication_loss(*args, 1)):
        with pytest.raises(ValueError, match=f"num_devices={num_devices} does not divide the 6 experts"):
            loss(uneven(), num_devices)
    for top_devices in (0, 4):
        with pytest.raises(ValueError, match=rf"top_devices={top_devices} must lie in 1..3"):
            balance.communication_loss(uneven(), 3, top_devices)


def test_scores_in_half_precision_that_are_all_zero_give_a_number():
    scores = torch.zeros(1, 3, 4, dtype=torch.float16)
    routing = Routing(torch.zeros(1, 3, 1, dtype=torch.int64), scores[..., :1], scores, scores)
    assert balance.sequence_loss(routing) == 0
