"""A trained dense MLP made into experts, which in their first step compute what it computed."""

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
    """Sparse upcycling (arXiv 2212.05055), with num_shards > 1 its fine-grained kind (arXiv 2410.07524).

    mlp, x (..., dim) -> y (..., dim); the MoE gives the same y for every x, and a Routing

    The hidden features are cut into shards, whose outputs sum to the MLP's; expert c x shards + s is copy c
    of shard s. All shards of a copy have the same row in the router, so a token uses all of them or none,
    each at the same weight. Over the chosen copies of one shard, normalised weights sum to 1/shards: to 1
    after routed_scaling_factor, unless all chosen scores are near the router's 1e-20 (logits below -40).

    Copies are alike, and become different because each learns from the tokens that chose it. The router has
    a gradient from the start if several shards are routed, since their outputs differ. With whole copies
    (num_shards=1) it has none until they have moved apart, or with noise.

    Args:
        num_experts: copies times routed shards.
        top_k: the copies that a token uses, times routed shards.
        num_shards: into how many experts the MLP is cut.
        num_shared_shards: the first so many of them become the shared expert (DeepSeekMoE, arXiv
            2401.06066), outside the router and its scale; only the others are copied.
        router: the class, made with normalize=True: weights that do not sum to 1 would not give y back.
        grouped: the copies are the router's groups, and a token may use top_k / shards of them. The same y
            then even where the scores of copies tie to the last bit; but shards of different copies do not
            mix until you set router.num_groups = router.top_groups = 1. False: they may from the start.
        routed_scaling_factor: of the router; None: the routed shards, with the MLP's own weights in the
            experts. Another number scales the experts' down projection instead.
        router_std: of the router's rows.
        noise: parts copies at once: normal noise on each expert's weights, of so many times the root mean
            square of the MLP's. y is then no longer quite the MLP's.
        generator: for the router's rows and the noise.

    Raises:
        ValueError: mlp is no SwiGLU, or the numbers do not fit it or each other.
    """
    if not isinstance(mlp, SwiGLU):
        raise ValueError(f"mlp={type(mlp).__name__} must be a moe.SwiGLU")
    if router not in (SigmoidRouter, SoftmaxRouter):
        raise ValueError(f"router={router!r} must be SigmoidRouter or SoftmaxRouter, which can normalise")
    dim, hidden_dim = mlp.gate_up.in_features, mlp.down.in_features
    check_numbers(hidden_dim, num_experts, top_k, num_shards, num_shared_shards)
    if not 0 < router_std < math.inf or not 0 <= noise < math.inf:
        raise ValueError(f"{router_std=} must be above 0, {noise=} at least 0, and both finite")
    routed, width = num_shards - num_shared_shards, hidden_dim // num_shards
    copies, scale = num_experts // routed, routed_scaling_factor
    scale = float(routed) if scale is None else scale
    # a copy of a single shard is one expert: no group limit is needed, and V3's wants two a group
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

    down(silu(gate(x)) * up(x)) is a sum over hidden features: any cut between them is one of the sum.
    """
    gate_up = mlp.gate_up.weight.unflatten(0, (2, num_shards, -1))  # (2, shards, width, dim)
    down = mlp.down.weight.unflatten(1, (num_shards, -1))  # (dim, shards, width)
    return gate_up.transpose(0, 1).flatten(1, 2), down.transpose(0, 1)


def shared_of(mlp: SwiGLU, width: int) -> nn.Module | None:
    """The MLP's first hidden features, as one that is always on; None for none."""
    if not width:
        return None
    shared = SwiGLU(mlp.gate_up.in_features, width).to(mlp.gate_up.weight)
    shared.gate_up.weight.copy_(mlp.gate_up.weight.unflatten(0, (2, -1))[:, :width].flatten(0, 1))
    shared.down.weight.copy_(mlp.down.weight[:, :width])
    return shared


def normal(shape: torch.Size | tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers, the same on every device, then in the dtype and place of `like`."""
    return torch.randn(shape, generator=generator).to(like)


def check_numbers(
    hidden_dim: int, num_experts: int, top_k: int, num_shards: int, num_shared_shards: int
) -> None:
    """Raise ValueError unless each token can be given every shard of the MLP once, or as often as others."""
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
            "top_k=1 would leave the router without a gradient: its weight is always 1; 2 is least"
        )
