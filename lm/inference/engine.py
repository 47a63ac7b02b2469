"""Continuous batching (Orca, OSDI 2022) over a paged cache (arXiv 2309.06180)."""

import warnings
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mla.paged import PAGE, Plan, pages_for

from ..model import Transformer
from .compiled import CompiledStep
from .pages import Pages, Row, capacity, tensors_of
from .request import Request
from .sampling import check_options, sampler
from .step import Decoder

CHUNK = 256  # prompt tokens per step, so that a long prompt does not hold up the others
SCORES = 2**24  # maximum attention scores of a chunk: 64 MB in fp32


class Engine:
    """Runs requests in one batch: a step reads a chunk of the prompts and generates a token for the others.

    Requests of any length come and go between steps. In fp32 a completion does not depend on the rest of the
    batch, bit for bit: each row has its own attention, and the other products get rows in multiples of 8,
    which a CPU rounds the same if widths are multiples of 16. Common prefixes are read once.

    The model's memory is not changed. Its weights may change between steps: the engine copies the new ones
    before it starts a request, and in `refresh`.

    Args:
        max_batch: maximum requests at once.
        max_tokens: capacity of the cache, in pages of 64; None: 1,024 per request, at least the model's
            context length and at most what memory holds.
        compile: decode with `CompiledStep`: a single sequence decodes two to six times as fast, after half a
            minute. Outputs then agree up to rounding, not bit for bit.

    Raises:
        ValueError: a number below 1; a cache larger than memory; compile: no compiler, or an attention
            without a decode step over pages.
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
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens} must be at least 1")
        self.model = model
        self.device = next(model.parameters()).device
        self.max_batch = max_batch
        self.decoder = Decoder(model)
        self.paged = self.decoder.paged
        if compile and not self.paged:
            raise ValueError("compile: the model's attention has no step over pages to compile")
        if self.paged:
            size = sum(
                heads * PAGE * width * dtype.itemsize for heads, width, dtype, _ in self.decoder.entries
            )
        else:
            size = sum(tensor.nbytes for tensor in tensors_of(model.new_caches(1, PAGE)))
        default = max(1024 * max_batch, model.config.max_length)
        self.max_tokens = capacity(max_tokens, default, size, self.device)
        self.pages = Pages(pages_for(self.max_tokens))
        self.pools = [self.pages.new_pool(*entry) for entry in self.decoder.entries] if self.paged else []
        self.compiled = CompiledStep(self.decoder, self.device) if compile else None
        self.weights = 0  # version of the weights in the known pages
        self.fresh = False  # weights already checked in this step
        self.waiting: deque[Request] = deque()
        self.active: list[Request] = []

    @property
    def busy(self) -> bool:
        """Whether any request is waiting or active."""
        return bool(self.waiting or self.active)

    @property
    def nbytes(self) -> int:
        """Bytes of cache held by requests now; a shared page counts once."""
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
        min_p: float = 0.0,
        record_experts: bool = False,
    ) -> Request:
        """Queue a request; options as in `generate.generate`.

        Args:
            ends: ids that end the completion.
            window: as in `generate.stream`.
            record_experts: keep the routers' choices in `Request.experts`.

        Raises:
            ValueError: the prompt is empty, has ids outside the vocabulary, or does not fit in the cache with
                its completion; an option out of range; record_experts with a window, or where the engine
                compiles or has no step over pages.
        """
        if record_experts and (window is not None or self.compiled or not self.paged):
            raise ValueError("record_experts: needs a step over pages that is not compiled, and no window")
        check_options(max_new_tokens, temperature, top_k, top_p, window, seed, min_p)
        if not len(prompt):
            raise ValueError("the prompt is empty; it needs at least one token")
        self.model.check(torch.tensor([list(prompt)]), None)
        sampling = (temperature, top_k, top_p, min_p)
        request = Request(prompt, max_new_tokens, sampling, seed, ends, window, record_experts)
        request.slide()
        longest, trained = self.longest(request), self.model.config.max_length
        if window is None and 0 < trained < longest:
            warnings.warn(
                f"the prompt and max_new_tokens make {longest:,} tokens; the model was trained for "
                f"max_length={trained}, which window={trained} would keep to",
                stacklevel=2,
            )
        if longest > self.max_tokens:
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
        """If the model's weights have changed, copy them and forget the pages of the old ones -> whether so

        Called before a request starts; active requests continue with the new weights.
        """
        self.fresh = True
        if not self.paged or not self.decoder.refresh():
            return False
        self.pages.forget()
        self.weights += 1
        return True

    def longest(self, request: Request) -> int:
        """Maximum tokens of a request in the cache at once. Its last token is never read."""
        whole = len(request.prompt) + request.max_new_tokens - 1
        return whole if request.window is None else min(whole, request.window)

    def run(self) -> None:
        """Step until no request is left; the weights are checked for changes once, at the start."""
        changed = True
        while self.busy:
            self.step(changed)
            changed = False

    @torch.inference_mode()
    def step(self, changed: bool = True) -> list[Request]:
        """Read a chunk of prompts and generate a token for each request that is fully read -> those requests

        After a failure (out of memory, say) every request is as before the step, or one token further.

        Args:
            changed: whether the weights may have changed since the last step.
        """
        self.retire()
        self.fresh = not changed
        ready: list[Request] = []
        logits: list[Tensor] = []
        try:
            budget = CHUNK
            for group in self.reading():
                while budget > 0 and group[0].unread > 1:
                    chunk = min(group[0].unread, max(1, budget // len(group)), self.longest_chunk(group))
                    last = self.read(group, chunk)
                    budget -= chunk * len(group)
                    if group[0].unread == 0:
                        for request in group:
                            self.remember(request)
                        ready += group
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
                lost = request.unread == 0 and not request.finished  # logits lost: read the last token again
                self.cut(request, request.row.length - lost)
            raise
        return ready

    def reading(self) -> Iterator[list[Request]]:
        """Requests with unread prompt tokens: the active ones, then waiting ones as they become active.

        They come in groups to be read together: of equal length, and without a first page in common, which
        is read once for all.
        """
        yield from [[request] for request in self.active if request.unread > 1]
        group: list[Request] = []
        while self.waiting and len(self.active) < self.max_batch:
            new = self.waiting[0]
            starts = {tuple(request.sequence[request.start :][:PAGE]) for request in [*group, new]}
            room = CHUNK // (len(group) + 1) >= len(new.sequence) - new.start
            if group and not (room and len(starts) > len(group)):
                yield group
                group = []
            if not self.let_in(new):
                break
            if group and group[0].unread != new.unread:
                yield group
                group = []
            group.append(new)
        if group:
            yield group

    def let_in(self, request: Request) -> bool:
        """Make the first waiting request active if there are pages for its maximum length."""
        known = len(request.sequence) - 1  # the last token is always read, for its logits
        same = [
            other
            for other in self.active
            if (other.prompt, other.weights) == (request.prompt, self.weights) and other.row.length >= known
            if (other.experts is None) == (request.experts is None)
        ]
        if not self.paged or (request.experts is not None and not same):
            row = Row([], 0)
        elif same and same[0].start == request.start == 0:
            row = self.pages.fork(same[0].row, known)  # the last page too, until one of them writes to it
            request.experts = same[0].experts and same[0].experts[:known]
        else:
            row = self.pages.open(request.sequence[request.start :])
        request.row, request.need, request.weights = row, pages_for(self.longest(request)), self.weights
        everyone, room = [*self.active, request], self.pages.available
        most = sum(other.need + 1 for other in everyone)  # quicker than the exact sum
        if most > room and sum(map(self.outstanding, everyone)) > room:
            self.pages.truncate(row, 0)
            return False
        if not self.fresh and self.refresh():  # the pages found may be of the old weights
            self.pages.truncate(row, 0)
            return self.let_in(request)
        if not self.paged:
            request.caches = self.model.new_caches(1, self.longest(request))
        self.active.append(self.waiting.popleft())
        return True

    def outstanding(self, request: Request) -> int:
        """Pages that a request may still need."""
        return max(0, request.need - len(request.row.pages)) + self.pages.is_shared(request.row)

    def read(self, requests: list[Request], time: int) -> Tensor:
        """Read the next `time` tokens of each -> the logits after them, (requests, vocab)"""
        rows = [request.row for request in requests]
        starts = [request.start + request.row.length for request in requests]
        chunks = [request.sequence[start : start + time] for request, start in zip(requests, starts)]
        self.pages.grow(rows, time)
        if self.paged:
            compiled = self.compiled if time == 1 else None
            tables, lengths = [row.pages for row in rows], [row.length for row in rows]
            plan = Plan(tables, lengths, time, self.device, compiled is not None)
            tokens = torch.tensor(chunks, device=self.device).flatten()
            if any(request.experts is not None for request in requests):
                chosen: list[Tensor] = []
                logits = self.decoder.step(tokens, self.pools, plan, experts=chosen)[:, -1]
                self.record(requests, time, torch.stack(chosen, 1))
            else:
                logits = (compiled or self.decoder.step)(tokens, self.pools, plan)[:, -1]
        else:
            tokens = torch.tensor(chunks, device=self.device).unsqueeze(1)  # (requests, 1, time)
            passes = [self.model(chunk, request.caches) for chunk, request in zip(tokens, requests)]
            logits = torch.cat([out.logits[:, -1] for out in passes])
        for row in rows:
            row.length += time
        return logits

    def record(self, requests: list[Request], time: int, experts: Tensor) -> None:
        """Keep the experts (requests x time, layers, top_k) of the tokens just read."""
        for request, new in zip(requests, experts.unflatten(0, (-1, time))):
            if request.experts is not None:
                request.experts[request.row.length :] = new.unbind(0)

    def write(self, requests: list[Request], logits: Tensor) -> None:
        """Draw each request's next token from its logits (requests, vocab), or end it if they allow none."""
        kinds: dict[Any, list[int]] = {}
        for at, request in enumerate(requests):
            kinds.setdefault(request.sampling, []).append(at)
        for (temperature, top_k, top_p, min_p), those in kinds.items():
            generators = [requests[at].generator for at in those]
            choose = sampler(temperature, top_k, top_p, generators, min_p)
            tokens, log_probs = choose(logits[those])
            for at, token, log_prob in zip(those, tokens.tolist(), log_probs.tolist()):
                request = requests[at]
                if token < 0:
                    most, read = logits[at].amax().item(), len(request.sequence)
                    request.error = f"the largest logit after {read} tokens is {most}; it must be finite"
                    request.finished = "error"
                    continue
                request.log_probs.append(log_prob)
                if token in request.ends:
                    request.ended = token
                    request.finished = "stop"
                    continue
                request.tokens.append(token)
                request.sequence.append(token)
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
        """Make the request's pages known to later prompts, such as the next turn of a chat."""
        if self.paged and request.weights == self.weights:
            self.pages.remember(request.row, request.sequence[request.start :])

    def retire(self) -> None:
        """Free the pages of finished requests."""
        for request in [r for r in self.active if r.finished]:
            self.remember(request)
            self.pages.truncate(request.row, 0)
            self.active.remove(request)
        self.waiting = deque(r for r in self.waiting if not r.finished)

    def longest_chunk(self, group: list[Request]) -> int:
        """Tokens of each whose attention scores stay within SCORES."""
        rows = sum(len(request.sequence) for request in group)
        return max(1, SCORES // (self.model.config.attention.num_heads * rows))
