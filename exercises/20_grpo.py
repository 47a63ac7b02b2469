"""When does a token stop being reinforced?"""

import torch

from exercises.grader.watch import backward

TARGET = "rl.objectives:grpo"
TESTS = ("tests/rl/test_objectives.py",)
WHICH = "(grpo or clip) and not reinforce and not fit and not expected_reward and not divides"
EQUATION = "GRPO (arXiv 2402.03300) eq. 3"
LEARN = "The lower product stops a token's gradient only once its ratio has moved far enough in the direction of the advantage."
HINTS = (
    "A response was bad, and its tokens have become more likely all the same. Should the clip stop their gradient?",
    "For each token the ratio rho (responses, time) of the new to the old probability. Multiply it, and the clipped one, by "
    "the response's advantage; keep the lower product. The loss is minus its mean over the mask. Values outside the mask can "
    "be NaN, and the gradient of exp at NaN is NaN even after masking: mask the log-ratio first.",
    "log_ratio, exp, clamp, torch.minimum, unsqueeze, mean (the one of this module); or clipped",
)
EXPECTS = {
    "log_probs, old": "(responses, time), fp32 or fp64: log-probabilities of the new policy, with gradient, and of the old one; anything, also NaN or inf, where mask is False",
    "advantages": "(responses,), of either sign",
    "mask": "bool (responses, time), True for the tokens of the response: neither prompt nor padding",
    "low, high": "floats; rho is clipped to 1 - low .. 1 + high",
    "average": "a str, passed on to mean as its `how`",
    "longest": "None or an int, passed on to mean",
    "returns": "the loss, (), in the dtype of log_probs; no gradient outside the mask",
}
MISTAKES = (
    (
        "-clipped(",
        "-(lambda r, a, l, h: torch.maximum(r * a, r.clamp(1 - l, 1 + h) * a))(",
        "the larger product is kept: take the lower one, which stops a token only once it has moved far enough the right way",
    ),
    (
        "-clipped(",
        "-(lambda r, a, l, h: r.clamp(1 - l, 1 + h) * a)(",
        "only the clipped ratio is used: a token that has moved the wrong way could not come back; keep the lower product",
    ),
    (
        "-clipped(",
        "-(lambda r, a, l, h: r * a)(",
        "the ratio is not clipped: one batch can move the policy without limit",
    ),
    (
        "-clipped(",
        "-(lambda r, a, l, h: torch.minimum(r, r.clamp(1 - l, 1 + h)) * a)(",
        "the lower ratio is kept, then multiplied by A: with a negative A that is the larger product; multiply first",
    ),
    (
        "-clipped(",
        "-(lambda r, a, l, h: torch.minimum(r * a, r.clamp(max=1 + h) * a))(",
        "the ratio is clipped above only: a negative advantage needs the lower bound 1 - low",
    ),
    (
        "-clipped(",
        "-(lambda r, a, l, h: torch.minimum(r * a, r.log().clamp(-l, h).exp() * a))(",
        "the log-ratio is clipped: the bounds are those of the ratio, 1 - low and 1 + high",
    ),
    (
        "-clipped(",
        "clipped(",
        "the sign is reversed: the objective is maximised, so the loss is its negative",
    ),
    (
        "low, high)",
        "high, low)",
        "low and high are swapped: the bounds are 1 - low and 1 + high",
    ),
    (
        "low, high)",
        "low, low)",
        "high is ignored: the upper bound is 1 + high, which DAPO sets higher than low",
    ),
    (
        "log_ratio(log_probs, old, mask).exp()",
        "log_ratio(log_probs, old, mask)",
        "the log-ratio is used as the ratio: rho is its exponential",
    ),
    (
        "log_ratio(log_probs, old, mask)",
        "log_ratio(old, log_probs, mask)",
        "the ratio is inverted: it is pi / pi_old",
    ),
    (
        "log_ratio(log_probs, old, mask)",
        "log_ratio(log_probs, log_probs.detach(), mask)",
        "the old log-probabilities are replaced by the new ones: the ratio is always 1, and nothing is ever clipped",
    ),
    (
        "log_ratio(log_probs, old, mask)",
        "log_ratio(log_probs.detach(), old, mask)",
        "log_probs are detached: no gradient reaches the policy",
    ),
    (
        "log_ratio(log_probs, old, mask).exp()",
        "(log_probs - old).exp()",
        "the log-ratio is not masked: NaN outside the mask reaches the gradient",
    ),
    (
        "log_ratio(log_probs, old, mask).exp()",
        "(log_ratio(log_probs, old, mask).sum(-1) / mask.sum(-1)).exp().unsqueeze(-1).expand(mask.shape)",
        "one ratio is used for the whole response: that is GSPO; GRPO clips each token's own ratio",
    ),
    (
        "return mean(",
        "return (lambda values, *_: values.where(mask, 0).mean())(",
        "padding is in the denominator: divide by the number of tokens in the mask",
    ),
    (
        "advantages.unsqueeze(-1)",
        "(advantages - advantages.mean()).unsqueeze(-1)",
        "the advantages are centred again, over all responses: use them as they are",
    ),
    (
        "mask, average, longest)",
        "mask | True, average, longest)",
        "the mask is left out of the mean: prompt and padding count as tokens of the response",
    ),
    (
        "mask, average, longest)",
        'mask, "sequence", longest)',
        "average is ignored: the mean is always over each response first",
    ),
    (
        "mask, average, longest)",
        'mask, "token", longest)',
        "average is ignored: the mean is always over all tokens (DAPO); GRPO averages over each response first",
    ),
    (
        "mask, average, longest)",
        "mask, average)",
        "longest is ignored: Dr. GRPO divides by a constant, whatever the padding",
    ),
    (
        "log_ratio(log_probs, old, mask)",
        "log_ratio(log_probs, old, mask).bfloat16().to(log_probs.dtype)",
        "the log-ratio is rounded to bf16: keep the dtype of log_probs",
    ),
)
RIGHT = (
    """
    ratio = (log_probs - old).masked_fill(~mask, 0).exp()
    gain = advantages[:, None]
    first, second = -gain * ratio, -gain * torch.clamp(ratio, 1 - low, 1 + high)
    return mean(torch.maximum(first, second), mask, average, longest)
    """,
    """
    ratio = torch.exp(torch.where(mask, log_probs - old, 0.0))
    gain = advantages.unsqueeze(1).expand_as(ratio)
    bounded = torch.where(gain > 0, ratio.clamp(max=1 + high), ratio.clamp(min=1 - low))
    return -mean(bounded * gain, mask, how=average, longest=longest)
    """,
    """
    rows = []
    for new, before, gain, own in zip(log_probs, old, advantages, mask):
        ratio = (new[own] - before[own]).exp()
        rows.append(torch.stack((ratio * gain, ratio.clamp(1 - low, 1 + high) * gain)).amin(0))
    if average == "token":
        return -torch.cat(rows).mean()
    if average == "sequence":
        return -torch.stack([row.mean() for row in rows]).mean()
    return -torch.stack([row.sum() for row in rows]).mean() / (longest or mask.shape[1])
    """,
    """
    real = mask.to(log_probs.dtype)
    ratio = (log_probs.masked_fill(~mask, 0.0) - old.masked_fill(~mask, 0.0)).exp()
    products = torch.einsum("krt,r->krt", torch.stack((ratio, ratio.clamp(1 - low, 1 + high))), advantages)
    lower = products.min(dim=0).values
    lengths = real.sum(1)
    weights = {
        "token": torch.ones_like(lengths) / lengths.sum(),
        "sequence": 1 / (lengths * len(lengths)),
        "constant": torch.ones_like(lengths) / (longest or mask.shape[1]) / len(lengths),
    }[average]
    return -torch.einsum("rt,rt,r->", lower, real, weights)
    """,
    """
    safe = mask.double()
    gap = torch.where(mask, log_probs.double(), 0.0) - torch.where(mask, old.double(), 0.0)
    ratio, gain = gap.exp(), advantages.double().unsqueeze(-1)
    lower = torch.minimum(ratio * gain, ratio.clamp(1 - low, 1 + high) * gain) * safe
    if average == "token":
        loss = -lower.sum() / safe.sum()
    elif average == "sequence":
        loss = -(lower.sum(-1) / safe.sum(-1)).mean()
    else:
        loss = -(lower.sum(-1) / (longest or lower.shape[-1])).mean()
    return loss.to(log_probs.dtype)
    """,
    """
    ratio = log_probs.where(mask, 0).exp() / old.where(mask, 0).exp()
    gain = advantages.unsqueeze(-1)
    stopped = ((gain > 0) & (ratio > 1 + high)) | ((gain < 0) & (ratio < 1 - low))
    held = torch.full_like(ratio, 1 + high).where(gain > 0, 1 - low)
    return mean(-torch.where(stopped, held, ratio) * gain, mask, average, longest)
    """,
    """
    ratio = log_ratio(log_probs, old, mask).exp()
    gain = advantages.unsqueeze(-1)
    surplus = torch.relu(ratio - 1 - high) * gain.clamp(min=0) - torch.relu(1 - low - ratio) * gain.clamp(max=0)
    return mean(surplus - ratio * gain, mask, average, longest)
    """,
)


