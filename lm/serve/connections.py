"""Connections: a limit on their number and on the time that one may wait, so that none blocks the others."""

import asyncio
import json
import sys
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .protocol import Problem

ACCEPTED = 8  # connections accepted at once; about four times as many may exceed the limit for a moment
QUIET = 60  # seconds before a line is printed again


class Connection(H11Protocol):
    """A client's connection. `check`, called several times a second, closes it when it has waited too long.

    Args:
        most: maximum open connections. A new one beyond it closes the one that has waited longest for its
            client; if all have requests to answer, it is answered with 503.
        seconds: maximum wait for a request's headers, and for a client to read.
    """

    def __init__(self, *arguments: Any, most: int, seconds: float, **more: Any):
        super().__init__(*arguments, **more)
        self.most, self.seconds = most, seconds
        self.since = self.loop.time()  # when it began to wait
        self.state: tuple[Any, ...] = ()
        self.begun = False  # part of the headers has arrived

    @property
    def waiting(self) -> bool:
        """No request is being read or answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def replaceable(self) -> bool:
        """It waits for its client: for a request, for the rest of one, or to read."""
        return self.waiting or self.cycle.more_body or self.flow.write_paused

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Make room for the connection, or answer with 503."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self.check()
        limit = most_open(self.most)
        if len(self.connections) <= limit:
            return
        say(f"{limit} connections are open; new ones replace those that wait for their client")
        found: Any = [c for c in self.connections if c.replaceable and c is not self]  # type: ignore[union-attr]
        if found:
            oldest = min(found, key=lambda connection: connection.since)
            self.connections.discard(oldest)  # at once: it is counted until the event loop has closed it
            oldest.transport.abort()
        else:
            self.respond(Problem(503, "too many connections; try again later", Retry_After="1"))

    def data_received(self, data: bytes) -> None:
        """Read part of a request."""
        super().data_received(data)
        self.begun = self.waiting

    def pause_writing(self) -> None:
        """The client does not read: its buffer is full."""
        super().pause_writing()
        self.since = self.loop.time()

    def check(self) -> None:
        """Close the connection if it has waited too long, at once if it is closing already."""
        closing, stalled = self.transport.is_closing(), self.flow.write_paused
        state = (closing, stalled, self.waiting, self.cycle)
        if state != self.state:
            self.state, self.since = state, self.loop.time()
        late = self.loop.time() - self.since > self.seconds
        if not late or not (closing or stalled or self.waiting):
            return
        if closing or stalled or not self.begun:
            self.transport.abort()
        else:
            self.respond(Problem(408, f"the headers took more than {self.seconds} seconds"))

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are not HTTP."""
        self.respond(Problem(400, "the request is not valid HTTP/1.1"))

    def respond(self, problem: Problem) -> None:
        """Send an error and close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(problem.body()).encode()
            headers = {
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                "Connection": "close",
            }
            response = h11.Response(
                status_code=problem.status, headers=[*(headers | problem.headers).items()]
            )
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def most_open(most: int) -> int:
    """The largest number of connections: `most`, or half of this process's limit on open files."""
    try:
        import resource  # not on Windows

        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except ImportError:
        return most
    return most if files == resource.RLIM_INFINITY else max(1, min(most, files // 2))


SAID: dict[str, float] = {}


def say(line: str) -> None:
    """Print a line to standard error, unless it was printed in the last minute."""
    now = time.monotonic()
    if now - SAID.get(line, -QUIET) >= QUIET:
        SAID[line] = now
        print(f"lm serve: {line}", file=sys.stderr, flush=True)


def tell(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """The event loop's exception handler: one line instead of a traceback."""
    error = context.get("exception")
    say(context["message"] + (f": {error}" if error else ""))
