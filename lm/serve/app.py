"""`lm serve`: the OpenAI API and a chat page over HTTP, by default for this machine only."""

import asyncio
import functools
import ipaddress
import os
import re
import signal
import socket
import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mla.paged import PAGE

from .. import budget, count, machine
from ..config import ModelConfig
from ..hub.folder import open_folder, read_config
from ..report.page import policy
from . import connections
from .answers import Answer, Limits, Served
from .protocol import Chat, Completion, ErrorShape, Problem, problem_of, reason, shorten, unknown_model

MAX_BODY = 2**20  # bytes
BACKLOG = 128  # connections that may wait to be accepted
GRACE = 5  # seconds for running requests to finish when the server stops


def serve(options: Any) -> int:
    """`lm serve`: serve until a signal arrives -> 128 + its number"""
    limits = Limits(options.max_batch, options.max_queue, options.max_seconds)
    for name, least in (("max_batch", 1), ("max_queue", 0), ("max_seconds", 1)):
        if not least <= getattr(limits, name) < float("inf"):
            raise ValueError(f"{name}={getattr(limits, name)} must be at least {least}")
    if limits.max_queue > limits.connections:
        most = f"{limits.connections}, the connections that may be open at once"
        raise ValueError(f"max_queue={limits.max_queue} must be at most {most}")
    check_batch(limits.max_batch, read_config(options.run, options.trust_code).model)
    listener = listen(options.host, options.port)
    if not is_loopback(options.host):
        warnings.warn(f"host {options.host}: anyone who reaches this machine can use the model", stacklevel=1)
    model, config, tokenizer = open_folder(options.run, options.trust_code, options.device)
    served = Served(model, config, tokenizer, options.run.resolve().name, limits, options.compile)
    server = Server(served, options.host)
    stopped: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        stopped.append(number)
        server.should_exit = True

    # uvicorn replaces these handlers while it runs; when it stops it raises the signal again, for these
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"{served.name}: chat at {address}/, OpenAI API at {address}/v1; press Ctrl-C to stop", flush=True)
    server.run(sockets=[listener])
    return 128 + stopped[0] if stopped else 1


def check_batch(max_batch: int, config: ModelConfig) -> None:
    """Raise ValueError if that many sequences, each with one page of cache, exceed this machine's memory."""
    page = PAGE * count.cache_bytes_per_token(count.without_custom_parts(config))
    needed, here = max_batch * (budget.SAMPLE_BYTES + page), machine.memory()
    if 0 < here < needed:
        raise ValueError(
            f"max_batch={max_batch:,} sequences take at least {needed / 2**30:,.0f} GiB; "
            f"this machine has {here / 2**30:,.0f} GiB"
        )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        ValueError: the port is out of range or in use, or the host is not an address of this machine.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port={port} must be in 0..65535; 0 picks a free port")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:
        why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        raise ValueError(f"{host}, port {port}: cannot listen: {why}") from None


def is_loopback(host: str) -> bool:
    """Whether an address is reachable only from this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Server(uvicorn.Server):
    """uvicorn for a served model, without logs; on shutdown, requests have GRACE seconds to finish."""

    def __init__(self, served: Served, host: str):
        app = Guard(make_app(served), host, served.limits.body_seconds)
        quiet: dict[str, Any] = {"log_config": None, "log_level": "critical", "access_log": False}
        limits: dict[str, Any] = {"most": served.limits.connections, "seconds": served.limits.idle_seconds}
        plain: dict[str, Any] = {
            "http": functools.partial(connections.Connection, **limits),
            "ws": "none",
            "lifespan": "off",
            "server_header": False,
            "backlog": connections.ACCEPTED,
        }
        super().__init__(uvicorn.Config(app, **quiet, **plain, timeout_graceful_shutdown=GRACE + 2))
        self.worker = served.worker

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the worker, then accept requests."""
        asyncio.get_running_loop().set_exception_handler(connections.tell)
        self.worker.start()
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(BACKLOG)  # startup has set it to the number accepted at once

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second -> whether to stop"""
        for connection in list(self.server_state.connections):
            connection.check()  # type: ignore[union-attr]
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish or fail the running requests, then stop the worker."""
        stopping = Problem(503, "the server is stopping", Retry_After="10")
        asyncio.get_running_loop().call_later(GRACE, self.worker.fail, stopping)
        try:
            await super().shutdown(sockets)
        finally:
            await asyncio.to_thread(self.worker.stop)


