"""How good is a response, measured against its own group?"""

import torch

TARGET = "rl.objectives:advantages"
TESTS = ("tests/rl/test_objectives.py",)
WHICH = "advantages or divides_each or one_deviation"
BEGIN = "centred = rewards - "
EQUATION = "DeepSeek-R1 (arXiv 2501.12948) eq. 3"
LEARN = "The other responses to the same prompt are the baseline, so no value model is needed; a flat group teaches nothing."
HINTS = (
    "Which rewards does GRPO compare a response with? What is left if they are all equal?",
    "From each reward (groups, size) subtract the mean of its row, then divide by the row's sample standard deviation "
    "plus STD_EPS. In floating point the mean of equal rewards can be off by a rounding error: set such a row to 0.",
    "mean(-1, keepdim=True), std(-1, keepdim=True), all(-1, keepdim=True), masked_fill, flatten",
)
EXPECTS = {
    "rewards": "(groups, size), fp32 or fp64, finite, size >= 2; a row holds the responses to one prompt",
    "normalize": "True: divide by the row's standard deviation (size - 1 in the denominator) plus STD_EPS; False: only centre",
    "returns": "(groups x size,), row after row, in the dtype of the rewards; exactly 0 where a row's rewards are equal",
}
MISTAKES = (
    (
        "rewards - rewards.mean(-1, keepdim=True)",
        "rewards * 1",
        "the mean is not subtracted: the group's mean reward is the baseline",
    ),
    (
        "rewards.mean(-1, keepdim=True)",
        "rewards.mean()",
        "the baseline is the mean of all rewards: use the mean of each group",
    ),
    (
        "rewards.mean(-1, keepdim=True)",
        "rewards.mean(0, keepdim=True)",
        "the mean is over the groups: it must be over the responses of a group, the last axis",
    ),
    (
        "rewards - rewards.mean(-1, keepdim=True)",
        "rewards.mean(-1, keepdim=True) - rewards",
        "the sign is reversed: a reward above the mean has a positive advantage",
    ),
    (
        "rewards.mean(-1, keepdim=True)",
        "(rewards.sum(-1, keepdim=True) - rewards) / (rewards.shape[1] - 1)",
        "the baseline leaves out the response itself: that is RLOO; GRPO uses the mean of the whole group",
    ),
    (
        "rewards - rewards.mean(-1, keepdim=True)",
        "rewards.reshape(*rewards.shape[::-1]).sub(rewards.reshape(*rewards.shape[::-1])"
        ".mean(-1, keepdim=True)).view_as(rewards)",
        "the groups are mixed up by a reshape: each row of the rewards is already one group",
    ),
    (
        "if normalize:",
        "if False:",
        "the standard deviation is left out: that is Dr. GRPO, which normalize=False asks for",
    ),
    (
        "if normalize:",
        "if True:",
        "normalize=False is ignored: it asks for centred rewards only (Dr. GRPO)",
    ),
    (
        "rewards.std(-1, keepdim=True)",
        "rewards.std(-1, keepdim=True, unbiased=False)",
        "the standard deviation divides by size: the sample standard deviation divides by size - 1",
    ),
    (
        "rewards.std(-1, keepdim=True)",
        "rewards.std()",
        "all groups are divided by one standard deviation: use that of each group",
    ),
    (
        "rewards.std(-1, keepdim=True)",
        "rewards.var(-1, keepdim=True)",
        "the rewards are divided by the variance: take its square root",
    ),
    (
        "(rewards.std(-1, keepdim=True) + STD_EPS)",
        "rewards.std(-1, keepdim=True)",
        "STD_EPS is missing: a group of equal rewards is divided by 0, and close rewards are scaled up too far",
    ),
    (
        "(rewards.std(-1, keepdim=True) + STD_EPS)",
        "(rewards.var(-1, keepdim=True) + STD_EPS).sqrt()",
        "STD_EPS is added to the variance: add it to the standard deviation",
    ),
    (
        "(rewards.std(-1, keepdim=True) + STD_EPS)",
        "rewards.std(-1, keepdim=True).clamp(min=STD_EPS)",
        "STD_EPS is used as a lower bound: add it to the standard deviation",
    ),
    (
        "+ STD_EPS",
        "+ 1e-8",
        "the term added to the standard deviation is too small: it is STD_EPS",
    ),
    (
        "centred.masked_fill(flat, 0)",
        "centred",
        "equal rewards do not give exactly 0: the mean has a rounding error, which the division by STD_EPS scales up",
    ),
    (
        "centred.flatten()",
        "centred.T.flatten()",
        "the responses are in a different order: the groups follow each other, row after row",
    ),
    (
        "centred.flatten()",
        "centred",
        "the result still has two axes: return one advantage for each response, (groups x size,)",
    ),
    (
        "centred.masked_fill(flat, 0)",
        "rewards.copy_(centred.masked_fill(flat, 0))",
        "the rewards are overwritten: the report needs them later; use masked_fill on a new tensor",
    ),
    (
        "centred.flatten()",
        "centred.bfloat16().to(rewards.dtype).flatten()",
        "the advantages are rounded to bf16: keep the dtype of the rewards",
    ),
)
RIGHT = (
    """
    centre = rewards.mean(dim=1).unsqueeze(1)
    equal = rewards.amin(1, keepdim=True) == rewards.amax(1, keepdim=True)
    gain = torch.where(equal, 0.0, rewards - centre)
    scale = rewards.std(dim=1, keepdim=True) + STD_EPS if normalize else 1.0
    return (gain / scale).reshape(-1)
    """,
    """
    moved = rewards - rewards[:, :1]  # exactly 0 in a flat group, and then so is the mean
    moved = moved - moved.mean(-1, keepdim=True)
    if not normalize:
        return moved.flatten()
    deviation = (moved.square().sum(-1, keepdim=True) / (moved.shape[-1] - 1)).sqrt()
    return (moved / (deviation + STD_EPS)).flatten()
    """,
    """
    found = []
    for group in rewards:
        if len(group.unique()) == 1:
            found.append(torch.zeros_like(group))
            continue
        own = group - group.mean()
        found.append(own / (group.std() + STD_EPS) if normalize else own)
    return torch.cat(found)
    """,
    """
    found = []
    for group in rewards.tolist():
        middle = sum(group) / len(group)
        spread = (sum((r - middle) ** 2 for r in group) / (len(group) - 1)) ** 0.5 + STD_EPS
        flat = min(group) == max(group)
        found += [0.0 if flat else (r - middle) / (spread if normalize else 1) for r in group]
    return torch.tensor(found, dtype=rewards.dtype, device=rewards.device)
    """,
    """
    size = rewards.shape[1]
    centring = torch.eye(size, dtype=rewards.dtype, device=rewards.device) - 1 / size
    gain = torch.einsum("gs,st->gt", rewards, centring)
    gain = gain * (rewards != rewards[:, :1]).any(-1, keepdim=True)
    if normalize:
        gain = gain / rewards.std(-1, keepdim=True).add(STD_EPS)
    return gain.flatten()
    """,
    """
    wide = rewards.double()
    deviation, middle = torch.std_mean(wide, dim=-1, keepdim=True)
    gain = (wide - middle).masked_fill((wide.diff(dim=-1) == 0).all(-1, keepdim=True), 0)
    if normalize:
        gain = gain / (deviation + STD_EPS)
    return gain.to(rewards.dtype).view(-1)
    """,
    """
    flat = informative(rewards).logical_not().unsqueeze(-1)
    centred = (rewards - rewards.mean(-1, keepdim=True)).masked_fill(flat, 0)
    length = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    deviation = length / (rewards.shape[-1] - 1) ** 0.5
    return (centred / (deviation + STD_EPS) if normalize else centred).flatten()
    """,
)


