"""Capacity of an expert or a device: slots beyond it are dropped."""

import math
from typing import Any

import torch
from torch import Tensor

from .balance import check_devices, real_tokens, sent_to, undropped
from .router import Router, Routing, described


class Dropping(Router):
    """Wraps a router and empties its slots beyond capacity; the subclasses decide which.

    x (..., dim) -> the router's Routing, with expert -1 and weight 0 in each dropped slot

    Nothing is dropped in evaluation: sequences are generated token by token, where capacity has no meaning.
    The losses of `balance` use the Routing's `asked`: the experts before dropping.
    """

    def __init__(self, router: Any):
        about = described(router)
        if not isinstance(about.num_experts, int):
            raise ValueError(f"{type(router).__name__} has no num_experts, from which capacity is computed")
        super().__init__(about.dim, about.num_experts)
        self.num_experts: int
        self.router = router
        self.needs_tokens = about.needs_tokens
        self.router_needs_mask = about.needs_mask

    needs_mask = True

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The wrapped router's selection bias, for `balance.update_bias_`."""
        return described(self.router).bias

    @property
    def mixes_tokens(self) -> bool:  # type: ignore[override]
        """Whether a token's experts depend on the other tokens of the call, even in evaluation."""
        return described(self.router).mixes_tokens

    @property
    def drops(self) -> bool:
        """Whether slots beyond capacity are dropped in the current mode."""
        return self.training

    def forward(self, x: Tensor, tokens: Tensor | None = None, mask: Tensor | None = None) -> Routing:
        """mask (...) bool: True for a real token; padding uses no capacity, and goes to no expert.

        Raises:
            ValueError: the mask has a wrong shape or dtype, or the router mixes tokens but takes no mask.
        """
        if mask is not None and described(self.router).mixes_tokens and not self.router_needs_mask:
            kind = type(self.router).__name__
            raise ValueError(
                f"mask: {kind} chooses among all tokens of a call, padding included; remove it from x"
            )
        given = {"tokens": tokens} if self.needs_tokens else {}
        routing = self.router(x, **given, **({"mask": mask} if self.router_needs_mask else {}))
        asked = undropped(routing).experts
        if mask is not None:
            real = real_tokens(routing, mask).unsqueeze(-1)
            routing, asked = keep_slots(routing, real), asked.where(real, -1)
        if self.drops:
            routing = keep_slots(routing, self.kept(routing, mask))
        return routing._replace(asked=asked)

    def kept(self, routing: Routing, mask: Tensor | None) -> Tensor:
        """-> (..., top_k) bool, the slots within capacity"""
        raise NotImplementedError


class Capacity(Dropping):
    """Limits the tokens per expert of a router (GShard, arXiv 2006.16668 section 2.2).

    An expert's capacity is top_k x tokens / num_experts x capacity_factor, rounded up, for the whole call.

    Args:
        priority: "choice": first every token's best expert, then every token's second best, and so on; within
            each round the earlier token first. "score": the highest score first, whatever the token's
            position and the rank of the choice (as V2 section 2.2.4 drops by device; V-MoE, arXiv 2106.05974,
            sorts tokens by score, but places all first choices before any second).
        drop_in_eval: drop in evaluation too. A token's output then depends on its batch, and differs when
            decoding.
    """

    def __init__(
        self,
        router: Any,
        capacity_factor: float = 1.25,
        priority: str = "choice",
        drop_in_eval: bool = False,
    ):
        super().__init__(router)
        check_factor(capacity_factor)
        if priority not in ("choice", "score"):
            raise ValueError(f'priority={priority!r} must be "choice" or "score"')
        self.capacity_factor = capacity_factor
        self.priority = priority
        self.drop_in_eval = drop_in_eval

    @property
    def mixes_tokens(self) -> bool:  # type: ignore[override]
        return self.drop_in_eval or super().mixes_tokens

    @property
    def drops(self) -> bool:
        return self.training or self.drop_in_eval

    def kept(self, routing: Routing, mask: Tensor | None) -> Tensor:
        affinity = affinities(routing)  # (..., top_k)
        top_k = affinity.shape[-1]
        tokens = affinity.numel() // top_k if mask is None or mask.is_meta else int(mask.sum())
        capacity = room(top_k * tokens, self.num_experts, self.capacity_factor)  # Switch Transformer eq. 3
        if self.priority == "choice":  # a Routing guarantees no order: rank the choices by affinity
            affinity = -affinity.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        return first_of(routing.experts, affinity, self.num_experts, capacity)