class Guard:
    """Middleware that checks Host and Origin, limits the body, and prints unexpected errors.

    The Host header must name this server, which stops web pages of other sites that reach it through DNS
    rebinding; the Origin header must name it too.
    """

    def __init__(self, app: ASGIApp, host: str, body_seconds: float):
        self.app, self.host, self.body_seconds = app, host, body_seconds
        self.open = not is_loopback(host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body: bytes | None = None

        async def receive_whole() -> Message:
            nonlocal body
            if body is None:
                return await receive()
            whole, body = body, None
            return {"type": "http.request", "body": whole, "more_body": False}

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self.check_names(headers)
            body = await self.read(headers, receive)
            if scope["method"] == "HEAD":  # as GET; uvicorn drops the body
                scope = {**scope, "method": "GET"}
            if body is not None:
                await self.app(scope, receive_whole, send)
        except Problem as problem:
            await problem.response()(scope, receive, send)
        except Exception as error:  # the client has its error response, unless the answer had begun
            print(f"lm serve: {scope['path']!a}: {reason(error)}", file=sys.stderr)

    def check_names(self, headers: dict[str, str]) -> None:
        """Raise Problem unless Host, and Origin if present, name this server."""
        origin = headers.get("origin")
        for address in [headers.get("host", "")] + ([origin.partition("://")[2]] if origin else []):
            if not self.is_name(re.sub(r":\d*$", "", address).strip("[]").lower()):
                said = f"{address!a} does not name this server; its name is {self.host}"
                raise Problem(403, said, code="host_not_allowed", Connection="close")

    def is_name(self, name: str) -> bool:
        """Whether a name is this server's; with a public host, any address and the machine's name are."""
        if name in ("localhost", self.host.lower()):
            return True
        try:
            return ipaddress.ip_address(name).is_loopback or self.open
        except ValueError:
            return self.open and name == socket.gethostname().lower()

    async def read(self, headers: dict[str, str], receive: Receive) -> bytes | None:
        """The body, or None if the client disconnected.

        Raises:
            Problem: the body is compressed, too large or too slow.
        """
        coding = headers.get("content-encoding", "identity")
        if coding.strip().lower() not in ("identity", ""):
            said = f"Content-Encoding {shorten(ascii(coding))} is not supported; send the body uncompressed"
            raise Problem(415, said, Connection="close")
        large = Problem(413, f"the body is larger than {MAX_BODY} bytes", Connection="close")
        if int(headers.get("content-length", 0)) > MAX_BODY:
            raise large
        body = bytearray()
        try:
            async with asyncio.timeout(self.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > MAX_BODY:
                        raise large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            slow = f"the body took more than {self.body_seconds} seconds"
            raise Problem(408, slow, Connection="close") from None


def make_app(served: Served) -> FastAPI:
    """The routes and error handlers."""
    errors: dict[int | str, dict[str, Any]] = {status: {"model": ErrorShape} for status in ("4XX", "5XX")}
    # without FastAPI's documentation pages, which load scripts from other sites
    app = FastAPI(title="lm serve", docs_url=None, redoc_url=None, redirect_slashes=False, responses=errors)
    page, headers = read_page()

    @app.get("/", response_class=HTMLResponse)
    async def chat_page() -> Response:
        return HTMLResponse(page, headers=headers)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "requests": len(served.worker.jobs), "waiting": served.worker.count()[1]}

    entry: dict[str, Any] = {"id": served.name, "object": "model", "created": 0, "owned_by": "lm"}
    # not in OpenAI's API; max_model_len as in vLLM's
    entry |= {"max_model_len": served.context, "chat_template": served.tokenizer.chat_template is not None}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [entry]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != served.name:
            raise unknown_model(name, served.name)
        return entry

    @app.post("/v1/completions", response_class=JSONResponse)
    async def completions(ask: Completion) -> Response:
        return Answer(served, ask)

    @app.post("/v1/chat/completions", response_class=JSONResponse)
    async def chat_completions(ask: Chat) -> Response:
        return Answer(served, ask)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return Problem(500, "the server failed").response()

    @app.exception_handler(Problem)
    async def told(_: Request, problem: Problem) -> Response:
        return problem.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return problem_of(error).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        path = request.scope["path"]
        problem = Problem(error.status_code, f"{request.method} {shorten(ascii(path))}: {error.detail}")
        problem.headers |= dict(error.headers or {})
        return problem.response()

    return app


def read_page() -> tuple[str, dict[str, str]]:
    """The chat page, and headers that allow the browser only the page's own script and style."""
    page = (Path(__file__).parent / "chat.html").read_text(encoding="utf-8")
    return page, {
        "Content-Security-Policy": policy(page, "connect-src 'self'", "frame-ancestors 'none'"),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }
