"""How is a token limited to a few groups of experts?"""

import torch

from exercises.grader.watch import backward

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
EXPECTS = {
    "choice": "(..., experts), fp32: scores plus bias, of either sign; any number of leading axes",
    "num_groups": "divides experts; a group is experts / num_groups consecutive experts",
    "top_groups": "the groups to keep, 1..num_groups",
    "group_best": "a group's score is the sum of this many of its best scores",
    "returns": "(..., experts), the dtype of choice: -inf in the other groups, choice elsewhere",
}
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
    (
        "grouped.masked_fill(",
        "grouped.masked_fill_(",
        "choice is overwritten: the caller still needs it; use masked_fill without the underscore",
    ),
    (
        "group_scores = grouped.",
        "group_scores = grouped.bfloat16().",
        "the groups are compared in bf16: close scores become ties; keep fp32",
    ),
    (
        'float("-inf")).flatten(-2)',
        'float("-inf")).flatten(-2).half()',
        "the result is fp16: keep the dtype of choice",
    ),
    (
        "return grouped.masked_fill(",
        "return grouped.detach().masked_fill(",
        "the scores are detached: no gradient passes through the kept ones",
    ),
    (
        'float("-inf")',
        "-1.0",
        "excluded groups get -1: a biased score can be lower than that; use minus infinity",
    ),
    (
        "grouped = choice.unflatten(-1, (num_groups, -1))",
        "batch, time, _ = choice.shape\n    grouped = choice.view(batch, time, num_groups, -1)",
        "exactly two leading axes are assumed: choice can have any number",
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
    """
    size = choice.shape[-1] // num_groups
    rows = []
    for row in choice.reshape(-1, choice.shape[-1]):
        parts = list(row.split(size))
        scores = torch.stack([part.topk(group_best).values.sum() for part in parts])
        kept = set(scores.topk(top_groups).indices.tolist())
        rows.append(torch.cat([p if g in kept else torch.full_like(p, -torch.inf) for g, p in enumerate(parts)]))
    return torch.stack(rows).reshape(choice.shape)
    """,
    """
    grouped = choice.unflatten(-1, (num_groups, -1))
    best = torch.einsum("...gk->...g", grouped.topk(group_best, dim=-1).values)
    hot = torch.nn.functional.one_hot(best.topk(top_groups, dim=-1).indices, num_groups)
    kept = torch.einsum("...kg->...g", hot).bool().repeat_interleave(choice.shape[-1] // num_groups, dim=-1)
    return choice.masked_fill(~kept, float("-inf"))
    """,
    """
    scores = torch.cat([part.topk(group_best).values.sum(-1, keepdim=True) for part in choice.chunk(num_groups, -1)], -1)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for _ in range(top_groups):
        best = scores.masked_fill(kept, -torch.inf).argmax(-1, keepdim=True)
        kept = kept.scatter(-1, best, True)
    open_ = kept[..., None].expand(*kept.shape, choice.shape[-1] // num_groups).reshape(choice.shape)
    return torch.where(open_, choice, -torch.inf)
    """,
)


def probe(module, generator):
    """Scores on both sides of zero and close ones, other shapes, groups scored by one and two experts."""
    choice = torch.randn(3, 5, 12, generator=generator, requires_grad=True)
    limited = module.keep_best_groups(choice, 4, 2, 2)
    backward((limited * torch.randn(12, generator=generator)).where(limited.isfinite(), 0).sum())
    found = {"best by two": limited, "gradient of the scores": choice.grad}
    choice = torch.randn(2, 7, 15, generator=generator) - 1.5
    found["best by one"] = module.keep_best_groups(choice, 5, 1, 1)
    close = 3 + torch.randn(2, 7, 12, generator=generator) / 1000  # bf16 has steps of 0.016 there
    found["close scores"] = module.keep_best_groups(close, 4, 2, 2)
    found["one token"] = module.keep_best_groups(choice[0, 0], 3, 1, 2)
    found["rows of tokens"] = module.keep_best_groups(choice[0], 5, 2, 2)
    found["none closed"] = module.keep_best_groups(choice, 3, 3, 2)
    return found
