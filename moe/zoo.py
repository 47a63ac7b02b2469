"""Other routers for comparison, from noisy top-k to Soft MoE.

Noise is drawn from torch's default generator, as for dropout, and except in `RandomRouter` only in training:
torch.manual_seed reproduces it, and activation checkpointing restores it.
"""

import random
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from .balance import one_hot
from .capacity import check_factor, room
from .fast import router_logits
from .router import Router, Routing, check_ids, check_sizes, settings


class Gate(Router):
    """Base class of the learned routers here: one row of weights for each expert."""

    num_experts: int

    def __init__(self, dim: int, num_experts: int, top_k: int):
        check_sizes(dim, num_experts, top_k, 1, 1, 1, 1.0)
        super().__init__(dim, num_experts)
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        nn.init.normal_(self.weight, std=dim**-0.5)


class NoisyTopKRouter(Gate):
    """Noisy top-k gating (Shazeer et al. 2017, arXiv 1701.06538): noise of learned width for each expert.

    x (..., dim) -> Routing; its logits include the noise

    With top_k=1 the weight is always 1, and the router gets no gradient from it.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int):
        super().__init__(dim, num_experts, top_k)
        self.noise_weight = nn.Parameter(torch.zeros(num_experts, dim))  # the paper starts `weight` at 0 too

    def forward(self, x: Tensor) -> Routing:
        logits = router_logits(x, self.weight)  # (..., experts)
        if self.training:
            width = F.softplus(router_logits(x, self.noise_weight))
            logits = logits + torch.randn_like(logits) * width  # Noisy Top-K eq. 4
        chosen, experts = logits.topk(self.top_k)  # Noisy Top-K eq. 5; the paper sets the rest to -inf
        return Routing(experts, chosen.softmax(-1), logits.softmax(-1), logits)  # Noisy Top-K eq. 3


class MixtralRouter(Gate):
    """Router of Mixtral (arXiv 2401.04088 section 2.1): softmax over the chosen logits alone.

    x (..., dim) -> Routing

    Equal to softmax over all, then normalized over the chosen: `SoftmaxRouter(normalize=True)`. With top_k=1
    the weight is always 1, and the router gets no gradient from it.
    """

    def forward(self, x: Tensor) -> Routing:
        logits = router_logits(x, self.weight)  # (..., experts)
        chosen, experts = logits.topk(self.top_k)
        return Routing(experts, chosen.softmax(-1), logits.softmax(-1), logits)


class SwitchRouter(Gate):
    """Router of Switch Transformer (arXiv 2101.03961): one expert, weighted by its probability.

    x (..., dim) -> Routing
    """

    def __init__(self, dim: int, num_experts: int, top_k: int = 1):
        check_top_k(self, top_k, 1)
        super().__init__(dim, num_experts, top_k)

    def forward(self, x: Tensor) -> Routing:
        logits = router_logits(x, self.weight)  # (..., experts)
        scores = logits.softmax(-1)  # Switch Transformer eq. 1
        # normalized, the weight would always be 1, and the router would get no gradient
        weights, experts = scores.topk(1)  # Switch Transformer eq. 2: p_i(x)
        return Routing(experts, weights, scores, logits)


class GShardRouter(Gate):
    """Router of GShard (arXiv 2006.16668 algorithm 1): two experts; training skips the second at random.

    x (..., dim) -> Routing; a skipped second expert is an empty slot

    The algorithm's capacity is `Capacity(router, capacity_factor)`, except that in the paper a skipped second
    expert still uses capacity (line 22), and that its loss counts first choices only (line 13).
    """

    def __init__(self, dim: int, num_experts: int, top_k: int = 2):
        check_top_k(self, top_k, 2)
        super().__init__(dim, num_experts, top_k)

    def forward(self, x: Tensor) -> Routing:
        logits = router_logits(x, self.weight)  # (..., experts)
        scores = logits.softmax(-1)  # GShard line 2
        best, experts = scores.topk(2)  # GShard line 5, 15
        weights = best / best.sum(-1, keepdim=True)  # GShard line 6, 16
        if self.training:
            used = 2 * weights > torch.rand_like(weights)  # GShard line 17, 19; always True for the first
            experts, weights = experts.where(used, -1), weights.where(used, 0)
        return Routing(experts, weights, scores, logits)


class ExpertChoiceRouter(Gate):
    """Expert choice (Zhou et al. 2022, arXiv 2202.09368): each expert takes its highest-scoring tokens.

    x (..., dim) -> Routing(experts (..., num_experts), ...): slot e holds e, or is empty

    Experts choose among all tokens of the call, over batch and time: a token's experts depend on its
    neighbours and on later tokens. A causal model trained with it sees the future, so its loss is too low.
    Generation differs from training: a token decoded alone is taken by every expert.

    Args:
        capacity_factor: experts per token, on average; an expert takes tokens x capacity_factor /
            num_experts, rounded up.
    """

    mixes_tokens = True

    def __init__(self, dim: int, num_experts: int, capacity_factor: float = 2.0):
        super().__init__(dim, num_experts, num_experts)
        check_factor(capacity_factor)
        if capacity_factor > num_experts:
            raise ValueError(f"{capacity_factor=} must be at most {num_experts}, the number of experts")
        self.capacity_factor = capacity_factor

    def forward(self, x: Tensor) -> Routing:
        logits = router_logits(x, self.weight)  # (..., experts)
        scores = logits.softmax(-1)  # Expert Choice eq. 2
        rows = scores.reshape(-1, self.num_experts)  # (tokens, experts)
        taken = room(rows.shape[0], self.num_experts, self.capacity_factor)  # Expert Choice eq. 1
        best = rows.topk(taken, dim=0).indices  # (taken, experts)  # Expert Choice eq. 2
        chosen = torch.zeros_like(rows, dtype=torch.bool).scatter(0, best, True).view_as(scores)
        experts = torch.arange(self.num_experts, device=x.device).where(chosen, -1)
        return Routing(experts, scores.where(chosen, 0), scores, logits)


class HashRouter(Router):
    """Hash layer (Roller et al. 2021, arXiv 2106.04426): a fixed table maps each token id to an expert.

    x (..., dim), tokens (...) int64 -> Routing; its scores are 1 for the expert and 0 for the others

    Args:
        vocab_size: token ids are 0..vocab_size - 1.
        seed: of the random table, which is not saved but rebuilt from the seed.
    """

    num_experts: int
    needs_tokens = True

    def __init__(self, num_experts: int, vocab_size: int, top_k: int = 1, seed: int = 0):
        super().__init__(num_experts=num_experts)
        check_top_k(self, top_k, 1)
        check_sizes(1, num_experts, top_k, 1, 1, 1, 1.0)
        if vocab_size < 1:
            raise ValueError(f"vocab_size={vocab_size} must be at least 1")
        if not isinstance(seed, int):
            raise ValueError(f"seed={seed!r} must be a whole number, from which the table is rebuilt")
        self.top_k = top_k
        self.vocab_size = vocab_size
        self.seed = seed
        draw = random.Random(seed).random  # unlike torch's, guaranteed not to change between versions
        table = torch.tensor([int(draw() * num_experts) for _ in range(vocab_size)])  # (vocab,)
        self.table: Tensor
        self.register_buffer("table", table, persistent=False)

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> Routing:
        if tokens is None or tokens.shape != x.shape[:-1]:
            found = None if tokens is None else tuple(tokens.shape)
            raise ValueError(f"tokens is {found}; expected the token ids of x, {tuple(x.shape[:-1])}")
        if tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise ValueError(f"tokens are {tokens.dtype}; expected integer token ids")
        check_ids("token", tokens, len(self.table))
        experts = self.table.index_select(0, tokens.flatten()).view(*tokens.shape, 1)
        weights = torch.ones_like(experts, dtype=torch.promote_types(x.dtype, torch.float32))
        scores = one_hot(experts.squeeze(-1), self.num_experts).to(weights.dtype)  # (..., experts)
        return Routing(experts, weights, scores, scores.log())


class RandomRouter(Router):
    """Baseline: top_k distinct experts at random, drawn again at each call, in evaluation too.

    x (..., dim) -> Routing; all scores are equal
    """

    num_experts: int

    def __init__(self, num_experts: int, top_k: int):
        check_sizes(1, num_experts, top_k, 1, 1, 1, 1.0)
        super().__init__(num_experts=num_experts)
        self.top_k = top_k

    def forward(self, x: Tensor) -> Routing:
        dtype = torch.promote_types(x.dtype, torch.float32)
        logits = torch.zeros(*x.shape[:-1], self.num_experts, dtype=dtype, device=x.device)
        experts = torch.rand_like(logits).topk(self.top_k).indices
        weights = torch.full_like(experts, 1 / self.top_k, dtype=dtype)
        return Routing(experts, weights, logits.softmax(-1), logits)


class SoftMoE(nn.Module):
    """Soft MoE (Puigcerver et al. 2023, arXiv 2308.00951): experts run on mixtures of all tokens.

    x (batch, time, dim) -> y (batch, time, dim), routing

    Not causal: every token of a sequence is mixed into every slot, so earlier outputs change with later
    inputs. For images and encoders, not for generation.

    The Routing sends each token to every expert, with the summed weight of the expert's slots. Each expert
    always runs on slots_per_expert rows per sequence, so `balance` reports perfect balance.

    Args:
        experts: `Experts`, or any module (x, routing) -> y with `num_experts` and `dim`.
        slots_per_expert: mixtures that each expert runs on.
    """

    def __init__(self, experts: Any, slots_per_expert: int = 1):
        super().__init__()
        if slots_per_expert < 1:
            raise ValueError(f"slots_per_expert={slots_per_expert} must be at least 1")
        for name in ("num_experts", "dim"):
            if not isinstance(getattr(experts, name, None), int):
                raise ValueError(f"{type(experts).__name__} has no {name}, which SoftMoE needs")
        self.experts = experts
        self.num_experts = experts.num_experts
        self.slots_per_expert = slots_per_expert
        self.weight = nn.Parameter(torch.empty(self.num_experts * slots_per_expert, experts.dim))
        self.scale = nn.Parameter(torch.ones(()))
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def extra_repr(self) -> str:
        return settings(self)

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> tuple[Tensor, Routing]:
        """tokens: ignored; accepted for the same call as MoE."""
        if x.ndim != 3 or x.shape[-1] != self.weight.shape[1] or not x.is_floating_point():
            wanted = f"floating-point (batch, time, dim={self.weight.shape[1]})"
            raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; expected {wanted}")
        # both L2-normalized (section 2.3): logits that grow with dim would leave one token per slot
        logits = router_logits(of_length_1(x), self.scale * of_length_1(self.weight))  # (batch, time, slots)
        dispatch = logits.softmax(1).to(x.dtype)  # Soft MoE eq. 1: over the tokens
        combine = logits.softmax(2)  # Soft MoE eq. 2: over the slots of all experts
        rows = einsum(dispatch, x, "batch time slots, batch time dim -> batch slots dim")  # Soft MoE eq. 1
        rows = self.experts(rows, self.slot_routing(rows))
        back = "batch time slots, batch slots dim -> batch time dim"
        y = einsum(combine.to(x.dtype), rows, back)  # Soft MoE eq. 2
        by_expert = "batch time (experts slots) -> batch time experts slots"
        logits = rearrange(logits, by_expert, experts=self.num_experts).logsumexp(-1)
        scores = rearrange(combine, by_expert, experts=self.num_experts).sum(-1)  # (batch, time, experts)
        everyone = torch.arange(self.num_experts, device=x.device).expand(scores.shape)
        return y, Routing(everyone, scores, scores, logits)

    def slot_routing(self, rows: Tensor) -> Routing:
        """Each slot to its own expert, with weight 1: rows (batch, slots, dim) -> Routing"""
        slots = torch.arange(rows.shape[1], device=rows.device).expand(rows.shape[:2]).unsqueeze(-1)
        ones = torch.ones_like(slots, dtype=rows.dtype)
        return Routing(slots // self.slots_per_expert, ones, ones, ones)


def of_length_1(x: Tensor) -> Tensor:
    """x (..., dim) -> x in fp32 or wider, each row scaled to length 1; a row of zeros stays zero"""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)


def check_top_k(router: nn.Module, top_k: int, fits: int) -> None:
    """Raise ValueError unless top_k is the only value that the router supports."""
    if top_k != fits:
        raise ValueError(f"top_k={top_k} must be {fits} for {type(router).__name__}")
