"""How a router uses its experts: numbers to look at, none of them to train on.

Some take what `balance.tokens_per_expert` counted, in one batch or summed over many, as does
`balance.max_violation`. Those that take a Routing know `mask` (same leading axes, True for a real token),
which keeps padding out, whatever it holds.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .balance import count_indices, mean_over_tokens, real_tokens, slots_from_1
from .router import Routing


def load_entropy(tokens_per_expert: Tensor) -> Tensor:
    """Entropy of the experts' shares of the load, over that of an even load.

    tokens_per_expert (..., experts) -> (...); 1 is even, 0 one expert for all, log(top_k) / log(experts) the
    same top_k experts for every token. 1 without a token, where nothing is uneven.
    """
    load = tokens_per_expert.double()
    total = load.sum(-1, keepdim=True)
    return evenness(load / total.where(total > 0, 1)).where(total.squeeze(-1) > 0, 1.0)


def dead_experts(tokens_per_expert: Tensor) -> Tensor:
    """How many experts got no token.

    tokens_per_expert (..., experts) -> (...) int64; 0 is none, all of them where there is no token
    """
    return (tokens_per_expert == 0).sum(-1)


def dropped_share(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """Share of the tokens' slots that are empty, -1: dropped, or never filled.

    routing (..., ...) -> (); 0 is none, 1 all of them
    """
    empty = (routing.experts < 0).double().mean(-1)  # (...)
    return mean_over_tokens(empty, real_tokens(routing, mask))


def coactivation(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """Of the tokens that an expert takes, the share that another takes too (arXiv 2409.02060 section 5.2).

    routing (..., ...) -> (experts, experts), row: the expert whose tokens are all, column: the other

    0 is never together, 1 always; on the diagonal 1, and top_k in the sum of a row without empty slots. Two
    experts of unlike load have two values. The row of an expert without a token is 0.
    """
    size = routing.scores.shape[-1] + 1
    slots = slots_from_1(routing, mask)
    pairs = slots.unsqueeze(-1) * size + slots.unsqueeze(-2)  # (..., top_k, top_k)
    together = count_indices(pairs, size * size).view(size, size)[1:, 1:].double()
    return together / together.diagonal().clamp(min=1).unsqueeze(-1)


def domain_specialization(
    routing: Routing, domains: Tensor, num_domains: int, mask: Tensor | None = None
) -> Tensor:
    """Of a domain's tokens, the share that an expert takes (arXiv 2409.02060 section 5.3).

    routing (..., ...), domains (...) int64 -> (domains, experts)

    0 is no token of the domain, 1 all of them, top_k / experts an even use; a row without empty slots sums to
    top_k, that of a domain without a token is 0.

    Args:
        domains: each token's, 0..num_domains - 1; padding may hold anything.
    """
    real = real_tokens(routing, mask)
    if domains.shape != real.shape or domains.dtype != torch.int64:
        found, wanted = f"{domains.dtype} {tuple(domains.shape)}", f"torch.int64 {tuple(real.shape)}"
        raise ValueError(f"domains is {found}; expected {wanted}, the domain of each token")
    wrong = domains[real & ((domains < 0) | (domains >= num_domains))]
    if wrong.numel():
        raise ValueError(f"domains holds {int(wrong[0])}, which is not in 0..{num_domains - 1}")
    size = routing.scores.shape[-1] + 1
    domains = domains.where(real, 0)  # the slots of padding are empty
    slots = slots_from_1(routing, mask) + domains.unsqueeze(-1) * size  # (..., top_k)
    taken = count_indices(slots, num_domains * size).view(num_domains, size)[:, 1:].double()
    tokens = count_indices(domains[real], num_domains)  # (domains,)
    return taken / tokens.clamp(min=1).unsqueeze(-1)


@torch.no_grad()
def router_confidence(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of the chosen experts' share of all scores, before any bias and normalization.

    routing (..., ...) -> (); 1 is all of it, top_k / experts what equal scores give, less where a selection
    bias chooses against the scores; an empty slot adds 0
    """
    real = real_tokens(routing, mask)
    chosen = F.pad(routing.scores, (1, 0)).gather(-1, slots_from_1(routing, mask)).sum(-1)  # (...)
    return mean_over_tokens(chosen / (routing.scores.sum(-1) + 1e-20), real)


@torch.no_grad()
def score_entropy(routing: Routing, mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of the entropy of the scores, scaled to sum to 1, over that of equal scores.

    routing (..., ...) -> (); 1 is all experts alike, 0 one expert with all of it
    """
    share = routing.scores / (routing.scores.sum(-1, keepdim=True) + 1e-20)
    return mean_over_tokens(evenness(share), real_tokens(routing, mask))


def evenness(share: Tensor) -> Tensor:
    """Entropy over its largest value: share (..., experts), which sums to 1 -> (...); 1 for a lone expert"""
    num_experts = share.shape[-1]
    entropy = torch.special.entr(share).sum(-1)  # 0 log 0 is 0 in it
    return entropy / math.log(num_experts) if num_experts > 1 else torch.ones_like(entropy)
