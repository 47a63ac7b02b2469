"""The server, asked by the official client, by plain HTTP and by raw sockets."""

import io
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import SimpleNamespace
from unittest import mock

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lm
from lm import cli
from lm.inference import generate as decode
from lm.serve import answers, protocol
from lm.serve import app as serve
from lm.serve.worker import Full, Job, Visible
from lm.tokenizer import ByteTokenizer

SECONDS = 60  # after which something has not come at all
# one for all: making one takes longer than most requests; and no connection is used twice
HTTP = httpx.Client(
    timeout=SECONDS, trust_env=False, verify=False, limits=httpx.Limits(max_keepalive_connections=0)
)


@pytest.fixture(scope="module")
def running(serving, make_served):
    """A server of the drawn model."""
    with serving(make_served()) as running:
        yield running


@pytest.fixture(scope="module")
def client(running):
    return client_of(running)


@pytest.fixture(scope="module")
def alone(served_folder):
    """alone(prompt, max_new_tokens, ...): the text that the model writes by itself, and why it ends."""
    model, tokenizer = lm.load(served_folder), ByteTokenizer()

    def write(prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=1.0, seed=0):
        tokens = [tokenizer.encode(prompt)]
        options = (max_new_tokens, temperature, top_k, top_p, seed, 96)
        made = [int(token) for token in decode.stream(model, tokens, *options)]
        kept = list(itertools.takewhile(lambda token: token not in tokenizer.ends, made))
        return bytes(kept).decode("utf-8", "replace"), "stop" if len(kept) < len(made) else "length"

    return write


def client_of(running):
    base_url = f"{running.url}/v1"
    return openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=SECONDS, http_client=HTTP)


def wait_for(found):
    until = time.monotonic() + SECONDS
    while not found():
        assert time.monotonic() < until, "nothing came"
        time.sleep(0.002)


def error_of(response, status, param=None, code=None):
    """The response is an error in the API's shape -> its message"""
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
    """Pieces of a stream -> the text of each choice, why each ended, the usage of the last piece"""
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


HI = [{"role": "user", "content": "hi"}]

# --- what the model writes


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"seed": 3}, {"seed": 3, "top_p": 0.7}], ids=str)
def test_a_completion_is_what_the_model_writes_alone(client, alone, sampling):
    answer = client.completions.create(model="drawn", prompt="to be", max_tokens=30, **sampling)
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason) == alone("to be", 30, **sampling)
    assert (answer.object, answer.model, choice.index) == ("text_completion", "drawn", 0)
    assert answer.usage.prompt_tokens == 5 and answer.usage.total_tokens == 5 + answer.usage.completion_tokens
    if choice.finish_reason == "length":
        assert answer.usage.completion_tokens == 30


def test_a_chat_without_a_template_goes_on_from_its_lines(client, alone):
    said = [("system", "ab"), ("user", "cd"), ("assistant", "é"), ("user", "ef")]
    messages = [{"role": role, "content": content} for role, content in said]
    answer = client.chat.completions.create(model="drawn", messages=messages, max_tokens=20, seed=1)
    [choice] = answer.choices
    assert (choice.message.content, choice.finish_reason) == alone("ab\ncd\né\nef\n", 20, seed=1)
    assert (answer.object, choice.message.role) == ("chat.completion", "assistant")
    assert answer.usage.prompt_tokens == len("ab\ncd\né\nef\n".encode())
    parts = [{"type": "text", "text": "c"}, {"type": "text", "text": "d"}]
    messages[1] = {"role": "user", "content": parts}
    again = client.chat.completions.create(model="drawn", messages=messages, max_completion_tokens=20, seed=1)
    assert again.choices[0].message.content == choice.message.content


def test_a_stream_says_the_same_in_pieces(client, alone):
    asked = {"model": "drawn", "max_tokens": 40, "seed": 5, "stream": True}
    pieces = list(client.completions.create(prompt="to be", **asked))
    texts, reasons, usage = joined(pieces)
    assert (texts[0], reasons[0]) == alone("to be", 40, seed=5) and len(pieces) > 20 and usage is None
    messages = [{"role": "user", "content": "to be"}]
    options = {"include_usage": True}
    pieces = list(client.chat.completions.create(messages=messages, stream_options=options, **asked))
    texts, reasons, usage = joined(pieces)
    assert (texts[0], reasons[0]) == alone("to be\n", 40, seed=5)
    assert [piece.choices[0].delta.role for piece in pieces[:2]] == ["assistant", None]
    assert {piece.object for piece in pieces} == {"chat.completion.chunk"}
    assert len({piece.id for piece in pieces}) == 1 and pieces[-1].choices == []
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (6, 40, 46)


