"""Routing metrics against loops over tokens, on uneven loads with padding and empty slots."""

import math

import pytest
import torch

from moe import Routing, metrics

BATCH, TIME, NUM_EXPERTS, TOP_K = 3, 7, 6, 2


def uneven():
    """Uneven loads, expert 5 unused, empty slots, a token with no expert; scores that do not sum to 1."""
    experts = torch.rand(BATCH, TIME, 5).topk(TOP_K).indices
    experts[0, :4] = torch.tensor([1, 3])
    experts[1, 2, 0] = experts[1, 4, 1] = -1
    experts[2, 5] = -1
    scores = torch.rand(BATCH, TIME, NUM_EXPERTS, dtype=torch.float64)
    return Routing(experts, torch.rand(BATCH, TIME, TOP_K), scores, scores.logit())


def some_mask():
    mask = torch.ones(BATCH, TIME, dtype=torch.bool)
    mask[0, 5:] = False
    mask[1, :3] = False
    return mask


def tokens_of(routing, mask):
    """[(experts without empty slots, scores)] of the real tokens."""
    keep = torch.ones(BATCH, TIME, dtype=torch.bool) if mask is None else mask
    rows = zip(routing.experts[keep].tolist(), routing.scores[keep].tolist())
    return [([i for i in experts if i >= 0], scores) for experts, scores in rows]


DOMAINS = torch.tensor([[0] * 7, [2] * 4 + [0] * 3, [3, 2, 3, 2, 2, 2, 2]])  # domain 1: no token; 10, 9 and 2


def dropped_share(tokens, domains):
    return sum(TOP_K - len(experts) for experts, _ in tokens) / (TOP_K * len(tokens))


def coactivation(tokens, domains):
    rows = []
    for i in range(NUM_EXPERTS):
        mine = [experts for experts, _ in tokens if i in experts]
        rows.append([sum(j in experts for experts in mine) / max(1, len(mine)) for j in range(NUM_EXPERTS)])
    return rows


def domain_specialization(tokens, domains):
    rows = []
    for domain in range(4):
        mine = [experts for (experts, _), d in zip(tokens, domains) if d == domain]
        rows.append([sum(i in experts for experts in mine) / max(1, len(mine)) for i in range(NUM_EXPERTS)])
    return rows


def router_confidence(tokens, domains):
    return sum(sum(scores[i] for i in experts) / sum(scores) for experts, scores in tokens) / len(tokens)


def entropy(values):
    """In nats, of non-negative values."""
    return -sum(v / sum(values) * math.log(v / sum(values)) for v in values if v)


def score_entropy(tokens, domains):
    return sum(entropy(scores) for _, scores in tokens) / len(tokens) / math.log(NUM_EXPERTS)


BY_HAND = [dropped_share, coactivation, domain_specialization, router_confidence, score_entropy]


def measure(name, routing, mask=None, domains=DOMAINS):
    """The metric of that name; only domain_specialization takes the domains."""
    more = (domains, 4) if name == "domain_specialization" else ()
    return getattr(metrics, name)(routing, *more, mask=mask)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("by_hand", BY_HAND)
def test_a_metric_equals_a_loop_over_tokens(by_hand, masked):
    routing, mask = uneven(), some_mask() if masked else None
    domains = DOMAINS.flatten() if mask is None else DOMAINS[mask]
    want = torch.tensor(by_hand(tokens_of(routing, mask), domains.tolist()), dtype=torch.float64)
    got = measure(by_hand.__name__, routing, mask)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("garbage", [-1.0, math.inf, math.nan])
@pytest.mark.parametrize("by_hand", BY_HAND)
def test_values_of_padding_make_no_difference(by_hand, garbage):
    routing, mask = uneven(), some_mask()
    scores = routing.scores.masked_fill(~mask.unsqueeze(-1), garbage)
    dirty = routing._replace(experts=routing.experts.where(mask.unsqueeze(-1), 5), scores=scores)
    clean = measure(by_hand.__name__, routing, mask)
    domains = DOMAINS.where(mask, -7)
    assert torch.equal(measure(by_hand.__name__, dirty, mask, domains), clean) and clean.any()


@pytest.mark.parametrize("by_hand", BY_HAND)
def test_without_tokens_a_metric_is_0(by_hand):
    nothing = torch.zeros(BATCH, TIME, dtype=torch.bool)
    assert not measure(by_hand.__name__, uneven(), nothing).any()


