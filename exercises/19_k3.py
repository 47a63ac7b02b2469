"""Which estimate of the KL divergence may be part of a loss?"""

import torch

from exercises.grader.watch import backward

TARGET = "rl.objectives:k3"
TESTS = ("tests/rl/test_objectives.py",)
WHICH = "kl_estimates or k3"
EQUATION = "GRPO (arXiv 2402.03300) eq. 4"
LEARN = "k3 is at least 0 for every token, and its mean is the KL divergence; k1 has the same mean, but its mean gradient is 0."
HINTS = (
    "The estimate is never negative. Where is x - log x - 1 equal to 0, and which ratio is x: pi_ref / pi or pi / pi_ref?",
    "The inputs are log-probabilities, so a ratio is the exponential of a difference, and its logarithm is that difference. "
    "One value for each token; the gradient flows through both terms.",
    "exp, or expm1",
)
EXPECTS = {
    "log_probs": "log pi of each token, any shape, fp32 or fp64; carries the gradient",
    "reference": "log pi_ref of the same tokens, the same shape, without gradient",
    "returns": "one value for each token, the same shape and dtype; the caller applies the mask and takes the mean",
}
MISTAKES = (
    (
        "reference - log_probs",
        "log_probs - reference",
        "the ratio is inverted: it is pi_ref / pi, so the log-ratio is reference - log_probs (eq. 4)",
    ),
    (
        "gap.exp() - gap - 1",
        "-gap",
        "this is k1: it can be negative, and the mean of its gradient is 0; eq. 4 is k3",
    ),
    (
        "gap.exp() - gap - 1",
        "gap * gap / 2",
        "this is k2: its mean is not the KL divergence; eq. 4 is k3",
    ),
    (
        "gap.exp() - gap - 1",
        "gap.abs()",
        "this is the absolute value of k1: its mean is not the KL divergence; eq. 4 is k3",
    ),
    (
        "gap.exp() - gap - 1",
        "gap.exp() - gap",
        "1 is not subtracted: the estimate must be 0 where the two policies agree",
    ),
    (
        "gap.exp() - gap - 1",
        "gap.exp() + gap - 1",
        "the logarithm of the ratio is added: eq. 4 subtracts it",
    ),
    (
        "gap.exp() - gap - 1",
        "gap.exp() - 1",
        "the logarithm of the ratio is missing: without it, the mean of the estimate is 0",
    ),
    (
        "gap.exp() - gap - 1",
        "1 + gap - gap.exp()",
        "the sign is reversed: the estimate is at least 0, and a loss adds it",
    ),
    (
        "reference - log_probs",
        "reference / log_probs",
        "the log-probabilities are divided as if they were probabilities: a ratio is the exp of their difference",
    ),
    (
        "gap.exp() - gap",
        "gap.detach().exp() - gap",
        "the ratio is detached: the gradient is that of k1, whose mean is 0",
    ),
    (
        "gap.exp() - gap",
        "gap.exp() - gap.detach()",
        "the logarithm of the ratio is detached: the gradient flows through both terms",
    ),
    (
        "reference - log_probs",
        "reference - log_probs.detach()",
        "log_probs are detached: no gradient reaches the policy",
    ),
    (
        "gap.exp() - gap - 1",
        "log_probs.exp() * (gap.exp() - gap - 1)",
        "the estimate is multiplied by pi: the tokens are sampled from pi, so their plain mean is enough",
    ),
    (
        "gap.exp() - gap - 1",
        "(gap.exp() - gap - 1) * (log_probs - log_probs.detach()).exp()",
        "the estimate is multiplied by a ratio of policies: that corrects for an old policy, which eq. 4 does not",
    ),
    (
        "gap.exp() - gap - 1",
        "(gap.exp() - gap - 1).mean(-1)",
        "the tokens are averaged: return one value for each token, since padding is masked later",
    ),
    (
        "reference - log_probs",
        "(reference - log_probs).clamp(-5, 5)",
        "the log-ratio is clamped: tokens far from the reference lose their gradient",
    ),
    (
        "reference - log_probs",
        "reference.sub_(log_probs.detach()) + log_probs.detach() - log_probs",
        "the reference is changed in place: the next update needs it",
    ),
    (
        "reference - log_probs",
        "(reference - log_probs).bfloat16().to(log_probs.dtype)",
        "the log-ratio is rounded to bf16: keep the dtype of log_probs",
    ),
)
RIGHT = (
    """
    gap = reference - log_probs
    return torch.expm1(gap) - gap
    """,
    """
    gap = log_probs - reference
    return gap + torch.exp(-gap) - 1
    """,
    """
    ratio = reference.exp() / log_probs.exp()
    return ratio - ratio.log() - 1
    """,
    """
    wide = reference.double() - log_probs.double()
    return (wide.exp() - 1 - wide).to(log_probs.dtype)
    """,
    """
    gap = torch.sub(reference.detach(), log_probs)
    return torch.pow(torch.e, gap) - gap - torch.ones_like(gap)
    """,
    """
    found = []
    for new, ref in zip(log_probs.flatten(), reference.flatten()):
        found.append((ref - new).exp() - (ref - new) - 1)
    return torch.stack(found).view_as(log_probs)
    """,
    """
    return (reference - log_probs).exp() + k1(log_probs, reference) - 1
    """,
)


def probe(module, generator):
    """Policies that differ in both directions, some of them far apart, and two that agree."""
    found = {}
    for name, shape, spread, dtype in (
        ("close policies", (3, 7), 0.5, torch.float32),
        ("fp64", (2, 3, 5), 1.0, torch.float64),
        ("far apart", (11,), 7.0, torch.float32),
    ):
        log_probs = -0.1 - 3 * torch.rand(*shape, generator=generator, dtype=dtype)
        shift = torch.linspace(-1, 1, log_probs.numel(), dtype=dtype)
        order = torch.randperm(log_probs.numel(), generator=generator)
        reference = (log_probs + spread * shift[order].view(shape)).clamp(max=-0.05)
        log_probs.requires_grad_()
        values = module.k3(log_probs, reference)
        weights = 0.5 + torch.rand(*shape, generator=generator, dtype=dtype)
        found[name] = values
        if values.shape == weights.shape:
            backward((values * weights).sum())
        found[f"gradient of log_probs, {name}"] = log_probs.grad
    same = torch.rand(4, generator=generator).log()
    return found | {"policies that agree": module.k3(same, same.clone())}
