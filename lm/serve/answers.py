"""Completions for requests: prompts go to the engine, its tokens come back as text, whole or streamed."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import Response
from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from ..config import Config
from ..hub.folder import Tokenizer
from ..hub.thinking import Splitter, splitter_for
from ..hub.tokenizer import encode_chat
from ..inference.engine import Engine
from ..model import Transformer
from .protocol import Ask, Chat, Completion, Problem, reason
from .shape import Said, Shape
from .worker import Full, Job, Refused, Visible, Worker

COMPLETION_TOKENS, CHAT_TOKENS = 16, 1024  # the default max_tokens; 16 is OpenAI's
LONGEST = 4096  # the largest max_tokens, unless the model's context is longer
SLACK = 15  # seconds beyond max_seconds, for the chat template and for slow readers


@dataclass(frozen=True)
class Limits:
    """A server's limits."""

    max_batch: int = 64  # sequences decoded together
    max_queue: int = 8  # requests that may wait for a place in the batch
    max_seconds: float = 300  # per request, including the wait
    body_seconds: float = 10  # for a request's body to arrive
    idle_seconds: float = 15  # for a request's headers to arrive, and for a client that reads nothing
    connections: int = 256  # open at once


class Served:
    """A model, its tokenizer and its worker.

    Attributes:
        context: the longest prompt in tokens; a completion that exceeds it sees the newest tokens, as in
            `lm generate`.
    """

    def __init__(
        self,
        model: Transformer,
        config: Config,
        tokenizer: Tokenizer,
        name: str,
        limits: Limits,
        compile: bool = False,
    ):
        self.tokenizer, self.name, self.limits = tokenizer, name, limits
        self.vocab_size = config.model.vocab_size
        self.context = config.model.max_length or config.train.context
        self.longest = max(self.context, LONGEST)

        def make_engine() -> Engine:
            return Engine(model, limits.max_batch, compile=compile)

        self.worker = Worker(make_engine, limits.max_batch, limits.max_queue)

    def encode(self, ask: Ask) -> list[list[int]]:
        """The token ids of each prompt.

        Raises:
            Problem: a prompt is empty, longer than the context, or has tokens outside the vocabulary.
        """
        name = "messages" if isinstance(ask, Chat) else "prompt"
        try:
            prompts = [self.encode_chat(ask)] if isinstance(ask, Chat) else self.encode_prompts(ask)
        except ValueError as error:
            raise Problem(400, f"{name}: {error}", name) from None
        for tokens in prompts:
            if len(tokens) > self.context:
                said = f"{name}: {len(tokens)} tokens exceed the model's context of {self.context}"
                raise Problem(400, said, name, "context_length_exceeded")
            if not tokens or max(tokens) >= self.vocab_size:
                said = f"{name}: must have at least one token, each in 0..{self.vocab_size - 1}"
                raise Problem(400, said, name)
        return prompts

    def encode_prompts(self, ask: Ask) -> list[list[int]]:
        """The token ids of the prompts of /v1/completions."""
        prompts = ask.prompts() if isinstance(ask, Completion) else []
        return [self.tokenizer.encode(text) if isinstance(text, str) else text for text in prompts]

    def encode_chat(self, ask: Chat) -> list[int]:
        """The token ids of a conversation, by the chat template or one line per message (as `lm chat`)."""
        return encode_chat(self.tokenizer, [message.plain() for message in ask.messages])

    def arguments(self, ask: Ask, prompts: list[list[int]]) -> list[dict[str, Any]]:
        """The arguments of Engine.submit for each sequence: n for the first prompt, n for the second, ..."""
        default = CHAT_TOKENS if isinstance(ask, Chat) else COMPLETION_TOKENS
        same: dict[str, Any] = {
            "max_new_tokens": ask.max_new_tokens(default),
            "temperature": ask.temperature,
            "top_k": None if ask.top_k is None else min(ask.top_k, self.vocab_size),
            "top_p": ask.top_p,
            "min_p": ask.min_p,
            "ends": self.tokenizer.ends,
            "window": self.context,
        }
        seeds = [None if ask.seed is None else (ask.seed + i) % 2**63 for i in range(ask.n)]
        return [{**same, "prompt": prompt, "seed": seed} for prompt in prompts for seed in seeds]


