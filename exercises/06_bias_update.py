"""How does the bias rule relieve an overloaded expert?"""

import torch
from torch import nn

TARGET = "moe.balance:update_bias_"
TESTS = ("tests/moe/test_balance.py",)
WHICH = "bias"
BEGIN = "step ="
EQUATION = "DeepSeek-V3 section 2.1.2, arXiv 2408.15664"
LEARN = "Without a loss or gradient: after each step, an overloaded expert's bias falls by a fixed amount, an underloaded one's rises."
HINTS = (
    "An expert is overloaded compared with what? Does it matter by how much?",
    "One step per expert: minus its load's relative distance from the mean, or only the sign of it unless "
    "proportional. If centred, subtract the mean of all steps. Change the bias, a buffer of the router, in place.",
    "violations(... .to(device, torch.float64)), sign, mean, add_ with alpha",
)
MISTAKES = (
    (
        "step = -violations(",
        "step = violations(",
        "the sign is reversed: overloaded experts would get even more tokens",
    ),
    (
        "if not proportional:",
        "if False:",
        "the step grows with the distance from the mean: without proportional=True only its sign counts",
    ),
    (
        "if not proportional:",
        "if True:",
        "proportional=True is ignored",
    ),
    (
        "-violations(tokens_per_expert.to(bias.device, torch.float64))",
        "-(tokens_per_expert - tokens_per_expert.sum()).to(torch.float64)",
        "the load is compared with the total: every expert is below it, so every bias would rise",
    ),
    (
        "bias.add_(step.to(bias.dtype), alpha=rate)",
        "router.bias = bias + rate * step.to(bias.dtype)",
        "the buffer is replaced by a new tensor: code that holds the old one, such as a distributed "
        "wrapper, sees no change; update it in place",
    ),
    (
        "bias.add_(step.to(bias.dtype), alpha=rate)",
        "bias.add_(step.to(bias.dtype))",
        "the rate is missing",
    ),
    (
        "if centred:",
        "if False:",
        "centred=True is ignored",
    ),
    (
        "if centred:",
        "if True:",
        "the steps are always centred: only do so if centred=True",
    ),
)
RIGHT = (
    """
    load = tokens_per_expert.to(bias.device, torch.float64)
    gap = violations(load)
    step = -gap if proportional else -torch.sign(gap)
    if centred:
        step -= step.mean()
    bias += rate * step.to(bias.dtype)
    """,
    """
    load = tokens_per_expert.double().to(bias.device)
    mean = load.mean()
    if proportional:
        step = (mean - load) / mean if mean > 0 else torch.zeros_like(load)
    else:
        step = (load < mean).double() - (load > mean).double()
    step = step - step.mean() if centred else step
    bias.copy_(bias + rate * step.to(bias.dtype))
    """,
    """
    away = -violations(tokens_per_expert.to(bias.device, torch.float64))
    step = away if proportional else away.sign()
    bias.sub_(((step.mean() if centred else 0) - step).to(bias.dtype), alpha=rate)
    """,
)


class Router(nn.Module):
    """A router reduced to its bias."""

    def __init__(self, bias):
        super().__init__()
        self.register_buffer("bias", bias)


def probe(module, generator):
    """Uneven loads, one of them equal to the mean, a nonzero bias, every option."""
    found = {}
    counts = torch.tensor([31, 0, 6, 12, 7, 11, 17])
    for name, options in {
        "by sign": {},
        "centred": {"centred": True},
        "proportional": {"proportional": True},
    }.items():
        bias = torch.randn(7, generator=generator)
        router = Router(bias.clone())
        held = router.bias
        module.update_bias_(router, counts, 0.03, **options)
        found |= {f"change, {name}": router.bias - bias, f"the buffer itself, {name}": held}
    return found
