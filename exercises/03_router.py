"""What chooses the experts, and what weights them?"""

import torch

from exercises.grader.watch import backward

TARGET = "moe.router:SigmoidRouter.forward"
TESTS = ("tests/moe/test_router.py",)
WHICH = "SigmoidRouter and not last_bit and not rounded and not renaming and not autocast and not gradients_of_the_logits and not loop_over and not finite_diff"
EQUATION = "DeepSeek-V3 eq. 13-16"
LEARN = "The selection bias affects which experts are chosen; their weights come from the scores without it."
HINTS = (
    "Where may the bias appear, and where not? Compare eq. 16 with eq. 13, and read section 2.1.2 on the bias.",
    "You need two tensors (..., experts): biased, group-limited scores to choose by, and the plain sigmoids as "
    "weights. The weights of the chosen experts (..., top_k) are divided by their own sum, then scaled.",
    "router_logits, sigmoid, keep_best_groups, topk(...).indices, gather, sum(keepdim=True), Routing",
)
EXPECTS = {
    "x": "(..., dim), fp32 or bf16; any number of leading axes",
    "self.weight, self.bias": "(experts, dim), and (experts,) in fp32, added to the scores to choose by",
    "self.top_k": "experts of a token",
    "self.num_groups, self.top_groups, self.group_best": "arguments of keep_best_groups",
    "self.normalize": "True: divide the chosen weights by their sum, which can be as small as 1e-9",
    "self.routed_scaling_factor": "a float, multiplied last",
    "returns": "Routing(experts (..., top_k) int64, weights (..., top_k), scores (..., experts), logits (..., experts)), fp32 for bf16 x",
}
MISTAKES = (
    (
        "weights = scores.gather(-1, experts)",
        "weights = (scores + self.bias).gather(-1, experts)",
        "the weights use the biased scores: the bias only affects the choice; eq. 13 uses the plain scores",
    ),
    (
        "keep_best_groups(scores + self.bias,",
        "keep_best_groups(scores,",
        "the bias is missing: the experts are chosen by the biased scores (eq. 16)",
    ),
    (
        "scores = sigmoid(logits)",
        "scores = logits.softmax(-1)",
        "the scores are a softmax: V3 uses a sigmoid for each expert separately (eq. 15)",
    ),
    (
        "if self.normalize:",
        "if False:",
        "the chosen weights are not divided by their sum (eq. 13)",
    ),
    (
        "weights.sum(-1, keepdim=True)",
        "scores.sum(-1, keepdim=True)",
        "the weights are divided by the sum over all experts: eq. 13 sums over the chosen ones",
    ),
    (
        "if self.normalize:",
        "if True:",
        "normalize=False is ignored",
    ),
    (
        "weights * self.routed_scaling_factor",
        "weights",
        "routed_scaling_factor is missing, or cancelled by the normalisation",
    ),
    (
        "choice = keep_best_groups(scores + self.bias, self.num_groups, self.top_groups, self.group_best)",
        "choice = scores + self.bias",
        "the group limit is missing: a token may only use experts of its best groups",
    ),
    (
        "keep_best_groups(scores + self.bias, self.num_groups, self.top_groups, self.group_best)",
        "keep_best_groups(scores + self.bias, self.num_groups, self.top_groups, 1)",
        "a group is scored by its best expert alone: V3 adds its two best",
    ),
    (
        "choice.topk(self.top_k).indices",
        "choice.topk(self.top_k, largest=False).indices",
        "the experts with the lowest scores are chosen",
    ),
    (
        "weights = scores.gather(-1, experts)",
        "weights = (scores + self.bias).gather(-1, experts) - self.bias[experts]",
        "the weights are biased scores minus the bias: small scores lose their digits; gather the plain scores",
    ),
    (
        "weights = scores.gather(",
        "weights = scores.detach().gather(",
        "the scores are detached: no gradient reaches the router through the weights",
    ),
    (
        "scores = sigmoid(logits)",
        "scores = sigmoid(logits.bfloat16()).float()",
        "the sigmoid runs in bf16: near ties flip; keep the logits in fp32",
    ),
    (
        "weights * self.routed_scaling_factor",
        "(weights * self.routed_scaling_factor).to(x.dtype)",
        "the weights are rounded to the dtype of x: they stay in fp32",
    ),
    (
        "keep_best_groups(scores + self.bias,",
        "keep_best_groups(scores.add_(self.bias),",
        "the bias is added to the scores in place: the weights and the returned scores are biased too",
    ),
    (
        "weights * self.routed_scaling_factor, scores, logits)",
        "weights * self.routed_scaling_factor, scores.detach(), logits)",
        "the returned scores are detached: the balance losses need their gradient",
    ),
    (
        "weights * self.routed_scaling_factor, scores, logits)",
        "weights * self.routed_scaling_factor, scores, logits.detach())",
        "the returned logits are detached: the z-loss needs their gradient",
    ),
    (
        "scores + self.bias,",
        "scores + self.bias.to(x.dtype),",
        "the bias is rounded to the dtype of x: close biases become ties; keep fp32",
    ),
    (
        "(weights.sum(-1, keepdim=True) + 1e-20)",
        "weights.sum(-1, keepdim=True).clamp(min=1e-6)",
        "the sum is clamped too high: sums can be as small as 1e-9",
    ),
)
RIGHT = (
    """
    logits = router_logits(x, self.weight)
    scores = torch.sigmoid(logits)
    biased = keep_best_groups(scores + self.bias, self.num_groups, self.top_groups, self.group_best)
    experts = biased.argsort(-1, descending=True)[..., : self.top_k]
    weights = torch.take_along_dim(scores, experts, -1)
    total = weights.sum(-1, keepdim=True) if self.normalize else 1.0
    return Routing(experts, self.routed_scaling_factor * weights / total, scores, logits)
    """,
    """
    logits = router_logits(x, self.weight)
    scores = sigmoid(logits)
    choice = keep_best_groups(scores + self.bias, self.num_groups, self.top_groups, self.group_best)
    _, experts = torch.topk(choice, self.top_k, dim=-1, sorted=False)
    weights = scores.gather(-1, experts)
    if self.normalize:
        weights = torch.nn.functional.normalize(weights, p=1, dim=-1, eps=1e-20)
    return Routing(experts=experts, weights=weights * self.routed_scaling_factor, scores=scores, logits=logits)
    """,
    """
    logits = router_logits(x, self.weight)
    scores = 1 / (1 + torch.exp(-logits))
    choice = keep_best_groups(scores + self.bias.detach(), self.num_groups, self.top_groups, self.group_best)
    kth = choice.topk(self.top_k).values[..., -1:]
    experts = (choice >= kth).nonzero()[:, -1].view(*x.shape[:-1], self.top_k)
    weights = scores.gather(-1, experts) * self.routed_scaling_factor
    if self.normalize:
        weights = weights / scores.gather(-1, experts).sum(-1, keepdim=True)
    return Routing(experts, weights, scores, logits)
    """,
    """
    logits = router_logits(x, self.weight)
    scores = logits.sigmoid()
    choice = keep_best_groups(scores + self.bias, self.num_groups, self.top_groups, self.group_best)
    experts = choice.topk(self.top_k).indices
    chosen = torch.nn.functional.one_hot(experts, scores.shape[-1]).to(scores.dtype)
    weights = torch.einsum("...e,...ke->...k", scores, chosen)
    if self.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return Routing(experts, weights * self.routed_scaling_factor, scores, logits)
    """,
    """
    logits = router_logits(x, self.weight)
    scores = sigmoid(logits)
    choice = keep_best_groups(scores + self.bias, self.num_groups, self.top_groups, self.group_best)
    experts = []
    for _ in range(self.top_k):
        experts.append(choice.argmax(-1, keepdim=True))
        choice = choice.scatter(-1, experts[-1], float("-inf"))
    experts = torch.cat(experts, dim=-1)
    weights = scores.gather(-1, experts)
    if self.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return Routing(experts, weights * self.routed_scaling_factor, scores, logits)
    """,
    """
    logits = router_logits(x, self.weight)
    scores = sigmoid(logits)
    biased = keep_best_groups(scores + self.bias, self.num_groups, self.top_groups, self.group_best)
    chosen = [row.topk(self.top_k).indices for row in biased.flatten(0, -2)]
    paid = [row[best] for row, best in zip(scores.flatten(0, -2), chosen)]
    if self.normalize:
        paid = [row / (row.sum() + 1e-20) for row in paid]
    shape = (*x.shape[:-1], self.top_k)
    weights = torch.stack(paid).reshape(shape) * self.routed_scaling_factor
    return Routing(torch.stack(chosen).reshape(shape), weights, scores, logits)
    """,
    """
    logits = router_logits(x, self.weight)
    scores = logits.double().sigmoid().float()
    choice = keep_best_groups(scores + self.bias, self.num_groups, self.top_groups, self.group_best)
    experts = choice.topk(self.top_k).indices
    weights = scores.gather(-1, experts)
    if self.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return Routing(experts, weights * self.routed_scaling_factor, scores, logits)
    """,
)


