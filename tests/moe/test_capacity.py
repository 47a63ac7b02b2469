"""Which slots are dropped beyond capacity, and in which order: by hand, and against loops."""

import math

import pytest
import torch
from torch import nn

from moe import (
    Capacity,
    DeviceDropping,
    ExpertChoiceRouter,
    Experts,
    GShardRouter,
    HashRouter,
    MoE,
    Routing,
    SigmoidRouter,
    SoftmaxRouter,
    balance,
    devices_visited,
)


class Fixed(nn.Module):
    """A router that always returns the same Routing."""

    def __init__(self, experts, scores):
        super().__init__()
        self.experts, self.scores = torch.tensor(experts), torch.tensor(scores, dtype=torch.float64)
        self.num_experts = self.scores.shape[-1]

    def forward(self, x):
        weights = self.scores.gather(-1, self.experts.clamp(min=0)).masked_fill(self.experts < 0, 0)
        return Routing(self.experts, weights, self.scores, self.scores.log())


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# Five tokens, three experts, top-2. All choose expert 0; the last token has its highest score.
EXPERTS = [[1, 0], [0, 2], [0, 1], [0, -1], [0, 2]]
SCORES = [[0.40, 0.50, 0.10], [0.45, 0.20, 0.35], [0.60, 0.30, 0.10], [0.50, 0.30, 0.20], [0.70, 0.05, 0.25]]
X = torch.zeros(5, 1)


def kept(router, x=X, **given):
    return router(x, **given).experts.tolist()


@pytest.mark.parametrize(
    "factor, priority, want",
    [
        # capacity ceil(2 * 5 / 3 * 0.9) = 3: for expert 0, the first choices of tokens 1, 2, 3 come before
        # that of token 4, and all of them before token 0's second choice
        (0.9, "choice", [[1, -1], [0, 2], [0, 1], [0, -1], [-1, 2]]),
        (0.9, "score", [[1, -1], [-1, 2], [0, 1], [0, -1], [0, 2]]),
        # capacity 2
        (0.6, "choice", [[1, -1], [0, 2], [0, 1], [-1, -1], [-1, 2]]),
        (0.6, "score", [[1, -1], [-1, 2], [0, 1], [-1, -1], [0, 2]]),
        # capacity 1: token 2's expert 1 is its second choice, and has the lower score
        (0.3, "choice", [[1, -1], [0, 2], [-1, -1], [-1, -1], [-1, -1]]),
        (0.3, "score", [[1, -1], [-1, 2], [-1, -1], [-1, -1], [0, -1]]),
        # capacity 5, more than needed
        (1.5, "choice", EXPERTS),
        (1.5, "score", EXPERTS),
    ],
)
def test_slots_beyond_capacity_are_dropped(factor, priority, want):
    router = Capacity(Fixed(EXPERTS, SCORES), factor, priority)
    routing = router(X)
    assert routing.experts.tolist() == want
    for row, scores, weights in zip(want, SCORES, routing.weights.tolist()):
        assert weights == [scores[e] if e >= 0 else 0 for e in row]  # kept slots keep their weight
    assert routing.scores.tolist() == SCORES
    assert kept(router.eval()) == EXPERTS
    assert kept(Capacity(Fixed(EXPERTS, SCORES), factor, priority, drop_in_eval=True).eval()) == want


def test_the_order_of_a_tokens_slots_does_not_matter():
    reversed_slots = Fixed([row[::-1] for row in EXPERTS], SCORES)
    assert kept(Capacity(reversed_slots, 0.6)) == [[-1, 1], [2, 0], [1, 0], [-1, -1], [2, -1]]


def test_an_empty_slot_is_not_a_first_choice():
    router = Capacity(Fixed([[-1, 1], [1, 0]], [[0.8, 0.2], [0.4, 0.6]]), 0.5)
    assert kept(router, torch.zeros(2, 1)) == [[-1, 1], [-1, 0]]
    router = Capacity(Fixed([[-1, 1], [0, 1]], [[0.8, 0.2], [0.4, 0.6]]), 0.5)
    assert kept(router, torch.zeros(2, 1)) == [[-1, 1], [0, -1]]


@pytest.mark.parametrize("priority", ["choice", "score"])
def test_ties_go_to_the_earlier_token(priority):
    router = Capacity(Fixed([[0], [0], [1], [0]], [[0.5, 0.5]] * 4), 1.0, priority)
    assert kept(router, torch.zeros(4, 1)) == [[0], [0], [1], [-1]]


@pytest.mark.parametrize("slots, factor, want", [(100, 1.1, 11), (100, 1.101, 12), (10, 1.0, 1), (3, 0.1, 1)])
def test_capacity_is_rounded_up_without_float_error(slots, factor, want):
    router = Capacity(Fixed([[2]] * slots, [[0.1] * 10] * slots), factor)
    assert sum(e == 2 for [e] in kept(router, torch.zeros(slots, 1))) == want


