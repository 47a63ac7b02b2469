"""RMSNorm, with a backward pass that saves only its input."""

import inspect

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in fp32, then back to x's dtype (arXiv 1910.07467 eq. 4).

    x (..., dim) -> (..., dim)
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim={dim} must be at least 1")
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def extra_repr(self) -> str:
        return f"dim={len(self.weight)}, eps={self.eps}"

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not transformed():
            return Norm.apply(x, self.weight, self.eps)
        return rms_norm(x, self.weight, self.eps)[0]


def settings(module: nn.Module) -> str:
    """The constructor's arguments that a module keeps as attributes, for its `extra_repr`: dim=16, top_k=2"""
    found = {name: getattr(module, name, None) for name in inspect.signature(type(module)).parameters}
    shown = {name: value for name, value in found.items() if not isinstance(value, nn.Module | Tensor | None)}
    return ", ".join(f"{name}={value!r}" for name, value in shown.items())


def transformed() -> bool:
    """Whether torch.func or forward-mode AD is at work: only plain operators can then be differentiated."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x (..., dim), weight (dim,) -> normed (..., dim), 1 / root mean square (..., 1)"""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight).to(x.dtype), scale


class Norm(torch.autograd.Function):
    """`rms_norm`; plain autograd would save a second tensor of x's size and take twice as long."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, scale = rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx, d_y: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # double backward: scale depends on x too
            scale = rms_norm(x, weight, ctx.eps)[1]
        d_y, normed = d_y.to(scale.dtype), x.to(scale.dtype) * scale
        each = d_y * normed  # (..., dim)
        d_weight = each.reshape(-1, x.shape[-1]).sum(0)
        along = (each @ weight.to(scale.dtype)).unsqueeze(-1) / x.shape[-1]  # (..., 1) what only scales x
        d_x = (d_y * weight).sub_(normed * along).mul_(scale)
        return d_x.to(x.dtype), d_weight.to(weight.dtype), None
