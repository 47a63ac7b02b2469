"""Room for a fixed number of tokens: what an expert or a device has no room for is dropped."""

import math
from typing import Any

import torch
from torch import Tensor

from .balance import check_devices, real_tokens, sent_to, undropped
from .router import Router, Routing, described


class Dropping(Router):
    """A router whose slots become empty where there is no room; which, the subclasses say.

    x (..., dim) -> Routing, the router's, but experts -1 and weight 0 where dropped; the rest stays as it is

    Nothing is dropped in evaluation: a text is written token by token, and then there is room for all.
    The losses of `balance` use what was asked for before dropping, the Routing's `asked`.
    """

    def __init__(self, router: Any):
        about = described(router)
        if not isinstance(about.num_experts, int):
            raise ValueError(f"{type(router).__name__} has no num_experts; a router with room has")
        super().__init__(about.dim, about.num_experts)
        self.num_experts: int
        self.router = router
        self.needs_tokens = about.needs_tokens
        self.router_needs_mask = about.needs_mask

    needs_mask = True

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The router's selection bias, for `balance.update_bias_`."""
        return described(self.router).bias

    @property
    def mixes_tokens(self) -> bool:  # type: ignore[override]
        """Whether a token's experts depend on the others of the call, in evaluation too."""
        return described(self.router).mixes_tokens

    @property
    def drops(self) -> bool:
        """Whether anything is dropped now."""
        return self.training

    def forward(self, x: Tensor, tokens: Tensor | None = None, mask: Tensor | None = None) -> Routing:
        """mask (...) bool: True for a real token; the others take no room, and go nowhere.

        Raises:
            ValueError: the mask does not fit, or the router chooses among all tokens and knows no mask.
        """
        if mask is not None and described(self.router).mixes_tokens and not self.router_needs_mask:
            kind = type(self.router).__name__
            raise ValueError(
                f"mask: {kind} chooses among all tokens of a call, padding too; leave it out of x"
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
        """-> (..., top_k) bool, the slots there is room for"""
        raise NotImplementedError


class Capacity(Dropping):
    """A router, and no more tokens an expert than it has room for (GShard, arXiv 2006.16668 section 2.2).

    The room is top_k x tokens / num_experts x capacity_factor, rounded up, for all tokens of the call.

    Args:
        priority: "choice": first every token's best expert, then every token's second best, ...; among them
            the earlier token. "score": the slot of highest score first, wherever the token stands and
            whichever of its choices it is (as V2 section 2.2.4 drops by device; V-MoE, arXiv 2106.05974,
            sorts tokens so, and places all first choices before any second).
        drop_in_eval: in evaluation, too. A token's output then depends on its batch, and is another when
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
    def mixes_tokens(self) -> bool:
        return self.drop_in_eval or super().mixes_tokens

    @property
    def drops(self) -> bool:
        return self.training or self.drop_in_eval

    def kept(self, routing: Routing, mask: Tensor | None) -> Tensor:
        affinity = affinities(routing)  # (..., top_k)
        top_k = affinity.shape[-1]
        tokens = affinity.numel() // top_k if mask is None else int(mask.sum())
        capacity = room(top_k * tokens, self.num_experts, self.capacity_factor)  # Switch Transformer eq. 3
        if self.priority == "choice":  # a Routing promises no order: the best expert is that of most affinity
            affinity = -affinity.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        return first_of(routing.experts, affinity, self.num_experts, capacity)


class DeviceDropping(Dropping):
    """A router, and no more slots a device than its share, the least affine dropped (V2 section 2.2.4).

    Experts lie in order on num_devices equal devices. A device's share is the average, top_k x tokens /
    num_devices, times capacity_factor, rounded up. Only in training.

    Args:
        exempt: probability of a sequence of which nothing is dropped; V2 spares about a tenth, so that the
            model knows the undropped case. Its slots take up room before the others'. Without a batch axis
            all tokens are one sequence.
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
        tokens = affinity.numel() // top_k if mask is None else int(mask.sum())
        capacity = room(top_k * tokens, self.num_devices, self.capacity_factor)
        sequences = affinity.shape[:-2].numel()
        spared = torch.rand(sequences, device=affinity.device) < self.exempt
        spared = spared.view(*affinity.shape[:-2], *(1 for _ in affinity.shape[-2:])).expand_as(affinity)
        devices = routing.experts.div(self.num_experts // self.num_devices, rounding_mode="floor")
        affinity = affinity.masked_fill(spared, float("inf"))
        return first_of(devices, affinity, self.num_devices, capacity) | spared


def devices_visited(routing: Routing, num_devices: int) -> Tensor:
    """To how many devices each token is sent, experts in order on num_devices equal ones.

    routing (..., ...) -> (...) int64; 0 for a token whose slots are all empty
    """
    return sent_to(routing.experts, check_devices(routing, num_devices), num_devices).sum(-1)


def room(slots: int, places: int, factor: float) -> int:
    """An equal share of the slots, times factor, rounded up: at least 1, and no more than there are."""
    if factor >= places:
        return slots
    return min(slots, max(1, math.ceil(slots * factor / places - 1e-9)))  # 10 * 1.1 is a hair above 11


def affinities(routing: Routing) -> Tensor:
    """Each slot's score, without gradient -> (..., top_k); minus infinity for an empty slot"""
    scores = routing.scores.detach().gather(-1, routing.experts.clamp(min=0))
    return scores.masked_fill(routing.experts < 0, float("-inf"))


def first_of(groups: Tensor, priority: Tensor, num_groups: int, capacity: int) -> Tensor:
    """Which slots are among the `capacity` of their group with the highest priority; of equals, the earlier.

    groups (...) int64, -1 for an empty slot, priority (...) -> (...) bool
    """
    group = groups.flatten() + 1
    order = priority.flatten().argsort(descending=True, stable=True)
    order = order.gather(0, group.gather(0, order).argsort(stable=True))  # by group, then by priority
    counts = group.new_zeros(num_groups + 1).scatter_add_(0, group, torch.ones_like(group))
    begins = (counts.cumsum(0) - counts).gather(0, group.gather(0, order))
    place = torch.arange(len(group), device=group.device) - begins  # within the group
    return place.gather(0, order.argsort()).view_as(groups) < capacity  # back in the order of the slots


def keep_slots(routing: Routing, kept: Tensor) -> Routing:
    """kept (..., top_k) or (..., 1) bool -> the Routing with the other slots empty"""
    experts, weights = routing.experts.where(kept, -1), routing.weights.where(kept, 0)
    return routing._replace(experts=experts, weights=weights)


def check_factor(capacity_factor: float) -> None:
    """Raise ValueError unless there is room for something."""
    if not isinstance(capacity_factor, int | float) or not 0 < capacity_factor < float("inf"):
        raise ValueError(f"capacity_factor={capacity_factor!r} must be positive and finite")