def test_padding_uses_no_capacity_and_goes_to_no_expert():
    router = Capacity(Fixed(EXPERTS, SCORES), 0.75)  # ceil(2 * 4 / 3 * 0.75) = 2; with five tokens 3
    mask = torch.tensor([True, False, True, True, True])
    assert kept(router, mask=mask) == [[1, -1], [-1, -1], [0, 1], [0, -1], [-1, 2]]
    assert kept(router.eval(), mask=mask) == [[1, 0], [-1, -1], *EXPERTS[2:]]
    device = DeviceDropping(Fixed(EXPERTS, SCORES), 3, 0.75, exempt=0.0)
    assert kept(device, mask=mask) == [[1, -1], [-1, -1], [0, 1], [-1, -1], [0, 2]]


def by_loop(routing, factor, priority):
    """GShard's loops over choices, then over tokens, counting each expert's tokens."""
    experts, scores = routing.experts.flatten(0, -2).tolist(), routing.scores.flatten(0, -2).tolist()
    slots = [
        (rank, token, e)
        for token, row in enumerate(experts)
        for rank, e in enumerate(sorted(row, key=lambda e: -scores[token][e]))
    ]
    slots.sort(key=(lambda slot: slot[:2]) if priority == "choice" else lambda s: -scores[s[1]][s[2]])
    count, want = [0] * len(scores[0]), [set() for _ in experts]
    for _, token, e in slots:
        if count[e] < math.ceil(len(slots) / len(count) * factor):
            want[token].add(e)
        count[e] += 1
    return want


@pytest.mark.parametrize("priority", ["choice", "score"])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.3])
def test_capacity_equals_a_loop_over_the_slots(factor, priority):
    inner = SigmoidRouter(5, 7, 3).double()
    inner.bias.copy_(torch.linspace(-0.5, 0.5, 7))
    x = torch.randn(3, 11, 5, dtype=torch.float64)
    routing = Capacity(inner, factor, priority)(x)
    found = [{e for e in row if e >= 0} for row in routing.experts.flatten(0, 1).tolist()]
    assert found == by_loop(inner(x), factor, priority)
    assert balance.tokens_per_expert(routing).max() <= math.ceil(99 / 7 * factor)
    assert 0 < sum(map(len, found)) < 99


def test_neighbours_compete_for_capacity_in_training_only():
    router = Capacity(SoftmaxRouter(4, 3, 1), 0.5)
    x = torch.randn(6, 4)
    alone = router(x[3:4]).experts
    crowd = x[3:4].expand(6, -1)
    assert alone.tolist() == router(crowd).experts[:1].tolist() and router(crowd).experts[3].tolist() == [-1]
    router.eval()
    assert torch.equal(router(crowd).experts[3], alone[0])


def test_a_dropped_slot_adds_nothing_and_gets_no_gradient():
    inner = SoftmaxRouter(4, 3, 2).double()
    layer = MoE(Capacity(inner, 0.5), Experts(3, 4, 2).double())
    x = torch.randn(9, 4, dtype=torch.float64)
    y, routing = layer(x)
    whole = inner(x)
    assert 0 < int((routing.experts < 0).sum()) < 18
    there = (routing.experts >= 0).double()
    torch.testing.assert_close(y, layer.experts.reference(x, routing))
    torch.testing.assert_close(routing.weights, whole.weights * there)
    ours = torch.autograd.grad(routing.weights.square().sum(), inner.weight)[0]
    theirs = torch.autograd.grad((whole.weights * there).square().sum(), inner.weight)[0]
    torch.testing.assert_close(ours, theirs)


def test_gshard_with_capacity_works_in_a_layer():
    layer = MoE(Capacity(GShardRouter(4, 6), 1.0), Experts(6, 4, 3))
    y, routing = layer(torch.randn(2, 20, 4))
    assert y.shape == (2, 20, 4) and balance.tokens_per_expert(routing).max() <= math.ceil(80 / 6)


def test_the_wrapped_routers_attributes_are_found_and_its_bias_updated():
    inner = SigmoidRouter(5, 8, 2)
    for router in (Capacity(inner), DeviceDropping(inner, 4), Capacity(DeviceDropping(inner, 2))):
        assert (router.num_experts, router.dim) == (8, 5) and router.bias is inner.bias
        balance.update_bias_(router, torch.tensor([9, 0, 0, 0, 0, 0, 0, 0]), 0.1)
    assert inner.bias.tolist() == pytest.approx([-0.3] + [0.3] * 7)
    assert Capacity(inner).bfloat16().bias.dtype == torch.float32
    assert Capacity(SoftmaxRouter(5, 8, 2)).bias is None
    with pytest.raises(ValueError, match="router with dim=5, experts with dim=4"):
        MoE(Capacity(inner), Experts(8, 4, 3))


