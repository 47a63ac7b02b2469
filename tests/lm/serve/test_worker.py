"""Whole characters and stop strings, the queue, disconnects, time limits and engine failures."""

import copy
import itertools
import socket
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import openai
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lm.inference.engine import Engine
from lm.serve import answers
from lm.serve.worker import Full, Job, Visible
from lm.tokenizer import ByteTokenizer
from tests.lm.serve.client import (
    HEAD,
    HTTP,
    SECONDS,
    Posted,
    client_of,
    error_of,
    jobs_of,
    joined,
    post,
    start,
    wait_for,
)

# --- text: whole characters, stop strings


def full_text(pieces, stops):
    """What Visible must show, found character by character -> (text, whether a stop string ended it)"""
    text = ""
    for character in b"".join(pieces).decode("utf-8", "replace"):
        text += character
        ended = [stop for stop in stops if text.endswith(stop)]
        if ended:
            return text[: -max(map(len, ended))], True
    return text, False


class Pieces:
    """A tokenizer whose token i is pieces[i]."""

    def __init__(self, pieces):
        self.pieces = pieces

    def writer(self):
        return lambda token: self.pieces[token]


@given(
    st.lists(st.sampled_from(["a", "ab", "ba", "é", "🙂", "b\n"]).map(str.encode) | st.binary(max_size=3)),
    st.lists(st.sampled_from(["a", "aab", "ab", "b\n", "é", "éa🙂", "bab"]), max_size=4),
)
def test_visible_text_does_not_depend_on_token_boundaries(pieces, stops):
    visible, shown = Visible(Pieces(pieces), stops), []
    for token in range(len(pieces)):
        shown.append(visible.add(token))
        if visible.stopped:
            break
    shown.append(visible.end())
    assert ("".join(shown), visible.stopped) == full_text(pieces, stops)


def test_only_a_possible_stop_string_is_held_back():
    visible = Visible(ByteTokenizer(), ["END", "!!"])
    shown = [visible.add(token) for token in "aENxENED! é".encode()]
    assert shown == ["a", "", "", "ENx", "", "", "EN", "ED", "", "! ", "", "é"]
    assert visible.end() == "" and not visible.stopped


SCRIPT = "Ça va? 🙂 Oui.\nEND of it, and more\nthat nobody asked for"


@pytest.fixture(scope="module")
def script(serving, make_served, scripted_with):
    """A server whose answers are SCRIPT."""
    with pytest.MonkeyPatch.context() as patch:
        scripted_with(patch, SCRIPT)
        served = make_served()
    with serving(served) as running:
        yield running


