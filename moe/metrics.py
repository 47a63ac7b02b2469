"""How a router uses its experts: metrics to look at, not to train on.

Some take the counts of `balance.tokens_per_expert`, of one batch or summed over many, as does
`balance.max_violation`. Those that take a Routing also take `mask` (same leading axes, True for a real
token), which excludes padding, whatever its values.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .balance import count_indices, mean_over_tokens, real_tokens, slots_from_1
from .modes import has_numbers
from .router import Routing


def load_entropy(tokens_per_expert: Tensor) -> Tensor:
    """Entropy of the expert load, relative to that of an even load.

    tokens_per_expert (..., experts) -> (...); 1 is even, 0 one expert for all tokens, and
    log(top_k) / log(experts) the same top_k experts for all tokens. 1 if there are no tokens.
    """
    load = tokens_per_expert.to(torch.promote_types(tokens_per_expert.dtype, torch.float32))
    total = load.sum(-1, keepdim=True)
    return evenness(load / total.where(total > 0, 1)).where(total.squeeze(-1) > 0, 1.0)


def dead_experts(tokens_per_expert: Tensor) -> Tensor:
    """Number of experts that no token was routed to.

    tokens_per_expert (..., experts) -> (...) int64; num_experts if there are no tokens
    """
    return (tokens_per_expert == 0).sum(-1)


def dropped_share(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """Share of the slots that are empty (-1): dropped, or never filled.

    routing (..., ...) -> ()
    """
    empty = (routing.experts < 0).to(width(routing)).mean(-1)  # (...)
    return mean_over_tokens(empty, real_tokens(routing, mask))


def coactivation(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """Share of one expert's tokens that also go to another expert (arXiv 2409.02060 section 5.2).

    routing (..., ...) -> (experts, experts), row: the expert whose tokens are counted, column: the other

    0 is never together, 1 always. The diagonal is 1, and a row without empty slots sums to top_k. Not
    symmetric if loads differ. The row of an unused expert is 0.
    """
    size = routing.scores.shape[-1] + 1
    slots = slots_from_1(routing, mask)
    pairs = slots.unsqueeze(-1) * size + slots.unsqueeze(-2)  # (..., top_k, top_k)
    together = count_indices(pairs, size * size).view(size, size)[1:, 1:].to(width(routing))
    return together / together.diagonal().clamp(min=1).unsqueeze(-1)


def domain_specialization(
    routing: Routing, domains: Tensor, num_domains: int, mask: Tensor | None = None
) -> Tensor:
    """Share of a domain's tokens that go to each expert (arXiv 2409.02060 section 5.3).

    routing (..., ...), domains (...) int64 -> (domains, experts)

    0 is no token of the domain, 1 all of them, top_k / experts an even load. A row without empty slots sums
    to top_k; the row of a domain with no tokens is 0.

    Args:
        domains: the domain of each token, 0..num_domains - 1; any value for padding.
    """
    real = real_tokens(routing, mask)
    if domains.shape != real.shape or domains.dtype != torch.int64:
        found, wanted = f"{domains.dtype} {tuple(domains.shape)}", f"torch.int64 {tuple(real.shape)}"
        raise ValueError(f"domains is {found}; expected {wanted}, the domain of each token")
    wrong = real & ((domains < 0) | (domains >= num_domains))
    if has_numbers(domains) and wrong.any():
        raise ValueError(f"domains holds {int(domains[wrong][0])}; expected 0..{num_domains - 1}")
    size = routing.scores.shape[-1] + 1
    tokens = count_indices(domains.where(real, -1) + 1, num_domains + 1)[1:]  # (domains,)
    domains = domains.where(real, 0)  # padding has only empty slots
    slots = slots_from_1(routing, mask) + domains.unsqueeze(-1) * size  # (..., top_k)
    taken = count_indices(slots, num_domains * size).view(num_domains, size)[:, 1:].to(width(routing))
    return taken / tokens.clamp(min=1).unsqueeze(-1)


@torch.no_grad()
def router_confidence(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of the chosen experts' share of all scores, before bias and normalization.

    routing (..., ...) -> (); at most 1; top_k / experts for equal scores, lower where a selection bias
    chooses against the scores; an empty slot adds 0
    """
    real = real_tokens(routing, mask)
    chosen = F.pad(routing.scores, (1, 0)).gather(-1, slots_from_1(routing, mask)).sum(-1)  # (...)
    return mean_over_tokens(chosen / (routing.scores.sum(-1) + 1e-20), real)


@torch.no_grad()
def score_entropy(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of the entropy of the scores, scaled to sum to 1, relative to that of equal scores.

    routing (..., ...) -> (); 1 for equal scores, 0 if one expert has the whole score
    """
    share = routing.scores / (routing.scores.sum(-1, keepdim=True) + 1e-20)
    return mean_over_tokens(evenness(share), real_tokens(routing, mask))


def width(routing: Routing) -> torch.dtype:
    """The dtype of a metric: that of the scores, at least fp32."""
    return torch.promote_types(routing.scores.dtype, torch.float32)


def evenness(share: Tensor) -> Tensor:
    """Entropy over its maximum: share (..., experts), which sums to 1 -> (...); 1 for a single expert"""
    num_experts = share.shape[-1]
    entropy = torch.special.entr(share).sum(-1)  # takes 0 log 0 as 0
    return entropy / math.log(num_experts) if num_experts > 1 else torch.ones_like(entropy)
