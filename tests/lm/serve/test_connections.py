"""Connections that never finish: they are closed in time, and the server answers others meanwhile."""

import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager

import pytest

from lm.serve import connections
from tests.helpers import ROOT
from tests.lm.serve.client import HEAD, HTTP, SECONDS, post, start, wait_for

GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


def connect(running):
    return socket.create_connection(("127.0.0.1", running.port), timeout=SECONDS)


@contextmanager
def connected(running, number, sent=b""):
    """Connections, each of which has sent the same bytes."""
    with ExitStack() as stack:
        found = [stack.enter_context(connect(running)) for _ in range(number)]
        for connection in found:
            connection.sendall(sent)
        yield found


def rest_of(connection):
    """Everything received until the server closes the connection."""
    answer = b""
    try:
        while more := connection.recv(65536):
            answer += more
    except (ConnectionResetError, BrokenPipeError):
        pass
    return answer


def error_in(answer):
    """Check that a raw response is an error in the API's shape -> its status and message"""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower() and b"content-type: application/json" in head.lower()
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    return int(head.split()[1]), json.loads(body)["error"]["message"]


@pytest.fixture(autouse=True)
def unsaid(monkeypatch):
    monkeypatch.setattr(connections, "SAID", {})


UNFINISHED = {
    "nothing": (b"", None),
    "a method": (b"GE", 408),
    "a line": (b"GET /health HTTP/1.1\r\n", 408),
    "headers": (GET, 408),
    "a header's name": (GET + b"Accep", 408),
    "an idle connection": (GET + b"\r\n", 200),
    "a second request": (GET + b"\r\n" + b"GET /he", 200),
}


@pytest.mark.parametrize("sent, status", UNFINISHED.values(), ids=UNFINISHED)
def test_unfinished_headers_and_idle_connections_are_closed(serving, make_served, sent, status, capfd):
    with serving(make_served(idle_seconds=0.4)) as running, connected(running, 1, sent) as [connection]:
        answer = rest_of(connection)
        wait_for(lambda: not running.server.server_state.connections)
    if status is None:
        assert answer == b""
    elif status == 408:
        assert error_in(answer) == (408, "the headers took more than 0.4 seconds")
    else:
        assert answer.startswith(b"HTTP/1.1 200 ")
    assert capfd.readouterr().err == ""


def test_the_limit_counts_from_the_first_byte_not_the_last(serving, make_served):
    with serving(make_served(idle_seconds=0.5)) as running:
        for before in (b"", GET + b"\r\n"):  # on a new connection, and after a request
            with connected(running, 1, before + GET + b"X: ") as [connection]:
                sent = 0
                while not select.select([connection], [], [], 0.1)[0] or b"HTTP/1.1 200" in connection.recv(
                    4096
                ):
                    connection.sendall(b"x")
                    sent += 1
                    assert sent < 100
                rest_of(connection)
        wait_for(lambda: not running.server.server_state.connections)


def test_a_request_in_progress_has_no_limit_on_connections(held):
    running, permits = held(idle_seconds=0.3)
    posted = start(running, 1, max_tokens=5)
    time.sleep(1)
    permits.release(5)
    assert posted.wait().json()["choices"][0]["text"] == "01234"


@pytest.mark.long
@pytest.mark.parametrize(
    "sent", [b"", GET, HEAD + b"Content-Length: 9\r\n\r\n{"], ids=["idle", "headers", "body"]
)
def test_300_connections_that_never_finish_do_not_block_others(serving, make_served, capfd, sent):
    with serving(make_served(connections=40, idle_seconds=600)) as running, connected(running, 300, sent):
        began = time.monotonic()
        for _ in range(5):
            assert HTTP.get(f"{running.url}/health").json()["status"] == "ok"
        assert post(running, {"prompt": "a", "max_tokens": 3}).status_code == 200
        assert time.monotonic() - began < SECONDS / 2
        assert len(running.server.server_state.connections) <= 40
    said = "lm serve: 40 connections are open; new ones replace those that wait for their client\n"
    assert capfd.readouterr().err == said


