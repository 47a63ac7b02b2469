"""Completions, whole and streamed, equal what the model generates without a server."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from lm.serve import protocol
from tests.lm.serve.client import HI, client_of, error_of, joined, post, wait_for


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"seed": 3}, {"seed": 3, "top_p": 0.7}], ids=str)
def test_a_completion_equals_what_the_model_generates(client, alone, sampling):
    answer = client.completions.create(model="drawn", prompt="to be", max_tokens=30, **sampling)
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason) == alone("to be", 30, **sampling)
    assert (answer.object, answer.model, choice.index) == ("text_completion", "drawn", 0)
    assert answer.usage.prompt_tokens == 5 and answer.usage.total_tokens == 5 + answer.usage.completion_tokens
    if choice.finish_reason == "length":
        assert answer.usage.completion_tokens == 30


def test_a_chat_without_a_template_is_one_line_per_message(client, alone):
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


def test_a_stream_has_the_same_text_in_pieces(client, alone):
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


def test_n_completions_of_several_prompts_equal_single_ones(running, client, alone):
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


def test_a_prompt_may_be_token_ids(client, alone):
    for prompt, texts in ((list(b"to be"), 1), ([list(b"to be"), list(b"to be")], 2)):
        answer = client.completions.create(model="drawn", prompt=prompt, max_tokens=9, temperature=0)
        assert [choice.text for choice in answer.choices] == [alone("to be", 9, temperature=0)[0]] * texts


def test_top_k_is_an_extension(client, alone):
    for top_k in (1, 3, 10**30):
        answer = client.completions.create(
            model="drawn", prompt="to be", max_tokens=9, seed=0, extra_body={"top_k": top_k}
        )
        assert answer.choices[0].text == alone("to be", 9, seed=0, top_k=min(top_k, 256))[0]


def test_the_smallest_value_of_every_option_is_accepted(client, alone):
    greedy = alone("to be", 9, temperature=0)[0]
    for option in ("temperature", "top_p"):
        asked = {"model": "drawn", "prompt": "to be", "max_tokens": 9, "seed": 0, option: 5e-324}
        assert client.completions.create(**asked).choices[0].text == greedy


def test_a_seed_makes_completions_repeatable(client):
    def write(**seed):
        return client.completions.create(model="drawn", prompt="x", max_tokens=20, **seed).choices[0].text

    assert write(seed=2**63 - 1, n=2) == write(seed=2**63 - 1)
    assert write() != write()


def test_default_lengths(client, running):
    assert client.completions.create(model="drawn", prompt="x", temperature=0).usage.completion_tokens == 16
    [chat] = running.served.arguments(protocol.Chat(messages=HI, top_k=10**30), [[1]])
    assert (chat["max_new_tokens"], chat["top_k"]) == (1024, 256)


def test_a_completion_beyond_the_context_continues_as_in_lm_generate(client, alone):
    answer = client.completions.create(model="drawn", prompt="p" * 96, max_tokens=150, seed=0)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == alone("p" * 96, 150, seed=0)


def test_null_means_the_default(running, alone):
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


def test_concurrent_clients_get_the_text_each_would_get_alone(client, alone):
    asked = {"model": "drawn", "max_tokens": 25}

    def write(i):
        prompt = "abcdefgh"[: 1 + i % 8]
        if i % 2:
            return joined(client.completions.create(prompt=prompt, seed=i, stream=True, **asked))[0][0]
        return client.completions.create(prompt=prompt, seed=i, **asked).choices[0].text

    with ThreadPoolExecutor(10) as pool:
        texts = list(pool.map(write, range(10)))
    assert texts == [alone("abcdefgh"[: 1 + i % 8], 25, seed=i)[0] for i in range(10)]


def test_the_model_may_end_a_completion(serving, make_served, alone):
    text = alone("x", 40, seed=3)[0]
    end = next(character for character in text[5:] if character.isascii())
    served = make_served()
    served.tokenizer.ends = frozenset(end.encode())
    with serving(served) as running:
        answer = client_of(running).completions.create(model="drawn", prompt="x", max_tokens=40, seed=3)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (text.partition(end)[0], "stop")
    assert 0 < answer.usage.completion_tokens < 40


def test_a_chat_template_is_used_if_there_is_one(serving, make_served, monkeypatch):
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
