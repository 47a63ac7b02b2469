"""Clients for the server's tests: the official one, plain HTTP, and posts on a thread."""

import threading
import time

import httpx
import openai

SECONDS = 60  # before a test gives up waiting
# shared, since creating one takes longer than most requests; no connection is used twice
HTTP = httpx.Client(
    timeout=SECONDS, trust_env=False, verify=False, limits=httpx.Limits(max_keepalive_connections=0)
)
HI = [{"role": "user", "content": "hi"}]
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def client_of(running):
    base_url = f"{running.url}/v1"
    return openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=SECONDS, http_client=HTTP)


def wait_for(found):
    until = time.monotonic() + SECONDS
    while not found():
        assert time.monotonic() < until, "timed out"
        time.sleep(0.002)


def error_of(response, status, param=None, code=None):
    """Check that a response is an error in the API's shape -> its message"""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert (error["param"], error["code"]) == (param, code), error
    return error["message"]


def post(running, body, path="completions", **more):
    return HTTP.post(f"{running.url}/v1/{path}", json=body, **more)


def joined(stream):
    """Pieces of a stream -> (each choice's text, each choice's finish reason, the last piece's usage)"""
    texts, reasons, usage = {}, {}, None
    for piece in stream:
        usage = piece.usage or usage
        for choice in piece.choices:
            assert choice.index not in reasons
            more = choice.delta.content if hasattr(choice, "delta") else choice.text
            texts[choice.index] = texts.get(choice.index, "") + more
            if choice.finish_reason is not None:
                reasons[choice.index] = choice.finish_reason
    return [texts[i] for i in sorted(texts)], [reasons[i] for i in sorted(reasons)], usage


class Posted:
    """A request sent from another thread."""

    def __init__(self, running, **body):
        self.answer = None
        self.thread = threading.Thread(target=self.post, args=(running, {"prompt": "x", **body}), daemon=True)
        self.thread.start()

    def post(self, running, body):
        self.answer = post(running, body)

    def wait(self):
        self.thread.join(timeout=SECONDS)
        return self.answer


def jobs_of(running):
    return running.served.worker.jobs


def start(running, jobs, **body):
    """Post, and wait until the server has `jobs` requests."""
    posted = Posted(running, **body)
    wait_for(lambda: len(jobs_of(running)) == jobs)
    return posted