def test_requests_in_progress_are_never_closed_for_new_connections(held):
    running, permits = held(connections=3)
    posted = [start(running, 1 + i, max_tokens=4) for i in range(3)]
    with connected(running, 1, GET + b"\r\n") as [connection]:
        answer = rest_of(connection)
    assert answer == b"" or error_in(answer) == (503, "too many connections; try again later")
    permits.release(100)
    assert [each.wait().json()["choices"][0]["text"] for each in posted] == ["0123"] * 3
    assert HTTP.get(f"{running.url}/health").status_code == 200


def test_a_client_that_never_reads_is_disconnected(serving, make_served):
    with serving(make_served(idle_seconds=0.5), send_buffer=4096) as running, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", running.port))
        connection.settimeout(0.5)
        try:
            for _ in range(2000):  # the page is sent again and again
                connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        except OSError:
            pass  # its requests are read no longer, or it is disconnected
        wait_for(lambda: not running.server.server_state.connections)
        assert not running.server.server_state.tasks


@pytest.mark.parametrize(
    "sent", [b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTQ/1.1\r\n\r\n", b"x" * 10**5]
)
def test_what_is_not_http_is_400(running, sent, capfd):
    with connected(running, 1, sent) as [connection]:
        answer = rest_of(connection)
    assert answer == b"" or error_in(answer) == (400, "the request is not valid HTTP/1.1")
    assert capfd.readouterr().err == ""


def test_a_broken_chunked_body_is_400(running, capfd):
    with connected(running, 1, HEAD + b"Transfer-Encoding: chunked\r\n\r\nnot a size\r\n") as [connection]:
        assert error_in(rest_of(connection))[0] == 400
    assert capfd.readouterr().err == ""


def test_few_file_descriptors_lower_the_limit(monkeypatch):
    for files, limit in (
        (1024, 256),
        (512, 256),
        (256, 128),
        (20, 10),
        (1, 1),
        (resource.RLIM_INFINITY, 256),
    ):
        monkeypatch.setattr(resource, "getrlimit", lambda _, files=files: (files, files))
        assert connections.most_open(256) == limit


def test_the_same_line_is_printed_once_a_minute(capfd, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(connections.time, "monotonic", lambda: now[0])
    for second in range(150):
        now[0] = second
        context = {"message": "socket.accept() failed", "exception": OSError(24, "Too many open files")}
        connections.tell(None, context)
    line = "lm serve: socket.accept() failed: [Errno 24] Too many open files"
    assert capfd.readouterr().err.splitlines() == [line] * 3


@pytest.mark.long
def test_a_process_with_few_descriptors_answers_and_stays_quiet(served_folder, tmp_path):
    """600 connections at once to a process that may open 128 files."""
    run = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128));"
        "from lm.cli import main; sys.exit(main())"
    )
    arguments = [sys.executable, "-P", "-c", run, "serve", served_folder, "--port", "0", "--device", "cpu"]
    errors, environment = tmp_path / "stderr", {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(errors, "w") as stderr:
        process = subprocess.Popen(
            arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=stderr
        )
    stop = threading.Timer(4 * SECONDS, process.kill)
    stop.start()
    try:
        line = process.stdout.readline().decode()
        running = type("Running", (), {"port": int(line.partition("127.0.0.1:")[2].partition("/")[0])})
        with connected(running, 600, GET):
            for _ in range(3):
                answer = HTTP.get(f"http://127.0.0.1:{running.port}/health", timeout=SECONDS)
                assert answer.json()["status"] == "ok"
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 143
    finally:
        stop.cancel()
        process.kill()
        process.wait()
        process.stdout.close()
    assert len(errors.read_text().splitlines()) == 1, errors.read_text()[:2000]