def test_token_ids_reach_the_wrapped_router():
    layer = MoE(Capacity(HashRouter(4, 10), 0.5), Experts(4, 3, 2))
    tokens = torch.tensor([[7, 7, 7, 1], [7, 2, 3, 4]])
    routing = layer(torch.randn(2, 4, 3), tokens=tokens)[1]  # capacity 1
    experts = layer.router.router.table[tokens].flatten().tolist()
    want = [e if e not in experts[:i] else -1 for i, e in enumerate(experts)]
    assert routing.experts.flatten().tolist() == want


# --- devices

# Two sequences of three tokens, four experts on two devices. Device 0 gets 8 slots, device 1 gets 3.
PAIRS = [[[0, 1], [1, 0], [0, 2]], [[1, 3], [0, 1], [3, 0]]]
AFFINITY = [
    [[0.5, 0.3, 0.1, 0.1], [0.2, 0.6, 0.1, 0.1], [0.4, 0.1, 0.35, 0.15]],
    [[0.1, 0.55, 0.1, 0.25], [0.45, 0.33, 0.12, 0.1], [0.32, 0.1, 0.13, 0.45]],
]


def test_an_overloaded_device_drops_the_least_affine():
    router = DeviceDropping(Fixed(PAIRS, AFFINITY), 2, exempt=0.0)  # 12 slots, capacity 6; device 0 has 8 ...
    x = torch.zeros(2, 3, 1)
    assert devices_visited(router.router(x), 2).tolist() == [[1, 1, 2], [2, 1, 2]]
    # ... sorted: .6 .55 .5 .45 .4 .33 | .32 .3 .2: drops token (0, 0)'s 1, (0, 1)'s 0 and (1, 2)'s 0
    want = [[[0, -1], [1, -1], [0, 2]], [[1, 3], [0, 1], [3, -1]]]
    assert kept(router, x) == want
    assert devices_visited(router(x), 2).tolist() == [[1, 1, 2], [2, 1, 1]]
    assert kept(router.eval(), x) == PAIRS
    half = DeviceDropping(Fixed(PAIRS, AFFINITY), 2, 0.5, exempt=0.0)
    assert kept(half, x) == [[[0, -1], [1, -1], [-1, 2]], [[1, 3], [-1, -1], [3, -1]]]


def test_an_exempt_sequence_loses_nothing_and_uses_capacity_first():
    router, x = DeviceDropping(Fixed(PAIRS, AFFINITY), 2, 0.5, exempt=0.5), torch.zeros(2, 3, 1)
    seen = {}
    for seed in range(40):
        torch.manual_seed(seed)
        found = kept(router, x)
        spared = tuple(a == b for a, b in zip(found, PAIRS))
        assert seen.setdefault(spared, found) == found
    assert set(seen) == {(False, False), (False, True), (True, False), (True, True)}
    # capacity 3: the exempt sequence's slots fill device 0, but not device 1
    assert seen[True, False] == [PAIRS[0], [[-1, 3], [-1, -1], [3, -1]]]
    assert seen[False, True] == [[[-1, -1], [-1, -1], [-1, 2]], PAIRS[1]]


def test_about_a_tenth_of_the_sequences_is_spared():
    experts = torch.zeros(2000, 2, 1, dtype=torch.int64).tolist()
    router = DeviceDropping(Fixed(experts, torch.rand(2000, 2, 2).tolist()), 2, 0.001)
    left = (router(torch.zeros(2000, 2, 1)).experts >= 0).all(1).sum()
    assert int(left) == pytest.approx(200, abs=5 * (2000 * 0.1 * 0.9) ** 0.5)
    assert int((DeviceDropping(router.router, 2, 0.001, 1.0)(torch.zeros(1)).experts >= 0).sum()) == 4000


def test_devices_are_counted_once_and_empty_slots_not_at_all():
    experts = torch.tensor([[0, 1, 2], [0, 3, 5], [5, -1, 4], [-1, -1, -1]])
    scores = torch.rand(4, 6)
    routing = Routing(experts, scores[:, :3], scores, scores)
    assert devices_visited(routing, 3).tolist() == [2, 3, 1, 0]
    assert devices_visited(routing, 1).tolist() == [1, 1, 1, 0]
    assert devices_visited(routing, 6).tolist() == [3, 3, 2, 0]
    with pytest.raises(ValueError, match="num_devices=4 does not divide the 6 experts"):
        devices_visited(routing, 4)


