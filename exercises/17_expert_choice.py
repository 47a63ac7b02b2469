"""What if the experts choose their tokens?"""

import torch

from exercises.grader.watch import backward

TARGET = "moe.zoo:ExpertChoiceRouter.forward"
TESTS = ("tests/moe/test_zoo.py",)
WHICH = "expert_choice and not refused and not at_most_all and not loop_over and not gradient_of"
EQUATION = "Expert Choice (arXiv 2202.09368) eq. 1, 2"
LEARN = "Every expert takes the same number of tokens: balance is perfect, but a token's experts depend on all other tokens."
HINTS = (
    "Which axis is the softmax over, and which axis the top-k: experts or tokens?",
    "scores (..., experts): a softmax over the experts. Of all tokens in the call (tokens, experts), each expert takes "
    "the room(...) tokens with its highest scores. experts (..., experts): slot e is e if e took the token, else -1.",
    "router_logits, softmax, reshape, room, topk(..., dim=0), scatter, where",
)
EXPECTS = {
    "x": "(..., dim), fp32 or bf16; all tokens of the call compete",
    "self.weight": "(experts, dim)",
    "self.num_experts, self.capacity_factor": "arguments of room(tokens, num_experts, capacity_factor)",
    "returns": "Routing(experts (..., experts) int64, weights, scores, logits, each (..., experts)), fp32 for bf16 x",
}
MISTAKES = (
    (
        "logits.softmax(-1)",
        "logits.reshape(-1, self.num_experts).softmax(0).view_as(logits)",
        "the softmax is over the tokens: it must be over the experts (eq. 2)",
    ),
    (
        "rows.topk(taken, dim=0)",
        "rows.topk(taken, dim=0, largest=False)",
        "each expert takes the tokens with its lowest scores",
    ),
    (
        "taken = room(",
        "taken = (lambda tokens, experts, factor: min(tokens, int(factor)))(",
        "each expert takes capacity_factor tokens: it should take tokens x capacity_factor / num_experts (eq. 1)",
    ),
    (
        "scores.where(chosen, 0)",
        "scores.where(chosen, 0) / scores.where(chosen, 0).sum(-1, keepdim=True).clamp(min=1e-9)",
        "the weights are normalised: eq. 2 uses the scores as they are",
    ),
    (
        "scores.where(chosen, 0)",
        "scores",
        "experts that did not take a token keep their weight: set it to 0",
    ),
    (
        ".where(chosen, -1)",
        ".where(chosen, 0)",
        "an empty slot is marked as expert 0: use -1",
    ),
    (
        "chosen = torch.zeros_like(rows, dtype=torch.bool).scatter(0, best, True).view_as(scores)",
        "chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(2).indices, True)",
        "the tokens choose their experts: here the experts choose their tokens",
    ),
    (
        "scores.where(chosen, 0)",
        "scores.detach().where(chosen, 0)",
        "the scores are detached: no gradient reaches the router through the weights",
    ),
    (
        "logits.softmax(-1)",
        "logits.bfloat16().softmax(-1).float()",
        "the softmax runs in bf16: keep the logits in fp32",
    ),
    (
        "scores.where(chosen, 0)",
        "scores.where(chosen, 0).to(x.dtype)",
        "the weights are rounded to the dtype of x: they stay in fp32",
    ),
    (
        "scores.where(chosen, 0)",
        "scores.mul_(chosen)",
        "the scores are overwritten: the balance losses need those of all experts; use where",
    ),
    (
        "scores.where(chosen, 0), scores, logits)",
        "scores.where(chosen, 0), scores.detach(), logits)",
        "the returned scores are detached: the balance losses need their gradient",
    ),
    (
        "scores.where(chosen, 0), scores, logits)",
        "scores.where(chosen, 0), scores, logits.detach())",
        "the returned logits are detached: the z-loss needs their gradient",
    ),
    (
        "rows.topk(taken, dim=0)",
        "rows.bfloat16().topk(taken, dim=0)",
        "the tokens are chosen by scores in bf16: close scores become ties; keep fp32",
    ),
)
RIGHT = (
    """
    logits = router_logits(x, self.weight)
    scores = torch.softmax(logits, dim=-1)
    by_expert = scores.reshape(-1, self.num_experts).t()
    taken = room(by_expert.shape[1], self.num_experts, self.capacity_factor)
    chosen = torch.zeros_like(by_expert).scatter_(1, by_expert.topk(taken).indices, 1.0)
    chosen = chosen.t().reshape(scores.shape) > 0
    slots = torch.arange(self.num_experts, device=x.device).expand(scores.shape)
    return Routing(slots.masked_fill(~chosen, -1), scores.masked_fill(~chosen, 0.0), scores, logits)
    """,
    """
    logits = router_logits(x, self.weight)
    scores = logits.softmax(-1)
    rows = scores.reshape(-1, self.num_experts)
    taken = room(len(rows), self.num_experts, self.capacity_factor)
    rank = rows.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
    mine = (rank < taken).view_as(scores)
    numbers = torch.arange(self.num_experts, device=x.device)
    return Routing(torch.where(mine, numbers, -1), scores * mine, scores, logits)
    """,
    """
    logits = router_logits(x, self.weight)
    scores = logits.softmax(-1)
    tokens = scores[..., 0].numel()
    taken = room(tokens, self.num_experts, self.capacity_factor)
    experts = torch.full_like(scores, -1, dtype=torch.int64).view(tokens, self.num_experts)
    for e in range(self.num_experts):
        experts[scores[..., e].flatten().topk(taken).indices, e] = e
    experts = experts.view(scores.shape)
    return Routing(experts, torch.where(experts >= 0, scores, 0.0), scores, logits)
    """,
    """
    logits = router_logits(x, self.weight)
    scores = logits.softmax(-1)
    taken = room(scores[..., 0].numel(), self.num_experts, self.capacity_factor)
    best = scores.reshape(-1, self.num_experts).topk(taken, dim=0).indices
    hot = torch.nn.functional.one_hot(best, scores[..., 0].numel())  # (taken, experts, tokens)
    chosen = torch.einsum("ket->te", hot).reshape(scores.shape).bool()
    experts = torch.where(chosen, torch.arange(self.num_experts, device=x.device), -1)
    return Routing(experts, scores * chosen, scores, logits)
    """,
    """
    logits = router_logits(x, self.weight)
    scores = (logits - logits.logsumexp(-1, keepdim=True)).exp()
    columns = list(scores.reshape(-1, self.num_experts).unbind(-1))
    taken = room(len(columns[0]), self.num_experts, self.capacity_factor)
    experts, weights = [], []
    for e, column in enumerate(columns):
        mine = set(column.argsort(descending=True)[:taken].tolist())
        kept = torch.tensor([token in mine for token in range(len(column))], device=x.device)
        experts.append(torch.where(kept, e, -1))
        weights.append(column * kept)
    shape = scores.shape
    return Routing(torch.stack(experts, -1).reshape(shape), torch.stack(weights, -1).reshape(shape), scores, logits)
    """,
    """
    logits = router_logits(x, self.weight)
    scores = logits.softmax(dim=-1)
    rows = scores.reshape(-1, self.num_experts)
    taken = room(len(rows), self.num_experts, self.capacity_factor)
    least = rows.sort(0, descending=True).values[taken - 1] if taken else rows.new_full((self.num_experts,), torch.inf)
    chosen = (rows >= least).reshape(scores.shape)
    return Routing(torch.where(chosen, torch.arange(self.num_experts, device=x.device), -1),
                   scores.masked_fill(~chosen, 0), scores, logits)
    """,
    """
    logits = router_logits(x, self.weight)
    scores = torch.softmax(logits.double(), -1).float()
    rows = scores.reshape(-1, self.num_experts)
    taken = room(len(rows), self.num_experts, self.capacity_factor)
    best = rows.T.topk(taken, -1, sorted=False).indices
    chosen = torch.nn.functional.one_hot(best, len(rows)).sum(1).T.bool().view_as(scores)
    experts = torch.where(chosen, torch.arange(self.num_experts, device=x.device), -1)
    return Routing(experts=experts, weights=scores.masked_fill(~chosen, 0), scores=scores, logits=logits)
    """,
)


