"""The server over HTTP and raw sockets: paths, names, bodies, shutdown, and the command."""

import io
import json
import os
import signal
import socket
import sys
import threading
from types import SimpleNamespace

import openai
import pytest

import lm
from lm import cli
from lm.serve import app as serve
from tests.lm.serve.client import HEAD, HTTP, SECONDS, client_of, error_of, joined, post, start, wait_for

# --- paths and methods


UPWARDS = ["/../../etc/passwd", "/%2e%2e/", "/%2e%2e/%2e%2e/etc/passwd", "/..%5c", "//"]


@pytest.mark.parametrize("target", [*UPWARDS, "/v1", "/v1/", "/v1/models/", "/docs", "/x?a=1", "/chat.html"])
def test_unknown_paths_are_404(running, target):
    answer = raw(running, f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 404 ") and set(json.loads(body)) == {"error"}
    assert b"root:" not in answer


def test_wrong_methods_are_405(running):
    for method, path in (
        ("GET", "/v1/completions"),
        ("DELETE", "/v1/models"),
        ("POST", "/"),
        ("OPTIONS", "/health"),
    ):
        answer = HTTP.request(method, running.url + path)
        error_of(answer, 405)
        assert answer.headers["allow"]


@pytest.mark.parametrize(
    "path", ["/", "/health", "/v1/models", "/v1/models/drawn", "/v1/models/other", "/none"]
)
def test_head_is_get_without_the_body(running, path):
    head, get = HTTP.head(running.url + path), HTTP.get(running.url + path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    assert {**head.headers, "date": ""} == {**get.headers, "date": ""}


@pytest.mark.parametrize("coding", ["gzip", "br", "GZIP, deflate", "x" * 1000])
def test_a_compressed_body_is_415(running, coding):
    answer = post(running, {"prompt": "hi"}, headers={"Content-Encoding": coding})
    assert "send the body uncompressed" in error_of(answer, 415) and len(answer.content) < 300


def test_an_error_does_not_repeat_long_input(running):
    answers = [HTTP.get(f"{running.url}/{'x' * 9000}"), HTTP.get(f"{running.url}/v1/models/{'x' * 9000}")]
    for field in ({"x" * 9000: 1}, {"model": "x" * 9000}, {"seed": "x" * 9000}):
        answers.append(post(running, {"prompt": "hi", **field}))
    for answer in answers:
        assert answer.status_code in (400, 404) and len(answer.content) < 400


def test_models_and_health(running, client):
    assert [model.id for model in client.models.list()] == ["drawn"]
    wait_for(
        lambda: HTTP.get(f"{running.url}/health").json() == {"status": "ok", "requests": 0, "waiting": 0}
    )


# --- raw sockets: names, bodies


def raw(running, *parts):
    """Send parts over one connection -> everything received until it is closed"""
    with socket.create_connection(("127.0.0.1", running.port), timeout=SECONDS) as connection:
        for part in parts:
            connection.sendall(part)
        return read_on(connection)


def read_on(connection):
    answer = b""
    try:
        while more := connection.recv(65536):
            answer += more
    except ConnectionResetError:
        pass
    return answer


def status_of(answer):
    """The status of a raw response, which is an error in the API's shape and closes the connection."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    assert set(json.loads(body)) == {"error"} and b"connection: close" in head.lower()
    return status


@pytest.mark.parametrize(
    "host, origin, served_as, status",
    [
        ("localhost:{port}", None, "127.0.0.1", 200),
        ("LOCALHOST", None, "127.0.0.1", 200),
        ("127.0.0.1", None, "127.0.0.1", 200),
        ("[::1]:{port}", None, "127.0.0.1", 200),
        ("evil.example", None, "127.0.0.1", 403),
        ("evil.example:{port}", None, "127.0.0.1", 403),
        ("localhost.evil.example", None, "127.0.0.1", 403),
        ("192.168.1.7", None, "127.0.0.1", 403),
        ("", None, "127.0.0.1", 403),
        ("[", None, "127.0.0.1", 403),
        ("evil.example", None, "0.0.0.0", 403),
        ("192.168.1.7:{port}", None, "0.0.0.0", 200),
        (socket.gethostname(), None, "0.0.0.0", 200),
        ("my.name", None, "my.name", 200),
        ("localhost", "http://localhost:{port}", "127.0.0.1", 200),
        ("localhost", "https://evil.example", "127.0.0.1", 403),
        ("localhost", "null", "127.0.0.1", 403),
        ("localhost", "http://[", "127.0.0.1", 403),
    ],
)
def test_only_requests_that_name_this_server_are_accepted(host, origin, served_as, status):
    guard = serve.Guard(None, served_as, 1)
    headers = {"host": host.format(port=1234)} | ({"origin": origin.format(port=1234)} if origin else {})
    if status == 200:
        guard.check_names(headers)
    else:
        with pytest.raises(serve.Problem) as caught:
            guard.check_names(headers)
        assert caught.value.status == status and caught.value.code == "host_not_allowed"


def test_a_foreign_host_or_origin_is_403_on_every_path(running):
    for path in ("/", "/health", "/v1/models", "/nowhere"):
        error_of(
            HTTP.get(running.url + path, headers={"Host": "evil.example"}), 403, None, "host_not_allowed"
        )
    answer = post(running, {"prompt": "a"}, headers={"Origin": "https://evil.example"})
    assert "'evil.example' does not name this server" in error_of(answer, 403, None, "host_not_allowed")
    answer = raw(running, b"GET / HTTP/1.0\r\n\r\n")
    assert status_of(answer) == 403


def test_a_large_body_is_rejected_before_it_is_read(running):
    answer = raw(running, HEAD + b"Content-Length: 1048577\r\n\r\n")  # and nothing follows
    assert status_of(answer) == 413
    answer = raw(running, HEAD + b"Content-Length: 1048577\r\nExpect: 100-continue\r\n\r\n")
    assert status_of(answer) == 413


def test_a_chunked_body_is_read_up_to_the_limit(running):
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    sent = 0
    with socket.create_connection(("127.0.0.1", running.port), timeout=SECONDS) as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        try:
            for _ in range(160):  # 10 MiB
                connection.sendall(chunk)
                sent += 65536
        except OSError:
            pass  # the server has closed the connection
        answer = read_on(connection)
    assert status_of(answer) == 413
    just = b"10001\r\n" + b"x" * 65537 + b"\r\n"
    assert status_of(raw(running, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 15, just)) == 413


def test_a_body_of_exactly_the_limit_is_read(running):
    body = b'{"prompt": "a", "max_tokens": 1, "user": "' + b"x" * (2**20 - 44) + b'"}'
    assert len(body) == 2**20
    headers = {"Content-Type": "application/json"}
    assert HTTP.post(f"{running.url}/v1/completions", content=body, headers=headers).status_code == 200


def test_a_slow_body_is_408(serving, make_served):
    with serving(make_served(body_seconds=0.3)) as running:
        assert status_of(raw(running, HEAD + b"Content-Length: 20\r\n\r\n", b'{"pro')) == 408
        assert status_of(raw(running, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n{\r\n")) == 408
        assert post(running, {"prompt": "a", "max_tokens": 1}).status_code == 200


def test_a_client_that_disconnects_within_its_body_is_forgotten(serving, make_served, scripted, capfd):
    scripted("ok")
    with serving(make_served()) as running:
        for begun in (b'{"prom', b'{"prompt": "left"}'):
            with socket.create_connection(("127.0.0.1", running.port), timeout=SECONDS) as connection:
                connection.sendall(HEAD + b"Content-Length: 99\r\n\r\n" + begun)
        assert post(running, {"prompt": "a", "max_tokens": 1}).status_code == 200
        assert [request.prompt for request in running.served.worker.engine.requests] == [[97]]
    assert capfd.readouterr().err == ""


# --- failures and shutdown


def test_an_internal_error_has_the_apis_shape(running, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(running.served, "encode", lambda ask: 1 / 0)
    assert error_of(post(running, {"prompt": "x"}), 500) == "the server failed"
    wait_for(lambda: sys.stderr.getvalue().endswith("\n"))  # printed after the response
    assert sys.stderr.getvalue() == "lm serve: '/v1/completions': division by zero\n"
    monkeypatch.undo()
    assert post(running, {"prompt": "x", "max_tokens": 1}).status_code == 200


def test_requests_that_still_run_when_the_server_stops_get_an_error(
    scripted, serving, make_served, monkeypatch
):
    monkeypatch.setattr(serve, "GRACE", 0.1)
    permits = threading.Semaphore(2)
    scripted("0123456789", permits)
    with serving(make_served(max_batch=1)) as running:
        stream = client_of(running).completions.create(model="drawn", prompt="x", max_tokens=9, stream=True)
        assert next(stream).choices[0].text == "0"
        waiting = start(running, 2)
        running.server.should_exit = True
        with pytest.raises(openai.APIError, match=r"^the server is stopping$"):
            list(stream)
        assert error_of(waiting.wait(), 503) == "the server is stopping"
        permits.release(100)


# --- the command


@pytest.fixture
def started(command, served_folder):
    """started(...): `lm serve` on a free port -> its port and process id, once it listens"""
    pids = []

    def start(*arguments):
        pids.append(command.start("serve", served_folder, "--port", "0", "--device", "cpu", *arguments))
        out = command.folder / "stdout"
        wait_for(lambda: (out.exists() and out.read_text().endswith("\n")) or not command_runs(command))
        line = out.read_text()
        assert line, (command.folder / "stderr").read_text()
        return int(line.partition("http://")[2].partition("/")[0].rpartition(":")[2]), pids[-1]

    return start


def command_runs(command):
    try:
        os.kill(command.pid, 0)
        return True
    except ProcessLookupError:
        return False


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"])
def test_a_signal_stops_the_server_after_running_completions(started, command, alone, number, status):
    port, pid = started()
    client = client_of(SimpleNamespace(url=f"http://127.0.0.1:{port}"))
    stream = client.completions.create(model="drawn", prompt="x", max_tokens=60, seed=3, stream=True)
    pieces = [next(stream)]
    os.kill(pid, number)
    assert joined([*pieces, *stream])[0][0] == alone("x", 60, seed=3)[0]
    ended = command.wait()
    assert (ended.code, ended.err) == (status, "")
    address = f"http://127.0.0.1:{port}"
    assert (
        ended.out.decode() == f"drawn: chat at {address}/, OpenAI API at {address}/v1; press Ctrl-C to stop\n"
    )
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port))


def test_a_public_host_gives_one_warning_and_names_are_still_checked(started, command):
    port, pid = started("--host", "0.0.0.0")
    assert HTTP.get(f"http://127.0.0.1:{port}/health", headers={"Host": "evil.example"}).status_code == 403
    assert HTTP.get(f"http://127.0.0.1:{port}/health", headers={"Host": "10.1.2.3"}).status_code == 200
    os.kill(pid, signal.SIGTERM)
    ended = command.wait()
    assert ended.code == 143
    assert ended.err == "lm: warning: host 0.0.0.0: anyone who reaches this machine can use the model\n"


def test_it_listens_on_the_loopback_address_by_default(command):
    assert cli.Serve(run=None).host == "127.0.0.1"
    assert serve.is_loopback("127.0.0.1") and serve.is_loopback("::1") and serve.is_loopback("localhost")
    assert not any(map(serve.is_loopback, ["0.0.0.0", "::", "192.168.0.1", "my.name"]))


def test_a_port_in_use_is_one_line(command, served_folder):
    with serve.listen("127.0.0.1", 0) as other:
        port = other.getsockname()[1]
        ended = command("serve", served_folder, "--port", port)
    assert (ended.code, ended.out) == (2, b"")
    assert ended.err == f"lm serve: 127.0.0.1, port {port}: cannot listen: Address already in use\n"


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--port", "70000"], "port=70000 must be in 0..65535"),
        (["--port", "-1"], "port=-1 must be in 0..65535"),
        (["--max-batch", "0"], "max_batch=0 must be at least 1"),
        (["--max-queue", "-1"], "max_queue=-1 must be at least 0"),
        (["--max-batch", "1000000000"], "max_batch=1,000,000,000 sequences take at least "),
        (["--max-batch", "9" * 20], "this machine has "),
        (["--max-queue", "257"], "max_queue=257 must be at most 256, the connections that may be open"),
        (["--max-queue", "1000000000"], "max_queue=1000000000 must be at most 256"),
        (["--max-seconds", "0"], "max_seconds=0.0 must be at least 1"),
        (["--max-seconds", "nan"], "max_seconds=nan must be at least 1"),
        (["--max-seconds", "inf"], "max_seconds=inf must be at least 1"),
        (["--host", "no.such.host.invalid"], "no.such.host.invalid, port 0: cannot listen: "),
        (["--host", "x" * 300], ", port 0: cannot listen: "),
        (["--host", "1.2.3.4"], "1.2.3.4, port 0: cannot listen: Cannot assign"),
        (["--device", "cuda:77"], "device 'cuda:77' was not found"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_wrong_options_are_one_line(command, served_folder, arguments, told):
    ended = command(
        "serve", served_folder, *(["--port", "0"] if "--port" not in arguments else []), *arguments
    )
    assert ended.code == 2 and ended.out == b"" and ended.err.count("\n") == 1, ended.err
    assert ended.err.startswith("lm serve: ") and told in ended.err


def test_a_batch_must_fit_into_memory(served_folder, tiny, monkeypatch):
    config = lm.Config.load(served_folder / "config.toml").model
    per_token = 3 * (8 + 4) * 2  # layers, latent and rope key, bytes of bf16
    room = 5 * (8192 + 64 * per_token)
    monkeypatch.setattr("lm.machine.memory", lambda: room)
    serve.check_batch(5, config)
    with pytest.raises(ValueError, match="max_batch=6 sequences take at least"):
        serve.check_batch(6, config)
    serve.check_batch(5, tiny(attention={"kind": "own:Attention"}).model)
    monkeypatch.setattr("lm.machine.memory", lambda: 0)  # unknown
    serve.check_batch(6, config)


def test_no_model_is_one_line(command, tmp_path):
    ended = command("serve", tmp_path / "absent", "--port", "0")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    told = "is not a folder; expected a run, a saved model or a Hugging Face folder\n"
    assert ended.err == f"lm serve: {tmp_path / 'absent'}: {told}"


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn"])
def test_a_missing_library_is_named_with_its_extra(command, served_folder, missing):
    ended = command("serve", served_folder, before=("hide", missing))
    assert ended.code == 2
    assert ended.err == f"lm serve: needs {missing}: pip install -c constraints.txt -e '.[lm,serve]'\n"
