"""The experts: many small SwiGLU MLPs, each run over the tokens that chose it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import dispatch
from .activation import gated
from .blocks import run_blocks, weighted_sum
from .router import Routing

FEW = 2**24  # bytes of experts that are worth copying for a step of decoding


class SwiGLU(nn.Module):
    """Gated MLP, down(silu(gate(x)) * up(x)) (Shazeer 2020, "GLU variants improve Transformer").

    x (..., dim) -> y (..., dim)

    The shared expert of a MoE is one of these: n experts, always on, are one of n times the width.
    """

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        if dim < 1 or hidden_dim < 1:
            raise ValueError(f"dim={dim} and hidden_dim={hidden_dim} must be at least 1")
        self.gate_up = nn.Linear(dim, 2 * hidden_dim, bias=False)  # gate's rows, then up's: one product
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gated(self.gate_up(x)))


class Gated(nn.Module):
    """A shared expert that each token weighs itself: sigmoid(gate(x)) mlp(x), as in Qwen2-MoE.

    x (..., dim) -> y (..., dim)
    """

    def __init__(self, mlp: nn.Module, dim: int):
        super().__init__()
        self.mlp = mlp
        self.gate = nn.Linear(dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x).sigmoid() * self.mlp(x)


class Experts(nn.Module):
    """The routed experts' weights, and the weighted sum of the chosen ones' outputs (V3 eq. 12, middle term).

    x (..., dim), routing -> y (..., dim)

    `reference` is that sum written as a loop; `forward` is equal to it and picks the fastest of three ways:
    `by_block` runs each expert over its block of sorted rows, `grouped` gives all blocks to one kernel, and
    `by_slot` does without sorting.

    Raises:
        ValueError: routing does not fit x, or names an expert that does not exist.
    """

    def __init__(self, num_experts: int, dim: int, hidden_dim: int):
        super().__init__()
        if num_experts < 1 or dim < 1 or hidden_dim < 1:
            raise ValueError(f"{num_experts=}, {dim=} and {hidden_dim=} must be at least 1")
        self.num_experts = num_experts
        self.dim = dim
        self.hidden_dim = hidden_dim
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * hidden_dim, dim))  # gate's rows, then up's
        self.down = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        nn.init.uniform_(self.gate_up, -(dim**-0.5), dim**-0.5)  # as nn.Linear does
        nn.init.uniform_(self.down, -(hidden_dim**-0.5), hidden_dim**-0.5)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        tokens, experts, weights, shape = self.flatten(x, routing)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        # the grouped kernel wants rows of whole 16 bytes, and knows no float64
        whole = self.dim * dtype.itemsize % 16 == self.hidden_dim * dtype.itemsize % 16 == 0
        run = self.grouped if x.is_cuda and whole and dtype != torch.float64 else self.by_block
        if self.is_few(experts):
            run = self.by_slot
        matrices: tuple[Tensor, ...] = (self.gate_up, self.down)
        if run is not self.by_block:  # which casts one expert's at a time, and keeps no copy
            matrices = tuple(matrix.to(dtype) for matrix in matrices)
        y = run(tokens.to(dtype), experts, weights, *matrices)
        return y.reshape(shape)

    def reference(self, x: Tensor, routing: Routing) -> Tensor:
        """The loop of the equation: each expert over its tokens, added up token by token."""
        tokens, experts, weights, shape = self.flatten(x, routing)
        y = torch.zeros_like(tokens)
        for i in range(self.num_experts):
            for token, slot in (experts == i).nonzero().tolist():
                out = F.linear(gated(F.linear(tokens[token], self.gate_up[i])), self.down[i])
                y[token] = y[token] + weights[token, slot] * out  # V3 eq. 12: g_it FFN_i(u_t)
        return y.reshape(shape)

    def is_few(self, experts: Tensor) -> bool:
        """Whether copying each slot's expert, experts (tokens, top_k), costs less than sorting the slots."""
        slots = experts.numel()
        if experts.is_cuda or not 0 < 2 * slots <= self.num_experts:
            return False
        each = (self.gate_up.nbytes + self.down.nbytes) // self.num_experts
        return slots * each <= FEW

    @staticmethod
    def by_block(tokens: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """Two matrix products an expert, over its own rows: best on a CPU.

        Blocks are filled up to 64 rows in bf16, where a new shape costs a new kernel; else, and for few
        tokens, to 8: a row's last bits depend on how many share the product, but not from there on.
        """
        multiple = 64 if tokens.dtype == torch.bfloat16 and len(tokens) >= 16 else 8
        order = dispatch.sort(experts, len(gate_up), multiple)
        return run_blocks(tokens, weights, gate_up, down, order)

    @staticmethod
    def by_slot(tokens: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """Every slot's own copy of its expert, all in one product: for few tokens sorting costs more.

        The row is there eight times: rounded as in a block, whatever else is in the batch. Compiled code,
        which promises no equal bits, does without.
        """
        chosen = experts.flatten().clamp(min=0)  # an empty slot gets an expert, too ...
        same = 1 if torch.compiler.is_compiling() else 8
        rows = tokens.unsqueeze(1).expand(-1, experts.shape[1] * same, -1)
        rows = rows.reshape(len(chosen), same, tokens.shape[1])
        hidden = gated(torch.bmm(rows, pick(gate_up, chosen).mT))  # (slots, same, hidden)
        outputs = torch.bmm(hidden, pick(down, chosen).mT)[:, 0]
        outputs = outputs.masked_fill(experts.reshape(-1, 1) < 0, 0)  # ... whose output is left out
        slots = torch.arange(len(outputs), device=outputs.device).view_as(experts)
        return weighted_sum(outputs, slots, weights)

    @staticmethod
    def grouped(tokens: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """One grouped product for all experts, and no wait for the device: best on a GPU."""
        order = dispatch.sort(experts, len(gate_up))
        ends = order.sizes[:-1].cumsum(0).to(torch.int32)  # (experts,) where each block stops
        computed = torch.arange(len(order.source), device=tokens.device).unsqueeze(-1) < ends[-1]
        # past the last block the kernel leaves whatever memory held, in the product and in its gradient
        rows = dispatch.gather(tokens, order).where(computed, 0)
        hidden = gated(F.grouped_mm(rows, gate_up.transpose(1, 2), offs=ends).where(computed, 0))
        rows = F.grouped_mm(hidden, down.transpose(1, 2), offs=ends).where(computed, 0)
        return dispatch.scatter(rows, order, weights)

    def flatten(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Tensor, torch.Size]:
        """Check and merge leading axes -> x (tokens, dim), experts and weights (tokens, top_k), x's shape"""
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
        # on a GPU the look itself would make it wait, and torch.compile would break its graph there
        if experts.numel() and not experts.is_cuda and not torch.compiler.is_compiling():
            lowest, highest = (int(i) for i in torch.aminmax(experts))
            if lowest < -1 or highest >= self.num_experts:
                wrong = lowest if lowest < -1 else highest
                last = self.num_experts - 1
                raise ValueError(f"routing.experts holds {wrong}; expected 0..{last}, or -1: an empty slot")
        top_k = experts.shape[-1]
        return x.reshape(-1, self.dim), experts.reshape(-1, top_k), weights.reshape(-1, top_k), x.shape


def pick(weights: Tensor, chosen: Tensor) -> Tensor:
    """weights (experts, ...)[chosen], read in the order in which they lie in memory"""
    if weights.is_contiguous():
        return weights.index_select(0, chosen)
    return weights.mT.index_select(0, chosen).mT
