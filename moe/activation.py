"""SwiGLU's activation, silu(gate) * up, with a backward pass that keeps its input alone."""

import torch
import torch.nn.functional as F
from torch import Tensor


def gated(gate_up: Tensor) -> Tensor:
    """(..., 2 hidden), gate then up -> (..., hidden). A gradient of its gradient raises RuntimeError."""
    learns = gate_up.requires_grad and torch.is_grad_enabled()
    return KeepsInput.apply(gate_up) if learns else reference(gate_up)


def reference(gate_up: Tensor) -> Tensor:
    """The formula; differentiated by autograd it would keep silu(gate), too."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def backward(d_hidden: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """d_hidden (..., hidden), gate_up (..., 2 hidden) -> hidden once more, and the gradient of gate_up"""
    gate, up = gate_up.chunk(2, dim=-1)
    silu = F.silu(gate)
    d_gate = torch.ops.aten.silu_backward(d_hidden * up, gate)
    return silu * up, torch.cat((d_gate, d_hidden * silu), dim=-1)


class KeepsInput(torch.autograd.Function):
    """`reference` and `backward` as one function for autograd."""

    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return reference(gate_up)

    @staticmethod
    def backward(ctx, d_hidden: Tensor) -> Tensor:
        return backward(d_hidden, *ctx.saved_tensors)[1]
