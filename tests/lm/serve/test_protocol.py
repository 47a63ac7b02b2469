"""Requests: errors name the invalid field; every response is one that the OpenAPI document states."""

import json

import openai
import pytest
from hypothesis import HealthCheck, given, settings

from lm.serve.protocol import Message
from tests.lm.serve.client import HI, HTTP, SECONDS, error_of, post


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
        ({"top_p": -0.1}, "top_p", "greater than or equal to 0, got -0.1"),
        ({"top_p": 1.1}, "top_p", "less than or equal to 1, got 1.1"),
        ({"top_k": 0}, "top_k", "greater than or equal to 1, got 0"),
        ({"min_p": 1.1}, "min_p", "less than or equal to 1, got 1.1"),
        ({"min_p": -0.1}, "min_p", "greater than or equal to 0, got -0.1"),
        ({"n": 0}, "n", "got 0"),
        ({"n": 9}, "n", "less than or equal to 8, got 9"),
        ({"n": 1000}, "n", "less than or equal to 8, got 1000"),
        ({"seed": -(2**63) - 1}, "seed", "greater than or equal to"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"n": 10**40}, "n", "less than or equal to 8"),
        ({"max_tokens": 10**40}, "max_tokens", "is more than 4096"),
        ({"seed": "x"}, "seed", "got 'x'"),
        ({"stop": ""}, "stop", "expected a string or up to 4 strings, each of 1 to 256 characters, got ''"),
        ({"stop": ["a", ""]}, "stop", "expected a string or up to 4 strings"),
        ({"stop": list("abcde")}, "stop", "expected a string or up to 4 strings"),
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
        ("", "prompt", "list of up to 64 of them, got ''"),
        ([], "prompt", "list of up to 64 of them, got []"),
        (["a", ""], "prompt", "expected a non-empty string"),
        ([[1], []], "prompt", "expected a non-empty string"),
        (["a", 1], "prompt", "got ['a', 1]"),
        ([1, True], "prompt", "got [1, True]"),
        ([-1], "prompt", "got [-1]"),
        ([255, 256], "prompt", "prompt: must have at least one token, each in 0..255"),
        ([2**70], "prompt", "each in 0..255"),
        ({"text": "a"}, "prompt", "got {'text': 'a'}"),
        (["a"] * 65, "prompt", "list of up to 64 of them"),
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
        ([{"role": "user", "content": 3}], "messages[0].content", "expected a string, or a list of parts"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content", "of type text"),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_a_wrong_message_is_named(running, messages, param, told):
    assert told in error_of(post(running, {"messages": messages}, "chat/completions"), 400, param)


def test_a_prompt_longer_than_the_context_has_its_own_code(running, client):
    for prompt in ("p" * 97, ["p", "p" * 97], [[1], [1] * 97]):
        told = error_of(post(running, {"prompt": prompt}), 400, "prompt", "context_length_exceeded")
        assert told == "prompt: 97 tokens exceed the model's context of 96"
    body = {"messages": [{"role": "user", "content": "p" * 96}]}  # and its line break
    told = error_of(post(running, body, "chat/completions"), 400, "messages", "context_length_exceeded")
    assert told.startswith("messages: 97 tokens")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="drawn", prompt="p" * 97)
    assert caught.value.code == "context_length_exceeded"


def test_other_models_are_rejected(running):
    told = error_of(post(running, {"prompt": "a", "model": "gpt-9"}), 404, "model", "model_not_found")
    assert told == "model 'gpt-9': must be drawn"


UNSUPPORTED = {
    "echo": True,
    "best_of": 3,
    "logprobs": 5,
    "presence_penalty": 0.5,
    "suffix": "x",
    "logit_bias": {"1": 2},
    "response_format": {"type": "json_object"},
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "reasoning_effort": "high",
    "repetition_penalty": 1.1,
    "stop_token_ids": [3],
    "ignore_eos": True,
    "min_tokens": 5,
    "typical_p": 0.9,
    "mirostat": 2,
    "guided_json": {"type": "object"},
    "skip_special_tokens": False,
    "add_generation_prompt": False,
    "chat_template_kwargs": {"enable_thinking": True},
    "n_predict": 5,
    "options": {"num_ctx": 9},
    "unheard_of": 1,
    "zero": 0,
    "no": False,
    "stream_options.continuous_usage_stats": True,
}
NEUTRAL = [
    ("echo", False),
    ("best_of", 1),
    ("presence_penalty", 0.0),
    ("repetition_penalty", 1.0),
    ("stop_token_ids", []),
    ("ignore_eos", False),
    ("logit_bias", {}),
    ("tools", []),
    ("tool_choice", "auto"),
    ("response_format", {"type": "text"}),
    ("unheard_of", None),
    ("user", "me"),
    ("metadata", {"a": "b"}),
    ("store", True),
    ("service_tier", "auto"),
    ("parallel_tool_calls", False),
    ("stream_options", {"include_usage": None, "include_obfuscation": False}),
]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_parameters_that_are_not_supported_are_named(running, path):
    needed = {"prompt": "a"} if path == "completions" else {"messages": HI}
    for name, value in UNSUPPORTED.items():
        field, _, inner = name.partition(".")
        body = {**needed, field: {inner: value} if inner else value}
        told = error_of(post(running, body, path), 400, name, "unsupported_parameter")
        assert told == f"{name}: not supported; leave it out"
    for name in ("best_of", "logprobs", "echo", "top_logprobs"):  # JSON's true is not 1
        value = {"best_of": True, "logprobs": 0, "echo": 0, "top_logprobs": False}[name]
        error_of(post(running, {**needed, name: value}, path), 400, name, "unsupported_parameter")
    assert post(running, {**needed, "max_tokens": 1, **dict(NEUTRAL)}, path).status_code == 200


