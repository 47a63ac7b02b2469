"""The objectives against plain Python loops written from the papers' equations, and against closed forms."""

import itertools
import math

import pytest
import torch

from rl import objectives
from rl.objectives import advantages, grpo, gspo, k1, k2, k3, kimi, length_reward, mean, reinforce
from tests.helpers import refused

EXACT = {"rel": 1e-12, "abs": 1e-12}
GROUPS, SIZE, TIME = 3, 4, 7
AVERAGES = ["sequence", "token", "constant"]


def random_case(seed=0, spread=0.3):
    """log_probs, old, rewards and mask; the mask begins late, and its rows differ in length."""
    generator = torch.Generator().manual_seed(seed)
    rows = GROUPS * SIZE
    old = -3 * torch.rand(rows, TIME, generator=generator, dtype=torch.float64)
    log_probs = old + spread * torch.randn(rows, TIME, generator=generator, dtype=torch.float64)
    rewards = torch.randint(0, 4, (GROUPS, SIZE), generator=generator).double() / 3 + torch.tensor([0.1])
    rewards[:, 0] = 1.7  # no group is flat
    mask = torch.zeros(rows, TIME, dtype=torch.bool)
    for row in range(rows):
        mask[row, 1 + row % 2 : 3 + row % 2 + (row * 5) % 4] = True
    assert len(set(mask.sum(-1).tolist())) > 2
    return log_probs, old, rewards, mask


def advantages_loop(rewards, normalize=True):
    """(r - mean) / std of each group; std divides by size - 1, and 1e-4 is added to it."""
    found = []
    for group in rewards.tolist():
        middle = sum(group) / len(group)
        std = math.sqrt(sum((r - middle) ** 2 for r in group) / (len(group) - 1))
        found += [(r - middle) / (std + 1e-4) if normalize else r - middle for r in group]
    return found


def average_loop(rows, how, longest=None):
    """The three averages of lists of unequal length."""
    if how == "sequence":
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    if how == "token":
        return sum(sum(row) for row in rows) / sum(len(row) for row in rows)
    return sum(sum(row) for row in rows) / (longest or TIME) / len(rows)


def grpo_loop(log_probs, old, gains, mask, low, high, how, longest=None):
    """The loss of GRPO (arXiv 2402.03300 eq. 3), and its gradient on log_probs by hand."""
    values, slopes = [], torch.zeros_like(log_probs)
    for row, gain in enumerate(gains):
        values.append([])
        for time in range(TIME):
            if not mask[row, time]:
                continue
            ratio = math.exp(log_probs[row, time] - old[row, time])
            value = min(ratio * gain, max(1 - low, min(1 + high, ratio)) * gain)
            values[-1].append(-value)
            stopped = (gain > 0 and ratio > 1 + high) or (gain < 0 and ratio < 1 - low)
            slopes[row, time] = 0 if stopped else -ratio * gain
    lengths = [len(row) for row in values]
    for row, length in enumerate(lengths):
        weight = {"sequence": length * len(values), "token": sum(lengths)}
        slopes[row] /= weight.get(how, (longest or TIME) * len(values))
    return average_loop(values, how, longest), slopes


def gradient(loss, log_probs):
    """Value and gradient of loss(log_probs)."""
    leaf = log_probs.clone().requires_grad_()
    value = loss(leaf)
    value.backward()
    return float(value.detach()), leaf.grad


def finite_differences(loss, log_probs, step=1e-6):
    """The gradient of loss(log_probs) by central differences."""
    found = torch.zeros_like(log_probs)
    for place in itertools.product(*map(range, log_probs.shape)):
        shift = torch.zeros_like(log_probs)
        shift[place] = step
        found[place] = (loss(log_probs + shift) - loss(log_probs - shift)) / (2 * step)
    return found


def close(got, want, tolerance=1e-12):
    return torch.allclose(got, torch.as_tensor(want, dtype=got.dtype), rtol=tolerance, atol=tolerance)


