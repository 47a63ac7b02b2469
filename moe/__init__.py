"""Mixture-of-Experts layers of DeepSeek-V2 and V3: routers, experts, balance, metrics.

Needs torch and einops only; the folder works copied alone into another project.
"""

from . import balance, metrics
from .experts import Experts, Gated, SwiGLU
from .layer import MoE
from .router import Routing, SigmoidRouter, SoftmaxRouter

__all__ = [
    "Experts",
    "Gated",
    "MoE",
    "Routing",
    "SigmoidRouter",
    "SoftmaxRouter",
    "SwiGLU",
    "balance",
    "metrics",
]
