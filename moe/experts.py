"""The experts: many small SwiGLU MLPs, each run over the tokens that chose it."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from . import dispatch
from .router import Routing


class SwiGLU(nn.Module):
    """Gated MLP, down(silu(gate(x)) * up(x)) (Shazeer 2020, "GLU variants improve Transformer").

    x (..., dim) -> y (..., dim)

    The shared expert of a MoE is one of these: n experts that are always on are one of n times the width.
    """

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        if dim < 1 or hidden_dim < 1:
            raise ValueError(f"dim={dim} and hidden_dim={hidden_dim} must be at least 1")
        self.gate_up = nn.Linear(dim, 2 * hidden_dim, bias=False)  # rows of gate, then rows of up: one product
        self.down = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gated(self.gate_up(x)))


class Experts(nn.Module):
    """The routed experts' weights, and the weighted sum of the chosen ones' outputs (V3 eq. 12, middle term).

    x (..., dim), routing -> y (..., dim)

    `reference` is that sum written as a loop; `forward` is equal to it and picks the faster of two ways:
    `by_block` runs each expert over its block of sorted rows, `grouped` gives all blocks to one kernel.

    Raises:
        ValueError: routing does not fit x, or names an expert that does not exist.
    """

    def __init__(self, num_experts: int, dim: int, hidden_dim: int):
        super().__init__()
        if num_experts < 1 or dim < 1 or hidden_dim < 1:
            raise ValueError(f"num_experts={num_experts}, dim={dim} and hidden_dim={hidden_dim} must be at least 1")
        self.num_experts = num_experts
        self.dim = dim
        self.hidden_dim = hidden_dim
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * hidden_dim, dim))  # rows of gate, then rows of up
        self.down = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        nn.init.uniform_(self.gate_up, -(dim**-0.5), dim**-0.5)  # as nn.Linear does
        nn.init.uniform_(self.down, -(hidden_dim**-0.5), hidden_dim**-0.5)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        tokens, experts, weights, shape = self.flatten(x, routing)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        # the grouped kernel wants rows of whole 16 bytes, and knows no float64
        fits = dtype != torch.float64 and self.dim * dtype.itemsize % 16 == self.hidden_dim * dtype.itemsize % 16 == 0
        run = self.grouped if x.is_cuda and fits else self.by_block
        return run(tokens.to(dtype), experts, weights, self.gate_up.to(dtype), self.down.to(dtype)).reshape(shape)

    def reference(self, x: Tensor, routing: Routing) -> Tensor:
        """The loop of the equation: each expert over its tokens, added up token by token."""
        tokens, experts, weights, shape = self.flatten(x, routing)
        y = torch.zeros_like(tokens)
        for i in range(self.num_experts):
            chosen = (experts == i).nonzero()  # (n, 2): token, slot
            for token, slot in chosen.tolist():
                out = F.linear(gated(F.linear(tokens[token], self.gate_up[i])), self.down[i])
                y[token] = y[token] + weights[token, slot] * out  # V3 eq. 12: g_it FFN_i(u_t)
        return y.reshape(shape)

    @staticmethod
    def by_block(tokens: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """Two matrix products an expert, over its own rows: best on a CPU.

        Blocks are filled up to 64 rows in bf16, where a new shape costs a new kernel, and to 16 in fp32, where a
        row's last bits depend on how many share the product. A handful of tokens (decoding) is not worth filling.
        """
        multiple = 1 if len(tokens) < 16 else 64 if tokens.dtype == torch.bfloat16 else 16
        order = dispatch.sort(experts, len(gate_up), multiple)
        *blocks, empty = dispatch.gather(tokens, order).split(order.sizes.tolist())
        # unbind, not gate_up[i]: its backward writes each expert's gradient once, into one tensor
        outputs = [
            F.linear(gated(F.linear(block, w)), v)
            for block, w, v in zip(blocks, gate_up.unbind(), down.unbind())
            if len(block)
        ]
        return dispatch.scatter(torch.cat([*outputs, torch.zeros_like(empty)]), order, weights)

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
        """Check x against the routing, and merge their leading axes -> (tokens, dim), (tokens, top_k) twice, x's shape."""
        experts, weights = routing.experts, routing.weights
        if x.ndim == 0 or x.shape[-1] != self.dim:
            raise ValueError(f"x has shape {tuple(x.shape)}; the experts expect (..., dim={self.dim})")
        if experts.dtype != torch.int64:
            raise ValueError(f"routing.experts is {experts.dtype}; it must be torch.int64")
        if experts.shape[:-1] != x.shape[:-1] or weights.shape != experts.shape:
            raise ValueError(
                f"routing.experts {tuple(experts.shape)} and routing.weights {tuple(weights.shape)} must both be "
                f"{tuple(x.shape[:-1])} + (top_k,), as x is {tuple(x.shape)}"
            )
        if experts.numel() and not experts.is_cuda:  # on a GPU the look itself would make it wait
            lowest, highest = (int(i) for i in torch.aminmax(experts))
            if lowest < -1 or highest >= self.num_experts:
                wrong = lowest if lowest < -1 else highest
                raise ValueError(
                    f"routing.experts holds {wrong}; it must lie in 0..{self.num_experts - 1}, or be -1 for an empty slot"
                )
        slots = "... top_k -> (...) top_k"
        return x.reshape(-1, self.dim), rearrange(experts, slots), rearrange(weights, slots), x.shape


def gated(gate_up: Tensor) -> Tensor:
    """(..., 2 hidden), gate then up -> (..., hidden)"""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