def probe(module, generator):
    """Uneven biases, with and without a group limit, a scale, scores far below close biases, bf16."""
    found = {}
    for kind, options in {
        "grouped": {"num_groups": 3, "top_groups": 2, "routed_scaling_factor": 2.5},
        "plain": {"normalize": False, "routed_scaling_factor": 0.7},
    }.items():
        router = module.SigmoidRouter(7, 12, 3, **options)
        with torch.no_grad():
            router.weight.copy_(torch.randn(12, 7, generator=generator) / 2)
            router.bias.copy_(torch.randn(12, generator=generator) / 3)
        x = torch.randn(3, 5, 7, generator=generator, requires_grad=True)
        routing = router(x)
        experts, order = routing.experts.sort(-1)
        weights = routing.weights.gather(-1, order)
        found |= {f"{kind}: experts": experts, f"{kind}: weights": weights}
        found |= {f"{kind}: scores": routing.scores, f"{kind}: logits": routing.logits}
        backward((weights * torch.randn(weights.shape, generator=generator)).sum())
        found |= {f"gradient of x, {kind}": x.grad, f"gradient of the weight, {kind}": router.weight.grad}
        for part in ("scores", "logits"):
            x.grad, values = None, getattr(router(x), part)
            backward((values * torch.randn(values.shape, generator=generator)).sum())
            found[f"gradient of x through the {part}, {kind}"] = x.grad
    router = module.SigmoidRouter(7, 12, 3)
    with torch.no_grad():
        router.weight.copy_(-2.5 - torch.rand(12, 7, generator=generator) / 4)
        router.bias.copy_(2 + torch.randn(12, generator=generator) / 100)
    x = (1 + torch.rand(4, 7, generator=generator) / 4).bfloat16()
    routing = router(x)  # scores near 1e-9, close biases near 2
    experts, order = routing.experts.sort(-1)
    found |= {"tiny scores: experts": experts, "tiny scores: weights": routing.weights.gather(-1, order)}
    return found | {"tiny scores: scores": routing.scores}