def probe(module, generator):
    """Off-policy ratios far beyond uneven clips, both signs, a late start, uneven lengths, NaN outside the mask."""
    rows, time = 5, 9
    starts, lengths = torch.tensor([1, 2, 1, 3, 0]), torch.tensor([7, 5, 2, 6, 4])
    places = torch.arange(time) - starts.unsqueeze(-1)
    mask = (places >= 0) & (places < lengths.unsqueeze(-1))
    gains = torch.tensor([1.0, -1.0, 0.5, 1.5, -0.7]) * (0.6 + torch.rand(rows, generator=generator))
    shift = torch.linspace(-0.8, 0.8, rows * time)[torch.randperm(rows * time, generator=generator)]
    old = -0.9 - 2 * torch.rand(rows, time, generator=generator)
    third = (
        torch.arange(time) % 3
    )  # of what is outside the mask, a third is finite, and must not count either
    old_padded = old.masked_fill(~mask & (third == 0), float("nan"))
    found = {}
    for name, dtype, more in (
        ("sequence", torch.float32, {"low": 0.2, "high": 0.35}),
        ("token", torch.float32, {"low": 0.1, "high": 0.28, "average": "token"}),
        ("constant", torch.float32, {"low": 0.2, "high": 0.3, "average": "constant", "longest": 13}),
        ("constant, longest=None", torch.float32, {"low": 0.3, "high": 0.2, "average": "constant"}),
        ("default, fp64", torch.float64, {}),
    ):
        new = (old + shift.view(rows, time)).masked_fill(~mask & (third == 1), float("inf"))
        new = new.to(dtype).requires_grad_()
        loss = module.grpo(new, old_padded.to(dtype), gains.to(dtype), mask, **more)
        backward(loss)
        found |= {f"loss, {name}": loss, f"gradient of log_probs, {name}": new.grad}
    return found
