"""Generation from a batch of prompts, of equal or different lengths."""

import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mla.paged import PAGE, pages_for

from .. import machine
from ..model import Transformer
from .engine import Engine
from .request import Request
from .sampling import check_options

STEP = 700  # bytes of a tensor with one token per row, without its tokens


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
    min_p: float = 0.0,
) -> Tensor:
    """Continue prompts of equal length -> (batch, time + max_new_tokens) int64

    Args:
        tokens: (batch, time) int64.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: sample from the top_k most likely tokens; None: all.
        top_p: sample from the fewest most likely tokens whose total probability is at least top_p.
        min_p: sample from the tokens at least min_p times as likely as the most likely one.
        seed: row i is seeded with seed + i, independent of the other rows; None: not reproducible.
        window: see `stream`.

    Raises:
        ValueError: an option out of range, tokens that are not (batch, time >= 1) ids, or logits whose
            largest is not finite.
    """
    model.check(tokens, None)
    check_options(max_new_tokens, temperature, top_k, top_p, window, seed, min_p)
    needed, memory = max_new_tokens * (STEP + 8 * len(tokens)), machine.memory()
    if memory and needed > memory:
        said = f"max_new_tokens={max_new_tokens} for {len(tokens)} rows needs {needed // 2**20:,} MiB"
        raise ValueError(f"{said}; this machine has {memory // 2**20:,} MiB")
    steps = stream(model, tokens.tolist(), max_new_tokens, temperature, top_k, top_p, seed, window, min_p)
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
    min_p: float = 0.0,
) -> Iterator[Tensor]:
    """Continue prompts of any lengths, in one batch; yields each row's next token, (batch,) int64.

    Args:
        window: a number of tokens, such as the context length in training. When it is full, the second half
            is read again as a new window. Warns of a longer prompt, which loses its oldest tokens. None: no
            limit, with a warning beyond the model's max_length.
    """
    check_options(max_new_tokens, temperature, top_k, top_p, window, seed, min_p)
    if not prompts or not all(prompts):
        lengths = [len(prompt) for prompt in prompts][:8]
        raise ValueError(f"{len(prompts)} prompts, of {lengths} tokens; each needs at least one")
    device = next(model.parameters()).device
    longest = max(map(len, prompts)) + max_new_tokens
    longest = longest if window is None else min(longest, window)
    engine = Engine(model, len(prompts), len(prompts) * pages_for(longest) * PAGE)
    seeds = [None if seed is None else seed + row for row in range(len(prompts))]
    requests = [
        engine.submit(prompt, max_new_tokens, temperature, top_k, top_p, own, window=window, min_p=min_p)
        for prompt, own in zip(prompts, seeds)
    ]
    for request in requests:
        warn_unread(request)
    for made in range(max_new_tokens):
        while any(len(request.tokens) <= made for request in requests):
            engine.step()
            for row, request in enumerate(requests):
                if request.finished == "error":
                    raise ValueError(f"prompt {row}: {request.error}")
        yield torch.tensor([request.tokens[made] for request in requests], device=device)


def warn_unread(request: Request) -> bool:
    """Warn if a prompt is longer than its window, so that its first tokens are not read -> whether it is"""
    if request.start:
        said = f"the first {request.start:,} of the prompt's {len(request.prompt):,} tokens are not read"
        warnings.warn(f"{said}: the prompt exceeds the window of {request.window:,} tokens", stacklevel=3)
    return request.start > 0
