"""The experts: many small SwiGLU MLPs, each run on the tokens routed to it."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import dispatch, fast
from .fast import gated
from .modes import autocast_dtype, cheap_to_read, has_numbers, transformed, watched
from .router import Routing, settings

Product = Callable[[Tensor, Tensor], Tensor]  # rows (rows, in), weight (out, in) -> (rows, out)


class SwiGLU(nn.Module):
    """Gated MLP, down(silu(gate(x)) * up(x)) (Shazeer 2020, "GLU variants improve Transformer").

    x (..., dim) -> y (..., dim)

    An MoE's shared expert is one of these: n shared experts equal one of n times the width.
    """

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        if dim < 1 or hidden_dim < 1:
            raise ValueError(f"dim={dim} and hidden_dim={hidden_dim} must be at least 1")
        self.gate_up = nn.Linear(dim, 2 * hidden_dim, bias=False)  # rows of gate, then of up: one matmul
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gated(self.gate_up(x)))


class Gated(nn.Module):
    """Shared expert with a learned gate for each token: sigmoid(gate(x)) * mlp(x), as in Qwen2-MoE.

    x (..., dim) -> y (..., dim)
    """

    def __init__(self, mlp: nn.Module, dim: int):
        super().__init__()
        self.mlp = mlp
        self.gate = nn.Linear(dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x).sigmoid() * self.mlp(x)


class Experts(nn.Module):
    """The routed experts: the weighted sum of the chosen experts' outputs (V3 eq. 12, middle term).

    x (..., dim), routing -> y (..., dim)

    `reference` is that sum written as a loop; `forward` computes the same by the fastest path in fast.py.

    Attributes:
        product: replaces the matmul of an expert's rows with a weight, e.g. to count, quantize or distribute
            it; None: the fast paths.

    Raises:
        ValueError: routing does not match x, or names an expert that does not exist.
    """

    def __init__(self, num_experts: int, dim: int, hidden_dim: int):
        super().__init__()
        if num_experts < 1 or dim < 1 or hidden_dim < 1:
            raise ValueError(f"{num_experts=}, {dim=} and {hidden_dim=} must be at least 1")
        self.num_experts = num_experts
        self.dim = dim
        self.hidden_dim = hidden_dim
        self.product: Product | None = None
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * hidden_dim, dim))  # rows of gate, then of up
        self.down = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        nn.init.uniform_(self.gate_up, -(dim**-0.5), dim**-0.5)  # as nn.Linear does
        nn.init.uniform_(self.down, -(hidden_dim**-0.5), hidden_dim**-0.5)

    def extra_repr(self) -> str:
        return settings(self)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        tokens, experts, weights, shape = self.flatten(x, routing)
        dtype = autocast_dtype(x) or x.dtype
        if self.product is not None:
            return self.by_product(tokens.to(dtype), experts, weights, self.product).reshape(shape)
        # the grouped kernel needs rows of a multiple of 16 bytes, and has no float64
        whole = self.dim * dtype.itemsize % 16 == self.hidden_dim * dtype.itemsize % 16 == 0
        run = fast.grouped if x.is_cuda and whole and dtype != torch.float64 else fast.by_block
        if fast.is_few(experts, self.gate_up, self.down):
            run = fast.by_slot
        if watched():
            run = fast.by_block  # one operator
        if transformed():
            run = fast.everywhere
        matrices: tuple[Tensor, ...] = (self.gate_up, self.down)
        if run is not fast.by_block:  # it casts one expert at a time itself, and keeps no copy
            matrices = tuple(matrix.to(dtype) for matrix in matrices)
        y = run(tokens.to(dtype), experts, weights, *matrices)
        return y.reshape(shape)

    def reference(self, x: Tensor, routing: Routing) -> Tensor:
        """The equation as a loop: each expert over its tokens, summed token by token."""
        tokens, experts, weights, shape = self.flatten(x, routing)
        y = torch.zeros_like(tokens)
        for i in range(self.num_experts):
            for token, slot in (experts == i).nonzero().tolist():
                out = F.linear(gated(F.linear(tokens[token], self.gate_up[i])), self.down[i])
                y[token] = y[token] + weights[token, slot] * out  # g_it FFN_i(u_t)
        return y.reshape(shape)

    def by_product(self, tokens: Tensor, experts: Tensor, weights: Tensor, product: Product) -> Tensor:
        """Run every expert on its block of sorted rows by two calls of `product`, even on an empty block.

        tokens (tokens, dim), experts and weights (tokens, top_k) -> (tokens, dim)
        """
        if not has_numbers(experts) and (torch.compiler.is_exporting() or not torch.compiler.is_compiling()):
            return fast.everywhere(tokens, experts, weights, self.gate_up, self.down, product)
        order = dispatch.sort(experts, self.num_experts)
        *blocks, empty = dispatch.gather(tokens, order).split(order.sizes.tolist())
        outputs = [
            product(gated(product(rows, gate_up.to(rows.dtype))), down.to(rows.dtype))
            for rows, gate_up, down in zip(blocks, self.gate_up, self.down)
        ]
        return dispatch.scatter(torch.cat([*outputs, torch.zeros_like(empty)]), order, weights)

    def flatten(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Tensor, torch.Size]:
        """Check, and merge leading axes -> x (tokens, dim), experts and weights (tokens, top_k), x's shape"""
        experts, weights = routing.experts, routing.weights
        if x.ndim == 0 or x.shape[-1] != self.dim or not x.is_floating_point():
            found = f"{x.dtype} {tuple(x.shape)}"
            raise ValueError(f"x is {found}; expected floating-point (..., dim={self.dim})")
        if experts.dtype != torch.int64:
            raise ValueError(f"routing.experts is {experts.dtype}; it must be torch.int64")
        fits = experts.ndim == x.ndim and experts.shape[:-1] == x.shape[:-1] and experts.shape[-1] >= 1
        if not fits or weights.shape != experts.shape:
            found = f"routing.experts is {tuple(experts.shape)}, routing.weights {tuple(weights.shape)}"
            raise ValueError(f"{found}; for this x both must be {tuple(x.shape[:-1])} + (top_k >= 1,)")
        if cheap_to_read(experts) and experts.numel():
            lowest, highest = (int(i) for i in torch.aminmax(experts))
            if lowest < -1 or highest >= self.num_experts:
                wrong = lowest if lowest < -1 else highest
                last = self.num_experts - 1
                raise ValueError(f"routing.experts holds {wrong}; expected 0..{last}, or -1 if empty")
        top_k = experts.shape[-1]
        return x.reshape(-1, self.dim), experts.reshape(-1, top_k), weights.reshape(-1, top_k), x.shape
