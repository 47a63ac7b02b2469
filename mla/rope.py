"""Rotary position embedding (RoFormer, arXiv 2104.09864): pairs of features rotate with the position.

Sequences longer than in training need lower frequencies: `Linear`, `YaRN` and `Llama3` scale them.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from .norm import settings


@dataclass(frozen=True)
class Linear:
    """Position interpolation (arXiv 2306.15595): every frequency is divided by `factor`."""

    factor: float

    def __post_init__(self):
        check_numbers(self)

    def slow_down(self, turn: Tensor, theta: float) -> Tensor:
        """turn (dim/2,), unscaled frequencies in radians per position -> scaled frequencies"""
        return turn / self.factor


@dataclass(frozen=True)
class YaRN:
    """YaRN (arXiv 2309.00071): low frequencies are divided by `factor`, high ones kept, a ramp between.

    Args:
        original_context: context length before scaling.
        beta_fast, beta_slow: pairs with at least beta_fast rotations within original_context are kept; those
            with at most beta_slow are divided by `factor`.
        mscale, mscale_all_dim: how much attention is sharpened as the context grows. mscale alone scales cos
            and sin, so only the rotated features. DeepSeek sets both to the same value, which leaves cos and
            sin unchanged and scales the softmax over all features instead.
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
        """turn (dim/2,), unscaled frequencies in radians per position, of base theta -> scaled frequencies"""
        dim = 2 * len(turn)
        low = max(math.floor(self.pair_with(self.beta_fast, dim, theta)), 0)
        high = min(math.ceil(self.pair_with(self.beta_slow, dim, theta)), dim - 1)
        pairs = torch.arange(len(turn), dtype=torch.float32, device=turn.device)
        kept = 1 - ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)  # (dim/2,) 1: fast, 0: slow
        return turn / self.factor * (1 - kept) + turn * kept  # YaRN section 3.2

    def pair_with(self, turns: float, dim: int, theta: float) -> float:
        """The index of the pair that rotates `turns` times within the original context, as a fraction."""
        return dim * math.log(self.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    def sharpening(self, mscale: float) -> float:
        """0.1 mscale ln(factor) + 1 (YaRN section 3.4)"""
        return 0.1 * mscale * math.log(self.factor) + 1.0


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1's scaling: YaRN without sharpening, and with the ramp over rotations instead of pairs.

    Args:
        original_context: context length before scaling.
        low_freq_factor, high_freq_factor: pairs with fewer than low_freq_factor rotations within
            original_context are divided by `factor`; those with more than high_freq_factor are kept.
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
        """turn (dim/2,), unscaled frequencies in radians per position -> scaled frequencies"""
        wavelength = 2 * math.pi / turn  # (dim/2,) positions per rotation
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = (self.original_context / wavelength - low) / (high - low)
        ramp = (1 - kept) * turn / self.factor + kept * turn
        slow = torch.where(wavelength > self.original_context / low, turn / self.factor, ramp)
        return torch.where(wavelength < self.original_context / high, turn, slow)


def check_numbers(scaling: Linear | YaRN | Llama3) -> None:
    """Raise ValueError for a field of a scaling that is out of range."""
    for name, value in vars(scaling).items():
        least = {"factor": 1.0, "original_context": 1, "mscale": 0.0, "mscale_all_dim": 0.0}.get(name, 1e-6)
        if not least <= value < math.inf:
            raise ValueError(f"{name}={value} must be finite and at least {least}")


class RotaryEmbedding(nn.Module):
    """Rotate pair i of the features by the angle position x theta^(-2i/dim) (RoFormer eq. 15).

    x (batch, time, [heads,] dim), positions (time,) or (batch, time) -> rotated x

    Args:
        theta: the base; the pair of lowest frequency rotates once in nearly 2 pi theta positions.
        interleaved: pair i is features (2i, 2i + 1), as in DeepSeek's checkpoints; False: features
            (i, i + dim/2), as in Llama's. The two differ by a permutation of the features: a model trained
            with one and run with the other is silently wrong, more so with every position.
        scaling: for sequences longer than in training; None: unscaled.

    Attributes:
        cos_sin_factor: multiplies cos and sin; 1 without YaRN, and with DeepSeek's YaRN.
        softmax_factor: multiplies the softmax scale of an attention over all features.

    Raises:
        ValueError: dim is odd or below 2, theta is below 1 (with YaRN: 1), scaling has another type, or the
            shapes of x and positions do not match.
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
            raise ValueError(f"dim={dim} must be even and at least 2, since features are rotated in pairs")
        if not 1 <= theta < float("inf"):
            raise ValueError(f"theta={theta} must be finite and at least 1")
        if not isinstance(scaling, Linear | YaRN | Llama3 | None):
            raise ValueError(f"scaling={scaling!r} must be a Linear, YaRN, Llama3 or None")
        if isinstance(scaling, YaRN) and theta == 1:
            raise ValueError(f"theta={theta} must be above 1 for YaRN; at 1 all frequencies are equal")
        self.dim = dim
        self.theta = theta
        self.interleaved = interleaved
        self.scaling = scaling
        self.cos_sin_factor, self.softmax_factor = 1.0, 1.0
        if isinstance(scaling, YaRN):
            of_all = scaling.sharpening(scaling.mscale_all_dim)
            self.cos_sin_factor = scaling.sharpening(scaling.mscale) / of_all
            self.softmax_factor = of_all**2  # once for the query, once for the key

    def extra_repr(self) -> str:
        return settings(self)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        if x.ndim not in (3, 4) or x.shape[-1] != self.dim or not x.is_floating_point():
            wanted = f"floating-point (batch, time, [heads,] dim={self.dim})"
            raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; expected {wanted}")
        if positions.shape not in (x.shape[1:2], x.shape[:2]):
            found, of = tuple(positions.shape), tuple(x.shape)
            raise ValueError(f"positions have shape {found}; expected (time,) or (batch, time) for x {of}")
        cos, sin = self.cos_sin(positions)  # (time, dim/2) or (batch, time, dim/2)
        if x.ndim == 4:
            cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (..., time, 1, dim/2): the same for all heads
        return self.turn(x, cos, sin)

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions (...) -> cos and sin of each pair's angle, (..., dim/2) fp32 each"""
        # Angles in fp32: bf16 cannot tell position 257 from 256. Not a buffer, so that no cast narrows them.
        # torch.compile ignores lru_cache with a warning, and a fake tensor must not stay in it
        plain = type(positions) is Tensor and not torch.compiler.is_compiling()
        find = frequencies if plain else frequencies.__wrapped__
        frequency = find(self.dim, self.theta, self.scaling, positions.device)  # (dim/2,)
        angles = positions.unsqueeze(-1).float() * frequency
        cos, sin = angles.cos(), angles.sin()
        if self.cos_sin_factor != 1.0:
            cos, sin = cos * self.cos_sin_factor, sin * self.cos_sin_factor
        return cos, sin

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (..., dim), cos and sin (..., dim/2) -> rotated x"""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        two, pairs = (-1, (-1, 2)) if self.interleaved else (-2, (2, -1))  # the axis of a pair's two features
        even, odd = wide.unflatten(-1, pairs).unbind(two)  # (..., dim/2) each
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=two)
        return turned.flatten(-2).to(x.dtype)


@lru_cache(maxsize=64)
def frequencies(
    dim: int, theta: float, scaling: Linear | YaRN | Llama3 | None, device: torch.device
) -> Tensor:
    """The frequency of each pair of features, in radians per position -> (dim/2,) fp32, high to low"""
    with torch.inference_mode(False), torch.no_grad():
        turn = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
        return turn if scaling is None else scaling.slow_down(turn, theta)
