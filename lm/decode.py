"""Writing on from a prompt: prefill in chunks, then one token at a time from the caches."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .model import Transformer

CHUNK = 256  # tokens of a prompt a pass: bounds the memory of its attention


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
    """Prompts of one length, continued -> (batch, time + max_new_tokens) int64

    Args:
        tokens: (batch, time) int64.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: choose among this many most likely tokens; None: all.
        top_p: choose among the fewest most likely tokens that have this probability together.
        seed: row i draws from seed + i, so its text does not depend on the other rows; None: unrepeatable.
        window: see `stream`.

    Raises:
        ValueError: an option out of its range, or tokens that are not (batch, time >= 1) ids.
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
    """Prompts of any length, continued together: yields (batch,) int64, each row's next token, as it is made.

    Args:
        window: as many tokens as the model was trained on. A row that has filled it is read again from the
            middle of the window on; None: never.
    """
    check_options(max_new_tokens, temperature, top_k, top_p, window, seed)
    if not prompts or not all(prompts):
        lengths = [len(prompt) for prompt in prompts][:8]
        raise ValueError(f"{len(prompts)} prompts, of {lengths} tokens; each needs at least one")
    device = next(model.parameters()).device
    generators = [torch.Generator() for _ in prompts]
    for row, generator in enumerate(generators):
        generator.seed() if seed is None else generator.manual_seed(seed + row)
    choose = sampler(temperature, top_k, top_p, generators)
    texts = [list(prompt) for prompt in prompts]
    starts = [0] * len(texts)  # where each row's window begins
    caches: list[Any] = []
    for made in range(max_new_tokens):
        if not caches or (window is not None and max(caches[0].lengths) >= window):
            for row, text in enumerate(texts):
                if window is not None and len(text) - starts[row] > window:
                    starts[row] = len(text) - max(1, window // 2)
            kept = [text[start:] for text, start in zip(texts, starts)]
            room = max(map(len, kept)) + max_new_tokens - made
            caches = model.new_caches(len(texts), room if window is None else min(room, window))
            logits = prefill(model, caches, kept, device)
        else:
            last = torch.tensor([text[-1:] for text in texts], device=device)
            logits = model(last, caches).logits[:, -1]
        token = choose(logits)  # (batch,)
        for text, new in zip(texts, token.tolist()):
            text.append(new)
        yield token


def prefill(model: Transformer, caches: list, texts: list[list[int]], device: torch.device) -> Tensor:
    """Read texts of any lengths into empty caches -> (batch, vocab), the logits after each text's last token

    Short texts are filled up on the right: their own tokens come first, so never see the filling, and the
    caches forget it afterwards.
    """
    lengths = torch.tensor([len(text) for text in texts])
    longest = int(lengths.max())
    tokens = torch.tensor([text + text[-1:] * (longest - len(text)) for text in texts], device=device)
    picked = torch.zeros(len(texts), model.config.vocab_size, device=device)
    for start in range(0, longest, CHUNK):
        logits = model(tokens[:, start : start + CHUNK], caches).logits  # (batch, time, vocab)
        ends_here = ((lengths > start) & (lengths <= start + CHUNK)).nonzero().squeeze(1)
        picked[ends_here] = logits[ends_here, lengths[ends_here] - 1 - start].to(picked.dtype)
    for cache in caches:
        cache.truncate(lengths.tolist())
    return picked


def sampler(
    temperature: float, top_k: int | None, top_p: float, generators: Sequence[torch.Generator]
) -> Callable[[Tensor], Tensor]:
    """A function logits (batch, vocab) -> (batch,) int64, each row drawn by its own generator."""

    def choose(logits: Tensor) -> Tensor:
        if temperature == 0:
            return logits.argmax(-1)
        device = logits.device
        probabilities = (logits.float().cpu() / max(temperature, 1e-30)).softmax(-1)  # less would overflow
        ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
        if top_k is not None:
            ranked[:, top_k:] = 0
        if top_p < 1:
            before = ranked.cumsum(-1) - ranked  # the probability of all that are more likely
            beyond = before >= top_p * ranked.sum(-1, keepdim=True)
            ranked[:, 1:][beyond[:, 1:]] = 0  # the first always stays, even where top_p times the sum is 0
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
    """Raise ValueError for an option out of its range."""
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
