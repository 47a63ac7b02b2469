"""A router that scores experts by direction only: the cosine of token and expert (X-MoE, arXiv 2204.09179).

With a dot product, a longer token vector gives a sharper softmax, and an expert with a longer row of weights
attracts more tokens. The cosine ignores both lengths. One learned temperature sets how sharp the softmax is.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe import Routing
from moe.router import router_logits
from moe.zoo import Gate


class CosineRouter(Gate):
    """x (..., dim) -> Routing; softmax over cosine / temperature; the temperature is learned, from 0.07 on"""

    def __init__(self, dim: int, num_experts: int, top_k: int):
        super().__init__(dim, num_experts, top_k)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(0.07)))

    def forward(self, x: Tensor) -> Routing:
        cosine = router_logits(F.normalize(x.float(), dim=-1), F.normalize(self.weight, dim=-1))
        logits = cosine / self.log_temperature.exp()  # X-MoE also projects x to fewer dims; omitted here
        scores = logits.softmax(-1)  # (..., experts)
        weights, experts = scores.topk(self.top_k)
        return Routing(experts, weights / weights.sum(-1, keepdim=True), scores, logits)
