"""A router that begins by trying: noise on the choice, whose temperature falls to 0 while it is trained.

With Gumbel noise of temperature 1 the best of the noisy logits is a draw from their softmax, and the best k
are k draws without putting back (Kool et al. 2019, arXiv 1903.06059). So at first every expert is tried as
often as it is likely, and learns; in the end the likeliest are taken.
"""

import torch
from torch import Tensor

from moe import Routing
from moe.router import router_logits
from moe.zoo import Gate


class AnnealedRouter(Gate):
    """x (..., dim) -> Routing; the choice is noisy for so many passes of training

    Not with train.recompute, which runs a pass twice: the second is cooler than the first, and training stops.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int, passes: int = 300):
        super().__init__(dim, num_experts, top_k)
        self.passes = passes
        self.passed: Tensor
        self.register_buffer("passed", torch.tensor(0.0))  # in checkpoints, too: a resumed training cools on

    def forward(self, x: Tensor) -> Routing:
        logits = router_logits(x, self.weight)  # (..., experts)
        choice = logits
        if self.training:
            temperature = (1 - self.passed / self.passes).clamp(min=0)
            noise = -torch.empty_like(logits).exponential_().log()  # Gumbel
            choice = logits + temperature * noise
            self.passed += 1
        scores = logits.softmax(-1)
        experts = choice.topk(self.top_k).indices  # the noise decides who is chosen ...
        weights = scores.gather(-1, experts)  # ... never how much they count
        return Routing(experts, weights / weights.sum(-1, keepdim=True), scores, logits)
