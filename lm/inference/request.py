"""A prompt and its completion, as the engine generates it."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from .pages import Row


class Request:
    """A prompt and its completion so far.

    Attributes:
        prompt: token ids.
        tokens: the completion so far, without the token that ended it.
        ended: the token that ended it; None before, and if something else did.
        log_probs: of each token and then of `ended`, at the temperature and truncation that drew it.
        experts: with `record_experts`, the experts (layers, top_k) of each token read; else None.
        finished: None, or the reason: "stop" (a token of `ends`), "length", "cancelled" or "error".
        error: with "error", what went wrong, in one line.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: tuple[float, int | None, float, float],
        seed: int | None,
        ends: Collection[int],
        window: int | None,
        record_experts: bool = False,
    ):
        self.prompt = list(prompt)
        self.tokens: list[int] = []
        self.ended: int | None = None
        self.log_probs: list[float] = []
        self.experts: list[Tensor] | None = [] if record_experts else None
        self.max_new_tokens = max_new_tokens
        self.sampling = sampling
        self.ends = ends
        self.window = window
        self.generator = torch.Generator()
        self.generator.seed() if seed is None else self.generator.manual_seed(seed)
        self.finished: str | None = None
        self.error = ""
        self.sequence = list(prompt)  # prompt and completion
        self.start = 0  # first position of the window
        self.row = Row([], 0)
        self.need = 0  # maximum pages
        self.weights = 0  # version of the weights at its start
        self.caches: list[Any] = []  # for an attention without a decode step over pages

    def cancel(self) -> None:
        """Stop; its pages are freed at the next step."""
        self.finished = self.finished or "cancelled"

    @property
    def unread(self) -> int:
        """Tokens that are not in the cache yet."""
        return len(self.sequence) - self.start - self.row.length

    def slide(self) -> bool:
        """Restart a full window at its middle -> whether it was full"""
        if self.window is None or len(self.sequence) - self.start <= self.window:
            return False
        self.start = len(self.sequence) - max(1, self.window // 2)
        return True
