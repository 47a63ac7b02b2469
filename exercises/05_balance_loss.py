"""Which factor of the balance loss is a count, and which carries the gradient?"""

import torch

from exercises.grader.watch import backward

TARGET = "moe.balance:load_and_share"
TESTS = ("tests/moe/test_balance.py",)
WHICH = "loss and not capacity and not dropped and not autocast and not without_tokens and not loop_over and not global_counts"
BEGIN = "scores = scores.where("
EQUATION = "DeepSeek-V3 eq. 17-20"
LEARN = "f counts choices and has no gradient; the gradient reaches the router through P, the mean normalised score."
HINTS = (
    "A count has no gradient. So which of f (eq. 18) and P (eq. 20) can change the router's weights?",
    "load (batch, experts): how often each expert was chosen in the sequence, divided by the mean, K T / experts. "
    "share (batch, experts): each token's scores over their sum (eq. 19), averaged over the sequence's real tokens. "
    "Scores of padding can be NaN: set them to 0 before you divide.",
    "where, one_hot(...).sum(2), sum(1), relative_load, sum(-1, keepdim=True), clamp(min=1)",
)
EXPECTS = {
    "routing": "Routing; given above as experts (batch, time, top_k), -1 for an empty slot, and scores (batch, time, experts) fp32",
    "mask": "None: every token is real; or bool (batch, time); given above as real (batch, time)",
    "returns": "load (batch, experts) without gradient, share (batch, experts) with it, real (batch, time)",
}
MISTAKES = (
    (
        "load = relative_load(count)",
        "load = count * num_experts / real.sum(-1, keepdim=True).clamp(min=1)",
        "top_k is not divided out: at perfect balance the loss would be K, not 1 (eq. 18)",
    ),
    (
        "normalized = scores / (scores.sum(-1, keepdim=True) + 1e-20)",
        "normalized = scores",
        "P uses the plain scores: first divide the sigmoids by their sum over the experts (eq. 19)",
    ),
    (
        "normalized.sum(1) / total",
        "normalized.sum(1)",
        "P is a sum over the tokens of the sequence: it must be their mean (eq. 20)",
    ),
    (
        "total = real.sum(-1, keepdim=True).clamp(min=1)",
        "total = real.shape[1]",
        "the mean divides by all tokens: padding must not count",
    ),
    (
        "chosen.sum(1)",
        "chosen.sum((0, 1), keepdim=True).squeeze(1).expand(len(chosen), -1)",
        "the load is that of the whole batch: this loss treats each sequence separately",
    ),
    (
        "count = chosen.sum(1).to(scores.dtype)",
        "count = scores.sum(1)",
        "the load sums scores: f counts how often each expert was chosen (eq. 18)",
    ),
    (
        ".sum(2) * real.unsqueeze(-1)",
        ".sum(2)",
        "padding is counted in the load: mask it out",
    ),
    (
        "share = normalized.sum(1) / total",
        "share = normalized.detach().sum(1) / total",
        "P carries no gradient: this loss could not change the router",
    ),
    (
        "scores = scores.where(real.unsqueeze(-1), 0)",
        "scores = scores.masked_fill_(~real.unsqueeze(-1), 0)",
        "the scores are overwritten: they belong to the routing; use where or masked_fill",
    ),
    (
        "normalized = scores / (scores.sum(-1, keepdim=True) + 1e-20)",
        "normalized = (scores.bfloat16() / (scores.bfloat16().sum(-1, keepdim=True) + 1e-20)).float()",
        "the scores are normalised in bf16: keep fp32",
    ),
    (
        "chosen.sum(1).to(scores.dtype)",
        "chosen.sum(1).bfloat16().to(scores.dtype)",
        "the counts are rounded to bf16, which cannot represent 257: convert them to fp32",
    ),
    (
        "load = relative_load(count)",
        "load = relative_load(count).double()",
        "the load is float64: keep the dtype of the scores",
    ),
    (
        "one_hot(experts, num_experts)",
        "one_hot(experts.clamp(min=0), num_experts)",
        "an empty slot (-1) is counted for expert 0: it counts for none",
    ),
    (
        "chosen.sum(1).to(scores.dtype)",
        "chosen.sum(1).half().to(scores.dtype)",
        "the counts are rounded to fp16, which cannot represent 2049: convert them to fp32",
    ),
    (
        "scores.where(real.unsqueeze(-1), 0)",
        "scores.nan_to_num()",
        "only NaN is removed from the padding: set all scores of padding to 0",
    ),
)
RIGHT = (
    """
    weight = real.unsqueeze(-1).to(scores.dtype)
    scores = torch.where(real.unsqueeze(-1), scores, torch.zeros_like(scores))
    chosen = one_hot(experts, num_experts).sum(dim=-2)
    count = torch.einsum("bte,bt->be", chosen.to(scores.dtype), real.to(scores.dtype))
    load = count / (count.sum(-1, keepdim=True) / num_experts).clamp(min=1e-9)
    normalized = scores / scores.sum(-1, keepdim=True).clamp(min=1e-20)
    share = (normalized * weight).sum(1) / weight.sum(1).clamp(min=1)
    return load, share, real
    """,
    """
    scores = scores.masked_fill(~real.unsqueeze(-1), 0.0)
    count = torch.zeros(len(scores), num_experts + 1, dtype=scores.dtype, device=scores.device)
    where = torch.where(real.unsqueeze(-1), experts, -1).flatten(1) + 1
    count = count.scatter_add(1, where, torch.ones_like(where, dtype=scores.dtype))[:, 1:]
    load = relative_load(count)
    tokens = real.sum(-1, keepdim=True)
    p = scores / (scores.sum(-1, keepdim=True) + 1e-20)
    share = p.sum(1) / tokens.clamp(min=1)
    return load, share, real
    """,
    """
    scores = scores.where(real.unsqueeze(-1), 0)
    hot = one_hot(experts, num_experts) * real[..., None, None]
    load = relative_load(hot.sum((1, 2)).to(scores.dtype))
    p = torch.nn.functional.normalize(scores, p=1.0, dim=-1, eps=1e-20)
    share = p.sum(1) / real.sum(1, keepdim=True).clamp(min=1)
    return load, share, real
    """,
    """
    scores = scores.where(real.unsqueeze(-1), 0)
    load, share = [], []
    for row, picks, kept in zip(scores, experts, real):
        ids = picks[kept]
        count = torch.bincount(ids[ids >= 0], minlength=num_experts).to(scores.dtype)
        load.append(relative_load(count))
        share.append((row / (row.sum(-1, keepdim=True) + 1e-20)).sum(0) / kept.sum().clamp(min=1))
    return torch.stack(load), torch.stack(share), real
    """,
    """
    scores = scores.where(real.unsqueeze(-1), 0)
    one = torch.nn.functional.one_hot(experts + 1, num_experts + 1)[..., 1:].to(scores.dtype)
    load = relative_load(torch.einsum("btke,bt->be", one, real.to(scores.dtype)))
    inverse = 1 / (scores.sum(-1) + 1e-20)
    share = torch.einsum("bte,bt,b->be", scores, inverse, 1 / real.sum(1).clamp(min=1).to(scores.dtype))
    return load, share, real
    """,
    """
    scores = scores.where(real.unsqueeze(-1), 0)
    columns = [((experts == e).sum(-1) * real).sum(1) for e in range(num_experts)]
    load = relative_load(torch.stack(columns, dim=1).to(scores.dtype))
    total = 0
    for time in range(scores.shape[1]):
        now = scores[:, time]
        total = total + now / (now.sum(-1, keepdim=True) + 1e-20)
    return load, total / real.sum(-1, keepdim=True).clamp(min=1), real
    """,
    """
    scores = scores.where(real.unsqueeze(-1), 0)
    hot = torch.nn.functional.one_hot(experts.clamp(min=0), num_experts) * (experts >= 0).unsqueeze(-1)
    count = (hot.sum(2) * real.unsqueeze(-1)).sum(1).float()
    load = relative_load(count)
    share = (scores / scores.sum(-1, keepdim=True).clamp(min=1e-20)).sum(1) / real.sum(1, keepdim=True).clamp(min=1)
    return load, share, real
    """,
)


