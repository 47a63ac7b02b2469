"""Routers: which experts a token goes to, and the weight of each."""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .fast import router_logits, sigmoid
from .modes import cheap_to_read


class Routing(NamedTuple):
    """A router's decision and the scores behind it. Leading axes are those of the input."""

    experts: Tensor  # (..., top_k) int64, in no guaranteed order; -1 is an empty slot, never dispatched
    weights: Tensor  # (..., top_k), the factor on each chosen expert's output
    scores: Tensor  # (..., experts), the affinities, without selection bias
    logits: Tensor  # (..., experts), from which the affinities are computed
    asked: Tensor | None = None  # (..., top_k) int64, `experts` before dropping; None: the router never drops

    def map(self, change: Callable[[Tensor], Tensor]) -> "Routing":
        """Apply `change` to every field that is not None, e.g. to slice the leading axes."""
        return Routing(*(None if part is None else change(part) for part in self))  # type: ignore[arg-type]


class Router(nn.Module):
    """Base class of the routers: the attributes that the rest of the package reads, with their defaults.

    x (..., dim) -> Routing

    Any module with this call works as a router; a subclass can also set these attributes.

    Attributes:
        dim: width of x; None: any.
        num_experts: number of experts to choose from; None: unknown.
        bias: (num_experts,) selection bias, an fp32 buffer for `balance.update_bias_`; None: no bias.
        mixes_tokens: a token's experts depend on the other tokens of the call, even in evaluation.
        needs_tokens: `forward` takes the token ids as `tokens`, (...) int64.
        needs_mask: `forward` takes a `mask`, (...) bool, True for a real token.
    """

    dim: int | None = None
    num_experts: int | None = None
    bias: Tensor | None
    mixes_tokens: bool = False
    needs_tokens: bool = False
    needs_mask: bool = False

    def __init__(self, dim: int | None = None, num_experts: int | None = None):
        super().__init__()
        self.dim = dim
        self.num_experts = num_experts
        self.register_buffer("bias", None)

    def extra_repr(self) -> str:
        return settings(self)


def settings(module: nn.Module) -> str:
    """The constructor's arguments that a module keeps as attributes, for its `extra_repr`: dim=16, top_k=2"""
    found = {name: getattr(module, name, None) for name in inspect.signature(type(module)).parameters}
    shown = {name: value for name, value in found.items() if not isinstance(value, nn.Module | Tensor | None)}
    return ", ".join(f"{name}={value!r}" for name, value in shown.items())


def described(router: nn.Module) -> Router:
    """The router itself; for any other module, a `Router` made from its attributes and arguments."""
    if isinstance(router, Router):
        return router
    found = Router(getattr(router, "dim", None), getattr(router, "num_experts", None))
    # a Parameter named bias is trained by gradients, as nn.Linear's is: no selection bias
    bias, takes = getattr(router, "bias", None), inspect.signature(router.forward).parameters
    found.bias = bias.detach() if isinstance(bias, Tensor) and not isinstance(bias, nn.Parameter) else None
    found.mixes_tokens = getattr(router, "mixes_tokens", False)
    found.needs_tokens, found.needs_mask = "tokens" in takes, "mask" in takes
    return found


class SoftmaxRouter(Router):
    """Token-choice router of DeepSeek-V2: softmax over all experts, then top-k, not renormalized by default.

    x (..., dim) -> Routing

    Args:
        num_groups, top_groups: experts are split in order into num_groups equal groups, and a token may only
            use the top_groups groups with the best experts (V2 section 2.2.2, where a group is a device).
        normalize: divide the chosen weights by their sum.
        routed_scaling_factor: multiplies the final weights: 16 in V2, 1 in V2-Lite.

    Raises:
        ValueError: the sizes are inconsistent, or x is not a floating-point (..., dim).
    """

    group_best = 1  # a group's score is that of its best expert

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        num_groups: int = 1,
        top_groups: int = 1,
        normalize: bool = False,
        routed_scaling_factor: float = 1.0,
    ):
        check_sizes(dim, num_experts, top_k, num_groups, top_groups, self.group_best, routed_scaling_factor)
        super().__init__(dim, num_experts)
        self.top_k = top_k
        self.num_groups = num_groups
        self.top_groups = top_groups
        self.normalize = normalize
        self.routed_scaling_factor = routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        nn.init.normal_(self.weight, std=dim**-0.5)

    def forward(self, x: Tensor) -> Routing:
        logits = router_logits(x, self.weight)  # (..., experts)
        scores = logits.softmax(-1)  # V2 eq. 22; over all experts, so the chosen ones need not sum to 1
        choice = keep_best_groups(scores, self.num_groups, self.top_groups, self.group_best)
        experts = choice.topk(self.top_k).indices  # (..., top_k)
        weights = scores.gather(-1, experts)  # V2 eq. 21
        if self.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(experts, weights * self.routed_scaling_factor, scores, logits)


