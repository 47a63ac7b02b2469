"""The same numbers, faster: read this last. Nothing in it is needed to understand the layer.

- the router's matmul in fp32, where a row's bits do not depend on the other rows;
- SwiGLU's activation, with a backward pass that saves only its input;
- three ways to run the chosen experts, each equal to `Experts.reference`: `by_block` on a CPU, `by_slot` for
  few tokens, `grouped` on a GPU;
- the operator behind `by_block`, with its own backward pass, which saves only gate and up before the
  activation: rows are gathered and activated again, block by block, in the CPU's cache. torch.compile sees
  one operator, and never the sizes of the blocks, which change with every batch.

The activation and the operator raise RuntimeError on double backward.
"""

import math
from collections.abc import Callable
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import dispatch
from .dispatch import Order
from .modes import autocast_dtype, has_numbers, transformed, watched

FEW = 2**24  # bytes of expert weights that are worth copying in a decode step


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """The router's matmul, in fp32 whatever the dtype of x: in bf16, near ties would flip.

    x (..., dim), weight (experts, dim) -> (..., experts)
    """
    num_experts, dim = weight.shape
    if x.ndim == 0 or x.shape[-1] != dim or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; expected floating-point (..., dim={dim})")
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    rows = x.reshape(-1, dim)
    product = Product.apply if torch.is_grad_enabled() and not transformed() else Product.compute
    if autocast_dtype(x) is not None:
        with torch.autocast(x.device.type, enabled=False):
            logits = product(rows, weight, dtype)
    else:
        logits = product(rows, weight, dtype)
    return logits.view(*x.shape[:-1], num_experts)


class Product(torch.autograd.Function):
    """rows weight^T in a wider dtype; a row's bits do not depend on the other rows or their number.

    rows (tokens, dim), weight (experts, dim) -> (tokens, experts). Both are saved in their own dtype.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return Product.compute(rows, weight, dtype)

    @staticmethod
    def compute(rows: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        count, num_experts = rows.shape[0], weight.shape[0]  # not len(): torch.export would fix it
        rows, weight = rows.to(dtype), weight.to(dtype)
        if rows.is_cpu and not torch.compiler.is_compiling() and not watched():
            # A CPU's matmul rounds a row depending on the number of rows and the row's index; a last bit can
            # flip an expert. With multiples of 8 rows and of 32 experts it depends on neither.
            rows, weight = fill(rows, 8), fill(weight, 32)
        return F.linear(rows, weight)[:count, :num_experts].contiguous()

    @staticmethod
    def backward(ctx, d_logits: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight = ctx.saved_tensors
        d_rows = torch.mm(d_logits, weight.to(d_logits.dtype)).to(rows.dtype)
        return d_rows, torch.mm(d_logits.t(), rows.to(d_logits.dtype)).to(weight.dtype), None


def fill(rows: Tensor, multiple: int) -> Tensor:
    """rows (n, dim) -> n rounded up to a multiple, padded with zeros"""
    return F.pad(rows, (0, 0, 0, -rows.shape[0] % multiple)) if rows.shape[0] % multiple else rows


def sigmoid(logits: Tensor) -> Tensor:
    """torch.sigmoid, with every element rounded the same way.

    On a CPU torch.sigmoid rounds the last few elements of a tensor differently from the rest, so that a
    token's scores would depend on the number of tokens.
    """
    return 1 / (1 + (-logits.clamp(min=-80)).exp())  # exp(89) is infinite in fp32, and its gradient NaN


def gated(gate_up: Tensor) -> Tensor:
    """(..., 2 hidden), gate then up -> (..., hidden). Double backward raises RuntimeError."""
    learns = gate_up.requires_grad and torch.is_grad_enabled() and not transformed()
    return KeepsInput.apply(gate_up) if learns else reference_gated(gate_up)


def reference_gated(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, for which autograd would also save silu(gate)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gated_backward(d_hidden: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """d_hidden (..., hidden), gate_up (..., 2 hidden) -> hidden, recomputed, and the gradient of gate_up"""
    gate, up = gate_up.chunk(2, dim=-1)
    silu = F.silu(gate)
    d_gate = torch.ops.aten.silu_backward(d_hidden * up, gate)
    return silu * up, torch.cat((d_gate, d_hidden * silu), dim=-1)


class KeepsInput(torch.autograd.Function):
    """`reference_gated` and `gated_backward` as one autograd function."""

    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return reference_gated(gate_up)

    @staticmethod
    def backward(ctx, d_hidden: Tensor) -> Tensor:
        return gated_backward(d_hidden, *ctx.saved_tensors)[1]


def by_block(tokens: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Two matmuls per expert, over its own rows: best on a CPU.

    tokens (tokens, dim), experts and weights (tokens, top_k), gate_up (experts, 2 hidden, dim),
    down (experts, dim, hidden) -> (tokens, dim)

    Blocks are padded to a multiple of 64 rows in bf16, where each new shape costs a new kernel. Otherwise,
    and for few tokens, to a multiple of 8: a row's last bits then do not depend on the number of rows.
    """
    # torch.export would otherwise allow only few tokens, or only many
    many = torch.compiler.is_exporting() or tokens.shape[0] >= 16
    multiple = 64 if tokens.dtype == torch.bfloat16 and many else 8
    order = dispatch.sort(experts, len(gate_up), multiple)
    return run_blocks(tokens, weights, gate_up, down, order)


