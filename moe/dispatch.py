"""Tokens to experts and back: sort the slots by expert, gather the tokens' rows, scatter the results home.

A slot is one of a token's top_k choices. Experts run over rows sorted by expert, so that each sees one
contiguous block; bookkeeping is O(tokens x top_k), whatever the number of experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Order(NamedTuple):
    """Where each slot's row lies once the slots are sorted by expert."""

    sizes: Tensor  # (experts + 1,) rows in each expert's block; the last block holds the empty slots
    source: Tensor  # (rows,) the token whose copy each row holds; rows that only fill a block up hold token 0
    target: Tensor  # (tokens, top_k) the row of each slot


def sort(experts: Tensor, num_experts: int, multiple: int = 1) -> Order:
    """Sort the slots by expert, stably; each expert's block is filled up to a multiple of `multiple` rows.

    experts (tokens, top_k) int64, -1 for an empty slot -> Order

    With multiple=1 the number of rows is tokens x top_k and nothing waits for the device. Under torch.compile
    the last block also takes the rows that are left over of the most there could be.
    """
    top_k = experts.shape[1]
    slots = experts.flatten()
    slots = slots.where(slots >= 0, num_experts)  # the empty ones last
    order = slots.argsort(stable=True)  # the slots in order of their rows
    counts = slots.new_zeros(num_experts + 1).scatter_add_(0, slots, torch.ones_like(slots))
    sizes = counts
    if multiple > 1:
        sizes = (counts + multiple - 1) // multiple * multiple
        sizes[-1] = counts[-1]
    filling = (sizes - counts).cumsum(0) - (sizes - counts)  # (experts + 1,) filling before each block
    rows = torch.arange(len(slots), device=slots.device) + filling[slots[order]]  # the row of each in order
    num_rows = len(slots)
    if multiple > 1 and torch.compiler.is_compiling():  # no shape may depend on the data: room for the most
        num_rows += num_experts * (multiple - 1)
        sizes[-1] = num_rows - sizes[:-1].sum()
    elif multiple > 1:
        num_rows = int(sizes.sum())
    source = slots.new_zeros(num_rows).index_copy_(0, rows, order // top_k)  # slot // top_k is the token
    target = torch.empty_like(slots).index_copy_(0, order, rows)
    return Order(sizes, source, target.view_as(experts))


def gather(x: Tensor, order: Order) -> Tensor:
    """x (tokens, dim) -> (rows, dim), a copy of its token for each row."""
    return x.index_select(0, order.source)


def scatter(rows: Tensor, order: Order, weights: Tensor) -> Tensor:
    """The weighted sum of each token's rows: the inverse of `gather`, up to the weights.

    rows (rows, dim), weights (tokens, top_k) -> (tokens, dim)
    """
    return weighted_sum(rows.index_select(0, order.target.flatten()), weights)


def weighted_sum(slots: Tensor, weights: Tensor) -> Tensor:
    """slots (tokens x top_k, dim), weights (tokens, top_k) -> (tokens, dim)

    For a GPU, through autograd; a CPU's blocks have it in one pass over their rows (moe/blocks.py).
    """
    slots = slots.unflatten(0, weights.shape)  # (tokens, top_k, dim)
    return torch.bmm(weights.to(slots.dtype).unsqueeze(1), slots).squeeze(1)
