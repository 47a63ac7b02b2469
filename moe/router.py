"""Routers: which experts does a token go to, and how much does each of them count?"""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .fast import router_logits, sigmoid


class Routing(NamedTuple):
    """What a router decided, and what it decided it from. Leading axes are those of the input."""

    experts: Tensor  # (..., top_k) int64, in no promised order; -1 is an empty slot, never dispatched
    weights: Tensor  # (..., top_k), how much each chosen expert's output counts
    scores: Tensor  # (..., experts), the affinities, without selection bias
    logits: Tensor  # (..., experts), what the affinities were computed from
    asked: Tensor | None = None  # (..., top_k) int64, `experts` before any were dropped; None: none were

    def map(self, change: Callable[[Tensor], Tensor]) -> "Routing":
        """The same change to every field that is there, as a slice of the leading axes."""
        return Routing(*(None if part is None else change(part) for part in self))  # type: ignore[arg-type]


class Router(nn.Module):
    """What the rest of the package may ask of a router, with the answers of one that says nothing.

    x (..., dim) -> Routing

    Any module with that call is a router; a subclass of this one can say more about itself.

    Attributes:
        dim: width of x; None: any.
        num_experts: how many experts there are to choose from; None: not stated.
        bias: (num_experts,) selection bias, a buffer in fp32 for `balance.update_bias_`; None: it has none.
        mixes_tokens: a token's experts depend on the other tokens of the call, in evaluation too.
        needs_tokens: the call takes the token ids as `tokens`, (...) int64.
        needs_mask: the call takes a `mask`, (...) bool, True for a real token.
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


def described(router: nn.Module) -> Router:
    """A router itself; for a module that is no `Router`, a record of what it has and what its call takes."""
    if isinstance(router, Router):
        return router
    found = Router(getattr(router, "dim", None), getattr(router, "num_experts", None))
    bias, takes = getattr(router, "bias", None), inspect.signature(router.forward).parameters
    found.bias = bias.detach() if isinstance(bias, Tensor) and not isinstance(bias, nn.Parameter) else None
    found.mixes_tokens = getattr(router, "mixes_tokens", False)
    found.needs_tokens, found.needs_mask = "tokens" in takes, "mask" in takes
    return found


class SoftmaxRouter(Router):
    """Token-choice router of DeepSeek-V2: softmax over all experts, then top-k, not renormalised by default.

    x (..., dim) -> Routing

    Args:
        num_groups, top_groups: experts are split into num_groups equal groups in order, and a token may use
            only the top_groups of them with the best expert (V2 section 2.2.2, there a group is a device).
        normalize: divide the chosen weights by their sum.
        routed_scaling_factor: multiplies the weights in the end: 16 in V2, 1 in V2-Lite.

    Raises:
        ValueError: the numbers do not fit each other, or x is not a floating-point (..., dim).
    """

    group_best = 1  # a group is as good as its best expert

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

    `bias` is a buffer in fp32, trained by `balance.update_bias_` and never by a gradient (V3 section 2.1.2).

    Args:
        num_groups, top_groups: experts are split into num_groups equal groups in order, and a token may use
            only the top_groups of them whose two best biased scores have the largest sum.
        normalize: divide the chosen weights by their sum. With top_k=1 that makes every weight exactly 1 and
            leaves the router without a gradient: pass False there.
        routed_scaling_factor: multiplies the weights in the end: 2.5 in V3.

    Raises:
        ValueError: the numbers do not fit each other, or x is not a floating-point (..., dim).
    """

    group_best = 2  # a group is as good as its two best experts together
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
        experts = choice.topk(self.top_k).indices  # V3 eq. 16; the bias decides who is chosen ...
        weights = scores.gather(-1, experts)  # V3 eq. 14; ... but never how much they count
        if self.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # V3 eq. 13; all scores may be 0
        return Routing(experts, weights * self.routed_scaling_factor, scores, logits)

    def _apply(self, fn, recurse=True):
        """Module.to(bfloat16) and the like: the bias moves along, but stays in fp32 or better.

        In bf16 hundreds of distinct biases become a handful, and steps of 0.001 are lost.
        """
        bias = self.bias
        super()._apply(fn, recurse)
        if self.bias is not None and bias is not None and self.bias.dtype.itemsize < 4:
            self.bias = bias.to(self.bias.device)
        return self


def keep_best_groups(choice: Tensor, num_groups: int, top_groups: int, group_best: int) -> Tensor:
    """Close all but the best groups of experts to a token, by a choice score of minus infinity.

    choice (..., experts) -> (..., experts). Zero would not do: a bias can push open experts below it.
    """
    if top_groups == num_groups:
        return choice
    grouped = choice.unflatten(-1, (num_groups, -1))  # (..., groups, experts)
    group_scores = grouped.topk(group_best).values.sum(-1)  # (..., groups); of the best 1 (V2) or 2 (V3)
    best = group_scores.topk(top_groups).indices  # (..., top_groups)
    closed = torch.ones_like(group_scores, dtype=torch.bool).scatter(-1, best, False)
    return grouped.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(-2)


def check_sizes(
    dim: int, num_experts: int, top_k: int, num_groups: int, top_groups: int, group_best: int, scale: float
) -> None:
    """Raise ValueError unless every token can be given top_k experts, with weights that are numbers."""
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
            f"num_groups={num_groups} leaves {group_size} expert a group, but a group is judged by its "
            f"{group_best} best: this router needs {group_best} a group"
        )
    if not 1 <= top_k <= group_size * top_groups:
        raise ValueError(
            f"top_k={top_k} must lie in 1..{group_size * top_groups}, the experts that "
            f"top_groups={top_groups} of num_groups={num_groups} leave open"
        )
    if not 0 < scale < float("inf"):
        raise ValueError(f"routed_scaling_factor={scale} must be positive and finite")


def check_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError for an id outside the vocabulary.

    Only on a CPU: elsewhere the look would make the device wait, and torch.compile would break its graph.
    """
    if ids.is_cpu and ids.numel() and not torch.compiler.is_compiling():
        low, high = (int(end) for end in ids.aminmax())
        if low < 0 or high >= vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"{name} {wrong} is not in the vocabulary, 0..{vocab_size - 1}")