def test_a_stream_is_server_sent_events_that_end_in_done(running):
    body = {"prompt": "a", "max_tokens": 3, "temperature": 0, "stream": True}
    answer = post(running, body)
    assert answer.headers["content-type"] == "text/event-stream"
    *events, done, rest = answer.text.split("\n\n")
    assert done == "data: [DONE]" and rest == "" and all(event.startswith("data: {") for event in events)
    assert "usage" not in json.loads(events[0].removeprefix("data: "))
    counted = post(running, {**body, "stream_options": {"include_usage": True}}).text.split("\n\n")
    assert json.loads(counted[0].removeprefix("data: "))["usage"] is None


def test_n_texts_of_several_prompts_each_as_if_alone(running, client, alone):
    answer = client.completions.create(model="drawn", prompt=["to", "be é"], n=3, max_tokens=12, seed=7)
    wanted = [alone(prompt, 12, seed=7 + i) for prompt in ("to", "be é") for i in range(3)]
    assert [(choice.text, choice.finish_reason) for choice in answer.choices] == wanted
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert len({text for text, _ in wanted}) == 6 and answer.usage.prompt_tokens == 2 + 5
    stream = client.completions.create(
        model="drawn", prompt=["to", "be é"], n=3, max_tokens=12, seed=7, stream=True
    )
    assert joined(stream)[:2] == ([text for text, _ in wanted], [reason for _, reason in wanted])
    wait_for(lambda: running.served.worker.running == {})


def test_token_ids_are_prompts_too(client, alone):
    for prompt, texts in ((list(b"to be"), 1), ([list(b"to be"), list(b"to be")], 2)):
        answer = client.completions.create(model="drawn", prompt=prompt, max_tokens=9, temperature=0)
        assert [choice.text for choice in answer.choices] == [alone("to be", 9, temperature=0)[0]] * texts


def test_top_k_is_an_extension(client, alone):
    for top_k in (1, 3, 10**30):
        answer = client.completions.create(
            model="drawn", prompt="to be", max_tokens=9, seed=0, extra_body={"top_k": top_k}
        )
        assert answer.choices[0].text == alone("to be", 9, seed=0, top_k=min(top_k, 256))[0]


def test_the_least_of_every_option_is_taken(client, alone):
    greedy = alone("to be", 9, temperature=0)[0]
    for option in ("temperature", "top_p"):
        asked = {"model": "drawn", "prompt": "to be", "max_tokens": 9, "seed": 0, option: 5e-324}
        assert client.completions.create(**asked).choices[0].text == greedy


def test_a_seed_repeats_and_none_does_not(client):
    def write(**seed):
        return client.completions.create(model="drawn", prompt="x", max_tokens=20, **seed).choices[0].text

    assert write(seed=2**63 - 1, n=2) == write(seed=2**63 - 1)
    assert write() != write()


def test_lengths_that_nobody_names(client, running):
    assert client.completions.create(model="drawn", prompt="x", temperature=0).usage.completion_tokens == 16
    [chat] = running.served.arguments(protocol.Chat(messages=HI, top_k=10**30), [[1]])
    assert (chat["max_new_tokens"], chat["top_k"]) == (1024, 256)


def test_an_answer_goes_on_beyond_the_context_as_lm_generate_does(client, alone):
    answer = client.completions.create(model="drawn", prompt="p" * 96, max_tokens=150, seed=0)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == alone("p" * 96, 150, seed=0)


def test_null_is_the_same_as_left_out(running, alone):
    names = [
        "model",
        "temperature",
        "top_p",
        "top_k",
        "n",
        "stop",
        "stream",
        "stream_options",
        "user",
        "logprobs",
    ]
    answer = post(running, {"prompt": "to be", "max_tokens": 5, "seed": 4, **dict.fromkeys(names)})
    assert answer.json()["choices"][0]["text"] == alone("to be", 5, seed=4)[0]


def test_several_clients_at_once_get_the_text_that_each_gets_alone(client, alone):
    asked = {"model": "drawn", "max_tokens": 25}

    def write(i):
        prompt = "abcdefgh"[: 1 + i % 8]
        if i % 2:
            return joined(client.completions.create(prompt=prompt, seed=i, stream=True, **asked))[0][0]
        return client.completions.create(prompt=prompt, seed=i, **asked).choices[0].text

    with ThreadPoolExecutor(10) as pool:
        texts = list(pool.map(write, range(10)))
    assert texts == [alone("abcdefgh"[: 1 + i % 8], 25, seed=i)[0] for i in range(10)]


