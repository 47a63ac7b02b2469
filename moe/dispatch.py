"""Tokens to experts and back: sort the slots by expert, gather the tokens' rows, scatter the results back.

A slot is one of a token's top_k choices. Rows are sorted by expert, so that each expert runs on one
contiguous block; bookkeeping is O(tokens x top_k), whatever the number of experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .modes import has_numbers


class Order(NamedTuple):
    """Where each slot's row is when the slots are sorted by expert."""

    sizes: Tensor  # (experts + 1,) rows in each expert's block; the last block holds the empty slots
    source: Tensor  # (rows,) the token that each row is a copy of; padding rows copy token 0
    target: Tensor  # (tokens, top_k) the row of each slot


def sort(experts: Tensor, num_experts: int, multiple: int = 1) -> Order:
    """Sort the slots stably by expert, and pad each expert's block to a multiple of `multiple` rows.

    experts (tokens, top_k) int64, -1 for an empty slot -> Order

    With multiple=1 there are tokens x top_k rows and no device synchronization. Where numbers cannot be read,
    as under torch.compile or on meta, there are as many rows as any routing could need; the last block then
    also holds the unused ones.
    """
    top_k = experts.shape[1]
    slots = experts.flatten()
    num_rows = slots.shape[0]  # not len(): torch.export would fix it
    slots = slots.where(slots >= 0, num_experts)  # empty slots last
    order = slots.argsort(stable=True)  # the slots, sorted by expert
    counts = slots.new_zeros(num_experts + 1).scatter_add_(0, slots, torch.ones_like(slots))
    sizes = counts
    if multiple > 1:
        sizes = (counts + multiple - 1) // multiple * multiple
        sizes[-1] = counts[-1]
    filling = (sizes - counts).cumsum(0) - (sizes - counts)  # (experts + 1,) padding before each block
    rows = torch.arange(num_rows, device=slots.device) + filling[slots[order]]  # each sorted slot's row
    if multiple > 1 and not has_numbers(experts):  # no shape may depend on the data: the maximum
        num_rows += num_experts * (multiple - 1)
        sizes[-1] = num_rows - sizes[:-1].sum()
    elif multiple > 1:
        num_rows = int(sizes.sum())
    source = slots.new_zeros(num_rows).index_copy_(0, rows, order // top_k)  # slot // top_k is the token
    target = torch.empty_like(slots).index_copy_(0, order, rows)
    return Order(sizes, source, target.view_as(experts))


def gather(x: Tensor, order: Order) -> Tensor:
    """x (tokens, dim) -> (rows, dim), each row a copy of its token"""
    return x.index_select(0, order.source)


def scatter(rows: Tensor, order: Order, weights: Tensor) -> Tensor:
    """The weighted sum of each token's rows: the inverse of `gather`, up to the weights.

    rows (rows, dim), weights (tokens, top_k) -> (tokens, dim)
    """
    return weighted_sum(rows.index_select(0, order.target.flatten()), weights)


def weighted_sum(slots: Tensor, weights: Tensor) -> Tensor:
    """slots (tokens x top_k, dim), weights (tokens, top_k) -> (tokens, dim)

    For a GPU, differentiated by autograd; on a CPU, moe/fast.py does it in one pass over the rows.
    """
    slots = slots.unflatten(0, weights.shape)  # (tokens, top_k, dim)
    return torch.bmm(weights.to(slots.dtype).unsqueeze(1), slots).squeeze(1)