def test_the_other_endpoints_input_is_not_ignored(running):
    both = {"prompt": "a", "messages": HI}
    error_of(post(running, both), 400, "messages", "unsupported_parameter")
    error_of(post(running, both, "chat/completions"), 400, "prompt", "unsupported_parameter")


def test_messages_as_clients_send_them(client, alone):
    """A developer's message, an empty answer, and an answer sent back with all its fields."""

    def write(*messages):
        answer = client.chat.completions.create(model="drawn", messages=messages, max_tokens=9, seed=-1)
        return answer.choices[0].message

    user = {"role": "user", "content": "ab", "name": "me"}
    first = write({"role": "developer", "content": "é"}, user, {"role": "assistant", "content": None}, user)
    assert first.content == alone("é\nab\n\nab\n", 9, seed=2**63 - 1)[0]
    again = write(user, first, {"role": "assistant"}, user)
    assert again == write(user, first.model_dump(), {"role": "assistant"}, user)
    assert again.content == alone(f"ab\n{first.content}\n\nab\n", 9, seed=2**63 - 1)[0]
    assert Message(role="developer", content="x").plain() == {"role": "system", "content": "x"}


@pytest.mark.parametrize(
    "name, value", [("tool_calls", [{"id": "1"}]), ("prefix", True), ("audio", {"id": "a"})]
)
def test_a_field_of_a_message_that_is_not_supported_is_named(running, name, value):
    messages = [*HI, {"role": "assistant", "content": None, name: value}, *HI]
    answer = post(running, {"messages": messages}, "chat/completions")
    error_of(answer, 400, f"messages[1].{name}", "unsupported_parameter")


def test_a_top_p_of_0_keeps_only_the_most_likely_token(client, alone):
    answer = client.completions.create(model="drawn", prompt="to be", max_tokens=9, seed=-(2**63), top_p=0)
    assert answer.choices[0].text == alone("to be", 9, temperature=0)[0]


def test_min_p_is_an_extension(client, alone):
    for min_p in (0.0, 0.2, 1.0):
        asked = {"model": "drawn", "prompt": "to be", "max_tokens": 20, "seed": 5}
        answer = client.completions.create(**asked, extra_body={"min_p": min_p})
        assert answer.choices[0].text == alone("to be", 20, seed=5, min_p=min_p)[0]


def test_a_model_is_found_by_its_name(client, running):
    assert client.models.retrieve("drawn") == client.models.list().data[0]
    for name in ("gpt-4", "meta/llama", "drawn/", "../drawn"):
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.retrieve(name)
        assert caught.value.code == "model_not_found"
    error_of(HTTP.delete(f"{running.url}/v1/models/drawn"), 405)


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
def test_a_body_that_is_not_a_json_object_of_unicode_text(running, body, param):
    path = "chat/completions" if param == "messages" else "completions"
    headers = {"Content-Type": "application/json"}
    error_of(HTTP.post(f"{running.url}/v1/{path}", content=body, headers=headers), 400, param)


def test_a_body_without_a_content_type_is_rejected(running):
    answer = HTTP.post(f"{running.url}/v1/completions", content=b'{"prompt": "a"}')
    assert "Content-Type: application/json" in error_of(answer, 400)


# --- the OpenAPI document


def test_requests_the_document_allows_or_forbids_are_answered_as_it_states(scripted, serving, make_served):
    schemathesis = pytest.importorskip("schemathesis")
    scripted("é🙂")
    with serving(make_served()) as running:
        ask_all(schemathesis, running)


def ask_all(schemathesis, running):
    """Send requests that the document allows and ones that it does not; it states every response."""
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
