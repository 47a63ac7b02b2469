"""The loss of a model on a text."""

import torch

from . import data, loss
from .model import Transformer


@torch.no_grad()
def evaluate(
    model: Transformer, windows: data.Windows, tokens: int | None, dtype: torch.dtype, batch_size: int
) -> float:
    """Mean loss in nats per token, over about `tokens` evenly spread tokens; None: over the whole text.

    Windows overlap by an eighth, which is context only: an n-gram model sees the preceding text too.
    """
    known = windows.context // 8
    starts = range(0, len(windows.tokens) - windows.context, windows.context - known)
    count = len(starts) if tokens is None else min(len(starts), max(1, tokens // windows.context))
    chosen = [starts[index * len(starts) // count] for index in range(count)]
    device = next(model.parameters()).device
    model.eval()
    total = 0.0
    for at in range(0, count, batch_size):
        batch = torch.stack([windows.cut(start) for start in chosen[at : at + batch_size]]).to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            hidden = model.norm(model.trunk(batch[:, :-1])[0][:, known:])
            mean = loss.head_cross_entropy(hidden, model.head.weight, batch[:, known + 1 :])
        total += float(mean) * len(batch)
    return total / count