def test_the_model_ends_a_text_itself(serving, make_served, alone):
    text = alone("x", 40, seed=3)[0]
    end = next(character for character in text[5:] if character.isascii())
    served = make_served()
    served.tokenizer.ends = frozenset(end.encode())
    with serving(served) as running:
        answer = client_of(running).completions.create(model="drawn", prompt="x", max_tokens=40, seed=3)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text.partition(end)[0], "stop")
    assert 0 < answer.usage.completion_tokens < 40


# --- text: whole characters, stop strings


def full_text(pieces, stops):
    """What Visible must show in all, from the bytes themselves, one character after the other."""
    text = ""
    for character in b"".join(pieces).decode("utf-8", "replace"):
        text += character
        ended = [stop for stop in stops if text.endswith(stop)]
        if ended:
            return text[: -max(map(len, ended))], True
    return text, False


class Pieces:
    """A tokenizer whose token i is a given piece of bytes."""

    def __init__(self, pieces):
        self.pieces = pieces

    def writer(self):
        return lambda token: self.pieces[token]


@given(
    st.lists(st.sampled_from(["a", "ab", "ba", "é", "🙂", "b\n"]).map(str.encode) | st.binary(max_size=3)),
    st.lists(st.sampled_from(["a", "aab", "ab", "b\n", "é", "éa🙂", "bab"]), max_size=4),
)
def test_what_is_shown_depends_neither_on_tokens_nor_on_pieces(pieces, stops):
    visible, shown = Visible(Pieces(pieces), stops), []
    for token in range(len(pieces)):
        shown.append(visible.add(token))
        if visible.stopped:
            break
    shown.append(visible.end())
    assert ("".join(shown), visible.stopped) == full_text(pieces, stops)


def test_only_what_may_become_a_stop_string_is_held_back():
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
def test_stop_strings_cut_the_text_and_end_the_work(script, stop, kept, stream):
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


def test_a_character_comes_whole_or_not_at_all(serving, make_served, scripted):
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


# --- chat templates


def test_a_chat_template_is_used_where_there_is_one(serving, make_served, monkeypatch):
    served = make_served()
    served.tokenizer.chat_template = (
        "{{ bos }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    served.tokenizer.special = {"bos": "^"}
    seen = []
    encode = served.tokenizer.encode
    served.tokenizer.encode = lambda text, special=True: seen.append((text, special)) or encode(text)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "é"}]
    with serving(served) as running:
        assert post(running, {"messages": messages, "max_tokens": 1}, "chat/completions").status_code == 200
        assert seen == [("^<system>s<user>é", False)]
        served.tokenizer.chat_template = "{{ raise_exception('turns must alternate') }}"
        told = error_of(post(running, {"messages": messages}, "chat/completions"), 400, "messages")
        assert told == "messages: the chat template cannot be used: turns must alternate"


# --- what is asked wrongly