def probe(module, generator):
    """Two batches of different shapes, capacities that do not divide evenly, close scores."""
    found = {}
    for name, shape, factor in (("two sequences", (2, 5), 1.5), ("one row", (7,), 2.0)):
        router = module.ExpertChoiceRouter(6, 4, factor)
        with torch.no_grad():
            router.weight.copy_(torch.randn(4, 6, generator=generator))
        x = torch.randn(*shape, 6, generator=generator, requires_grad=True)
        routing = router(x)
        found |= {f"experts, {name}": routing.experts, f"weights, {name}": routing.weights}
        found |= {f"scores, {name}": routing.scores, f"logits, {name}": routing.logits}
        backward((routing.weights * torch.randn(4, generator=generator)).sum())
        found |= {f"gradient of x, {name}": x.grad, f"gradient of the weight, {name}": router.weight.grad}
        for part in ("scores", "logits"):
            x.grad, values = None, getattr(router(x), part)
            backward((values * torch.randn(4, generator=generator)).sum())
            found[f"gradient of x through the {part}, {name}"] = x.grad
        close = router(x.detach() / 1000)
        found |= {f"experts for close scores, {name}": close.experts}
        routing = router(x.detach().bfloat16())
        found |= {f"weights of bf16, {name}": routing.weights, f"scores of bf16, {name}": routing.scores}
    return found
