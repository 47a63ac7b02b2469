"""A router that explores first: noise on the choice of experts, whose temperature falls to 0 in training.

With Gumbel noise of temperature 1, the largest noisy logit is a sample from the softmax, and the top k are k
samples without replacement (Kool et al. 2019, arXiv 1903.06059). At first every expert is chosen with its
softmax probability, so all of them learn. At the end the router takes the most likely ones.
"""

import torch
from torch import Tensor

from moe import Routing
from moe.router import router_logits
from moe.zoo import Gate


class AnnealedRouter(Gate):
    """x (..., dim) -> Routing; the choice is noisy for the first `passes` forward passes in training

    Does not work with train.recompute: it runs every pass twice, the second time at a lower temperature, and
    training stops with an error.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int, passes: int = 300):
        super().__init__(dim, num_experts, top_k)
        self.passes = passes
        self.passed: Tensor
        self.register_buffer(
            "passed", torch.tensor(0.0)
        )  # saved in checkpoints, so resuming continues the schedule

    def forward(self, x: Tensor) -> Routing:
        logits = router_logits(x, self.weight)  # (..., experts)
        choice = logits
        if self.training:
            temperature = (1 - self.passed / self.passes).clamp(min=0)
            noise = -torch.empty_like(logits).exponential_().log()  # Gumbel
            choice = logits + temperature * noise
            self.passed += 1
        scores = logits.softmax(-1)
        experts = choice.topk(self.top_k).indices  # the noise affects which experts are chosen ...
        weights = scores.gather(-1, experts)  # ... but not their weights
        return Routing(experts, weights / weights.sum(-1, keepdim=True), scores, logits)
