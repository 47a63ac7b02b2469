"""Generation from a batch of prompts, of equal or different lengths."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mla.paged import PAGE, pages_for

from ..model import Transformer
from .engine import Engine
from .sampling import check_options


@torch.no_grad()
def generate(
    model: Transformer,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int | None = None,
    window: int | None = None,
) -> Tensor:
    """Continue prompts of equal length -> (batch, time + max_new_tokens) int64

    Args:
        tokens: (batch, time) int64.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: sample from the top_k most likely tokens; None: all.
        top_p: sample from the fewest most likely tokens whose total probability is at least top_p.
        seed: row i is seeded with seed + i, independent of the other rows; None: not reproducible.
        window: see `stream`.

    Raises:
        ValueError: an option out of range, or tokens that are not (batch, time >= 1) ids.
    """
    model.check(tokens, None)
    steps = stream(model, tokens.tolist(), max_new_tokens, temperature, top_k, top_p, seed, window)
    return torch.cat([tokens, *(step.unsqueeze(1).to(tokens.device) for step in steps)], dim=1)


@torch.no_grad()
def stream(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int | None = None,
    window: int | None = None,
) -> Iterator[Tensor]:
    """Continue prompts of any lengths, in one batch; yields each row's next token, (batch,) int64.

    Args:
        window: the context length in training. When it is full, the second half is read again as a new
            window; None: no limit.
    """
    check_options(max_new_tokens, temperature, top_k, top_p, window, seed)
    if not prompts or not all(prompts):
        lengths = [len(prompt) for prompt in prompts][:8]
        raise ValueError(f"{len(prompts)} prompts, of {lengths} tokens; each needs at least one")
    device = next(model.parameters()).device
    longest = max(map(len, prompts)) + max_new_tokens
    longest = longest if window is None else min(longest, window)
    engine = Engine(model, len(prompts), len(prompts) * pages_for(longest) * PAGE)
    seeds = [None if seed is None else seed + row for row in range(len(prompts))]
    requests = [
        engine.submit(prompt, max_new_tokens, temperature, top_k, top_p, own, window=window)
        for prompt, own in zip(prompts, seeds)
    ]
    for made in range(max_new_tokens):
        while any(len(request.tokens) <= made for request in requests):
            engine.step()
        yield torch.tensor([request.tokens[made] for request in requests], device=device)
