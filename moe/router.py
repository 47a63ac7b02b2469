"""Routers: which experts does a token go to, and how much does each of them count?"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Routing(NamedTuple):
    """What a router decided, and what it decided it from. Leading axes are those of the input.

    Any module that returns one of these is a router.
    """

    experts: Tensor  # (..., top_k) int64, in no promised order; -1 is an empty slot, never dispatched
    weights: Tensor  # (..., top_k), how much each chosen expert's output counts
    scores: Tensor  # (..., experts), the affinities, without selection bias
    logits: Tensor  # (..., experts), what the affinities were made from


class SoftmaxRouter(nn.Module):
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
        super().__init__()
        check_sizes(dim, num_experts, top_k, num_groups, top_groups, self.group_best, routed_scaling_factor)
        self.dim = dim
        self.num_experts = num_experts
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


class SigmoidRouter(nn.Module):
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
        super().__init__()
        check_sizes(dim, num_experts, top_k, num_groups, top_groups, self.group_best, routed_scaling_factor)
        self.dim = dim
        self.num_experts = num_experts
        self.top_k = top_k
        self.num_groups = num_groups
        self.top_groups = top_groups
        self.normalize = normalize
        self.routed_scaling_factor = routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.bias: Tensor
        self.register_buffer("bias", torch.zeros(num_experts, dtype=torch.float32))
        nn.init.normal_(self.weight, std=dim**-0.5)

    def forward(self, x: Tensor) -> Routing:
        logits = router_logits(x, self.weight)  # (..., experts)
        scores = sigmoid(logits)  # V3 eq. 15
        choice = keep_best_groups(scores + self.bias, self.num_groups, self.top_groups, self.group_best)
        experts = choice.topk(self.top_k).indices  # V3 eq. 16; the bias decides who is chosen ...
        weights = scores.gather(-1, experts)  # V3 eq. 14; ... but never how much they count
        if self.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # V3 eq. 13; all scores may be 0
        return Routing(experts, weights * self.routed_scaling_factor, scores, logits)

    def _apply(self, fn, recurse=True):
        """Module.to(bfloat16) and friends: the bias moves along, but stays in fp32 or better.

        In bf16 hundreds of distinct biases become a handful, and steps of 0.001 are lost.
        """
        bias = self.bias
        super()._apply(fn, recurse)
        if self.bias.dtype.itemsize < 4:
            self.bias = bias.to(self.bias.device)
        return self


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """The gate's matrix product, in fp32 whatever x is: in bf16 near ties would flip.

    x (..., dim), weight (experts, dim) -> (..., experts)
    """
    num_experts, dim = weight.shape
    if x.ndim == 0 or x.shape[-1] != dim or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; expected floating-point (..., dim={dim})")
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    rows = x.reshape(-1, dim)
    product = Product.apply if torch.is_grad_enabled() else Product.compute
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            logits = product(rows, weight, dtype)
    else:
        logits = product(rows, weight, dtype)
    return logits.view(*x.shape[:-1], num_experts)


class Product(torch.autograd.Function):
    """rows weight^T in a wider dtype, each row's bits alike whatever the other rows are and however many.

    rows (tokens, dim), weight (experts, dim) -> (tokens, experts). Kept for the backward pass as they are.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return Product.compute(rows, weight, dtype)

    @staticmethod
    def compute(rows: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        count, num_experts = len(rows), len(weight)
        rows, weight = rows.to(dtype), weight.to(dtype)
        if rows.is_cpu and not torch.compiler.is_compiling():
            # A CPU's matmul rounds a row by how many share the product, and by its place among them; a last
            # bit can flip an expert. With rows in multiples of 8 and experts of 32 it depends on neither.
            rows, weight = fill(rows, 8), fill(weight, 32)
        return F.linear(rows, weight)[:count, :num_experts].contiguous()  # V3 eq. 15: u_t . e_i

    @staticmethod
    def backward(ctx, d_logits: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight = ctx.saved_tensors
        d_rows = torch.mm(d_logits, weight.to(d_logits.dtype)).to(rows.dtype)
        return d_rows, torch.mm(d_logits.t(), rows.to(d_logits.dtype)).to(weight.dtype), None


def fill(rows: Tensor, multiple: int) -> Tensor:
    """rows (n, dim) -> n rounded up to a multiple, zeros behind"""
    return F.pad(rows, (0, 0, 0, -len(rows) % multiple)) if len(rows) % multiple else rows


def sigmoid(logits: Tensor) -> Tensor:
    """torch.sigmoid, but every number is rounded alike: on a CPU that one rounds the last few of a tensor
    differently from the rest, so that a token's scores would depend on how many tokens come with it.
    """
    return 1 / (1 + (-logits.clamp(min=-80)).exp())  # exp(89) is infinite in fp32, and its gradient NaN


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