@pytest.mark.parametrize(
    "build, said",
    [
        (lambda r: Capacity(r, 0.0), "capacity_factor=0.0 must be positive and finite"),
        (lambda r: Capacity(r, -1.0), "capacity_factor=-1.0 must be positive and finite"),
        (lambda r: Capacity(r, math.inf), "capacity_factor=inf must be positive and finite"),
        (lambda r: Capacity(r, priority="rank"), 'priority=\'rank\' must be "choice" or "score"'),
        (lambda r: DeviceDropping(r, 3), "num_devices=3 does not divide num_experts=8"),
        (lambda r: DeviceDropping(r, 0), "num_devices=0 does not divide num_experts=8"),
        (lambda r: DeviceDropping(r, 2, 0.0), "capacity_factor=0.0 must be positive and finite"),
        (lambda r: DeviceDropping(r, 2, exempt=1.5), "exempt=1.5 must lie in 0..1"),
        (lambda r: Capacity(nn.Linear(4, 8)), "Linear has no num_experts, from which"),
        (lambda r: Capacity(r, "1.5"), "capacity_factor='1.5' must be positive and finite"),
        (lambda r: Capacity(r)(torch.randn(2, 3, 4), mask=torch.ones(3) > 0), r"mask is torch.bool \(3,\)"),
        (lambda r: Capacity(r)(torch.randn(2, 4), mask=torch.ones(2)), "mask is torch.float32"),
        (
            lambda r: Capacity(ExpertChoiceRouter(4, 8))(torch.randn(2, 4), mask=torch.ones(2) > 0),
            "mask: ExpertChoiceRouter chooses among all tokens",
        ),
    ],
)
def test_numbers_that_do_not_fit_are_refused(build, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        build(SoftmaxRouter(4, 8, 2))


@pytest.mark.parametrize(
    "wrap", [lambda r: Capacity(r, 0.5), lambda r: Capacity(DeviceDropping(r, 2, 0.5), 0.8)]
)
def test_balance_losses_use_the_counts_before_dropping(wrap):
    inner = SoftmaxRouter(5, 8, 2).double()
    router = wrap(inner)
    x = torch.randn(3, 11, 5, dtype=torch.float64)
    mask = torch.rand(3, 11) < 0.7
    whole, routing = inner(x), router(x)
    left, asked = balance.tokens_per_expert(routing), balance.tokens_per_expert(routing, dropped=True)
    assert int(left.sum()) < int(asked.sum()) == 66
    assert torch.equal(asked, balance.tokens_per_expert(whole))
    for loss in (
        lambda r, m: balance.sequence_loss(r, m),
        lambda r, m: balance.switch_loss(r, m),
        lambda r, m: balance.device_loss(r, 4, m),
        lambda r, m: balance.communication_loss(r, 4, 2, m),
    ):
        torch.testing.assert_close(loss(routing, None), loss(whole, None))
        torch.testing.assert_close(loss(routing, mask), loss(whole, mask))
        torch.testing.assert_close(loss(router(x, mask=mask), mask), loss(whole, mask))
    assert torch.equal(
        balance.tokens_per_expert(router(x, mask=mask), dropped=True), balance.tokens_per_expert(whole, mask)
    )


def test_padding_uses_no_capacity_in_nested_routers():
    inner = Fixed([[0], [0], [1], [1]], [[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.3, 0.7]])
    mask = torch.tensor([False, True, True, False])
    for router in (
        Capacity(DeviceDropping(inner, 2, 0.5, exempt=0.0), 10.0),
        DeviceDropping(Capacity(inner, 0.5), 2, 10.0, exempt=0.0),
    ):
        assert kept(router, torch.zeros(4, 1), mask=mask) == [[-1], [0], [1], [-1]]


def test_asked_is_kept_in_evaluation_and_through_replace():
    inner = Capacity(Fixed(EXPERTS, SCORES), 0.3, drop_in_eval=True)
    router = Capacity(inner).eval()
    mask = torch.ones(5, dtype=torch.bool)
    for routing in (router(X), router(X, mask=mask), router(X)._replace(weights=torch.ones(5, 2))):
        assert int(balance.tokens_per_expert(routing).sum()) == 3
        assert int(balance.tokens_per_expert(routing, dropped=True).sum()) == 9


def test_mixing_tokens_is_declared():
    plain, choice = SoftmaxRouter(4, 8, 2), ExpertChoiceRouter(4, 8)
    assert not Capacity(plain).mixes_tokens and not DeviceDropping(plain, 2).mixes_tokens
    assert Capacity(plain, drop_in_eval=True).mixes_tokens and Capacity(choice).mixes_tokens
    assert DeviceDropping(choice, 2).mixes_tokens


def test_a_capacity_above_all_slots_drops_nothing():
    assert kept(Capacity(Fixed(EXPERTS, SCORES), 1e308)) == EXPERTS


def test_the_least_capacity_is_one():
    assert kept(Capacity(Fixed([[0], [0]], [[0.9, 0.1], [0.8, 0.2]]), 1e-12), torch.zeros(2, 1)) == [
        [0],
        [-1],
    ]
