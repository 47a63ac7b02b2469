"""The loss of a model on a text."""

import torch
from tqdm import tqdm

from . import data, loss
from .model import Transformer


@torch.no_grad()
def evaluate(
    model: Transformer, windows: data.Windows, tokens: int | None, dtype: torch.dtype, batch_size: int
) -> float:
    """Mean loss in nats per token, over about `tokens` evenly spread tokens; None: over all whole windows.

    Windows overlap by an eighth, which is context only: an n-gram model sees the preceding text too.
    """
    known, starts = spread(windows)
    count = len(starts) if tokens is None else min(len(starts), max(1, tokens // windows.context))
    chosen = [starts[index * len(starts) // count] for index in range(count)]
    device = next(model.parameters()).device
    model.eval()
    total, scored = 0.0, 0
    for at in tqdm(range(0, count, batch_size), unit="batch", leave=False, disable=None):
        batch = torch.stack([windows.cut(start) for start in chosen[at : at + batch_size]]).to(device)
        inputs, targets = batch[:, :-1], batch[:, 1:]
        visible, counted = windows.masks(inputs, targets)
        counted = None if counted is None else counted[:, known:]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            hidden = model.norm(model.trunk(inputs, mask=visible)[0][:, known:])
            mean = loss.head_cross_entropy(hidden, model.head.weight, targets[:, known:], counted)
        size = len(batch) if counted is None else int(counted.sum())
        total, scored = total + float(mean) * size, scored + size
    return total / max(1, scored)


def spread(windows: data.Windows) -> tuple[int, range]:
    """The tokens of each window that are only context, and where the windows start."""
    known = windows.context // 8
    return known, range(0, len(windows.tokens) - windows.context, windows.context - known)


def coverage(windows: data.Windows) -> str:
    """Which tokens of the text a whole evaluation scores, and which it leaves out."""
    known, starts = spread(windows)
    scored, total = len(starts) * (windows.context - known), len(windows.tokens)
    first = 1 + known
    tail = f" and the last {total - first - scored:,}" if total > first + scored else ""
    only = "" if windows.answer_start is None else "of their answers only, "
    return f"{only}{scored:,} of {total:,} tokens are scored; the first {first:,}{tail} are left out"
