"""Sampling of the next token from logits."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def sampler(
    temperature: float, top_k: int | None, top_p: float, generators: Sequence[torch.Generator]
) -> Callable[[Tensor], Tensor]:
    """A function logits (batch, vocab) -> (batch,) int64, with one generator per row."""

    def choose(logits: Tensor) -> Tensor:
        if temperature == 0:
            return logits.argmax(-1)
        device = logits.device
        probabilities = (logits.float().cpu() / max(temperature, 1e-30)).softmax(-1)  # no overflow
        ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
        if top_k is not None:
            ranked[:, top_k:] = 0
        if top_p < 1:
            before = ranked.cumsum(-1) - ranked  # the total probability of more likely tokens
            beyond = before >= top_p * ranked.sum(-1, keepdim=True)
            ranked[:, 1:][beyond[:, 1:]] = 0  # always keep the first, even if top_p times the sum is 0
        drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(ranked, generators)]
        return order.gather(1, torch.stack(drawn)).squeeze(1).to(device)

    return choose


def check_options(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    window: int | None = None,
    seed: int | None = None,
) -> None:
    """Raise ValueError for an option out of range."""
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 0")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be finite and at least 0; 0 is greedy")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie above 0 and at most at 1")
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1")
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed} must lie in 0..{2**63 - 1}")
