"""How is a token limited to a few groups of experts?"""

import torch

TARGET = "moe.router:keep_best_groups"
TESTS = ("tests/moe/test_router.py",)
WHICH = "group and not last_bit"
EQUATION = "DeepSeek-V3 section 2.1.2, DeepSeek-V2 section 2.2.2"
LEARN = "Excluded experts get minus infinity, not zero: with a bias, the scores of allowed experts can be negative."
HINTS = (
    "A choice score can be negative. Which value is never chosen before an allowed expert?",
    "View the scores as (..., groups, experts per group). A group's score is the sum of its group_best largest. "
    "Exclude all groups but the top_groups best, and return to the shape (..., experts).",
    "unflatten, topk(...).values.sum, topk(...).indices, scatter, masked_fill, flatten",
)
MISTAKES = (
    (
        'float("-inf")',
        "0.0",
        "excluded groups get 0: a biased score can be lower than that; minus infinity is never chosen",
    ),
    (
        "grouped.topk(group_best).values.sum(-1)",
        "grouped.sum(-1)",
        "a group is scored by all of its experts: only its group_best largest scores count",
    ),
    (
        "grouped.topk(group_best).values.sum(-1)",
        "grouped.amax(-1)",
        "a group is scored by its best expert alone: V3 adds its two best (group_best)",
    ),
    (
        "choice.unflatten(-1, (num_groups, -1))",
        "choice.unflatten(-1, (-1, num_groups)).transpose(-1, -2)",
        "the groups are strided: each group consists of consecutive experts",
    ),
    (
        "group_scores.topk(top_groups)",
        "group_scores.topk(num_groups - top_groups)",
        "num_groups - top_groups groups are kept: keep top_groups",
    ),
    (
        "group_scores.topk(top_groups)",
        "group_scores.topk(top_groups, largest=False)",
        "the worst groups are kept: keep the best ones",
    ),
)
RIGHT = (
    """
    if top_groups == num_groups:
        return choice
    grouped = choice.reshape(*choice.shape[:-1], num_groups, choice.shape[-1] // num_groups)
    best_of_each = grouped.sort(-1, descending=True).values[..., :group_best].sum(-1)
    keep = torch.zeros_like(best_of_each).scatter_(-1, best_of_each.topk(top_groups).indices, 1.0) > 0
    return torch.where(keep.unsqueeze(-1), grouped, float("-inf")).flatten(-2)
    """,
    """
    size = choice.shape[-1] // num_groups
    scores = torch.stack([part.topk(group_best).values.sum(-1) for part in choice.split(size, -1)], -1)
    rank = scores.argsort(-1, descending=True).argsort(-1)
    closed = (rank >= top_groups).repeat_interleave(size, -1)
    return choice.masked_fill(closed, float("-inf"))
    """,
    """
    grouped = choice.unflatten(-1, (num_groups, -1))
    scores = grouped.topk(group_best, dim=-1).values.sum(-1)
    least = scores.topk(top_groups, dim=-1).values[..., -1:]
    shut = torch.zeros_like(scores).masked_fill(scores < least, -torch.inf)
    return (grouped + shut.unsqueeze(-1)).flatten(-2)
    """,
)


def probe(module, generator):
    """Scores on both sides of zero, groups scored by one and by two experts, and no group excluded."""
    choice = torch.randn(3, 5, 12, generator=generator, requires_grad=True)
    limited = module.keep_best_groups(choice, 4, 2, 2)
    (limited * torch.randn(12, generator=generator)).where(limited.isfinite(), 0).sum().backward()
    found = {"best by two": limited, "gradient of the scores": choice.grad}
    choice = torch.randn(2, 7, 15, generator=generator) - 1.5
    found["best by one"] = module.keep_best_groups(choice, 5, 1, 1)
    found["none closed"] = module.keep_best_groups(choice, 3, 3, 2)
    return found
