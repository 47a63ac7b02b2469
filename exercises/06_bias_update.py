"""What becomes of an expert that has too much to do?"""

import torch
from torch import nn

TARGET = "moe.balance:update_bias_"
TESTS = ("tests/moe/test_balance.py",)
WHICH = "bias"
BEGIN = "step ="
EQUATION = "DeepSeek-V3 section 2.1.2, arXiv 2408.15664"
LEARN = "No loss and no gradient: after each step a busy expert's bias goes down by a fixed step, an idle one's up."
HINTS = (
    "Compared with what is an expert busy? And does it matter by how much?",
    "One number an expert: how far its load is from the mean, in means; its sign, unless proportional; less the mean "
    "of all steps, if centred. The bias, a buffer of the router, is changed where it is.",
    "violations(... .to(device, torch.float64)), sign, mean, add_ with alpha",
)
MISTAKES = (
    (
        "step = -violations(",
        "step = violations(",
        "the sign is reversed: busy experts get busier",
    ),
    (
        "if not proportional:",
        "if False:",
        "the step grows with the gap: without proportional=True only its sign counts",
    ),
    (
        "if not proportional:",
        "if True:",
        "proportional=True is not heeded",
    ),
    (
        "-violations(tokens_per_expert.to(bias.device, torch.float64))",
        "-(tokens_per_expert - tokens_per_expert.sum()).to(torch.float64)",
        "compared with the total: every expert is below that, so every bias goes up",
    ),
    (
        "bias.add_(step.to(bias.dtype), alpha=rate)",
        "router.bias = bias + rate * step.to(bias.dtype)",
        "a new tensor in the place of the buffer: whoever holds the old one, as an optimizer or a "
        "distributed wrapper does, sees no change; change it in place",
    ),
    (
        "bias.add_(step.to(bias.dtype), alpha=rate)",
        "bias.add_(step.to(bias.dtype))",
        "the rate is left out",
    ),
    (
        "if centred:",
        "if False:",
        "centred=True is not heeded",
    ),
    (
        "if centred:",
        "if True:",
        "always centred: that is an option of its own",
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
    """All that is asked of a router here: a bias."""

    def __init__(self, bias):
        super().__init__()
        self.register_buffer("bias", bias)


def probe(module, generator):
    """Uneven loads with one right at the mean, a bias that is not zero, every option."""
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