class DeviceDropping(Dropping):
    """Limits a router's slots per device and drops those of lowest affinity (V2 section 2.2.4).

    Experts are placed in order on num_devices equal devices. A device's capacity is the average load,
    top_k x tokens / num_devices, times capacity_factor, rounded up. Drops in training only.

    Args:
        exempt: probability that a sequence is exempt from dropping; about 0.1 in V2, so that the model also
            trains without dropping. Exempt slots use up capacity first. Without a batch axis all tokens are
            one sequence.
    """

    def __init__(self, router: Any, num_devices: int, capacity_factor: float = 1.0, exempt: float = 0.1):
        super().__init__(router)
        check_factor(capacity_factor)
        if num_devices < 1 or self.num_experts % num_devices:
            raise ValueError(f"num_devices={num_devices} does not divide num_experts={self.num_experts}")
        if not 0 <= exempt <= 1:
            raise ValueError(f"exempt={exempt} must lie in 0..1, the share of sequences")
        self.num_devices = num_devices
        self.capacity_factor = capacity_factor
        self.exempt = exempt

    def kept(self, routing: Routing, mask: Tensor | None) -> Tensor:
        affinity = affinities(routing)  # (..., top_k)
        top_k = affinity.shape[-1]
        tokens = affinity.numel() // top_k if mask is None or mask.is_meta else int(mask.sum())
        capacity = room(top_k * tokens, self.num_devices, self.capacity_factor)
        sequences = affinity.shape[:-2].numel()
        spared = torch.rand(sequences, device=affinity.device) < self.exempt
        spared = spared.view(*affinity.shape[:-2], *(1 for _ in affinity.shape[-2:])).expand_as(affinity)
        devices = routing.experts.div(self.num_experts // self.num_devices, rounding_mode="floor")
        affinity = affinity.masked_fill(spared, float("inf"))
        return first_of(devices, affinity, self.num_devices, capacity) | spared


def devices_visited(routing: Routing, num_devices: int) -> Tensor:
    """Number of devices each token is sent to, with the experts in order on num_devices equal devices.

    routing (..., ...) -> (...) int64; 0 for a token whose slots are all empty
    """
    return sent_to(routing.experts, check_devices(routing, num_devices), num_devices).sum(-1)


def room(slots: int, places: int, factor: float) -> int:
    """An equal share of the slots times factor, rounded up: at least 1, at most all slots."""
    if factor >= places:
        return slots
    return min(slots, max(1, math.ceil(slots * factor / places - 1e-9)))  # 10 * 1.1 is slightly above 11


def affinities(routing: Routing) -> Tensor:
    """Each slot's score, without gradient -> (..., top_k); minus infinity for an empty slot"""
    scores = routing.scores.detach().gather(-1, routing.experts.clamp(min=0))
    return scores.masked_fill(routing.experts < 0, float("-inf"))


def first_of(groups: Tensor, priority: Tensor, num_groups: int, capacity: int) -> Tensor:
    """Which slots are among the `capacity` highest priorities of their group; ties go to the earlier slot.

    groups (...) int64, -1 for an empty slot, priority (...) -> (...) bool
    """
    group = groups.flatten() + 1
    order = priority.flatten().argsort(descending=True, stable=True)
    order = order.gather(0, group.gather(0, order).argsort(stable=True))  # by group, then by priority
    counts = group.new_zeros(num_groups + 1).scatter_add_(0, group, torch.ones_like(group))
    begins = (counts.cumsum(0) - counts).gather(0, group.gather(0, order))
    place = torch.arange(group.shape[0], device=group.device) - begins  # within the group
    return place.gather(0, order.argsort()).view_as(groups) < capacity  # back in slot order


def keep_slots(routing: Routing, kept: Tensor) -> Routing:
    """kept (..., top_k) or (..., 1) bool -> the Routing with the other slots empty"""
    experts, weights = routing.experts.where(kept, -1), routing.weights.where(kept, 0)
    return routing._replace(experts=experts, weights=weights)


def check_factor(capacity_factor: float) -> None:
    """Raise ValueError unless the factor is positive and finite."""
    if not isinstance(capacity_factor, int | float) or not 0 < capacity_factor < float("inf"):
        raise ValueError(f"capacity_factor={capacity_factor!r} must be positive and finite")