@pytest.mark.parametrize(
    "stop, kept",
    [
        (None, SCRIPT),
        ("never", SCRIPT),
        ("END", "Ça va? 🙂 Oui.\n"),
        (["more", "🙂"], "Ça va? "),
        (["\nEND of", "of it"], "Ça va? 🙂 Oui."),
        ("Ç", ""),
        (["a", "va", "for"], "Ç"),
        ("r", "Ça va? 🙂 Oui.\nEND of it, and mo"),
        ("forever", SCRIPT),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_cut_the_text_and_stop_decoding(script, stop, kept, stream):
    asked = {"model": "drawn", "prompt": "x", "max_tokens": 200, "stop": stop, "n": 2, "stream": stream}
    if stream:
        asked["stream_options"] = {"include_usage": True}
    answer = client_of(script).completions.create(**asked)
    if stream:
        texts, reasons, usage = joined(answer)
    else:
        texts = [choice.text for choice in answer.choices]
        reasons, usage = [choice.finish_reason for choice in answer.choices], answer.usage
    assert texts == [kept] * 2 and reasons == ["stop"] * 2
    through = len(SCRIPT.encode())
    if kept != SCRIPT:
        stops = [stop] if isinstance(stop, str) else stop
        through = min(len(SCRIPT[: SCRIPT.find(s) + len(s)].encode()) for s in stops if s in SCRIPT)
    assert usage.completion_tokens == 2 * through


def test_only_whole_characters_are_sent(serving, make_served, scripted):
    scripted("é🙂")
    with serving(make_served()) as running:
        asked = {"model": "drawn", "prompt": "x", "max_tokens": 6, "stream": True}
        pieces = [p.choices[0].text for p in client_of(running).completions.create(**asked)]
        assert pieces == ["é", "🙂"]
        asked["max_tokens"] = 5
        pieces = [p.choices[0].text for p in client_of(running).completions.create(**asked)]
        assert pieces == ["é", "\ufffd"]
        [choice] = (
            client_of(running).completions.create(**{**asked, "stop": "\ufffd", "stream": False}).choices
        )
        assert (choice.text, choice.finish_reason) == ("é", "stop")


# --- the queue, disconnects, time limits, failures


def test_the_ninth_waiting_request_is_told_to_try_again(held):
    running, permits = held(max_batch=1)
    posted = [start(running, 1 + i, max_tokens=5) for i in range(9)]
    for more in ({}, {"stream": True}, {"n": 2}):
        answer = post(running, {"prompt": "x", **more})
        assert error_of(answer, 503) == "the queue is full; try again later"
        assert int(answer.headers["retry-after"]) >= 1
    assert HTTP.get(f"{running.url}/health").json() == {"status": "ok", "requests": 9, "waiting": 8}
    permits.release(9 * 5)
    assert [each.wait().json()["choices"][0]["text"] for each in posted] == ["01234"] * 9
    permits.release(5)
    assert post(running, {"prompt": "x", "max_tokens": 5}).status_code == 200


def test_a_request_that_fits_into_the_next_step_does_not_wait(held):
    running, permits = held(max_batch=3, max_queue=0)
    posted = [start(running, 1, max_tokens=2, n=2), start(running, 2, max_tokens=2)]
    error_of(post(running, {"prompt": "x"}), 503)
    permits.release(100)
    assert [each.wait().status_code for each in posted] == [200, 200]
    wait_for(lambda: not jobs_of(running))
    assert post(running, {"prompt": "x", "max_tokens": 2}).status_code == 200


def test_a_request_that_does_not_fit_into_the_cache_waits(held):
    running, permits = held(max_batch=8, max_queue=1)
    answers.Engine.room = 1
    first = start(running, 1, max_tokens=90)
    second = start(running, 2, max_tokens=90)
    wait_for(lambda: permits.release() or jobs_of(running)[1].passed_over)
    assert not jobs_of(running)[1].started
    error_of(post(running, {"prompt": "x"}), 503)
    permits.release(1000)
    assert [first.wait().status_code, second.wait().status_code] == [200, 200]


@pytest.mark.parametrize("n", [1, 2])
def test_a_closed_stream_frees_its_place_within_one_token(held, n):
    running, permits = held()
    permits.release(3)
    asked = {"model": "drawn", "prompt": "x", "n": n, "max_tokens": 90, "stream": True}
    stream = client_of(running).completions.create(**asked)
    assert len(list(itertools.islice(stream, 3 * n))) == 3 * n
    stream.response.close()
    wait_for(lambda: not jobs_of(running))
    engine = running.served.worker.engine
    permits.release(1)
    wait_for(lambda: not engine.busy)
    assert [(len(request.tokens) <= 4, request.finished) for request in engine.requests] == [
        (True, "cancelled")
    ] * n
    assert engine.steps <= 4


def test_a_disconnected_request_is_cancelled_within_one_token(held):
    running, permits = held()
    body = b'{"prompt": "x", "max_tokens": 90}'
    with socket.create_connection(("127.0.0.1", running.port), timeout=SECONDS) as connection:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        permits.release(3)
        engine = running.served.worker.engine
        wait_for(lambda: engine.steps == 3)
    wait_for(lambda: not jobs_of(running))
    permits.release(1)
    wait_for(lambda: not engine.busy)
    assert engine.steps <= 4 and engine.requests[0].finished == "cancelled"


def test_a_waiting_client_may_disconnect(held):
    running, permits = held(max_batch=1, max_queue=1)
    first = start(running, 1, max_tokens=5)
    with socket.create_connection(("127.0.0.1", running.port), timeout=SECONDS) as connection:
        connection.sendall(HEAD + b'Content-Length: 15\r\n\r\n{"prompt": "x"}')
        wait_for(lambda: len(jobs_of(running)) == 2)
    wait_for(lambda: len(jobs_of(running)) == 1)
    third = start(running, 2, max_tokens=5)
    permits.release(20)
    assert [each.wait().json()["choices"][0]["text"] for each in (first, third)] == ["01234"] * 2
    written = [len(request.tokens) for request in running.served.worker.engine.requests]
    assert written in ([5, 0, 5], [5, 5])  # cancelled in the engine's queue, or before it got there


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_only_its_own_sequence(held, stream):
    running, permits = held("0123456789" * 2)
    engine = running.served.worker.engine
    engine.later = True  # the second completion begins with 4
    pool = ThreadPoolExecutor(1)
    asked = {"model": "drawn", "prompt": ["x", "xxxxx"], "max_tokens": 12, "stop": "3", "stream": stream}
    create = client_of(running).completions.create
    answer = pool.submit(lambda: joined(create(**asked)) if stream else create(**asked))
    permits.release(4)
    inbox = running.served.worker.inbox
    # the cancellation is in the inbox, or the engine has seen it already
    wait_for(lambda: engine.steps == 4 and (engine.requests[0].finished or not inbox.empty()))
    permits.release(1)
    wait_for(lambda: engine.requests[0].finished)
    assert engine.requests[0].finished == "cancelled" and len(engine.requests[0].tokens) in (4, 5)
    assert engine.requests[1].finished is None
    permits.release(20)
    answer = answer.result()
    texts = answer[0] if stream else [choice.text for choice in answer.choices]
    assert texts == ["012", "456789012"]
    assert (answer[1] if stream else [choice.finish_reason for choice in answer.choices]) == ["stop"] * 2
    if not stream:
        assert answer.usage.completion_tokens == 4 + 10
    wait_for(lambda: not engine.busy and not running.served.worker.running)


def test_a_job_whose_sequences_are_all_cancelled_is_removed_at_once(scripted, make_served):
    scripted("0123")
    worker = make_served().worker
    one, other = Job({0, 1}), Job({0})
    for job in (one, other):
        worker.take(job, [{"prompt": [1], "max_new_tokens": 4} for _ in job.open])
    worker.take(one, 1)
    assert list(worker.running) == [one, other] and list(worker.running[one]) == [0]
    worker.take(one, 0)
    assert list(worker.running) == [other]
    worker.take(one, 0)  # again, as after its end
    assert [request.finished for request in worker.engine.requests] == ["cancelled", "cancelled", None]


def test_several_tokens_in_one_step_are_cut_and_counted_correctly(held):
    running, permits = held()
    running.served.worker.engine.stride = 7
    permits.release(100)
    answer = post(running, {"prompt": "x", "max_tokens": 50, "stop": "89", "n": 2}).json()
    assert [choice["text"] for choice in answer["choices"]] == ["01234567"] * 2
    assert answer["usage"]["completion_tokens"] == 2 * 10
    answer = post(running, {"prompt": "x", "max_tokens": 50}).json()
    assert answer["choices"][0]["text"] == "0123456789" * 5
    assert answer["usage"] == {"prompt_tokens": 1, "completion_tokens": 50, "total_tokens": 51}


def test_a_finished_sequence_frees_its_place(scripted, make_served):
    scripted("0")
    worker = make_served(max_batch=3, max_queue=0).worker
    with worker.job(2) as job:
        worker.tell([(job, (0, [48], None))])
        assert worker.count() == (1, 0)
        worker.tell([(job, (0, [], "length"))])
        assert worker.count() == (2, 0)
        with worker.job(2), pytest.raises(Full), worker.job(1):
            pass
    assert worker.count() == (3, 0)


def test_a_request_that_waits_too_long_gets_an_error(held):
    running, _ = held(max_seconds=0.2)
    for stream in (False, True):
        told = error_of(post(running, {"prompt": "x", "stream": stream}), 503)
        assert told == "timed out in the queue; try again later"
    wait_for(lambda: not jobs_of(running))


def test_a_request_that_takes_too_long_keeps_its_text(held):
    running, permits = held("0123456789" * 9, max_seconds=1)
    permits.release(4)
    asked = {"model": "drawn", "prompt": "x", "max_tokens": 50}
    stream = client_of(running).completions.create(stream=True, **asked)
    assert [next(stream).choices[0].text for _ in range(4)] == list("0123")
    assert joined(stream)[:2] == ([""], ["length"])
    wait_for(lambda: not jobs_of(running))
    permits.release(1)  # for the step in progress
    wait_for(lambda: running.served.worker.engine.steps == 5)
    permits.release(3)
    whole = client_of(running).completions.create(n=2, **asked)
    assert [(choice.text, choice.finish_reason) for choice in whole.choices] == [("012", "length")] * 2
    assert whole.usage.completion_tokens == 6


def test_a_client_that_does_not_read_is_disconnected(held, monkeypatch):
    monkeypatch.setattr(answers, "SLACK", 0.5)
    running, permits = held("x" * 50_000, max_seconds=1, send_buffer=4096)
    permits.release(100_000)
    body = b'{"prompt": "x", "max_tokens": 4096, "n": 8, "stream": true}'
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", running.port))
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        wait_for(lambda: jobs_of(running))
        wait_for(lambda: not jobs_of(running))
    assert post(running, {"prompt": "x", "max_tokens": 2}).status_code == 200


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_an_engine_failure_ends_running_requests_and_the_server_goes_on(held, capfd, kind):
    running, permits = held(max_batch=1)
    engine = running.served.worker.engine

    def fail():
        raise kind("out of\nmemory")

    permits.release(2)
    stream = client_of(running).completions.create(model="drawn", prompt="x", max_tokens=50, stream=True)
    assert next(stream).choices[0].text == "0"
    wait_for(lambda: engine.steps == 2)
    waiting = start(running, 2, max_tokens=5)
    wait_for(lambda: not running.served.worker.inbox.empty())  # until the held step ends
    engine.step = fail
    permits.release(1)
    with pytest.raises(openai.APIError, match=r"^the model failed: out of$"):
        list(stream)
    assert error_of(waiting.wait(), 500) == "the model failed: out of"
    assert running.served.worker.engine is None and running.served.worker.running == {}
    permits.release(5)
    assert post(running, {"prompt": "x", "max_tokens": 5}).json()["choices"][0]["text"] == "01234"
    assert running.served.worker.engine is not engine
    assert capfd.readouterr().err.splitlines() == ["lm serve: the model failed: out of"] * 2


def test_a_request_that_the_engine_rejects_is_400(held):
    running, _ = held()
    engine = running.served.worker.engine
    submit = engine.submit

    def second_is_too_long(**arguments):
        if engine.requests:
            raise ValueError("the cache holds 64 tokens")
        return submit(**arguments)

    engine.submit = second_is_too_long
    for stream in (False, True):
        engine.requests.clear()
        answer = post(running, {"prompt": "x", "n": 2, "stream": stream})
        assert error_of(answer, 400, "max_tokens") == "max_tokens: the cache holds 64 tokens"
        assert [request.finished for request in engine.requests] == ["cancelled"]
    wait_for(lambda: not jobs_of(running))


def test_creating_a_new_engine_is_retried_at_the_next_request(held):
    running, permits = held()
    worker = running.served.worker
    make, worker.engine = worker.make_engine, None

    for error, told in ((MemoryError(), "MemoryError"), (ValueError("no room"), "no room")):
        worker.make_engine = mock.Mock(side_effect=error)
        assert error_of(post(running, {"prompt": "x"}), 500) == f"the model failed: {told}"
    worker.make_engine = make
    permits.release(3)
    assert post(running, {"prompt": "x", "max_tokens": 3}).json()["choices"][0]["text"] == "012"


def test_nan_logits_fail_only_their_own_request(serving, served_folder, make_served, alone, capfd):
    served = make_served()
    worker = served.worker
    broken, text = copy.deepcopy(worker.engine.model), alone("to be", 60, seed=3)[0]
    mark = next(chr(code) for code in range(33, 127) if chr(code) not in text + "to be")
    with torch.no_grad():
        broken.embedding.weight[ord(mark)] = float("nan")
    worker.engine = Engine(broken, 8)
    told = "the model failed: the largest logit after 2 tokens is nan; it must be finite"
    with serving(served) as running:
        long = Posted(running, prompt="to be", max_tokens=60, seed=3)
        for sampling in ({"temperature": 0}, {"seed": 1}):
            for more in ({}, {"stream": True}, {"n": 2}, {"prompt": ["a", f"a{mark}"]}):
                answer = post(running, {"prompt": f"a{mark}", "max_tokens": 5, **sampling, **more})
                assert error_of(answer, 500) == told
        assert long.wait().json()["choices"][0]["text"] == text
        wait_for(lambda: not jobs_of(running) and not worker.engine.busy)
        assert worker.engine.model is broken  # not replaced
        assert worker.running == {}
    assert capfd.readouterr().err.splitlines() == [f"lm serve: {told}"] * 8


def test_an_error_after_some_tokens_ends_a_stream(held):
    running, permits = held()
    engine = running.served.worker.engine
    permits.release(2)
    stream = client_of(running).completions.create(model="drawn", prompt="x", max_tokens=50, stream=True)
    assert [next(stream).choices[0].text for _ in range(2)] == ["0", "1"]
    request, step = engine.requests[0], engine.step

    def fail():
        step()
        request.error, request.finished = "the largest logit is nan", "error"

    engine.step = fail  # the step in progress is still sound
    permits.release(2)
    with pytest.raises(openai.APIError, match=r"^the model failed: the largest logit is nan$"):
        list(stream)
    engine.step = step
    permits.release(3)
    assert post(running, {"prompt": "x", "max_tokens": 3}).json()["choices"][0]["text"] == "012"
    assert running.served.worker.engine is engine
