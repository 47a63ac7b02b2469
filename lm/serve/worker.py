"""The thread that owns the engine: requests come from the server's event loop, tokens go back to it."""

import asyncio
import codecs
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..hub.folder import Tokenizer
from ..inference.engine import Engine
from ..inference.request import Request

Event = tuple[int, list[int], str | None]  # index of the sequence, new tokens, finish reason


class Full(Exception):
    """The queue is full."""


class Refused(Exception):
    """The engine rejected the request as invalid."""


class Visible:
    """The visible text of a sequence: whole characters only, cut before the first complete stop string.

    Text that may become a stop string is held back, so the result does not depend on token boundaries.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self.bytes_of = tokenizer.writer()
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.stops, self.held, self.stopped = stops, "", False

    def add(self, token: int) -> str:
        """The text that becomes visible with one more token."""
        return self.show(self.decoder.decode(self.bytes_of(token)), last=False)

    def end(self) -> str:
        """The rest of the text, after the last token."""
        return self.show(self.decoder.decode(b"", final=True), last=True)

    def show(self, more: str, last: bool) -> str:
        """The visible part of the held-back text plus `more`."""
        text = self.held + more
        found = [(text.find(stop) + len(stop), -len(stop)) for stop in self.stops if stop in text]
        if found:
            end, minus_length = min(found)
            self.held, self.stopped = "", True
            return text[: end + minus_length]
        begun = (n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        shown = len(text) - (0 if last else max(begun, default=0))
        self.held = text[shown:]
        return text[:shown]


@dataclass(eq=False)
class Job:
    """A client's request for one or more sequences. Belongs to the event loop's thread."""

    open: set[int]  # the unfinished sequences
    events: asyncio.Queue[Event | Exception] = field(default_factory=asyncio.Queue)
    started: bool = False  # it has received a token
    passed_over: bool = False  # a step had no room for it


@dataclass
class Made:
    """A sequence in the engine, and how many of its tokens the event loop has received."""

    request: Request
    known: int = 0


News = list[tuple[Job, Event | Exception | None]]  # None: a step had no room for the job


class Worker:
    """Runs an engine on its own thread. If the engine fails, a new one replaces it.

    Args:
        make_engine: called at once, and again after a failure.
        max_batch: the number of sequences decoded together.
        max_queue: the number of jobs that may wait for a place in the batch.
    """

    def __init__(self, make_engine: Callable[[], Engine], max_batch: int, max_queue: int):
        self.make_engine, self.max_batch, self.max_queue = make_engine, max_batch, max_queue
        self.jobs: list[Job] = []  # in order of arrival
        self.inbox: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.work, name="engine", daemon=True)
        self.engine: Engine | None = make_engine()  # belongs to the thread from here on, as does `running`
        self.running: dict[Job, dict[int, Made]] = {}

    # called on the event loop's thread

    def start(self) -> None:
        """Start the thread, for the running event loop."""
        self.loop = asyncio.get_running_loop()
        self.thread.start()

    def stop(self) -> None:
        """Stop the thread after its current step."""
        self.inbox.put(None)
        self.thread.join()

    @contextmanager
    def job(self, texts: int) -> Iterator[Job]:
        """A place for a request; on exit, its unfinished sequences are cancelled.

        Raises:
            Full: the request would have to wait, and the queue is full.
        """
        room, waiting = self.count()
        if waiting >= self.max_queue and (waiting or room <= 0):
            raise Full
        job = Job(set(range(texts)))
        self.jobs.append(job)
        try:
            yield job
        finally:
            self.jobs.remove(job)
            self.cancel(job, *job.open)

    def count(self) -> tuple[int, int]:
        """(sequences that still fit into the next step, jobs that will wait)."""
        room, waiting = self.max_batch, 0
        for job in self.jobs:
            if job.started or (room > 0 and not job.passed_over):
                room -= len(job.open)
            else:
                waiting += 1
        return room, waiting

    def submit(self, job: Job, asked: list[dict[str, Any]]) -> None:
        """Submit a job's sequences, given as arguments of Engine.submit; results arrive in job.events."""
        self.inbox.put((job, asked))

    def cancel(self, job: Job, *texts: int) -> None:
        """Cancel sequences of a job."""
        job.open -= set(texts)
        for text in texts:
            self.inbox.put((job, text))

    def fail(self, error: Exception) -> None:
        """End every job with an error."""
        for job in self.jobs:
            self.tell([(job, error)])

    def tell(self, news: News) -> None:
        """Deliver news to the jobs; None: there was no room for the job."""
        for job, event in news:
            if event is None:
                job.passed_over = True
                continue
            if isinstance(event, tuple):
                job.started = True
                if event[2] is not None:
                    job.open.discard(event[0])
            job.events.put_nowait(event)

    # called on the engine's thread

    def work(self) -> None:
        """Take orders, run a step, report; sleep while there is nothing to do."""
        while True:
            while self.engine is None or not self.engine.busy or not self.inbox.empty():
                order = self.inbox.get()
                if order is None:
                    return
                self.take(*order)
            news: News
            try:
                self.engine.step()
                news = self.news()
            except Exception as failure:
                failure = failure.with_traceback(None)  # its frames reference the engine
                news = [(job, failure) for job in self.running]
                self.running.clear()
                self.engine = None  # its state may be inconsistent; frees its memory for the next one
            self.loop.call_soon_threadsafe(self.tell, news)

    def take(self, job: Job, asked: list[dict[str, Any]] | int) -> None:
        """Submit all sequences of a job or none, or cancel one of them."""
        if isinstance(asked, int):
            texts = self.running.get(job, {})
            if asked in texts:
                texts.pop(asked).request.cancel()
                if not texts:
                    del self.running[job]
            return
        texts = {}
        try:
            self.engine = self.engine or self.make_engine()
            for index, arguments in enumerate(asked):
                texts[index] = Made(self.engine.submit(**arguments))
            self.running[job] = texts
        except Exception as error:
            for made in texts.values():
                made.request.cancel()
            # without an engine, the error is that of creating it
            refused = isinstance(error, ValueError) and self.engine is not None
            news: News = [(job, Refused(str(error)) if refused else error)]
            self.loop.call_soon_threadsafe(self.tell, news)

    def news(self) -> News:
        """The results of the last step; removes finished sequences."""
        news: News = []
        for job, texts in list(self.running.items()):
            if not any(made.request.tokens or made.request.finished for made in texts.values()):
                news.append((job, None))
            for index, made in list(texts.items()):
                tokens, finished = made.request.tokens[made.known :], made.request.finished
                made.known += len(tokens)
                failed = finished == "error"
                if tokens or (finished is not None and not failed):
                    news.append((job, (index, tokens, None if failed else finished)))
                if failed:
                    news.append((job, ArithmeticError(made.request.error)))
                if finished is not None:
                    del texts[index]
            if not texts:
                del self.running[job]
        return news