class SigmoidRouter(Router):
    """Token-choice router of DeepSeek-V3: sigmoid affinities, selection bias, group-limited top-k.

    x (..., dim) -> Routing

    `bias` is an fp32 buffer, updated by `balance.update_bias_` and never by a gradient (V3 section 2.1.2).

    Args:
        num_groups, top_groups: experts are split in order into num_groups equal groups, and a token may only
            use the top_groups groups whose two best biased scores have the largest sum.
        normalize: divide the chosen weights by their sum. With top_k=1 every weight is then exactly 1 and the
            router gets no gradient: pass False there.
        routed_scaling_factor: multiplies the final weights: 2.5 in V3.

    Raises:
        ValueError: the sizes are inconsistent, or x is not a floating-point (..., dim).
    """

    group_best = 2  # a group's score is the sum of its two best experts' scores
    bias: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        num_groups: int = 1,
        top_groups: int = 1,
        normalize: bool = True,
        routed_scaling_factor: float = 1.0,
    ):
        check_sizes(dim, num_experts, top_k, num_groups, top_groups, self.group_best, routed_scaling_factor)
        super().__init__(dim, num_experts)
        self.top_k = top_k
        self.num_groups = num_groups
        self.top_groups = top_groups
        self.normalize = normalize
        self.routed_scaling_factor = routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.register_buffer("bias", torch.zeros(num_experts, dtype=torch.float32))
        nn.init.normal_(self.weight, std=dim**-0.5)

    def forward(self, x: Tensor) -> Routing:
        logits = router_logits(x, self.weight)  # (..., experts); u_t . e_i, in fp32
        scores = sigmoid(logits)  # V3 eq. 15
        choice = keep_best_groups(scores + self.bias, self.num_groups, self.top_groups, self.group_best)
        experts = choice.topk(self.top_k).indices  # V3 eq. 16; the bias affects the choice ...
        weights = scores.gather(-1, experts)  # V3 eq. 14; ... but never the weights
        if self.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # V3 eq. 13; all scores may be 0
        return Routing(experts, weights * self.routed_scaling_factor, scores, logits)

    def _apply(self, fn, recurse=True):
        """Module.to(bfloat16) and the like move the bias to the device, but keep it in fp32 or wider.

        In bf16, hundreds of distinct biases would collapse to a few, and steps of 0.001 would be lost.
        """
        bias = self.bias
        super()._apply(fn, recurse)
        if self.bias is not None and bias is not None and self.bias.dtype.itemsize < 4:
            self.bias = bias.to(self.bias.device)
        return self


def keep_best_groups(choice: Tensor, num_groups: int, top_groups: int, group_best: int) -> Tensor:
    """Set the choice scores outside each token's best groups to minus infinity.

    choice (..., experts) -> (..., experts). Zero would be wrong: a bias can push the kept scores below it.
    """
    if top_groups == num_groups:
        return choice
    grouped = choice.unflatten(-1, (num_groups, -1))  # (..., groups, experts)
    group_scores = grouped.topk(group_best).values.sum(-1)  # (..., groups); the best 1 (V2) or 2 (V3)
    best = group_scores.topk(top_groups).indices  # (..., top_groups)
    closed = torch.ones_like(group_scores, dtype=torch.bool).scatter(-1, best, False)
    return grouped.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(-2)


def check_sizes(
    dim: int, num_experts: int, top_k: int, num_groups: int, top_groups: int, group_best: int, scale: float
) -> None:
    """Raise ValueError unless every token can get top_k experts with finite weights."""
    if dim < 1:
        raise ValueError(f"dim={dim} must be at least 1")
    if num_experts < 1:
        raise ValueError(f"num_experts={num_experts} must be at least 1")
    if num_groups < 1 or num_experts % num_groups:
        fits = ", ".join(str(n) for n in range(1, num_experts + 1) if num_experts % n == 0)
        raise ValueError(f"num_groups={num_groups} does not divide num_experts={num_experts}; {fits} do")
    if not 1 <= top_groups <= num_groups:
        raise ValueError(f"top_groups={top_groups} must lie in 1..{num_groups}, the number of groups")
    group_size = num_experts // num_groups
    if num_groups > 1 and group_size < group_best:
        raise ValueError(
            f"num_groups={num_groups} leaves {group_size} expert a group, but a group is scored by its "
            f"{group_best} best experts: this router needs {group_best} a group"
        )
    if not 1 <= top_k <= group_size * top_groups:
        raise ValueError(
            f"top_k={top_k} must lie in 1..{group_size * top_groups}, the number of experts reachable with "
            f"top_groups={top_groups} of num_groups={num_groups}"
        )
    if not 0 < scale < float("inf"):
        raise ValueError(f"routed_scaling_factor={scale} must be positive and finite")


def check_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError for an id outside the vocabulary."""
    if cheap_to_read(ids) and ids.numel():
        low, high = (int(end) for end in ids.aminmax())
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"{name} {wrong} is not in the vocabulary, 0..{vocab_size - 1}")
