"""How well logits foretell tokens, in nats: the one place for training, evaluation, MTP and RL."""

import torch
import torch.nn.functional as F
from torch import Tensor


def token_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target, in fp32 at least.

    logits (..., vocab), targets (...) int64 -> (...)
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} "
            "must agree in all but the vocabulary"
        )
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(wide.reshape(-1, wide.shape[-1]), targets.flatten(), reduction="none")
    return -losses.view_as(targets)


def cross_entropy(logits: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean negative log-probability over the tokens where mask (...) is True; 0 where there is none.

    logits (..., vocab), targets (...) int64 -> (), nats a token
    """
    losses = -token_log_probs(logits, targets)
    if mask is None:
        return losses.mean()
    return losses.where(mask, 0).sum() / mask.sum().clamp(min=1)