def probe(module, generator):
    """Groups with different means and spreads, the first reward the highest or lowest, flat and close ones."""
    rewards = torch.rand(3, 5, generator=generator) * torch.tensor([[1.0], [0.3], [4.0]])
    rewards = rewards + torch.tensor([[0.0], [2.0], [-1.0]])
    rewards[0], rewards[1] = rewards[0].sort(descending=True).values, rewards[1].sort().values
    close = 0.5 + 1e-4 * torch.rand(2, 7, generator=generator, dtype=torch.float64)
    right = (torch.rand(4, 6, generator=generator) < 0.4).float()
    right[0], right[:, 0] = 0, torch.tensor([0.0, 1.0, 0.0, 1.0])
    right[1:, 1:3] = torch.tensor([0.0, 1.0])
    level = torch.tensor([[0.1], [0.7], [1 / 3], [3.3]]).expand(4, 7).clone()
    found = {}
    for name, normalize in (("normalized", True), ("centred", False)):
        found |= {
            name: module.advantages(rewards.clone(), normalize),
            f"{name}, fp64": module.advantages(rewards.double(), normalize),
            f"{name}, close rewards": module.advantages(close.clone(), normalize),
            f"{name}, right or wrong": module.advantages(right.clone(), normalize),
            f"{name}, equal rewards": module.advantages(level, normalize),
        }
    return found | {"default": module.advantages(rewards.clone())}
