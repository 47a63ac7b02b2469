"""Objectives of policy-gradient training, as pure functions of log-probabilities and rewards. All are losses.

Shapes: log_probs, old, reference and mask are (responses, time); mask is True for the tokens of the response;
rewards are (groups, size), with groups x size responses, those of a group in a row.
"""

import torch
from torch import Tensor

STD_EPS = 1e-4  # added to a group's standard deviation


def advantages(rewards: Tensor, normalize: bool = True) -> Tensor:
    """A response against its group: A = (r - mean r) / std r (arXiv 2402.03300 section 4.1.2).

    rewards (groups, size) -> (groups x size,). A group of equal rewards has advantages of exactly 0.

    Args:
        normalize: divide by the sample standard deviation; False: only centre (Dr. GRPO, arXiv 2503.20783).

    Raises:
        ValueError: rewards are not finite (groups, size >= 2).
    """
    check_rewards(rewards)
    centred = rewards - rewards.mean(-1, keepdim=True)
    flat = (rewards == rewards[:, :1]).all(-1, keepdim=True)  # rounding of the mean must not be scaled up
    centred = centred.masked_fill(flat, 0)
    if normalize:
        centred = centred / (rewards.std(-1, keepdim=True) + STD_EPS)  # R1 eq. 3
    return centred.flatten()


def informative(rewards: Tensor) -> Tensor:
    """Groups whose rewards differ, (groups,) bool; DAPO keeps only these (arXiv 2503.14476, eq. 8)."""
    check_rewards(rewards)
    return (rewards != rewards[:, :1]).any(-1)


def mean(values: Tensor, mask: Tensor, how: str = "sequence", longest: int | None = None) -> Tensor:
    """The mean of values (responses, time) where mask is True -> ()

    Args:
        how: "sequence": over each response, then over responses (GRPO); "token": over all tokens (DAPO);
            "constant": each response's sum over `longest`, then over responses (Dr. GRPO), so that a token
            counts the same in a long response.
        longest: the constant; None: time.
    """
    check_mask(values, mask)
    values = values.where(mask, 0)
    if how == "token":
        return values.sum() / mask.sum().clamp(min=1)
    sums = values.sum(-1)
    if how == "sequence":
        return (sums / mask.sum(-1).clamp(min=1)).mean()
    if how == "constant":
        return (sums / (longest or mask.shape[-1])).mean()
    raise ValueError(f"average {how!r}: expected sequence, token or constant")


def reinforce(log_probs: Tensor, advantages: Tensor, mask: Tensor, how: str = "sequence") -> Tensor:
    """REINFORCE with a baseline: -A log pi. Its gradient is that of the expected reward."""
    return mean(-advantages.unsqueeze(-1) * log_probs, mask, how)


def grpo(
    log_probs: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    low: float = 0.2,
    high: float = 0.2,
    average: str = "sequence",
    longest: int | None = None,
) -> Tensor:
    """The clipped objective of PPO and GRPO, negated: -min(rho A, clip(rho, 1 - low, 1 + high) A).

    GRPO (arXiv 2402.03300 eq. 3) has low = high and averages by sequence. DAPO (arXiv 2503.14476 eq. 8) has
    high = 0.28 and averages over all tokens. Dr. GRPO averages by a constant, with centred advantages.

    Args:
        advantages: (responses,)
    """
    ratio = log_ratio(log_probs, old, mask).exp()  # rho = pi / pi_old
    return mean(-clipped(ratio, advantages.unsqueeze(-1), low, high), mask, average, longest)


def gspo(
    log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, low: float = 3e-4, high: float = 4e-4
) -> Tensor:
    """GSPO (arXiv 2507.18071 eq. 5): clips the ratio of whole sequences, the mean over tokens of log rho."""
    logs = log_ratio(log_probs, old, mask).sum(-1) / mask.sum(-1).clamp(min=1)
    ratio = logs.exp()  # GSPO eq. 7
    return -clipped(ratio, advantages, low, high).mean()


def log_ratio(log_probs: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """log(pi / pi_old) of each token, 0 outside the mask"""
    check_mask(log_probs, mask)
    return (log_probs - old).where(mask, 0)


def clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """min(rho A, clip(rho) A): no gain from moving further than the clip in the direction that A asks for"""
    return torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)  # GRPO eq. 3


def kimi(log_probs: Tensor, old: Tensor, rewards: Tensor, mask: Tensor, tau: float) -> Tensor:
    """Kimi 1.5's mirror descent (arXiv 2501.12599 section 2.3.2): (r - mean r - tau log(pi / pi_old))^2.

    Divided by 2 tau, so that the gradient on policy is that of `reinforce` with summed log-probabilities.

    Args:
        rewards: (groups, size); the group's mean stands in for tau log Z.
        tau: strength of the pull to the old policy.
    """
    if not tau > 0:
        raise ValueError(f"tau={tau} must be positive")
    centred = advantages(rewards, normalize=False)
    moved = log_ratio(log_probs, old, mask).sum(-1)  # log pi(y) / pi_old(y) of whole responses
    return ((centred - tau * moved) ** 2).mean() / (2 * tau)


def length_reward(lengths: Tensor, right: Tensor) -> Tensor:
    """Kimi 1.5's length reward (arXiv 2501.12599 section 2.3.3), to be added to the reward.

    lengths (groups, size), right (groups, size) bool -> (groups, size): from 0.5 for the shortest response of
    the group to -0.5 for the longest; at most 0 for a wrong one; 0 where all are of one length.
    """
    lengths = lengths.float()
    shortest, longest = lengths.amin(-1, keepdim=True), lengths.amax(-1, keepdim=True)
    share = 0.5 - (lengths - shortest) / (longest - shortest).clamp(min=1)
    reward = torch.where(right, share, share.clamp(max=0))
    return reward.masked_fill(shortest == longest, 0)


def k1(log_probs: Tensor, reference: Tensor) -> Tensor:
    """log pi - log pi_ref: its mean under pi is the KL divergence. Not for a loss: its mean gradient is 0."""
    return log_probs - reference


def k2(log_probs: Tensor, reference: Tensor) -> Tensor:
    """(log pi - log pi_ref)^2 / 2: biased, and its mean gradient is that of the KL divergence."""
    return (log_probs - reference) ** 2 / 2


def k3(log_probs: Tensor, reference: Tensor) -> Tensor:
    """pi_ref / pi - log(pi_ref / pi) - 1: at least 0, and its mean under pi is the KL divergence."""
    gap = reference - log_probs
    return gap.exp() - gap - 1  # GRPO eq. 4


def check_rewards(rewards: Tensor) -> None:
    """Raise ValueError unless rewards are finite, in groups of at least two."""
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards are {tuple(rewards.shape)}; expected (groups, size >= 2)")
    if not rewards.isfinite().all():
        row = int((~rewards.isfinite()).any(-1).nonzero()[0])
        raise ValueError(f"rewards of group {row} are {rewards[row].tolist()}; they must be finite")


def check_mask(values: Tensor, mask: Tensor) -> None:
    """Raise ValueError unless mask is a bool for each value."""
    if mask.dtype != torch.bool or mask.shape != values.shape:
        found, wanted = f"{mask.dtype} {tuple(mask.shape)}", f"torch.bool {tuple(values.shape)}"
        raise ValueError(f"mask is {found}; expected {wanted}, True for a token of the response")
