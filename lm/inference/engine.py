"""Many texts written at once: continuous batching (Orca, OSDI 2022) over a paged cache (arXiv 2309.06180)."""

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mla.paged import Plan, pages_for

from ..model import Transformer
from .compiled import CompiledStep
from .pages import Pages, Row
from .sampling import check_options, sampler
from .step import Decoder

CHUNK = 256  # tokens of prompts that a step reads before it goes on writing: bounds how long others wait
SCORES = 2**24  # attention scores of a chunk, at most: 64 MB in fp32


class Request:
    """A text to be continued, and what has been made of it so far.

    Attributes:
        prompt: the token ids to go on from.
        tokens: those made so far, without the one that ended it.
        finished: None, or why it ended: "stop" (a token of `ends`), "length" or "cancelled".
    """

    def __init__(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: tuple[float, int | None, float],
        seed: int | None,
        ends: Collection[int],
        window: int | None,
    ):
        self.prompt = list(prompt)
        self.tokens: list[int] = []
        self.max_new_tokens = max_new_tokens
        self.sampling = sampling
        self.ends = ends
        self.window = window
        self.generator = torch.Generator()
        self.generator.seed() if seed is None else self.generator.manual_seed(seed)
        self.finished: str | None = None
        self.text = list(prompt)  # prompt and answer
        self.start = 0  # where its window begins
        self.row = Row([], 0)
        self.need = 0  # pages, at most
        self.weights = 0  # the version it was begun with
        self.caches: list[Any] = []  # of an attention without a step over pages

    def cancel(self) -> None:
        """Stop it; its place is given back at the next step."""
        self.finished = self.finished or "cancelled"

    @property
    def unread(self) -> int:
        """Tokens of the text that are not in the cache yet."""
        return len(self.text) - self.start - self.row.length

    def slide(self) -> bool:
        """Where the window is full, begin it again in its middle -> whether it was"""
        if self.window is None or len(self.text) - self.start <= self.window:
            return False
        self.start = len(self.text) - max(1, self.window // 2)
        return True


class Engine:
    """Runs requests together: a step reads a chunk of the prompts that wait, and writes a token of each text.

    Requests of any lengths come and go between steps. In fp32 a text is the same, bit for bit, whatever runs
    beside it: its attention is its own, and other products have rows in multiples of 8, which a CPU rounds
    alike as long as widths are multiples of 16. What texts begin with in common is read once.

    The model's memory stays as it is. Its weights may change between steps: the engine takes them over before
    it begins a text, and when `refresh` is called.

    Args:
        max_batch: texts at once.
        max_tokens: what the cache holds of them all, in pages of 64; None: 1,024 for each, or one of the
            model's own length.
        compile: write tokens by compiled code (`CompiledStep`): one text comes two to six times as fast,
            after half a minute. A text is then the same up to rounding, not bit for bit.

    Raises:
        ValueError: a number is below 1; compile: there is no compiler, or an attention without a paged step.
    """

    def __init__(
        self,
        model: Transformer,
        max_batch: int = 64,
        max_tokens: int | None = None,
        compile: bool = False,
    ):
        if max_batch < 1:
            raise ValueError(f"max_batch={max_batch} must be at least 1")
        if max_tokens is None:
            max_tokens = max(1024 * max_batch, model.config.max_length)
        if max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens} must be at least 1")
        self.model = model
        self.device = next(model.parameters()).device
        self.max_batch = max_batch
        self.pages = Pages(pages_for(max_tokens))
        self.max_tokens = max_tokens
        self.decoder = Decoder(model)
        self.paged = self.decoder.paged
        self.pools = [self.pages.new_pool(*entry) for entry in self.decoder.entries] if self.paged else []
        if compile and not self.paged:
            raise ValueError("compile: the model's attention has no step over pages to compile")
        self.compiled = CompiledStep(self.decoder, self.device) if compile else None
        self.weights = 0  # the version that known pages were made with
        self.fresh = False  # whether the weights were looked at in this step
        self.waiting: deque[Request] = deque()
        self.active: list[Request] = []

    @property
    def busy(self) -> bool:
        """Whether something waits or runs."""
        return bool(self.waiting or self.active)

    @property
    def nbytes(self) -> int:
        """Bytes of cache that texts hold now; a page that several share counts once."""
        held = sum(1 for holders in self.pages.holders if holders)
        return held * sum(pool[0].nbytes for pool in self.pools)

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
        """A request, in the queue; options as in `decode.generate`.

        Args:
            ends: the ids that end the text.
            window: as many tokens as the model was trained on. A text that has filled it is read again from
                the middle of the window on; None: never.

        Raises:
            ValueError: the prompt is empty, has ids outside the vocabulary or is, with what is to come, more
                than the cache holds; an option is out of its range.
        """
        check_options(max_new_tokens, temperature, top_k, top_p, window, seed)
        if not len(prompt):
            raise ValueError("the prompt is empty; it needs at least one token")
        self.model.check(torch.tensor([list(prompt)]), None)
        request = Request(prompt, max_new_tokens, (temperature, top_k, top_p), seed, ends, window)
        request.slide()
        if self.longest(request) > self.max_tokens:
            raise ValueError(
                f"the prompt of {len(prompt)} tokens and max_new_tokens={max_new_tokens} are more than "
                f"the cache holds, max_tokens={self.max_tokens}"
            )
        if max_new_tokens == 0:
            request.finished = "length"
        else:
            self.waiting.append(request)
        return request

    def refresh(self) -> bool:
        """Take the model's weights over if they have changed, and forget the pages made with the old ones.

        -> whether they had. It is called before a text is begun; texts at work go on with what is taken over.
        """
        self.fresh = True
        if not self.paged or not self.decoder.refresh():
            return False
        self.pages.forget()
        self.weights += 1
        return True

    def longest(self, request: Request) -> int:
        """Tokens of a request that are in the cache at once, at most. The last one made is never read."""
        whole = len(request.prompt) + request.max_new_tokens - 1
        return whole if request.window is None else min(whole, request.window)

    def run(self) -> None:
        """Steps until nothing is left."""
        while self.busy:
            self.step()

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Read on in the prompts, write a token more of each text that is read -> the requests it is of.

        A failure (of memory, say) leaves every request as it was before the step, or one token further.
        """
        self.retire()
        self.fresh = False
        ready: list[Request] = []
        logits: list[Tensor] = []
        try:
            budget = CHUNK
            for request in self.reading():
                while budget > 0 and request.unread > 1:
                    chunk = min(request.unread, budget, self.longest_chunk(request))
                    last = self.read([request], chunk)
                    budget -= chunk
                    if request.unread == 0:
                        self.remember(request)
                        ready.append(request)
                        logits.append(last)
                if budget <= 0:
                    break
            writing = [request for request in self.active if request.unread == 1]
            if writing:
                logits.append(self.read(writing, 1))
                ready += writing
            if ready:
                self.write(ready, torch.cat(logits))
        except BaseException:
            for request in self.active:
                lost = request.unread == 0 and not request.finished  # its logits: its last token once more
                self.cut(request, request.row.length - lost)
            raise
        return ready

    def reading(self) -> Iterator[Request]:
        """The requests whose prompts are not all read; those that wait are let in when it is their turn."""
        yield from [request for request in self.active if request.unread > 1]
        while self.waiting and len(self.active) < self.max_batch and self.let_in(self.waiting[0]):
            yield self.active[-1]

    def let_in(self, request: Request) -> bool:
        """Make the first that waits active, if there are pages for all that it may come to."""
        known = len(request.text) - 1  # the last token is always read: its logits are wanted
        same = [
            other
            for other in self.active
            if (other.prompt, other.weights) == (request.prompt, self.weights) and other.row.length >= known
        ]
        if not self.paged:
            row = Row([], 0)
        elif same and same[0].start == request.start == 0:
            row = self.pages.fork(same[0].row, known)  # the last page too, until one of them writes it
        else:
            row = self.pages.open(request.text[request.start :])
        request.row, request.need, request.weights = row, pages_for(self.longest(request)), self.weights
        if sum(map(self.outstanding, [*self.active, request])) > self.pages.available:
            self.pages.truncate(row, 0)
            return False
        if not self.fresh and self.refresh():  # what it found may be of other weights
            self.pages.truncate(row, 0)
            return self.let_in(request)
        if not self.paged:
            request.caches = self.model.new_caches(1, self.longest(request))
        self.active.append(self.waiting.popleft())
        return True

    def outstanding(self, request: Request) -> int:
        """Pages that a request may still ask for."""
        return max(0, request.need - len(request.row.pages)) + self.pages.is_shared(request.row)

    def read(self, requests: list[Request], time: int) -> Tensor:
        """The next `time` tokens of each -> (requests, vocab), the logits after the last of them"""
        rows = [request.row for request in requests]
        starts = [request.start + request.row.length for request in requests]
        texts = [request.text[start : start + time] for request, start in zip(requests, starts)]
        self.pages.grow(rows, time)
        if self.paged:
            compiled = self.compiled if time == 1 else None
            tables, lengths = [row.pages for row in rows], [row.length for row in rows]
            plan = Plan(tables, lengths, time, self.device, compiled is not None)
            tokens = torch.tensor(texts, device=self.device).flatten()
            logits = (compiled or self.decoder.step)(tokens, self.pools, plan)[:, -1]
        else:
            tokens = torch.tensor(texts, device=self.device).unsqueeze(1)  # (requests, 1, time)
            passes = [self.model(text, request.caches) for text, request in zip(tokens, requests)]
            logits = torch.cat([out.logits[:, -1] for out in passes])
        for row in rows:
            row.length += time
        return logits

    def write(self, requests: list[Request], logits: Tensor) -> None:
        """Draw each request's next token from its logits (requests, vocab)."""
        kinds: dict[Any, list[int]] = {}
        for at, request in enumerate(requests):
            kinds.setdefault(request.sampling, []).append(at)
        for (temperature, top_k, top_p), those in kinds.items():
            choose = sampler(temperature, top_k, top_p, [requests[at].generator for at in those])
            for at, token in zip(those, choose(logits[those]).tolist()):
                request = requests[at]
                if token in request.ends:
                    request.finished = "stop"
                    continue
                request.tokens.append(token)
                request.text.append(token)
                if len(request.tokens) == request.max_new_tokens:
                    request.finished = "length"
                elif request.slide():
                    self.cut(request, 0)

    def cut(self, request: Request, length: int) -> None:
        """Keep only the first length tokens of a request in the cache."""
        self.pages.truncate(request.row, length)
        for cache in request.caches:
            cache.truncate(length)

    def remember(self, request: Request) -> None:
        """What comes next may go on from this text, as the next turn of a talk does."""
        if self.paged and request.weights == self.weights:
            self.pages.remember(request.row, request.text[request.start :])

    def retire(self) -> None:
        """Give back the places of those that are finished."""
        for request in [r for r in self.active if r.finished]:
            self.remember(request)
            self.pages.truncate(request.row, 0)
            self.active.remove(request)
        self.waiting = deque(r for r in self.waiting if not r.finished)

    def longest_chunk(self, request: Request) -> int:
        """Tokens whose attention scores are not too many at once."""
        return max(1, SCORES // (self.model.config.attention.num_heads * len(request.text)))
