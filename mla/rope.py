"""Rotary position embedding (RoFormer, arXiv 2104.09864): pairs of features turn with the position.

Texts longer than in training need slower turns: `Linear`, `YaRN` and `Llama3` say how much slower each pair.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Linear:
    """Position interpolation (arXiv 2306.15595): every pair turns `factor` times slower."""

    factor: float

    def __post_init__(self):
        check_numbers(self)

    def slow_down(self, turn: Tensor, theta: float) -> Tensor:
        """turn (dim/2,) radians a position, of the plain embedding -> the same, slower"""
        return turn / self.factor


@dataclass(frozen=True)
class YaRN:
    """YaRN (arXiv 2309.00071): slow pairs turn `factor` times slower, fast ones as before, a ramp between.

    Args:
        original_context: tokens of the texts before scaling.
        beta_fast, beta_slow: turns within original_context from which a pair is fast, and below which slow.
        mscale, mscale_all_dim: how much attention is sharpened as the context grows. mscale alone grows cos
            and sin, so only the features with position; DeepSeek has both alike, which leaves cos and sin as
            they are and grows the softmax scale of all features instead.
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self):
        check_numbers(self)
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast={self.beta_fast} is below beta_slow={self.beta_slow}")

    def slow_down(self, turn: Tensor, theta: float) -> Tensor:
        """turn (dim/2,) radians a position, theta the base that they come from -> the same, slower"""
        dim = 2 * len(turn)
        low = max(math.floor(self.pair_with(self.beta_fast, dim, theta)), 0)
        high = min(math.ceil(self.pair_with(self.beta_slow, dim, theta)), dim - 1)
        pairs = torch.arange(len(turn), dtype=torch.float32, device=turn.device)
        kept = 1 - ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)  # (dim/2,) 1: fast, 0: slow
        return turn / self.factor * (1 - kept) + turn * kept  # YaRN section 3.2

    def pair_with(self, turns: float, dim: int, theta: float) -> float:
        """Which pair makes so many turns within the original context; between two, a fraction."""
        return dim * math.log(self.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    def sharpening(self, mscale: float) -> float:
        """0.1 mscale ln(factor) + 1 (YaRN section 3.4)"""
        return 0.1 * mscale * math.log(self.factor) + 1.0


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1's scaling: as YaRN without sharpening, the ramp over turns and not over pairs.

    Args:
        original_context: tokens of the texts before scaling.
        low_freq_factor, high_freq_factor: turns within original_context below which a pair is slow, and above
            which fast.
    """

    factor: float
    original_context: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self):
        check_numbers(self)
        low, high = self.low_freq_factor, self.high_freq_factor
        if high <= low:
            raise ValueError(f"high_freq_factor={high} must be above low_freq_factor={low}")

    def slow_down(self, turn: Tensor, theta: float) -> Tensor:
        """turn (dim/2,) radians a position, of the plain embedding -> the same, slower"""
        wavelength = 2 * math.pi / turn  # (dim/2,) positions a turn
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = (self.original_context / wavelength - low) / (high - low)
        ramp = (1 - kept) * turn / self.factor + kept * turn
        slow = torch.where(wavelength > self.original_context / low, turn / self.factor, ramp)
        return torch.where(wavelength < self.original_context / high, turn, slow)


def check_numbers(scaling: Linear | YaRN | Llama3) -> None:
    """Raise ValueError for a number of a scaling that is out of its range, by its name."""
    for name, value in vars(scaling).items():
        least = {"factor": 1.0, "original_context": 1, "mscale": 0.0, "mscale_all_dim": 0.0}.get(name, 1e-6)
        if not least <= value < math.inf:
            raise ValueError(f"{name}={value} must be finite and at least {least}")


class RotaryEmbedding(nn.Module):
    """Turn pair i of the features by position x theta^(-2i/dim) (RoFormer eq. 15).

    x (batch, time, [heads,] dim), positions (time,) or (batch, time) -> rotated x

    Args:
        theta: the base; the slowest pair needs nearly 2 pi theta positions for one turn.
        interleaved: pair i is features (2i, 2i + 1), as in DeepSeek's checkpoints; False: features
            (i, i + dim/2), as in Llama's. The two differ by a permutation of the features: a model trained
            with one and run with the other is silently wrong, more so with every position.
        scaling: for texts longer than in training; None is the plain embedding.

    Attributes:
        cos_sin_factor: what cos and sin are multiplied by; 1 without YaRN, and with DeepSeek's.
        softmax_factor: what the softmax scale of an attention over all features is multiplied by.

    Raises:
        ValueError: dim is odd or below 2, theta is below 1 (YaRN: is 1), scaling is none of these, x or
            positions have another shape.
    """

    def __init__(
        self,
        dim: int,
        theta: float = 10000.0,
        interleaved: bool = True,
        scaling: Linear | YaRN | Llama3 | None = None,
    ):
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"dim={dim} must be even and at least 2, since features turn in pairs")
        if not 1 <= theta < float("inf"):
            raise ValueError(f"theta={theta} must be finite and at least 1")
        if not isinstance(scaling, Linear | YaRN | Llama3 | None):
            raise ValueError(f"scaling={scaling!r} must be a Linear, YaRN, Llama3 or None")
        if isinstance(scaling, YaRN) and theta == 1:
            raise ValueError(f"theta={theta} must be above 1 for YaRN, which tells fast pairs from slow ones")
        self.dim = dim
        self.theta = theta
        self.interleaved = interleaved
        self.scaling = scaling
        self.cos_sin_factor, self.softmax_factor = 1.0, 1.0
        if isinstance(scaling, YaRN):
            of_all = scaling.sharpening(scaling.mscale_all_dim)
            self.cos_sin_factor = scaling.sharpening(scaling.mscale) / of_all
            self.softmax_factor = of_all**2  # once for the query, once for the key

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        if x.ndim not in (3, 4) or x.shape[-1] != self.dim or not x.is_floating_point():
            wanted = f"floating-point (batch, time, [heads,] dim={self.dim})"
            raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; expected {wanted}")
        if positions.shape not in (x.shape[1:2], x.shape[:2]):
            found, of = tuple(positions.shape), tuple(x.shape)
            raise ValueError(f"positions have shape {found}; expected (time,) or (batch, time) of x {of}")
        cos, sin = self.cos_sin(positions)  # (time, dim/2) or (batch, time, dim/2)
        if x.ndim == 4:
            cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (..., time, 1, dim/2): every head turns alike
        return self.turn(x, cos, sin)

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions (...) -> cos and sin of every pair's angle there, (..., dim/2) fp32 each"""
        # Angles in fp32: bf16 cannot tell position 257 from 256. Not a buffer, so no cast can reach them.
        # torch.compile looks through the cache, and would warn that it does
        find = frequencies.__wrapped__ if torch.compiler.is_compiling() else frequencies
        turn = find(self.dim, self.theta, self.scaling, positions.device)  # (dim/2,)
        angles = positions.unsqueeze(-1).float() * turn
        cos, sin = angles.cos(), angles.sin()
        if self.cos_sin_factor != 1.0:
            cos, sin = cos * self.cos_sin_factor, sin * self.cos_sin_factor
        return cos, sin

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (..., dim), cos and sin (..., dim/2) -> rotated x"""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        two, pairs = (-1, (-1, 2)) if self.interleaved else (-2, (2, -1))  # where pairs lie
        even, odd = wide.unflatten(-1, pairs).unbind(two)  # (..., dim/2) each
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=two)
        return turned.flatten(-2).to(x.dtype)


@lru_cache(maxsize=64)
def frequencies(
    dim: int, theta: float, scaling: Linear | YaRN | Llama3 | None, device: torch.device
) -> Tensor:
    """Radians a position for each pair of features -> (dim/2,) fp32, fast to slow"""
    with torch.inference_mode(False), torch.no_grad():
        turn = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
        return turn if scaling is None else scaling.slow_down(turn, theta)
