"""Upcycling: turn a trained dense MLP into an MoE that at first computes the same function."""

import math

import torch
from torch import Tensor, nn

from .experts import Experts, SwiGLU
from .layer import MoE
from .router import SigmoidRouter, SoftmaxRouter


@torch.no_grad()
def upcycle(
    mlp: SwiGLU,
    num_experts: int,
    top_k: int,
    num_shards: int = 1,
    num_shared_shards: int = 0,
    router: type[SigmoidRouter] | type[SoftmaxRouter] = SigmoidRouter,
    grouped: bool = True,
    routed_scaling_factor: float | None = None,
    router_std: float = 0.02,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> MoE:
    """Sparse upcycling (arXiv 2212.05055); with num_shards > 1, fine-grained upcycling (arXiv 2410.07524).

    mlp: x (..., dim) -> y (..., dim); the MoE returns the same y for every x, and a Routing

    The hidden features are split into shards, whose outputs sum to the MLP's; expert c x shards + s is copy c
    of shard s. All shards of a copy have the same row in the router, so a token uses all of them or none,
    each with the same weight. Over the chosen copies of one shard, normalized weights sum to 1/shards: to 1
    after routed_scaling_factor, unless all chosen scores are near the router's 1e-20 (logits below -40).

    Copies start equal and diverge because each learns from the tokens routed to it. The router gets a
    gradient from the start if several shards are routed, since their outputs differ. With whole copies
    (num_shards=1) it gets one only when the copies have diverged, or with noise.

    Args:
        num_experts: copies x routed shards.
        top_k: copies that a token uses x routed shards.
        num_shards: number of shards, which must divide hidden_dim.
        num_shared_shards: number of leading shards that form the shared expert (DeepSeekMoE, arXiv
            2401.06066), outside the router and its scale; only the others are copied.
        router: the router's class, built with normalize=True: y would change if weights did not sum to 1.
        grouped: make each copy a router group, of which a token may use top_k / shards. y is then the same
            even where the scores of copies tie to the last bit, but shards of different copies do not mix
            until you set router.num_groups = router.top_groups = 1. False: they may from the start.
        routed_scaling_factor: of the router; None: the number of routed shards, with the MLP's weights
            unchanged in the experts. Any other value is compensated in the experts' down projections.
        router_std: standard deviation of the router's rows.
        noise: standard deviation of noise on each expert's weights, relative to their root mean square. The
            copies then differ from the start, and y only approximates the MLP's.
        generator: for the router's rows and the noise.

    Raises:
        ValueError: mlp is not a SwiGLU, or the sizes are inconsistent.
    """
    if not isinstance(mlp, SwiGLU):
        raise ValueError(f"mlp={type(mlp).__name__} must be a moe.SwiGLU")
    if router not in (SigmoidRouter, SoftmaxRouter):
        raise ValueError(f"router={router!r} must be SigmoidRouter or SoftmaxRouter, which can normalize")
    dim, hidden_dim = mlp.gate_up.in_features, mlp.down.in_features
    check_numbers(hidden_dim, num_experts, top_k, num_shards, num_shared_shards)
    if not 0 < router_std < math.inf or not 0 <= noise < math.inf:
        raise ValueError(f"{router_std=} must be above 0, {noise=} at least 0, and both finite")
    routed, width = num_shards - num_shared_shards, hidden_dim // num_shards
    copies, scale = num_experts // routed, routed_scaling_factor
    scale = float(routed) if scale is None else scale
    # a copy of a single shard is one expert: no group limit is needed, and V3's needs two per group
    groups = (copies, top_k // routed) if grouped and routed > 1 else (1, 1)

    chooser = router(dim, num_experts, top_k, *groups, normalize=True, routed_scaling_factor=scale)
    gate_up, down = shards_of(mlp, num_shards)  # (shards, 2 width, dim), (shards, dim, width)
    experts = Experts(num_experts, dim, width).to(gate_up)
    experts.gate_up.copy_(gate_up[num_shared_shards:].repeat(copies, 1, 1))
    experts.down.copy_((down[num_shared_shards:] * (routed / scale)).repeat(copies, 1, 1))
    rows = router_std * normal((copies, dim), gate_up, generator)
    chooser.to(gate_up).weight.copy_(rows.repeat_interleave(routed, dim=0))
    if noise:
        for part in (experts.gate_up, experts.down):
            part.add_(noise * part.square().mean().sqrt() * normal(part.shape, part, generator))
    return MoE(chooser, experts, shared_of(mlp, num_shared_shards * width))


def shards_of(mlp: SwiGLU, num_shards: int) -> tuple[Tensor, Tensor]:
    """An MLP as a sum of narrower ones -> gate_up (shards, 2 width, dim), down (shards, dim, width)

    down(silu(gate(x)) * up(x)) is a sum over hidden features: splitting the features splits the sum.
    """
    gate_up = mlp.gate_up.weight.unflatten(0, (2, num_shards, -1))  # (2, shards, width, dim)
    down = mlp.down.weight.unflatten(1, (num_shards, -1))  # (dim, shards, width)
    return gate_up.transpose(0, 1).flatten(1, 2), down.transpose(0, 1)


def shared_of(mlp: SwiGLU, width: int) -> nn.Module | None:
    """A SwiGLU of the MLP's first `width` hidden features; None if width is 0."""
    if not width:
        return None
    shared = SwiGLU(mlp.gate_up.in_features, width).to(mlp.gate_up.weight)
    shared.gate_up.weight.copy_(mlp.gate_up.weight.unflatten(0, (2, -1))[:, :width].flatten(0, 1))
    shared.down.weight.copy_(mlp.down.weight[:, :width])
    return shared


def normal(shape: torch.Size | tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers, drawn on the CPU, then moved to the dtype and device of `like`."""
    return torch.randn(shape, generator=generator).to(like)


def check_numbers(
    hidden_dim: int, num_experts: int, top_k: int, num_shards: int, num_shared_shards: int
) -> None:
    """Raise ValueError unless each token can use every shard of the MLP equally often."""
    if num_shards < 1 or hidden_dim % num_shards:
        fits = ", ".join(str(n) for n in range(1, hidden_dim + 1) if hidden_dim % n == 0)
        raise ValueError(f"num_shards={num_shards} does not divide hidden_dim={hidden_dim}; {fits} do")
    if not 0 <= num_shared_shards < num_shards:
        raise ValueError(f"num_shared_shards={num_shared_shards} must lie in 0..{num_shards - 1}")
    routed = num_shards - num_shared_shards
    if num_experts < 1 or num_experts % routed:
        raise ValueError(f"num_experts={num_experts} must be a multiple of {routed}, the routed shards")
    if not 1 <= top_k <= num_experts or top_k % routed:
        found = f"top_k={top_k} must be a multiple of {routed}, the routed shards"
        raise ValueError(f"{found}, and at most num_experts={num_experts}")
    if top_k == 1:
        raise ValueError(
            "top_k=1 would leave the router without a gradient: its weight is always 1; use at least 2"
        )