@pytest.mark.parametrize(
    "change, param, told",
    [
        ({"max_tokens": "ten"}, "max_tokens", "max_tokens: input should be a valid integer, got 'ten'"),
        ({"max_tokens": "10"}, "max_tokens", "got '10'"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 1, got -1"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1, got 0"),
        ({"max_tokens": 10**9}, "max_tokens", "max_tokens: 1000000000 is more than 4096"),
        ({"max_tokens": 4097}, "max_tokens", "4097 is more than 4096"),
        ({"max_tokens": 1.5}, "max_tokens", "got 1.5"),
        ({"max_tokens": True}, "max_tokens", "got True"),
        ({"max_tokens": [1]}, "max_tokens", "got [1]"),
        ({"max_completion_tokens": 10**9}, "max_completion_tokens", "is more than 4096"),
        ({"max_completion_tokens": -5}, "max_completion_tokens", "got -5"),
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0, got -0.1"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2, got 2.1"),
        ({"temperature": "hot"}, "temperature", "got 'hot'"),
        ({"temperature": 10**400}, "temperature", "temperature"),
        ({"top_p": 0}, "top_p", "greater than 0, got 0"),
        ({"top_p": 1.1}, "top_p", "less than or equal to 1, got 1.1"),
        ({"top_k": 0}, "top_k", "greater than or equal to 1, got 0"),
        ({"n": 0}, "n", "got 0"),
        ({"n": 9}, "n", "less than or equal to 8, got 9"),
        ({"n": 1000}, "n", "less than or equal to 8, got 1000"),
        ({"seed": -1}, "seed", "got -1"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"seed": "x"}, "seed", "got 'x'"),
        ({"stop": ""}, "stop", "expected a text or up to 4 texts, each of 1 to 256 characters, got ''"),
        ({"stop": ["a", ""]}, "stop", "expected a text or up to 4 texts"),
        ({"stop": list("abcde")}, "stop", "expected a text or up to 4 texts"),
        ({"stop": "x" * 257}, "stop", "xxx..."),
        ({"stop": 3}, "stop", "got 3"),
        ({"stream": "yes"}, "stream", "got 'yes'"),
        ({"stream_options": {"include_usage": 3}}, "stream_options.include_usage", "got 3"),
        ({"stream_options": []}, "stream_options", "got []"),
        ({"model": 3}, "model", "got 3"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_wrong_field_is_named(running, path, change, param, told):
    body = {"prompt": "hi", "messages": HI, **change}
    assert told in error_of(post(running, body, path), 400, param)


@pytest.mark.parametrize(
    "prompt, param, told",
    [
        ("", "prompt", "none of them empty, got ''"),
        ([], "prompt", "none of them empty, got []"),
        (["a", ""], "prompt", "none of them empty"),
        ([[1], []], "prompt", "none of them empty"),
        (["a", 1], "prompt", "got ['a', 1]"),
        ([1, True], "prompt", "got [1, True]"),
        ([-1], "prompt", "got [-1]"),
        ([255, 256], "prompt", "prompt: needs at least one token, each in 0..255"),
        ([2**70], "prompt", "each in 0..255"),
        ({"text": "a"}, "prompt", "got {'text': 'a'}"),
        (["a"] * 65, "prompt", "up to 64 texts"),
        (None, "prompt", "prompt: field required"),
    ],
    ids=lambda value: json.dumps(value)[:30],
)
def test_a_wrong_prompt_is_named(running, prompt, param, told):
    assert told in error_of(post(running, {"prompt": prompt}), 400, param)


@pytest.mark.parametrize(
    "messages, param, told",
    [
        (None, "messages", "messages: field required"),
        ("hi", "messages", "messages: input should be a valid list, got 'hi'"),
        ({}, "messages", "valid list"),
        ([], "messages", "at least 1 item"),
        (["hi"], "messages[0]", "got 'hi'"),
        ([*HI, {"role": "wizard", "content": "a"}], "messages[1].role", "got 'wizard'"),
        ([{"content": "a"}], "messages[0].role", "messages[0].role: field required"),
        ([{"role": "user"}], "messages[0].content", "field required"),
        ([{"role": "user", "content": None}], "messages[0].content", "got None"),
        ([{"role": "user", "content": 3}], "messages[0].content", "expected a text, or a list of parts"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content", "of type text"),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_a_wrong_message_is_named(running, messages, param, told):
    assert told in error_of(post(running, {"messages": messages}, "chat/completions"), 400, param)


def test_a_prompt_longer_than_the_context_is_refused_with_its_code(running, client):
    for prompt in ("p" * 97, ["p", "p" * 97], [[1], [1] * 97]):
        told = error_of(post(running, {"prompt": prompt}), 400, "prompt", "context_length_exceeded")
        assert told == "prompt: 97 tokens; the model's context is 96"
    body = {"messages": [{"role": "user", "content": "p" * 96}]}  # and the end of its line
    told = error_of(post(running, body, "chat/completions"), 400, "messages", "context_length_exceeded")
    assert told.startswith("messages: 97 tokens")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="drawn", prompt="p" * 97)
    assert caught.value.code == "context_length_exceeded"


def test_another_model_and_what_is_not_to_be_had(running):
    told = error_of(post(running, {"prompt": "a", "model": "gpt-9"}), 404, "model", "model_not_found")
    assert told == "model 'gpt-9': there is drawn"
    wrong = {
        "echo": True,
        "best_of": 3,
        "logprobs": 5,
        "presence_penalty": 0.5,
        "suffix": "x",
        "logit_bias": {"1": 2},
    }
    for name, value in wrong.items():
        told = error_of(post(running, {"prompt": "a", name: value}), 400, name, "unsupported_parameter")
        assert told == f"{name}: not to be had here; leave it out"
    fine = {
        "echo": False,
        "best_of": 1,
        "presence_penalty": 0,
        "logit_bias": {},
        "user": "me",
        "unheard_of": 1,
    }
    assert post(running, {"prompt": "a", "max_tokens": 1, **fine}).status_code == 200


@pytest.mark.parametrize(
    "body, param",
    [
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b"3", None),
        (b"null", None),
        (b'"text"', None),
        (b'{"prompt": "a"', None),
        (b"\xff\xfe", None),
        (b'{"prompt": "a\xff"}', None),
        (b'{"prompt": "a", "temperature": NaN}', "temperature"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature"),
        (b'{"prompt": "a", "top_p": -Infinity}', "top_p"),
        (b'{"prompt": "a", "max_tokens": 1' + b"0" * 5000 + b"}", None),
        (b"[" * 100_000, None),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
        (b'{"prompt": "\\ud800"}', "prompt"),
        (b'{"prompt": "a", "messages": [], "stop": "\\udfff"}', "stop"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "messages"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_body_that_is_no_json_object_of_text(running, body, param):
    path = "chat/completions" if param == "messages" else "completions"
    headers = {"Content-Type": "application/json"}
    error_of(HTTP.post(f"{running.url}/v1/{path}", content=body, headers=headers), 400, param)


def test_a_body_without_its_type_is_told_of_it(running):
    answer = HTTP.post(f"{running.url}/v1/completions", content=b'{"prompt": "a"}')
    assert "Content-Type: application/json" in error_of(answer, 400)


UPWARDS = ["/../../etc/passwd", "/%2e%2e/", "/%2e%2e/%2e%2e/etc/passwd", "/..%5c", "//"]


@pytest.mark.parametrize("target", [*UPWARDS, "/v1", "/v1/", "/v1/models/", "/docs", "/x?a=1", "/chat.html"])
def test_paths_that_are_none(running, target):
    answer = raw(running, f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 404 ") and set(json.loads(body)) == {"error"}
    assert b"root:" not in answer


def test_methods_that_are_none(running):
    for method, path in (
        ("GET", "/v1/completions"),
        ("DELETE", "/v1/models"),
        ("POST", "/"),
        ("OPTIONS", "/health"),
    ):
        answer = HTTP.request(method, running.url + path)
        error_of(answer, 405)
        assert answer.headers["allow"]


def test_models_and_health(running, client):
    assert [model.id for model in client.models.list()] == ["drawn"]
    wait_for(
        lambda: HTTP.get(f"{running.url}/health").json() == {"status": "ok", "requests": 0, "waiting": 0}
    )


# --- raw sockets: names, bodies


def raw(running, *parts):
    """Send parts over one connection -> all that comes back until it is closed"""
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
    """Status and body of a raw answer; an error in the API's shape, on a connection that closes."""
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
def test_only_a_name_of_this_server_is_answered(host, origin, served_as, status):
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
    assert "'evil.example' is no name of this server" in error_of(answer, 403, None, "host_not_allowed")
    answer = raw(running, b"GET / HTTP/1.0\r\n\r\n")
    assert status_of(answer) == 403


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_a_large_body_is_refused_before_it_is_read(running):
    answer = raw(running, HEAD + b"Content-Length: 1048577\r\n\r\n")  # and nothing follows
    assert status_of(answer) == 413
    answer = raw(running, HEAD + b"Content-Length: 1048577\r\nExpect: 100-continue\r\n\r\n")
    assert status_of(answer) == 413


def test_a_body_without_length_is_read_no_further_than_it_may_be(running):
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    sent = 0
    with socket.create_connection(("127.0.0.1", running.port), timeout=SECONDS) as connection:
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        try:
            for _ in range(160):  # 10 MiB
                connection.sendall(chunk)
                sent += 65536
        except OSError:
            pass  # it has hung up
        answer = read_on(connection)
    assert status_of(answer) == 413
    just = b"10001\r\n" + b"x" * 65537 + b"\r\n"
    assert status_of(raw(running, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 15, just)) == 413


def test_a_body_of_just_the_size_is_read(running):
    body = b'{"prompt": "a", "max_tokens": 1, "user": "' + b"x" * (2**20 - 44) + b'"}'
    assert len(body) == 2**20
    headers = {"Content-Type": "application/json"}
    assert HTTP.post(f"{running.url}/v1/completions", content=body, headers=headers).status_code == 200


def test_a_slow_body_is_408(serving, make_served):
    with serving(make_served(body_seconds=0.3)) as running:
        assert status_of(raw(running, HEAD + b"Content-Length: 20\r\n\r\n", b'{"pro')) == 408
        assert status_of(raw(running, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n{\r\n")) == 408
        assert post(running, {"prompt": "a", "max_tokens": 1}).status_code == 200


def test_a_client_that_leaves_within_its_body_is_forgotten(serving, make_served, scripted, capfd):
    scripted("ok")
    with serving(make_served()) as running:
        for begun in (b'{"prom', b'{"prompt": "left"}'):
            with socket.create_connection(("127.0.0.1", running.port), timeout=SECONDS) as connection:
                connection.sendall(HEAD + b"Content-Length: 99\r\n\r\n" + begun)
        assert post(running, {"prompt": "a", "max_tokens": 1}).status_code == 200
        assert [request.prompt for request in running.served.worker.engine.requests] == [[97]]
    assert capfd.readouterr().err == ""


# --- places: the queue, leaving, time, failures


@pytest.fixture
def held(scripted, serving, make_served):
    """held(text, **limits): a server whose engine makes a step for each permit -> it, its permits."""
    permits = threading.Semaphore(0)
    with ExitStack() as stack:

        def make(text="0123456789" * 10, send_buffer=None, **limits):
            scripted(text, permits)
            return stack.enter_context(serving(make_served(**limits), send_buffer=send_buffer)), permits

        yield make
        permits.release(100_000)


class Posted:
    """A request on a thread of its own, whose answer is waited for."""

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
    """Post, and wait until so many requests are in the server."""
    posted = Posted(running, **body)
    wait_for(lambda: len(jobs_of(running)) == jobs)
    return posted


def test_the_ninth_waiting_request_is_told_to_come_again(held):
    running, permits = held(max_batch=1)
    posted = [start(running, 1 + i, max_tokens=5) for i in range(9)]
    for more in ({}, {"stream": True}, {"n": 2}):
        answer = post(running, {"prompt": "x", **more})
        assert error_of(answer, 503) == "as many requests wait as may; try again"
        assert int(answer.headers["retry-after"]) >= 1
    assert HTTP.get(f"{running.url}/health").json() == {"status": "ok", "requests": 9, "waiting": 8}
    permits.release(9 * 5)
    assert [each.wait().json()["choices"][0]["text"] for each in posted] == ["01234"] * 9
    permits.release(5)
    assert post(running, {"prompt": "x", "max_tokens": 5}).status_code == 200


def test_what_the_next_step_takes_in_does_not_wait(held):
    running, permits = held(max_batch=3, max_queue=0)
    posted = [start(running, 1, max_tokens=2, n=2), start(running, 2, max_tokens=2)]
    error_of(post(running, {"prompt": "x"}), 503)
    permits.release(100)
    assert [each.wait().status_code for each in posted] == [200, 200]
    wait_for(lambda: not jobs_of(running))
    assert post(running, {"prompt": "x", "max_tokens": 2}).status_code == 200


def test_what_the_cache_has_no_room_for_waits(held):
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
def test_a_stream_that_is_left_gives_its_place_back_within_one_token(held, n):
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


def test_a_whole_answer_that_nobody_waits_for_is_given_up_within_one_token(held):
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


def test_a_client_may_leave_while_it_waits(held):
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
    assert written in ([5, 0, 5], [5, 5])  # left as the engine had it waiting, or before it had it


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_one_text_and_leaves_the_others(held, stream):
    running, permits = held("0123456789" * 2)
    engine = running.served.worker.engine
    engine.later = True  # the second text begins with 4
    pool = ThreadPoolExecutor(1)
    asked = {"model": "drawn", "prompt": ["x", "xxxxx"], "max_tokens": 12, "stop": "3", "stream": stream}
    create = client_of(running).completions.create
    answer = pool.submit(lambda: joined(create(**asked)) if stream else create(**asked))
    permits.release(4)
    inbox = running.served.worker.inbox
    # the cancelling waits there, or was quicker than the engine's next step
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


def test_a_job_whose_texts_are_all_cancelled_is_forgotten_without_a_step(scripted, make_served):
    scripted("0123")
    worker = make_served().worker
    one, other = Job({0, 1}), Job({0})
    for job in (one, other):
        worker.take(job, [{"prompt": [1], "max_new_tokens": 4} for _ in job.open])
    worker.take(one, 1)
    assert list(worker.running) == [one, other] and list(worker.running[one]) == [0]
    worker.take(one, 0)
    assert list(worker.running) == [other]
    worker.take(one, 0)  # once more, as after its end
    assert [request.finished for request in worker.engine.requests] == ["cancelled", "cancelled", None]


def test_tokens_that_come_several_at_once_are_cut_and_counted_alike(held):
    running, permits = held()
    running.served.worker.engine.stride = 7
    permits.release(100)
    answer = post(running, {"prompt": "x", "max_tokens": 50, "stop": "89", "n": 2}).json()
    assert [choice["text"] for choice in answer["choices"]] == ["01234567"] * 2
    assert answer["usage"]["completion_tokens"] == 2 * 10
    answer = post(running, {"prompt": "x", "max_tokens": 50}).json()
    assert answer["choices"][0]["text"] == "0123456789" * 5
    assert answer["usage"] == {"prompt_tokens": 1, "completion_tokens": 50, "total_tokens": 51}


def test_a_text_that_is_finished_leaves_its_place(scripted, make_served):
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


def test_a_request_that_gets_no_place_in_time_is_told(held):
    running, _ = held(max_seconds=0.2)
    for stream in (False, True):
        told = error_of(post(running, {"prompt": "x", "stream": stream}), 503)
        assert told == "no place became free in time; try again"
    wait_for(lambda: not jobs_of(running))


def test_a_request_that_takes_too_long_keeps_what_it_has(held):
    running, permits = held("0123456789" * 9, max_seconds=1)
    permits.release(4)
    asked = {"model": "drawn", "prompt": "x", "max_tokens": 50}
    stream = client_of(running).completions.create(stream=True, **asked)
    assert [next(stream).choices[0].text for _ in range(4)] == list("0123")
    assert joined(stream)[:2] == ([""], ["length"])
    wait_for(lambda: not jobs_of(running))
    permits.release(1)  # the step that had begun
    wait_for(lambda: running.served.worker.engine.steps == 5)
    permits.release(3)
    whole = client_of(running).completions.create(n=2, **asked)
    assert [(choice.text, choice.finish_reason) for choice in whole.choices] == [("012", "length")] * 2
    assert whole.usage.completion_tokens == 6


def test_a_client_that_does_not_read_is_hung_up_on(held, monkeypatch):
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
def test_a_failure_in_the_engine_ends_what_runs_and_the_server_goes_on(held, capfd, kind):
    running, permits = held(max_batch=1)
    engine = running.served.worker.engine

    def fail():
        raise kind("out of\nmemory")

    permits.release(2)
    stream = client_of(running).completions.create(model="drawn", prompt="x", max_tokens=50, stream=True)
    assert next(stream).choices[0].text == "0"
    wait_for(lambda: engine.steps == 2)
    waiting = start(running, 2, max_tokens=5)
    wait_for(lambda: not running.served.worker.inbox.empty())  # for the end of the step that is held
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


def test_what_the_engine_refuses_is_a_wrong_request(held):
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


def test_an_engine_that_cannot_be_made_again_is_tried_at_the_next_request(held):
    running, permits = held()
    worker = running.served.worker
    make, worker.engine = worker.make_engine, None

    for error, told in ((MemoryError(), "MemoryError"), (ValueError("no room"), "no room")):
        worker.make_engine = mock.Mock(side_effect=error)
        assert error_of(post(running, {"prompt": "x"}), 500) == f"the model failed: {told}"
    worker.make_engine = make
    permits.release(3)
    assert post(running, {"prompt": "x", "max_tokens": 3}).json()["choices"][0]["text"] == "012"


def test_a_failure_in_the_server_itself_is_told_in_shape(running, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(running.served, "encode", lambda ask: 1 / 0)
    assert error_of(post(running, {"prompt": "x"}), 500) == "the server failed"
    wait_for(lambda: sys.stderr.getvalue().endswith("\n"))  # after the answer
    assert sys.stderr.getvalue() == "lm serve: '/v1/completions': division by zero\n"
    monkeypatch.undo()
    assert post(running, {"prompt": "x", "max_tokens": 1}).status_code == 200


def test_what_still_runs_when_the_server_stops_is_told(scripted, serving, make_served, monkeypatch):
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


# --- the document


def test_whatever_the_document_allows_or_not_is_answered_in_shape(scripted, serving, make_served):
    schemathesis = pytest.importorskip("schemathesis")
    scripted("é🙂")
    with serving(make_served()) as running:
        ask_all(schemathesis, running)


def ask_all(schemathesis, running):
    """Ask what the OpenAPI document allows and what it does not; every answer is one that it states."""
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    tried = set()

    def ask(case):
        if isinstance(case.body, dict) and isinstance(case.body.get("max_tokens", 0), int):
            case.body["max_tokens"] = min(4, case.body.get("max_tokens", 4))
        answer = case.call(timeout=SECONDS)
        tried.add((case.path, answer.status_code))
        assert answer.status_code < 500
        if answer.status_code >= 400:
            assert set(answer.json()) == {"error"}

    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in schemathesis.GenerationMode if operation.method == "post" else []:
            cases = operation.as_strategy(generation_mode=mode)
            settings(max_examples=12, suppress_health_check=list(HealthCheck))(given(cases)(ask))()
    assert {status for path, status in tried if path == "/v1/completions"} >= {200, 400}
    assert {status for path, status in tried if path == "/v1/chat/completions"} >= {200, 400}


# --- the command


@pytest.fixture
def started(command, served_folder):
    """started(...): `lm serve` on a free port -> its port, once it answers"""
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
def test_a_signal_ends_the_server_after_what_it_writes(started, command, alone, number, status):
    port, pid = started()
    client = client_of(SimpleNamespace(url=f"http://127.0.0.1:{port}"))
    stream = client.completions.create(model="drawn", prompt="x", max_tokens=60, seed=3, stream=True)
    pieces = [next(stream)]
    os.kill(pid, number)
    assert joined([*pieces, *stream])[0][0] == alone("x", 60, seed=3)[0]
    ended = command.wait()
    assert (ended.code, ended.err) == (status, "")
    address = f"http://127.0.0.1:{port}"
    assert ended.out.decode() == f"drawn: chat at {address}/, OpenAI API at {address}/v1; Ctrl-C ends it\n"
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port))


def test_open_to_all_is_one_warning_and_names_are_still_checked(started, command):
    port, pid = started("--host", "0.0.0.0")
    assert HTTP.get(f"http://127.0.0.1:{port}/health", headers={"Host": "evil.example"}).status_code == 403
    assert HTTP.get(f"http://127.0.0.1:{port}/health", headers={"Host": "10.1.2.3"}).status_code == 200
    os.kill(pid, signal.SIGTERM)
    ended = command.wait()
    assert ended.code == 143
    assert ended.err == "lm: warning: host 0.0.0.0: all who reach this machine can use the model\n"


def test_it_listens_to_this_machine_alone_unless_told(command):
    assert cli.Serve(run=None).host == "127.0.0.1"
    assert serve.is_loopback("127.0.0.1") and serve.is_loopback("::1") and serve.is_loopback("localhost")
    assert not any(map(serve.is_loopback, ["0.0.0.0", "::", "192.168.0.1", "my.name"]))


def test_a_port_in_use_is_one_line(command, served_folder):
    with serve.listen("127.0.0.1", 0) as other:
        port = other.getsockname()[1]
        ended = command("serve", served_folder, "--port", port)
    assert (ended.code, ended.out) == (2, b"")
    assert ended.err == f"lm serve: 127.0.0.1, port {port}: cannot be listened on: Address already in use\n"


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--port", "70000"], "port=70000 must lie in 0..65535"),
        (["--port", "-1"], "port=-1 must lie in 0..65535"),
        (["--max-batch", "0"], "max_batch=0 must be at least 1"),
        (["--max-queue", "-1"], "max_queue=-1 must be at least 0"),
        (["--max-seconds", "0"], "max_seconds=0.0 must be at least 1"),
        (["--max-seconds", "nan"], "max_seconds=nan must be at least 1"),
        (["--max-seconds", "inf"], "max_seconds=inf must be at least 1"),
        (["--host", "no.such.host.invalid"], "no.such.host.invalid, port 0: cannot be listened on: "),
        (["--host", "x" * 300], ", port 0: cannot be listened on: "),
        (["--host", "1.2.3.4"], "1.2.3.4, port 0: cannot be listened on: Cannot assign"),
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


def test_no_model_is_one_line(command, tmp_path):
    ended = command("serve", tmp_path / "absent", "--port", "0")
    assert (
        ended.code == 2
        and ended.err == f"lm serve: {tmp_path}/absent: is not a folder; expected a run or a saved model\n"
    )


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn"])
def test_without_its_libraries_the_extra_is_named(command, served_folder, missing):
    before = f"import sys; sys.modules[{missing!r}] = None"
    ended = command("serve", served_folder, before=before)
    assert ended.code == 2
    assert ended.err == f"lm serve: needs {missing}: pip install -c constraints.txt -e '.[lm,serve]'\n"
