"""Custom routers that runs name by their path, such as `tests.lm.own_routers:NoBias`."""

import torch
from torch import nn

from moe import Routing, SigmoidRouter, SoftmaxRouter


class NanAtStep7(SigmoidRouter):
    calls = 0

    def forward(self, x):
        routing = super().forward(x)
        self.calls += torch.is_grad_enabled()
        return routing._replace(weights=routing.weights * (float("nan") if self.calls == 7 else 1))


class NanGradientAtStep7(SigmoidRouter):
    calls = 0

    def forward(self, x):
        routing = super().forward(x)
        self.calls += torch.is_grad_enabled()
        if self.calls == 7 and torch.is_grad_enabled():
            routing.weights.register_hook(lambda gradient: gradient * float("nan"))
        return routing


class TrainedBias(SoftmaxRouter):
    def __init__(self, dim, num_experts, top_k):
        super().__init__(dim, num_experts, top_k)
        self.bias = nn.Parameter(torch.zeros(num_experts))

    def forward(self, x):
        routing = super().forward(x)
        chosen = self.bias.gather(0, routing.experts.flatten())
        return routing._replace(weights=routing.weights + chosen.view_as(routing.weights))


class NoBias(nn.Linear):
    def __init__(self, dim, num_experts, top_k):
        super().__init__(dim, num_experts, bias=False)
        self.top_k = top_k

    def forward(self, x):
        logits = super().forward(x.float())
        scores = logits.softmax(-1)
        weights, experts = scores.topk(self.top_k)
        return Routing(experts, weights, scores, logits)


class Fixed(nn.Module):
    def __init__(self, dim, num_experts, top_k):
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.unused = nn.Linear(dim, 2)

    def forward(self, x, tokens):
        experts = (tokens.unsqueeze(-1) + torch.arange(self.top_k)) % self.num_experts
        scores = torch.full((*tokens.shape, self.num_experts), 1 / self.num_experts)
        return Routing(experts, torch.ones(experts.shape), scores, scores)
