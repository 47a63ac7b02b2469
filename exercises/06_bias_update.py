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
    "violations, to(bias.device), sign, mean, add_ with alpha",
)
EXPECTS = {
    "router": "a module; given above as its buffer bias (experts,), fp32",
    "tokens_per_expert": "(experts,), whole numbers in any dtype, on any device; up to millions",
    "rate": "a float, at least 0",
    "centred, proportional": "bools, see the docstring",
    "returns": "None; the buffer is changed in place",
}
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
        "-violations(tokens_per_expert.to(bias.device), bias.dtype)",
        "-(tokens_per_expert - tokens_per_expert.sum()).to(bias.dtype)",
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
    (
        "-violations(tokens_per_expert.to(bias.device), bias.dtype)",
        "-violations(tokens_per_expert.to(bias.device, torch.bfloat16), bias.dtype)",
        "the counts are rounded to bf16, which cannot represent 257: convert them to fp32 or wider",
    ),
    (
        "-violations(tokens_per_expert.to(bias.device), bias.dtype)",
        "-violations(tokens_per_expert.sub_(tokens_per_expert.min()), bias.dtype)",
        "tokens_per_expert is changed in place: the caller still logs it",
    ),
    (
        "bias.add_(step.to(bias.dtype), alpha=rate)",
        "bias.add_(step.to(torch.bfloat16).to(bias.dtype), alpha=rate)",
        "the step is rounded to bf16: keep the dtype of the bias",
    ),
    (
        "bias.add_(step.to(bias.dtype), alpha=rate)",
        "bias.copy_((bias + rate * step).bfloat16())",
        "the bias is rounded to bf16: steps of 0.001 are lost in it",
    ),
    (
        "-violations(tokens_per_expert.to(bias.device), bias.dtype)",
        "-violations(tokens_per_expert.to(bias.device, torch.int16), bias.dtype)",
        "the counts overflow int16: keep int64, or convert them to fp32",
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
    """
    load = tokens_per_expert.to(bias.device).tolist()
    mean = sum(load) / len(load)
    gaps = [(mean - count) / mean if mean else 0.0 for count in load]
    if not proportional:
        gaps = [float((gap > 0) - (gap < 0)) for gap in gaps]
    if centred:
        gaps = [gap - sum(gaps) / len(gaps) for gap in gaps]
    bias.add_(torch.tensor(gaps, dtype=bias.dtype, device=bias.device), alpha=rate)
    """,
    """
    load = tokens_per_expert.to(bias.device, torch.float64)
    centre = torch.eye(len(load), dtype=load.dtype, device=load.device) - 1 / len(load)
    step = -torch.einsum("ij,j->i", centre, load) / load.mean().clamp(min=1e-9)
    if not proportional:
        step = -violations(tokens_per_expert.to(bias.device)).sign().double()
    if centred:
        step = torch.einsum("ij,j->i", centre, step)
    bias += (rate * step).to(bias.dtype)
    """,
    """
    gap = violations(tokens_per_expert.to(bias.device), bias.dtype)
    for expert in range(len(bias)):
        step = gap[expert] if proportional else torch.sign(gap[expert])
        if centred:
            step = step - (gap if proportional else gap.sign()).mean()
        bias[expert] -= rate * step
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
        "large counts": {},
        "counts of a large batch": {},
    }.items():
        tokens = counts * 7001 if "batch" in name else counts + 70_000 * (name == "large counts")
        bias = torch.randn(7, generator=generator)
        router = Router(bias.clone())
        held = router.bias[:]
        module.update_bias_(router, tokens, 0.03, **options)
        found |= {f"change, {name}": router.bias - bias, f"the buffer itself, {name}": held}
    router = Router(torch.ones(7))
    module.update_bias_(router, torch.zeros(7, dtype=torch.int64), 0.03, proportional=True)
    return found | {"bias after no tokens": router.bias}
