"""Sampling of the next token from logits."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def sampler(
    temperature: float,
    top_k: int | None,
    top_p: float,
    generators: Sequence[torch.Generator],
    min_p: float = 0.0,
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A function logits (batch, vocab) -> tokens (batch,) int64 and their log-probabilities, fp32.

    Each row draws from its own generator. A row whose largest logit is not finite (NaN, an overflow, or -inf
    everywhere) gives -1. A single logit of -inf is a token with probability 0. The log-probabilities are
    those of the distribution that is drawn from: at this temperature, of the tokens that are left.
    """

    def choose(logits: Tensor) -> tuple[Tensor, Tensor]:
        best = logits.argmax(-1, keepdim=True)  # of a row with NaN: the place of one
        broken = ~logits.gather(-1, best).isfinite()  # (batch, 1)
        if temperature == 0:
            return best.masked_fill(broken, -1).squeeze(1), logits.new_zeros(len(logits))
        device = logits.device
        scaled = logits.float().masked_fill(broken, 0).cpu()
        if temperature < 1:
            scaled = scaled - scaled.amax(-1, keepdim=True)  # at most 0: the division gives no +inf
        probabilities = (scaled / max(temperature, 1e-30)).softmax(-1)
        if top_k is not None or top_p < 1 or min_p > 0:
            ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
            if top_k is not None:
                ranked[:, top_k:] = 0
            if top_p < 1:
                before = ranked.cumsum(-1) - ranked  # the total probability of more likely tokens
                beyond = before >= top_p * ranked.sum(-1, keepdim=True)
                ranked[:, 1:][beyond[:, 1:]] = 0  # always keep the first, even if top_p times the sum is 0
            ranked[ranked < min_p * ranked[:, :1]] = 0
            probabilities = torch.zeros_like(probabilities).scatter_(1, order, ranked)
        upto = probabilities.double().cumsum(-1)
        shares = torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])
        cut = shares.unsqueeze(1) * upto[:, -1:]
        drawn = torch.searchsorted(upto, cut, right=True).clamp(max=upto.shape[1] - 1)
        log_probs = (probabilities.gather(1, drawn) / upto[:, -1:]).log().float().squeeze(1)
        return drawn.to(device).masked_fill(broken, -1).squeeze(1), log_probs

    return choose


def check_options(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    window: int | None = None,
    seed: int | None = None,
    min_p: float = 0.0,
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
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p={min_p} must lie in 0..1; 0 keeps all tokens")
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1")
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed} must lie in 0..{2**63 - 1}")
