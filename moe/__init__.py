"""Mixture-of-Experts layers of DeepSeek-V2 and V3: routers, experts, balance and metrics, and other routers.

Depends on torch and einops only: the folder can be copied into another project.
"""

from . import balance, metrics
from .capacity import Capacity, DeviceDropping, devices_visited
from .experts import Experts, Gated, SwiGLU
from .layer import MoE
from .router import Router, Routing, SigmoidRouter, SoftmaxRouter
from .upcycle import upcycle
from .zoo import (
    ExpertChoiceRouter,
    GShardRouter,
    HashRouter,
    MixtralRouter,
    NoisyTopKRouter,
    RandomRouter,
    SoftMoE,
    SwitchRouter,
)

__all__ = [
    "Capacity",
    "DeviceDropping",
    "ExpertChoiceRouter",
    "Experts",
    "GShardRouter",
    "Gated",
    "HashRouter",
    "MixtralRouter",
    "MoE",
    "NoisyTopKRouter",
    "RandomRouter",
    "Router",
    "Routing",
    "SigmoidRouter",
    "SoftMoE",
    "SoftmaxRouter",
    "SwiGLU",
    "SwitchRouter",
    "balance",
    "devices_visited",
    "metrics",
    "upcycle",
]
