"""A router that goes by direction alone: the cosine between token and expert (X-MoE, arXiv 2204.09179).

With a dot product a long token vector is surer than a short one, and an expert with a long row is liked by
all. Without lengths, what is left is how well the two point the same way, and one number for all, how much
that matters.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe import Routing
from moe.router import router_logits
from moe.zoo import Gate


class CosineRouter(Gate):
    """x (..., dim) -> Routing; softmax over cosine / temperature, a temperature that is learned from 0.07"""

    def __init__(self, dim: int, num_experts: int, top_k: int):
        super().__init__(dim, num_experts, top_k)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(0.07)))

    def forward(self, x: Tensor) -> Routing:
        cosine = router_logits(F.normalize(x.float(), dim=-1), F.normalize(self.weight, dim=-1))
        logits = cosine / self.log_temperature.exp()  # X-MoE first takes x to fewer dims; here it does not
        scores = logits.softmax(-1)  # (..., experts)
        weights, experts = scores.topk(self.top_k)
        return Routing(experts, weights / weights.sum(-1, keepdim=True), scores, logits)