class Answer(Response):
    """The response to one request, whole or streamed; a disconnect cancels its sequences."""

    def __init__(self, served: Served, ask: Ask):
        super().__init__()
        ask.check(served.name, served.longest)
        self.served, self.ask, self.shape = served, ask, Shape(ask, served.name)
        texts = ask.n * (len(ask.prompts()) if isinstance(ask, Completion) else 1)
        self.visible = [Visible(served.tokenizer, ask.stops()) for _ in range(texts)]
        self.splitters = [Splitter("answer") for _ in range(texts)]  # /v1/completions splits nothing
        self.said = [Said(None, "", None)] * texts
        self.tokens = 0  # generated in all

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def until_gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        work = asyncio.create_task(self.answer(scope, receive, send))
        watch = asyncio.create_task(until_gone())
        watch.add_done_callback(lambda _: work.cancel())
        try:
            async with asyncio.timeout(self.served.limits.max_seconds + SLACK):
                await work
        except TimeoutError:
            pass  # the client reads too slowly: close the connection
        except asyncio.CancelledError:
            if not watch.done():  # the server is stopping; the client is still there
                raise
        finally:
            watch.cancel()

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Wait for a place in the batch, then for tokens; send them as they arrive or all at once."""
        try:
            with self.served.worker.job(len(self.visible)) as job:
                prompts = await asyncio.to_thread(self.served.encode, self.ask)
                self.writers = [self.served.tokenizer.writer(p) for p in prompts for _ in range(self.ask.n)]
                for visible, writer in zip(self.visible, self.writers):
                    visible.bytes_of = writer
                if isinstance(self.ask, Chat):
                    self.splitters = [splitter_for(self.served.tokenizer, prompts[0]) for _ in self.visible]
                self.served.worker.submit(job, self.served.arguments(self.ask, prompts))
                pieces = self.pieces(job)
                if self.ask.stream:
                    await self.stream(pieces, prompts, send)
                    return
                async for _ in pieces:
                    pass
        except Full:
            raise Problem(503, "the queue is full; try again later", Retry_After="1") from None
        await JSONResponse(self.shape.whole(self.said, self.usage(prompts)))(scope, receive, send)

    async def stream(self, pieces: AsyncIterator[Any], prompts: list[list[int]], send: Send) -> None:
        """Send server-sent events; the status goes with the first, so an earlier error sets its own."""
        started: set[int] = set()

        async def say(data: Any) -> None:
            body = f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})

        try:
            async for index, said in pieces:
                if not started:
                    kind = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]
                    await send({"type": "http.response.start", "status": 200, "headers": kind})
                for piece in self.shape.pieces(index, said, index not in started):
                    await say(piece)
                started.add(index)
            if self.shape.counted:
                await say(self.shape.last(self.usage(prompts)))
            await say("[DONE]")
        except Problem as problem:
            if not started:
                raise
            await say(problem.body())
        await send({"type": "http.response.body", "body": b""})

    async def pieces(self, job: Job) -> AsyncIterator[tuple[int, Said]]:
        """Yield (sequence, its new text) as tokens arrive, until all are finished.

        Raises:
            Problem: the engine rejected the request or failed, or the time limit came before the first token.
        """
        until = asyncio.get_running_loop().time() + self.served.limits.max_seconds
        while any(said.finished is None for said in self.said):
            try:
                async with asyncio.timeout_at(until):
                    event = await job.events.get()
            except TimeoutError:
                if not job.started:
                    raise Problem(503, "timed out in the queue; try again later", Retry_After="1") from None
                for index, known in enumerate(self.said):
                    if known.finished is None:
                        yield index, self.say(index, "", "length")
                return
            if isinstance(event, Problem):
                raise event
            if isinstance(event, Refused):  # everything else was checked before
                raise Problem(400, f"max_tokens: {event}", "max_tokens")
            if isinstance(event, Exception):
                said = f"the model failed: {reason(event)}"
                print(f"lm serve: {said}", file=sys.stderr)
                raise Problem(500, said)
            index, tokens, finished = event
            if self.said[index].finished is not None:
                continue  # decoded before the engine saw the cancellation
            gained = ""
            for token in tokens:
                gained += self.visible[index].add(token)
                self.tokens += 1
                if self.visible[index].stopped:
                    finished = "stop"
                    self.served.worker.cancel(job, index)
                    break
            new = self.say(index, gained, finished)
            if new.thought or new.answer or finished is not None:
                yield index, new

    def say(self, index: int, text: str, finished: str | None) -> Said:
        """Add text to a sequence, and what was held back if it is finished -> what is new"""
        visible, splitter, known = self.visible[index], self.splitters[index], self.said[index]
        if finished is not None:
            if not visible.stopped:
                text += visible.show(self.writers[index].end().decode(), last=False) + visible.end()
            finished = "stop" if visible.stopped else finished
        thought, answer = splitter.add(text, last=finished is not None)
        new = Said(thought if splitter.thinks else None, answer, finished)
        whole = None if new.thought is None else (known.thought or "") + new.thought
        self.said[index] = Said(whole, known.answer + answer, finished)
        return new

    def usage(self, prompts: list[list[int]]) -> dict[str, int]:
        """Token counts of the prompts and completions."""
        read = sum(map(len, prompts))
        return {
            "prompt_tokens": read,
            "completion_tokens": self.tokens,
            "total_tokens": read + self.tokens,
        }