@pytest.mark.parametrize("by_hand", BY_HAND)
def test_leading_axes_make_no_difference(by_hand):
    routing, mask = uneven(), some_mask()
    flat = routing.map(lambda field: field.flatten(0, 1))
    want = measure(by_hand.__name__, routing, mask)
    assert torch.equal(measure(by_hand.__name__, flat, mask.flatten(), DOMAINS.flatten()), want)


@pytest.mark.parametrize("by_hand", BY_HAND)
def test_a_mask_of_wrong_shape_is_refused(by_hand):
    with pytest.raises(ValueError, match=r"mask is .*expected torch.bool \(3, 7\)"):
        measure(by_hand.__name__, uneven(), torch.ones(TIME, BATCH, dtype=torch.bool))


@pytest.mark.parametrize(
    "load, want",
    [
        ([4, 4, 4], 1),
        ([9, 0, 0, 0], 0),
        ([5, 0, 5, 0], 0.5),  # the same two of four for every token: log 2 / log 4
        ([1, 2, 5], entropy([1, 2, 5]) / math.log(3)),
        ([0, 0], 1),
        ([7], 1),
        ([0], 1),
    ],
)
def test_load_entropy_is_relative_to_an_even_load(load, want):
    assert metrics.load_entropy(torch.tensor(load)).item() == pytest.approx(want, rel=1e-6)  # in fp32
    wide = torch.tensor(load, dtype=torch.float64)
    assert metrics.load_entropy(wide).item() == pytest.approx(want, rel=1e-12)


def test_loads_may_have_leading_axes():
    loads = torch.tensor([[[9, 0, 0], [4, 4, 4]], [[0, 0, 0], [5, 0, 5]]])
    got = metrics.load_entropy(loads.double())
    assert got.flatten().tolist() == pytest.approx([0, 1, 1, math.log(2) / math.log(3)], rel=1e-12)
    assert metrics.dead_experts(loads).tolist() == [[2, 0], [3, 1]]


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_equal_scores_give_the_value_at_perfect_balance(top_k):
    experts = torch.arange(2 * 6 * top_k).remainder(6).view(2, 6, top_k)
    scores = torch.full((2, 6, 6), 0.3, dtype=torch.float64)
    routing = Routing(experts, scores[..., :top_k], scores, scores)
    domains = torch.tensor([[0] * 6, [1] * 6])
    assert metrics.router_confidence(routing).item() == pytest.approx(top_k / 6, rel=1e-12)
    assert metrics.score_entropy(routing).item() == pytest.approx(1, rel=1e-12)
    specialization = metrics.domain_specialization(routing, domains, 2)
    assert specialization.flatten().tolist() == pytest.approx([top_k / 6] * 12, rel=1e-12)
    together = metrics.coactivation(routing)
    assert together.diagonal().tolist() == [1] * 6
    assert together.sum(-1).tolist() == pytest.approx([top_k] * 6, rel=1e-12)


def test_one_expert_for_all_tokens_gives_the_opposite_value():
    experts = torch.full((1, 5, 1), 2)
    scores = torch.zeros(1, 5, 3, dtype=torch.float64).index_fill_(-1, torch.tensor([2]), 0.7)
    routing = Routing(experts, scores[..., 2:], scores, scores)
    assert metrics.router_confidence(routing) == 1 and metrics.score_entropy(routing) == 0
    one_domain = torch.zeros(1, 5, dtype=torch.int64)
    assert metrics.domain_specialization(routing, one_domain, 1).tolist() == [[0, 0, 1]]
    assert metrics.coactivation(routing).tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 1]]
    assert metrics.dropped_share(routing) == 0
    assert metrics.dropped_share(routing._replace(experts=-torch.ones_like(experts))) == 1


def test_metrics_keep_no_graph():
    routing = uneven()
    routing = routing._replace(scores=routing.scores.requires_grad_())
    assert not any(measure(by_hand.__name__, routing).requires_grad for by_hand in BY_HAND)


@pytest.mark.parametrize("wrong", [DOMAINS[:2], DOMAINS.int(), DOMAINS.unsqueeze(-1)])
def test_domains_of_wrong_shape_or_dtype_are_refused(wrong):
    with pytest.raises(ValueError, match=r"domains is torch.int.*; expected torch.int64 \(3, 7\)"):
        metrics.domain_specialization(uneven(), wrong, 4)


@pytest.mark.parametrize("wrong", [-1, 4])
def test_a_domain_out_of_range_is_named(wrong):
    domains = DOMAINS.clone()
    domains[1, 5] = wrong
    with pytest.raises(ValueError, match=rf"domains holds {wrong}; expected 0..3"):
        metrics.domain_specialization(uneven(), domains, 4)