# advantages


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_advantages_are_those_of_the_loop(normalize, seed):
    rewards = random_case(seed)[2]
    got = advantages(rewards, normalize)
    assert got.shape == (GROUPS * SIZE,)
    assert close(got, advantages_loop(rewards, normalize))


def test_advantages_by_hand():
    got = advantages(torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64))
    assert close(got, [0.75 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001])
    assert close(advantages(torch.tensor([[2.0, 5.0]], dtype=torch.float64), False), [-1.5, 1.5])


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 0.7, 1 / 3, 1e8, -0.1])
@pytest.mark.parametrize("size", [2, 3, 6, 7, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flat_groups_have_no_advantage(value, size, dtype):
    rewards = torch.full((2, size), value, dtype=dtype)
    rewards[1, 0] += 1 + abs(value)
    for normalize in (True, False):
        got = advantages(rewards, normalize).view(2, size)
        assert got[0].tolist() == [0.0] * size
        assert (got[1] != 0).all()
    old = torch.randn(2 * size, 3, dtype=dtype)
    mask = torch.ones(2 * size, 3, dtype=torch.bool)
    for loss in (
        lambda x: grpo(x, old, advantages(rewards), mask),
        lambda x: gspo(x, old, advantages(rewards), mask),
        lambda x: kimi(x, old, rewards, mask, 0.1),
    ):
        slopes = gradient(loss, old)[1]
        assert not slopes[:size].any() and slopes[size:].any()


def test_only_groups_that_differ_are_informative():
    rewards = torch.tensor([[0.1, 0.1, 0.1], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    assert objectives.informative(rewards).tolist() == [False, True, True, False]


# averages


def test_averages_are_those_of_the_loop():
    values, _, _, mask = random_case()
    rows = [values[row][mask[row]].tolist() for row in range(len(values))]
    for how in AVERAGES:
        assert float(mean(values, mask, how)) == pytest.approx(average_loop(rows, how), **EXACT)
    got = float(mean(values, mask, "constant", 64))
    assert got == pytest.approx(average_loop(rows, "constant", 64), **EXACT)


def test_averages_agree_for_equal_lengths():
    values = random_case()[0]
    mask = torch.zeros(values.shape, dtype=torch.bool)
    for row in range(len(mask)):
        mask[row, row % 3 : row % 3 + 4] = True
    sequence, token = (float(mean(values, mask, how)) for how in ("sequence", "token"))
    assert sequence == pytest.approx(token, **EXACT)
    assert sequence == pytest.approx(float(mean(values, mask, "constant", 4)), **EXACT)


@pytest.mark.parametrize(
    ("how", "longest", "weights"),
    [
        ("sequence", None, (1 / 2, 1 / 6)),  # a token of a long response counts less
        ("token", None, (1 / 4, 1 / 4)),
        ("constant", None, (1 / 10, 1 / 10)),
        ("constant", 20, (1 / 40, 1 / 40)),
    ],
)
def test_weight_of_a_token_in_a_short_and_a_long_response(how, longest, weights):
    mask = torch.tensor([[0, 1, 0, 0, 0], [0, 1, 1, 1, 0]], dtype=torch.bool)
    values = torch.rand(2, 5, dtype=torch.float64)
    slopes = gradient(lambda x: mean(x, mask, how, longest), values)[1]
    want = [[0, weights[0], 0, 0, 0], [0, weights[1], weights[1], weights[1], 0]]
    assert close(slopes, want)


def test_a_response_without_tokens_adds_nothing():
    mask = torch.tensor([[False, False], [True, False]])
    values = torch.tensor([[5.0, 5.0], [3.0, 5.0]], dtype=torch.float64)
    assert [float(mean(values, mask, how)) for how in AVERAGES] == [1.5, 3.0, 0.75]
    assert [float(mean(values, mask & False, how)) for how in AVERAGES] == [0.0, 0.0, 0.0]


# GRPO and its relatives


@pytest.mark.parametrize("how", AVERAGES)
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (0.05, 0.4)])
def test_grpo_is_the_loop(how, low, high):
    log_probs, old, rewards, mask = random_case()
    gains = advantages_loop(rewards)
    longest = 11 if how == "constant" else None

    def loss(x):
        return grpo(x, old, torch.tensor(gains, dtype=x.dtype), mask, low, high, how, longest)

    want, slopes = grpo_loop(log_probs, old, gains, mask, low, high, how, longest)
    got, found = gradient(loss, log_probs)
    assert got == pytest.approx(want, **EXACT)
    assert close(found, slopes)
    assert close(found, finite_differences(loss, log_probs), 1e-8)
    stopped = mask & (found == 0)
    assert 5 < stopped.sum() < mask.sum() - 5


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("how", AVERAGES)
def test_on_policy_grpo_is_reinforce(normalize, how):
    old, _, rewards, mask = random_case()
    gains = advantages(rewards, normalize)
    value, slopes = gradient(lambda x: grpo(x, old, gains, mask, average=how), old)
    if how == "sequence":
        assert abs(value) < 1e-15
    assert close(slopes, gradient(lambda x: reinforce(x, gains, mask, how), old)[1])
    assert slopes[mask].abs().min() > 0


def test_reinforce_is_the_loop():
    log_probs, _, rewards, mask = random_case()
    gains = advantages_loop(rewards, False)
    rows = [[-gain * x for x in row[own].tolist()] for gain, row, own in zip(gains, log_probs, mask)]
    for how in AVERAGES:
        got = float(reinforce(log_probs, torch.tensor(gains, dtype=torch.float64), mask, how))
        assert got == pytest.approx(average_loop(rows, how), **EXACT)


@pytest.mark.parametrize(
    ("gain", "ratio", "moves"),
    [
        (1.0, 1.35, False),  # gained enough
        (1.0, 0.6, True),
        (-1.0, 1.35, True),
        (-1.0, 0.6, False),
        (1.0, 1.25, True),  # high is 0.3: a swap with low would stop it
        (-1.0, 0.85, True),
        (-1.0, 0.75, False),  # low is 0.2: a swap with high would let it pass
        (1.0, 1.0, True),
    ],
)
def test_the_clip_stops_only_the_side_that_gains(gain, ratio, moves):
    old = torch.tensor([[-1.0]], dtype=torch.float64)
    gains, mask = torch.tensor([gain], dtype=torch.float64), torch.tensor([[True]])
    log_probs = old + math.log(ratio)
    slope = float(gradient(lambda x: grpo(x, old, gains, mask, 0.2, 0.3), log_probs)[1])
    assert slope == pytest.approx(-gain * ratio if moves else 0, **EXACT)
    slope = float(gradient(lambda x: gspo(x, old, gains, mask, 0.2, 0.3), log_probs)[1])
    assert slope == pytest.approx(-gain * ratio if moves else 0, **EXACT)


def test_gspo_is_the_loop():
    log_probs, old, rewards, mask = random_case(spread=0.02)
    gains, low, high = advantages_loop(rewards), 0.003, 0.004
    values, stops = [], 0
    for row, gain in enumerate(gains):
        gaps = [float(log_probs[row, t] - old[row, t]) for t in range(TIME) if mask[row, t]]
        ratio = math.exp(sum(gaps) / len(gaps))
        held = max(1 - low, min(1 + high, ratio))
        values.append(-min(ratio * gain, held * gain))
        stops += held * gain < ratio * gain

    def loss(x):
        return gspo(x, old, torch.tensor(gains, dtype=x.dtype), mask, low, high)

    got, found = gradient(loss, log_probs)
    assert got == pytest.approx(sum(values) / len(values), **EXACT)
    assert close(found, finite_differences(loss, log_probs), 1e-8)
    assert 0 < stops < len(gains) and (found[mask] == 0).any()


# A bandit with four actions, each a response of one token: expectations by enumeration

LOGITS = torch.tensor([0.3, -0.5, 1.1, 0.2], dtype=torch.float64)
PAYS = torch.tensor([1.0, 0.0, 0.4, 0.1], dtype=torch.float64)


def expected_gradient(loss, size=3, pays=PAYS):
    """The gradient of the mean of loss(log_probs (size, 1), rewards (1, size)) over all groups of actions."""
    logits = LOGITS.clone().requires_grad_()
    log_probs, total = logits.log_softmax(-1), 0
    for actions in itertools.product(range(len(LOGITS)), repeat=size):
        chosen = log_probs[list(actions)]
        total = total + chosen.sum().exp().detach() * loss(chosen[:, None], pays[list(actions)][None])
    total.backward()
    return logits.grad


def reward_gradient(pays=PAYS):
    """The gradient of the expected reward on the logits: p_i (r_i - r . p)"""
    probabilities = LOGITS.softmax(-1)
    return probabilities * (pays - probabilities @ pays)


def one_token(size):
    return torch.ones(size, 1, dtype=torch.bool)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_dr_grpo_follows_the_expected_reward(size):
    """A response's own reward is in the mean, which shrinks the gradient by (size - 1) / size."""

    def loss(x, rewards):
        return grpo(x, x.detach(), advantages(rewards, False), one_token(size), average="constant")

    got = expected_gradient(loss, size)
    assert close(got, -reward_gradient() * (size - 1) / size)


def test_grpo_divides_each_group_by_its_deviation():
    def loss(x, rewards):
        return grpo(x, x.detach(), advantages(rewards), one_token(3))

    def by_hand(x, rewards):
        centred = rewards[0] - rewards.mean()
        return -(centred / (rewards.std() + 1e-4) * x[:, 0]).mean()

    got = expected_gradient(loss)
    assert close(got, expected_gradient(by_hand))
    straight = reward_gradient()
    cosine = torch.cosine_similarity(-got, straight, dim=0)
    assert 0.8 < cosine < 0.999  # it leans towards groups with a small deviation


def test_grpo_with_one_deviation_is_the_expected_reward_over_it():
    """Groups of two with rewards 0 and 1: all that are not flat have the deviation sqrt(1 / 2)."""
    pays = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    got = expected_gradient(lambda x, r: grpo(x, x.detach(), advantages(r), one_token(2)), 2, pays)
    assert close(got, -reward_gradient(pays) / 2 / (math.sqrt(0.5) + 1e-4))


# KL

POLICY = torch.tensor([0.5, 1.0, -0.7], dtype=torch.float64)
REFERENCE = torch.tensor([-0.2, 0.9, 0.4], dtype=torch.float64).log_softmax(-1)


def expected_kl(estimate):
    """The estimate's mean under the policy, and the mean of its gradient on the logits."""
    logits = POLICY.clone().requires_grad_()
    log_probs = logits.log_softmax(-1)
    values = estimate(log_probs, REFERENCE)
    weights = log_probs.exp().detach()
    (weights * values).sum().backward()
    return float((weights * values).sum().detach()), logits.grad


def true_kl():
    """sum p log(p / q), and its gradient on the logits: p_i (log(p_i / q_i) - KL)"""
    log_probs = POLICY.log_softmax(-1)
    terms = [math.exp(p) * (p - q) for p, q in zip(log_probs.tolist(), REFERENCE.tolist())]
    kl = sum(terms)
    return kl, log_probs.exp() * (log_probs - REFERENCE - kl)


def test_means_of_the_kl_estimates():
    kl, slopes = true_kl()
    assert kl > 0.1
    assert expected_kl(k1)[0] == pytest.approx(kl, **EXACT)
    assert expected_kl(k3)[0] == pytest.approx(kl, **EXACT)
    assert abs(expected_kl(k2)[0] - kl) > 1e-3  # biased
    assert close(expected_kl(k2)[1], slopes)
    assert close(expected_kl(k1)[1], [0.0, 0.0, 0.0])
    reverse = POLICY.softmax(-1) - REFERENCE.exp()  # the gradient of the KL divergence from the reference
    assert close(expected_kl(k3)[1], reverse)


def test_k3_is_at_least_zero():
    log_probs = (-12 * torch.rand(200, dtype=torch.float64)).requires_grad_()
    reference = -12 * torch.rand(200, dtype=torch.float64)
    values = k3(log_probs, reference)
    (gradient,) = torch.autograd.grad(values.sum(), log_probs)
    log_probs = log_probs.detach()
    torch.testing.assert_close(gradient, 1 - (reference - log_probs).exp(), rtol=1e-12, atol=1e-12)
    assert (values > 0).all() and not k3(log_probs, log_probs).any()
    for got, p, q in zip(values.tolist(), log_probs.tolist(), reference.tolist()):
        ratio = math.exp(q) / math.exp(p)
        assert got == pytest.approx(ratio - math.log(ratio) - 1, **EXACT)
    assert (k1(log_probs, reference) < 0).any()
    assert close(k1(log_probs, reference), [a - b for a, b in zip(log_probs.tolist(), reference.tolist())])


# Kimi 1.5


@pytest.mark.parametrize("tau", [0.02, 0.5, 3.0])
def test_kimi_is_the_loop(tau):
    log_probs, old, rewards, mask = random_case()
    total = 0.0
    for at, group in enumerate(rewards.tolist()):
        for turn, reward in enumerate(group):
            row = at * SIZE + turn
            moved = sum(float(log_probs[row, t] - old[row, t]) for t in range(TIME) if mask[row, t])
            total += (reward - sum(group) / SIZE - tau * moved) ** 2

    def loss(x):
        return kimi(x, old, rewards, mask, tau)

    got, found = gradient(loss, log_probs)
    assert got == pytest.approx(total / (GROUPS * SIZE) / (2 * tau), **EXACT)
    assert close(found, finite_differences(loss, log_probs), 1e-7)


@pytest.mark.parametrize("tau", [0.02, 1.0])
def test_on_policy_kimi_is_reinforce_of_whole_responses(tau):
    old, _, rewards, mask = random_case()
    slopes = gradient(lambda x: kimi(x, old, rewards, mask, tau), old)[1]
    gains = advantages_loop(rewards, False)
    want = [[-gain / len(gains) * own for own in row] for gain, row in zip(gains, mask.double().tolist())]
    assert close(slopes, want)


def test_the_minimum_of_kimi_is_the_tilted_old_policy():
    """pi(y) = pi_old(y) exp(r(y) / tau) / Z, here with pi_old such that tau log Z is the group's mean."""
    tau, rewards = 0.4, torch.tensor([[0.9, 0.1, 0.5]], dtype=torch.float64)
    old = torch.tensor([0.2, 0.2 * math.e, 0.8 - 0.2 * math.e], dtype=torch.float64)
    tilted = [p * math.exp(r / tau) for p, r in zip(old.tolist(), rewards[0].tolist())]
    normalizer = sum(tilted)
    assert tau * math.log(normalizer) == pytest.approx(0.5, **EXACT)

    def loss(logits):
        return kimi(logits.log_softmax(-1)[:, None], old.log()[:, None], rewards, one_token(3), tau)

    best = torch.tensor([value / normalizer for value in tilted], dtype=torch.float64).log()
    value, slopes = gradient(loss, best)
    assert value < 1e-30 and close(slopes, [0.0, 0.0, 0.0])
    for other in (old.log(), *(best + 0.01 * torch.eye(3, dtype=torch.float64))):
        assert float(loss(other)) > 1e-6


def test_length_reward_by_hand():
    lengths = torch.tensor([[10, 20, 30, 14], [8, 8, 8, 8], [1, 2, 1, 2]])
    right = torch.tensor([[True, True, False, False], [True, False, True, False], [False, False, True, True]])
    want = [[0.5, 0.0, -0.5, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, -0.5, 0.5, -0.5]]
    assert length_reward(lengths, right).tolist() == want
    late = length_reward(torch.tensor([[10, 20, 26, 30]]), torch.tensor([[False, True, True, False]]))
    assert late[0].tolist() == pytest.approx([0.0, 0.0, -0.3, -0.5])


# What lies outside the mask

LOSSES = {
    **{
        f"grpo {how}": (
            lambda x, old, rewards, mask, how=how: grpo(x, old, advantages(rewards), mask, average=how)
        )
        for how in AVERAGES
    },
    "reinforce": lambda x, old, rewards, mask: reinforce(x, advantages(rewards), mask),
    "gspo": lambda x, old, rewards, mask: gspo(x, old, advantages(rewards), mask, 0.2, 0.2),
    "kimi": lambda x, old, rewards, mask: kimi(x, old, rewards, mask, 0.1),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("filler", [0.0, -7.5, float("inf"), float("nan")])
def test_nothing_outside_the_mask_counts(name, filler):
    log_probs, old, rewards, mask = random_case()
    value, slopes = gradient(lambda x: LOSSES[name](x, old, rewards, mask), log_probs)
    changed = log_probs.where(mask, filler), old.where(mask, 2 * filler)
    again, found = gradient(lambda x: LOSSES[name](x, changed[1], rewards, mask), changed[0])
    assert again == value
    assert torch.equal(found, slopes) and not found[~mask].any() and found[mask].any()


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "grpo constant"])
def test_padding_is_not_in_the_denominator(name):
    log_probs, old, rewards, mask = random_case()
    value = float(LOSSES[name](log_probs, old, rewards, mask))
    wide = [torch.nn.functional.pad(part, (2, 5)) for part in (log_probs, old, mask)]
    assert float(LOSSES[name](wide[0], wide[1], rewards, wide[2])) == pytest.approx(value, **EXACT)


def test_the_constant_of_dr_grpo_does_not_follow_the_padding():
    log_probs, old, rewards, mask = random_case()
    gains = advantages(rewards, False)
    wide = [torch.nn.functional.pad(part, (2, 5)) for part in (log_probs, old, mask)]
    value = float(grpo(log_probs, old, gains, mask, average="constant", longest=20))
    again = float(grpo(wide[0], wide[1], gains, wide[2], average="constant", longest=20))
    assert again == pytest.approx(value, **EXACT)


# Errors


def test_rewards_that_no_group_can_have():
    wrong = torch.tensor([[0.0, 1.0], [float("nan"), 1.0]])
    for call in (advantages, objectives.informative):
        refused(lambda call=call: call(torch.zeros(3, 1)), "(3, 1)", "size >= 2")
        refused(lambda call=call: call(torch.zeros(6)), "(6,)", "size >= 2")
        refused(lambda call=call: call(wrong), "group 1", "nan", "finite")
        refused(lambda call=call: call(wrong.nan_to_num(float("inf"))), "group 1", "inf", "finite")
    log_probs, old, rewards, mask = random_case()
    refused(lambda: kimi(log_probs, old, rewards.view(-1, 1), mask, 0.1), "(12, 1)", "size >= 2")
    for tau in (0.0, -1.0, float("nan")):
        refused(lambda tau=tau: kimi(log_probs, old, rewards, mask, tau), f"tau={tau}", "positive")


@pytest.mark.parametrize("name", LOSSES)
def test_masks_that_do_not_fit(name):
    log_probs, old, rewards, mask = random_case()
    refused(lambda: LOSSES[name](log_probs, old, rewards, mask.double()), "float64", "torch.bool (12, 7)")
    refused(lambda: LOSSES[name](log_probs, old, rewards, mask[:, 1:]), "(12, 6)", "torch.bool (12, 7)")
    refused(lambda: LOSSES[name](log_probs, old, rewards, mask[:1]), "(1, 7)", "torch.bool (12, 7)")


def test_an_unknown_average():
    values, _, _, mask = random_case()
    refused(lambda: mean(values, mask, "median"), "median", "sequence, token or constant")
