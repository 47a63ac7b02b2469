"""The training losses: next-token cross-entropy in nats, and the balance losses of the routers."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe import Routing, balance
from moe.modes import autocast_dtype, transformed
from moe.router import check_ids

from .config import TrainConfig
from .model import Block, Transformer

CHUNK = 2**27  # bytes of fp32 logits held at once


def token_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target, in fp32 or wider.

    logits (..., vocab), targets (...) int64 -> (...)
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} "
            "must agree in all but the vocabulary"
        )
    check_ids("target", targets, logits.shape[-1])  # torch ignores -100: its loss would be 0
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(wide.reshape(-1, wide.shape[-1]), targets.flatten(), reduction="none")
    return -losses.view_as(targets)


def cross_entropy(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean negative log-probability over the targets where mask (...) is True; 0 if it is True nowhere.

    logits (..., vocab), targets (...) int64 -> (), nats per token
    """
    losses = -token_log_probs(logits, targets)
    if mask is None:
        return losses.mean()
    check_mask(mask, targets)
    return losses.where(mask, 0).sum() / mask.sum().clamp(min=1)


def head_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """`cross_entropy` of the head's logits, hidden weight^T, in chunks if there are many.

    hidden (..., dim) after the final norm, weight (vocab, dim), targets (...) int64 -> (), nats per token
    """
    if mask is not None:  # a masked NaN would make the gradients NaN
        check_mask(mask, targets)
        hidden = hidden.where(mask.unsqueeze(-1), 0)
    tokens_at_once = max(1, CHUNK // (4 * len(weight)))
    few = targets.numel() <= tokens_at_once
    if few or hidden.shape[:-1] != targets.shape or transformed():
        return cross_entropy(F.linear(hidden, weight), targets, mask)
    check_ids("target", targets, len(weight))
    counted = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
    wants = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return Chunked.apply(hidden, weight, targets, counted, tokens_at_once, wants)


def check_mask(mask: Tensor, targets: Tensor) -> None:
    """Raise ValueError unless mask is a bool for each target."""
    if mask.dtype != torch.bool or mask.shape != targets.shape:
        found, wanted = f"{mask.dtype} {tuple(mask.shape)}", f"torch.bool {tuple(targets.shape)}"
        raise ValueError(f"mask is {found}; expected {wanted}, True where a target counts")


class Chunked(torch.autograd.Function):
    """Head and loss, a chunk of tokens at a time. The forward pass computes the gradients too: it keeps those
    of hidden and weight, not the logits (as in Liger, arXiv 2410.10989 section 3.2).
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, counted: Tensor, size: int, wants: bool
    ) -> Tensor:
        dtype = autocast_dtype(hidden) or hidden.dtype
        rows, narrow = hidden.reshape(-1, hidden.shape[-1]).to(dtype), weight.to(dtype)
        share = counted.flatten() / counted.sum().clamp(min=1).to(torch.promote_types(dtype, torch.float32))
        total = share.new_zeros(())
        d_rows = torch.empty_like(rows)
        d_weight = torch.zeros_like(weight if wants else weight[:0], dtype=share.dtype)
        parts = (t.split(size) for t in (rows, targets.flatten(), share, d_rows))
        for row, target, part, d_row in zip(*parts, strict=True):
            with autocast(hidden.device, dtype, enabled=False):
                log_probs = F.linear(row, narrow).to(share.dtype).log_softmax(-1)  # (size, vocab)
                at = target.unsqueeze(-1)
                of_target = log_probs.gather(-1, at).squeeze(-1)
                total -= (of_target * part).where(part > 0, 0).sum()
                if wants:
                    d_logits = log_probs.exp_().scatter_add_(-1, at, -torch.ones_like(at, dtype=share.dtype))
                    d_logits = d_logits.mul_(part.unsqueeze(-1)).to(dtype)  # (probability - target) x share
                    torch.mm(d_logits, narrow, out=d_row)
                    d_weight += torch.mm(d_logits.t(), row)
        ctx.save_for_backward(d_rows.view_as(hidden).to(hidden.dtype), d_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, d_total: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("chunked logits have no second derivative; use cross_entropy")
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * d_total, d_weight * d_total, None, None, None, None


def autocast(device: torch.device, dtype: torch.dtype, enabled: bool) -> AbstractContextManager[Any]:
    """torch.autocast, which does not know every device, such as meta."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, dtype, enabled=enabled) if known else nullcontext()


class Losses(NamedTuple):
    """The losses of a training pass and the load of its routers."""

    named: dict[str, Tensor]  # "cross_entropy" and the balance losses in use, each times its weight
    counts: list[Tensor]  # tokens per expert of each MoE layer in this step so far, (experts,) int64


def training_losses(
    model: Transformer,
    inputs: Tensor,
    targets: Tensor,
    config: TrainConfig,
    counts: Sequence[Tensor] = (),
    dtype: torch.dtype = torch.float32,
    run: Callable[..., Any] = Block.__call__,
    masks: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Losses:
    """One forward pass of training; backpropagate the sum of the losses.

    inputs, targets (batch, time) int64

    Args:
        counts: `Losses.counts` of the step's previous pass, to which this pass is added.
        dtype: of the matrix products.
        run: how to call a block, see `Transformer.trunk`.
        masks: of `data.Windows.masks`: what each token sees, and the targets that count.
    """
    visible, counted = masks
    with autocast(inputs.device, dtype, enabled=dtype != torch.float32):
        hidden, routings = model.trunk(inputs, mask=visible, run=run)
        named = {"cross_entropy": head_cross_entropy(model.norm(hidden), model.head.weight, targets, counted)}
    here = [balance.tokens_per_expert(routing, dropped=True) for routing in routings]
    here = [before + new for before, new in zip(counts, here)] if counts else here
    for layer in zip(routings, here):
        for name, value in balance_losses(*layer, config).items():
            named[name] = named[name] + value if name in named else value
    return Losses(named, here)


def balance_losses(routing: Routing, tokens_per_expert: Tensor, config: TrainConfig) -> dict[str, Tensor]:
    """The balance losses of one layer, each times its weight; those with weight 0 are left out.

    tokens_per_expert (experts,), counted in this step so far

    The global-batch loss uses the load up to and including this forward pass (arXiv 2501.11873).
    """
    devices, top_devices = config.num_devices, config.top_devices
    losses: dict[str, Callable[[], Tensor]] = {
        "sequence_loss": lambda: balance.sequence_loss(routing),
        "switch_loss": lambda: balance.switch_loss(routing),
        "global_batch_loss": lambda: balance.switch_loss(routing, None, tokens_per_expert),
        "z_loss": lambda: balance.z_loss(routing),
        "device_loss": lambda: balance.device_loss(routing, devices),
        "communication_loss": lambda: balance.communication_loss(routing, devices, top_devices),
    }
    weights = {name: getattr(config, name) for name in losses}
    return {name: weights[name] * loss() for name, loss in losses.items() if weights[name]}