def probe(module, generator):
    """Uneven loads, an expert that is never chosen, empty slots, lengths down to 0, NaN in the padding, a long one."""
    logits = torch.randn(4, 11, 7, generator=generator)
    logits[..., 2] += 1.5
    logits[..., 5] -= 9
    logits.requires_grad_()
    scores = logits.sigmoid()
    experts = (scores + torch.linspace(0, 0.2, 7)).topk(3).indices
    experts[0, 4, 1] = experts[1, 2, 0] = -1
    mask = torch.arange(11) < torch.tensor([[11], [8], [1], [0]])
    padding = ~mask & (torch.arange(11) % 2 == 0)  # half of it: finite scores must not count either
    spoilt = scores.masked_fill(padding.unsqueeze(-1), float("nan"))
    routing = module.Routing(experts, spoilt.gather(-1, experts.clamp(min=0)), spoilt, logits)
    load, share, real = module.load_and_share(routing, mask)
    loss = module.sequence_loss(routing, mask)
    backward(loss)
    whole = module.Routing(experts, scores.gather(-1, experts.clamp(min=0)), scores.detach(), logits)
    found = {"load": load, "share": share, "real": real, "loss": loss, "gradient of the logits": logits.grad}
    found["loss without padding"] = module.sequence_loss(whole)
    scores = torch.rand(2, 5000, 7, generator=generator) + torch.linspace(0, 0.5, 7)
    experts = scores.topk(3).indices  # loads above 2048: bf16 and fp16 cannot represent them
    long = module.Routing(experts, scores.gather(-1, experts), scores, scores)
    return found | {"load of 5000 tokens": module.load_and_share(long, None)[0]}
