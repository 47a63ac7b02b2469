"""Between a server's event loop and the thread that owns the engine: requests in, tokens out."""

import asyncio
import codecs
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..hub.folder import Tokenizer
from ..inference.engine import Engine, Request

Event = tuple[int, list[int], str | None]  # of which text, its new tokens, why it is finished if it is


class Full(Exception):
    """As many requests wait as may."""


class Refused(Exception):
    """The engine does not take a text: the request is wrong."""


class Visible:
    """A text as its tokens come: whole characters only, cut before the stop string that is complete first.

    What may still become a stop string is held back, so that the text does not depend on where tokens end.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self.bytes_of = tokenizer.writer()
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.stops, self.held, self.stopped = stops, "", False

    def add(self, token: int) -> str:
        """What can be shown after one more token."""
        return self.show(self.decoder.decode(self.bytes_of(token)), last=False)

    def end(self) -> str:
        """What is left to show after the last token."""
        return self.show(self.decoder.decode(b"", final=True), last=True)

    def show(self, more: str, last: bool) -> str:
        """What can be shown of the text held back and more."""
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
    """A client's request, for one text or several. Belongs to the event loop's thread."""

    open: set[int]  # the texts that are not finished
    events: asyncio.Queue[Event | Exception] = field(default_factory=asyncio.Queue)
    started: bool = False  # it has a token
    passed_over: bool = False  # there was a step without room for it


@dataclass
class Made:
    """A text in the engine, and how many of its tokens the event loop knows."""

    request: Request
    known: int = 0


News = list[tuple[Job, Event | Exception | None]]  # None: a step had no room for the job


class Worker:
    """Owns an engine on a thread of its own. An engine that failed is replaced by a new one.

    Args:
        make_engine: called now, and again after a failure.
        max_queue: how many jobs may wait for a place among the max_batch texts that are made together.
    """

    def __init__(self, make_engine: Callable[[], Engine], max_batch: int, max_queue: int):
        self.make_engine, self.max_batch, self.max_queue = make_engine, max_batch, max_queue
        self.jobs: list[Job] = []  # in order of arrival
        self.inbox: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.work, name="engine", daemon=True)
        self.engine: Engine | None = make_engine()  # from here on the thread's, as is what runs in it
        self.running: dict[Job, dict[int, Made]] = {}

    # on the event loop's thread

    def start(self) -> None:
        """Begin to work for the running event loop."""
        self.loop = asyncio.get_running_loop()
        self.thread.start()

    def stop(self) -> None:
        """End the thread after the step that it is in."""
        self.inbox.put(None)
        self.thread.join()

    @contextmanager
    def job(self, texts: int) -> Iterator[Job]:
        """A place for a request; what is still being made at the end is cancelled.

        Raises:
            Full: it would wait, and as many wait as may.
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
        """How many more texts the next step takes, and how many jobs it leaves waiting."""
        room, waiting = self.max_batch, 0
        for job in self.jobs:
            if job.started or (room > 0 and not job.passed_over):
                room -= len(job.open)
            else:
                waiting += 1
        return room, waiting

    def submit(self, job: Job, asked: list[dict[str, Any]]) -> None:
        """Have a job's texts made, each from its arguments of Engine.submit; what comes is in job.events."""
        self.inbox.put((job, asked))

    def cancel(self, job: Job, *texts: int) -> None:
        """Stop making texts of a job."""
        job.open -= set(texts)
        for text in texts:
            self.inbox.put((job, text))

    def fail(self, error: Exception) -> None:
        """End every job by an error."""
        for job in self.jobs:
            self.tell([(job, error)])

    def tell(self, news: News) -> None:
        """Hand news to the jobs; None: passed over."""
        for job, event in news:
            if event is None:
                job.passed_over = True
                continue
            if isinstance(event, tuple):
                job.started = True
                if event[2] is not None:
                    job.open.discard(event[0])
            job.events.put_nowait(event)

    # on the engine's thread

    def work(self) -> None:
        """Take what has come, make a step, tell; sleep while there is nothing to do."""
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
                failure = failure.with_traceback(None)  # whose frames hold the engine
                news = [(job, failure) for job in self.running]
                self.running.clear()
                self.engine = None  # what it holds may be half written; its memory is free for the next
            self.loop.call_soon_threadsafe(self.tell, news)

    def take(self, job: Job, asked: list[dict[str, Any]] | int) -> None:
        """Submit a job's texts, all or none, or cancel one of them."""
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
            refused = isinstance(error, ValueError) and self.engine is not None  # else it could not be made
            news: News = [(job, Refused(str(error)) if refused else error)]
            self.loop.call_soon_threadsafe(self.tell, news)

    def news(self) -> News:
        """What the last step brought; forgets what is finished."""
        news: News = []
        for job, texts in list(self.running.items()):
            if not any(made.request.tokens or made.request.finished for made in texts.values()):
                news.append((job, None))
            for index, made in list(texts.items()):
                tokens, finished = made.request.tokens[made.known :], made.request.finished
                made.known += len(tokens)
                if tokens or finished is not None:
                    news.append((job, (index, tokens, finished)))
                if finished is not None:
                    del texts[index]
            if not texts:
                del self.running[job]
        return news
