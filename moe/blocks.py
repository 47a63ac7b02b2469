"""Experts over sorted rows as one operator with its own backward pass.

Only one intermediate is kept for it, gate and up before the activation: rows are gathered and activated
again, block by block, in the processor's cache. torch.compile sees one operator, and never the sizes of the
blocks, which change with every batch. A gradient of a gradient raises RuntimeError.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import activation
from .dispatch import Order


def run_blocks(tokens: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, order: Order) -> Tensor:
    """Two matrix products an expert, over its own rows, and the weighted sum of each token's rows.

    tokens (tokens, dim), weights (tokens, top_k), gate_up (experts, 2 hidden, dim),
    down (experts, dim, hidden) -> (tokens, dim), in the dtype of tokens, whatever that of the matrices
    """
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (tokens, weights, gate_up, down))
    run = forward if learns or torch.compiler.is_compiling() else compute  # as an operator it starts slower
    y, _ = run(tokens, weights, gate_up, down, *order)
    return y


def compute(
    tokens: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    sizes: Tensor,
    source: Tensor,
    target: Tensor,
) -> tuple[Tensor, Tensor]:
    """Arguments as in `run_blocks` -> y (tokens, dim), projected (rows, 2 hidden) before the activation"""
    projected = tokens.new_empty(source.shape[0], gate_up.shape[1])
    outputs = tokens.new_empty(len(source), tokens.shape[1])
    *blocks, empty = blocks_of(sizes)
    for block, w, v in zip(blocks, gate_up, down):
        if block.start == block.stop:  # while decoding, most experts have no token
            continue
        rows = tokens.index_select(0, source[block])
        torch.mm(rows, w.to(rows.dtype).t(), out=projected[block])
        torch.mm(activation.reference(projected[block]), v.to(rows.dtype).t(), out=outputs[block])
    outputs[empty] = 0
    return weighted_sum(outputs, target, weights), projected


forward = torch.library.custom_op("moe::run_blocks", compute, mutates_args=())


@torch.library.custom_op("moe::run_blocks_backward", mutates_args=())
def backward(
    d_y: Tensor,
    projected: Tensor,
    tokens: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    sizes: Tensor,
    source: Tensor,
    target: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d_y (tokens, dim) -> the gradients of tokens, weights, gate_up and down"""
    places = target.flatten()
    weight = tokens.new_zeros(len(source), 1)  # of each row; 0: it only fills its block up
    weight.index_copy_(0, places, weights.reshape(-1, 1).to(tokens.dtype))
    d_weight, d_rows = torch.zeros_like(weight), tokens.new_empty(len(source), tokens.shape[1])
    d_gate_up, d_down = torch.empty_like(gate_up), torch.empty_like(down)
    *blocks, empty = blocks_of(sizes)
    for block, w, v, d_w, d_v in zip(blocks, gate_up, down, d_gate_up, d_down):
        rows, d_outputs = tokens.index_select(0, source[block]), d_y.index_select(0, source[block])
        d_hidden = torch.mm(d_outputs, v.to(rows.dtype))  # the slot's weight still left out
        hidden, d_projected = activation.backward(d_hidden * weight[block], projected[block])
        torch.sum(d_hidden * hidden, -1, keepdim=True, out=d_weight[block])
        torch.mm(d_projected, w.to(rows.dtype), out=d_rows[block])
        d_w.copy_(torch.mm(d_projected.t(), rows))
        d_v.copy_(torch.mm(d_outputs.t(), hidden * weight[block]))
    d_rows[empty] = 0
    d_weights = d_weight.index_select(0, places).view_as(weights).to(weights.dtype)
    return weighted_sum(d_rows, target), d_weights, d_gate_up, d_down


def weighted_sum(rows: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """rows (rows, dim), target and weights (tokens, top_k) -> (tokens, dim), in one pass over the rows"""
    weights = None if weights is None else weights.to(rows.dtype)
    return F.embedding_bag(target, rows, mode="sum", per_sample_weights=weights)


def blocks_of(sizes: Tensor) -> list[slice]:
    """The rows of each expert, then those of the empty slots"""
    ends = sizes.cumsum(0).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends)]


@forward.register_fake
def _(tokens, weights, gate_up, down, sizes, source, target):
    return torch.empty_like(tokens), tokens.new_empty(source.shape[0], gate_up.shape[1])


@backward.register_fake
def _(d_y, projected, tokens, weights, gate_up, down, sizes, source, target):
    return tuple(torch.empty_like(t) for t in (tokens, weights, gate_up, down))


def keep(ctx, inputs, output):
    """What the backward pass needs: the arguments, and projected."""
    ctx.save_for_backward(output[1], *inputs)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # a gradient of zeros for projected would cost as much as projected


def differentiate(ctx, d_y, _):
    """The gradients of the operator's seven arguments."""
    given = (None,) * 4 if d_y is None else backward(d_y.contiguous(), *ctx.saved_tensors)
    return *given, None, None, None


forward.register_autograd(differentiate, setup_context=keep)