def by_slot(tokens: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Copy each slot's expert and run all slots in one batched matmul: for few tokens sorting costs more.

    Each row is repeated 8 times, to be rounded as in a block, whatever else is in the batch. Compiled code,
    which does not guarantee equal bits, does without.
    """
    chosen = experts.flatten().clamp(min=0)  # an empty slot runs an expert too ...
    same = 1 if torch.compiler.is_compiling() else 8
    rows = tokens.unsqueeze(1).expand(-1, experts.shape[1] * same, -1)
    rows = rows.reshape(chosen.shape[0], same, tokens.shape[1])
    hidden = gated(torch.bmm(rows, pick(gate_up, chosen).mT))  # (slots, same, hidden)
    outputs = torch.bmm(hidden, pick(down, chosen).mT)[:, 0]
    outputs = outputs.masked_fill(experts.reshape(-1, 1) < 0, 0)  # ... whose output is set to 0
    slots = torch.arange(outputs.shape[0], device=outputs.device).view_as(experts)
    return weighted_sum(outputs, slots, weights)


def grouped(tokens: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One grouped matmul for all experts, without device synchronization: best on a GPU."""
    order = dispatch.sort(experts, len(gate_up))
    ends = order.sizes[:-1].cumsum(0).to(torch.int32)  # (experts,) where each block ends
    computed = torch.arange(order.source.shape[0], device=tokens.device).unsqueeze(-1) < ends[-1]
    # past the last block the kernel leaves its output, and its gradient, uninitialized
    rows = dispatch.gather(tokens, order).where(computed, 0)
    hidden = gated(F.grouped_mm(rows, gate_up.transpose(1, 2), offs=ends).where(computed, 0))
    rows = F.grouped_mm(hidden, down.transpose(1, 2), offs=ends).where(computed, 0)
    return dispatch.scatter(rows, order, weights)


def everywhere(
    tokens: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    product: Callable[[Tensor, Tensor], Tensor] = F.linear,
) -> Tensor:
    """Every expert on every token: no shape depends on the routing, and torch.func can transform it."""
    y = torch.zeros_like(tokens)
    for expert, (w, v) in enumerate(zip(gate_up, down)):
        share = weights.where(experts == expert, 0).sum(-1, keepdim=True).to(tokens.dtype)  # 0 if not chosen
        hidden = gated(product(tokens, w.to(tokens.dtype)))
        y = y + share * product(hidden, v.to(tokens.dtype))
    return y


def is_few(experts: Tensor, gate_up: Tensor, down: Tensor) -> bool:
    """Whether copying each slot's expert, experts (tokens, top_k), costs less than sorting the slots."""
    slots, num_experts = experts.numel(), len(gate_up)
    if experts.is_cuda or torch.compiler.is_exporting() or not 0 < 2 * slots <= num_experts:
        return False
    return slots * ((gate_up.nbytes + down.nbytes) // num_experts) <= FEW


def pick(weights: Tensor, chosen: Tensor) -> Tensor:
    """weights (experts, ...)[chosen], read in memory order"""
    if weights.is_contiguous():
        return weights.index_select(0, chosen)
    return weights.mT.index_select(0, chosen).mT


def operator_name(name: str) -> str:
    """package::name, the name under which PyTorch registers an operator for the whole process.

    A copy of this package under another name registers its own; one under the same name appends a number.
    """
    space = __name__.rpartition(".")[0].replace(".", "_") or "moe"
    names = (name if number == 1 else f"{name}_{number}" for number in count(1))
    return next(f"{space}::{free}" for free in names if not hasattr(getattr(torch.ops, space), free))


def run_blocks(tokens: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, order: Order) -> Tensor:
    """Two matmuls per expert, over its own rows, and the weighted sum of each token's rows.

    tokens (tokens, dim), weights (tokens, top_k), gate_up (experts, 2 hidden, dim),
    down (experts, dim, hidden) -> (tokens, dim), in the dtype of tokens, whatever the weights' dtype
    """
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (tokens, weights, gate_up, down))
    plain = not learns and has_numbers(tokens) and not watched()
    run = compute if plain else forward  # an operator call is slower
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
        if block.start == block.stop:  # in a decode step, most experts have no tokens
            continue
        rows = tokens.index_select(0, source[block])
        torch.mm(rows, w.to(rows.dtype).t(), out=projected[block])
        torch.mm(reference_gated(projected[block]), v.to(rows.dtype).t(), out=outputs[block])
    outputs[empty] = 0
    return weighted_sum(outputs, target, weights), projected


forward = torch.library.custom_op(operator_name("run_blocks"), compute, mutates_args=())


@torch.library.custom_op(operator_name("run_blocks_backward"), mutates_args=())
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
    weight = tokens.new_zeros(len(source), 1)  # of each row; 0 for padding
    weight.index_copy_(0, places, weights.reshape(-1, 1).to(tokens.dtype))
    d_weight, d_rows = torch.zeros_like(weight), tokens.new_empty(len(source), tokens.shape[1])
    d_gate_up, d_down = torch.empty_like(gate_up), torch.empty_like(down)
    *blocks, empty = blocks_of(sizes)
    for block, w, v, d_w, d_v in zip(blocks, gate_up, down, d_gate_up, d_down):
        rows, d_outputs = tokens.index_select(0, source[block]), d_y.index_select(0, source[block])
        d_hidden = torch.mm(d_outputs, v.to(rows.dtype))  # not yet times the slot's weight
        hidden, d_projected = gated_backward(d_hidden * weight[block], projected[block])
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
    """Save what the backward pass needs: the arguments, and projected."""
    ctx.save_for_backward(output[1], *inputs)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # a zero gradient for projected would take as much memory as projected


def differentiate(ctx, d_y, _):
    """The gradients of the operator's seven arguments."""
    given = (None,) * 4 if d_y is None else backward(d_y.contiguous(), *ctx.saved_tensors)
    return *given, None, None, None


forward.register_autograd(differentiate, setup_context=keep)


@register_flop_formula(forward._opoverload.overloadpacket)
def count_forward(tokens, weights, gate_up, down, *order, out_shape=None) -> int:
    """Of the slots' own rows, without padding; the arguments are shapes."""
    return 2 * math.prod(weights) * (math.prod(gate_up[1:]) + math.prod(down[1:]))


@register_flop_formula(backward._opoverload.overloadpacket)
def count_backward(d_y, projected, *inputs, out_shape=None) -> int:
    """Of each product, a gradient for both factors."""
    return 2 * count_forward(*inputs)
