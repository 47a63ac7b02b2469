"""Requests made together, a token each at every step. A plain stand-in: each one is decoded by itself."""

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import Tensor

from . import decode
from .model import Transformer


class Request:
    """A text that an engine makes.

    Attributes:
        tokens: made so far, without the token that ended it.
        finished: None, "stop" (an ending token), "length" or "cancelled".
    """

    def __init__(
        self, prompt: list[int], steps: Iterator[Tensor], size: int, left: int, ends: Collection[int]
    ):
        self.prompt, self.steps, self.size, self.left, self.ends = prompt, steps, size, left, ends
        self.tokens: list[int] = []
        self.finished: str | None = None

    def cancel(self) -> None:
        """Give its place back at the next step."""
        self.finished = self.finished or "cancelled"


class Engine:
    """Admits requests in order of arrival, as many as max_batch and the cache take; one thread owns it.

    Args:
        max_tokens: what the cache holds for all requests together; None: any number.
    """

    def __init__(self, model: Transformer, max_batch: int = 64, max_tokens: int | None = None):
        self.model, self.max_batch, self.max_tokens = model, max_batch, max_tokens
        self.waiting: deque[Request] = deque()
        self.active: list[Request] = []

    @property
    def busy(self) -> bool:
        """Whether something is waiting or active."""
        return bool(self.waiting or self.active)

    def submit(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int | None = None,
        ends: Collection[int] = (),
        window: int | None = None,
    ) -> Request:
        """Queue a request.

        Raises:
            ValueError: empty prompt, ids out of the vocabulary, an option out of range, or too long.
        """
        decode.check_options(max_new_tokens, temperature, top_k, top_p, window, seed)
        highest = self.model.config.vocab_size - 1
        if not prompt or not all(0 <= token <= highest for token in prompt):
            raise ValueError(f"the prompt needs at least one token, each in 0..{highest}")
        size = len(prompt) + max_new_tokens
        if self.max_tokens is not None and size > self.max_tokens:
            raise ValueError(f"{size} tokens are more than the cache holds, {self.max_tokens}")
        sampling: Any = (max_new_tokens, temperature, top_k, top_p, seed, window)
        steps = decode.stream(self.model, [prompt], *sampling)
        request = Request(list(prompt), steps, size, max_new_tokens, ends)
        self.waiting.append(request)
        return request

    def step(self) -> list[Request]:
        """Admit what fits, make one more token for each active request -> the requests that got one"""
        self.waiting = deque(request for request in self.waiting if request.finished is None)
        self.active = [request for request in self.active if request.finished is None]
        while self.waiting and len(self.active) < self.max_batch:
            used = sum(request.size for request in self.active)
            if self.max_tokens is not None and used + self.waiting[0].size > self.max_tokens:
                break
            self.active.append(self.waiting.popleft())
        for request in self.active:
            token = int(next(request.steps))
            request.left -= 1
            if token in request.ends:
                request.finished = "stop"
                continue
            request.tokens.append(token)
            if not request.left:
                request.finished = "length"
        served = self.active
        self.active = [request for request in served if request.finished is None]
        return served

    def run(self) -> None:
        """Step until nothing is left."""
        while self.busy:
            self.step()
