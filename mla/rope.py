"""Rotary position embedding (RoFormer, arXiv 2104.09864): pairs of features turn with the position."""

from functools import lru_cache

import torch
from torch import Tensor, nn


class RotaryEmbedding(nn.Module):
    """Turn pair i of the features by position x theta^(-2i/dim) (RoFormer eq. 15).

    x (batch, time, [heads,] dim), positions (time,) or (batch, time) -> rotated x

    Args:
        theta: the base; the slowest pair needs nearly 2 pi theta positions for one turn.
        interleaved: pair i is features (2i, 2i + 1), as in DeepSeek's checkpoints; False: features
            (i, i + dim/2), as in Llama's. The two differ by a permutation of the features: a model trained
            with one and run with the other is silently wrong, more so with every position.
        scaling: reserved for longer contexts; None is the plain embedding.

    Raises:
        ValueError: dim is odd or below 2, theta is below 1, x or positions have another shape.
    """

    def __init__(self, dim: int, theta: float = 10000.0, interleaved: bool = True, scaling: None = None):
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"dim={dim} must be even and at least 2, since features turn in pairs")
        if not 1 <= theta < float("inf"):
            raise ValueError(f"theta={theta} must be finite and at least 1")
        if scaling is not None:
            raise ValueError(f"scaling={scaling!r} is not supported; None is")
        self.dim = dim
        self.theta = theta
        self.interleaved = interleaved

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        if x.ndim not in (3, 4) or x.shape[-1] != self.dim or not x.is_floating_point():
            wanted = f"floating-point (batch, time, [heads,] dim={self.dim})"
            raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; expected {wanted}")
        if positions.shape not in (x.shape[1:2], x.shape[:2]):
            found, of = tuple(positions.shape), tuple(x.shape)
            raise ValueError(f"positions have shape {found}; expected (time,) or (batch, time) of x {of}")
        # Angles in fp32: bf16 cannot tell position 257 from 256. Not a buffer, so no cast can reach them.
        turn = frequencies(self.dim, self.theta, x.device)  # (dim/2,)
        angles = positions.unsqueeze(-1).float() * turn  # (time, dim/2) or (batch, time, dim/2)
        if x.ndim == 4:
            angles = angles.unsqueeze(-2)  # (..., time, 1, dim/2): every head turns alike
        cos, sin = angles.cos(), angles.sin()
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        two, pairs = (-1, (-1, 2)) if self.interleaved else (-2, (2, -1))  # where pairs lie
        even, odd = wide.unflatten(-1, pairs).unbind(two)  # (..., dim/2) each
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=two)
        return turned.flatten(-2).to(x.dtype)


@lru_cache(maxsize=64)
def frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    """Radians a position for each pair of features -> (dim/2,) fp32, fast to slow"""
    with torch.inference_mode(False):
        return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
