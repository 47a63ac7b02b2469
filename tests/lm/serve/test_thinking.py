"""Thoughts are in a field of their own, whole and streamed, as in DeepSeek's API."""

import json

import pytest

from lm.serve.protocol import Chat
from lm.serve.shape import Said, Shape
from tests.lm.serve.client import HI, client_of, post

R1 = "{% for m in messages %}[{{ m.content }}]{% endfor %}{{ '<think>\\n' }}"
CASES = [
    # what the model writes, its template, the thought (None: no field), the answer
    ("<think>\nhm é\n</think>\n\nyes 🙂\n", None, "hm é", "yes 🙂\n"),
    ("hm é\n</think>\n\nyes 🙂\n", R1, "hm é", "yes 🙂\n"),
    ("<think>never closed\n</thi", None, "never closed\n</thi", ""),
    ("never closed\n", R1, "never closed\n", ""),
    ("<think></think>yes", None, "", "yes"),
    ("<think></think>", None, "", ""),
    ("\n no <think>hm</think>", None, None, "\n no <think>hm</think>"),
    ("<thin", None, None, "<thin"),
    ("", None, None, ""),
]


@pytest.fixture
def thinking(scripted, serving, make_served):
    """with thinking(text, template, stride) as running: a model that writes this, `stride` bytes a step"""

    def make(text, template=None, stride=1):
        scripted(text)
        served = make_served()
        served.tokenizer.chat_template, served.tokenizer.special = template, {}
        served.worker.engine.stride = stride
        return serving(served)

    return make


def whole(running, **body):
    """Each choice's message and finish reason."""
    answer = post(running, {"messages": HI, **body}, "chat/completions")
    assert answer.status_code == 200, answer.text
    return [(choice["message"], choice["finish_reason"]) for choice in answer.json()["choices"]]


def deltas(running, **body):
    """Each choice's deltas and finish reason."""
    text = post(running, {"messages": HI, "stream": True, **body}, "chat/completions").text
    *events, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    found = {}
    for event in events:
        [choice] = json.loads(event.removeprefix("data: "))["choices"]
        before, finished = found.get(choice["index"], ([], None))
        assert finished is None
        found[choice["index"]] = ([*before, choice["delta"]], choice["finish_reason"])
    return [found[index] for index in sorted(found)]


def joined(pieces):
    """The message that deltas add up to; checks the order and the fields of each."""
    assert pieces[0]["role"] == "assistant" and all("role" not in piece for piece in pieces[1:])
    thinks = "reasoning_content" in pieces[0]
    parts = {"content": "", **({"reasoning_content": ""} if thinks else {})}
    for piece in pieces:
        [(name, text)] = [(n, t) for n, t in piece.items() if n != "role" and t is not None]
        assert ("reasoning_content" in piece) == thinks and "content" in piece
        assert name == "content" or parts["content"] == ""  # the thought comes first
        parts[name] += text
    return {"role": "assistant", **parts}


@pytest.mark.parametrize("stride", [1, 5])
@pytest.mark.parametrize("text, template, thought, answer", CASES, ids=lambda value: ascii(value)[:30])
def test_whole_and_streamed_answers_have_the_same_parts(thinking, text, template, thought, answer, stride):
    wanted = {"role": "assistant", "content": answer}
    if thought is not None:
        wanted["reasoning_content"] = thought
    with thinking(text, template, stride) as running:
        assert whole(running, n=2) == [(wanted, "stop")] * 2
        streamed = [(joined(pieces), reason) for pieces, reason in deltas(running, n=2)]
        assert streamed == [(wanted, "stop")] * 2
        raw = post(running, {"prompt": "hi", "max_tokens": 99}).json()["choices"][0]
        assert (raw["text"], raw["finish_reason"]) == (text, "stop") and "reasoning_content" not in raw


def test_a_thought_is_streamed_before_it_ends(thinking):
    with thinking("<think>\nhm\n</think>\n\nyes") as running:
        [(pieces, _)] = deltas(running)
    assert pieces == [
        {"role": "assistant", "content": None, "reasoning_content": "h"},
        {"content": None, "reasoning_content": "m"},
        {"content": "y", "reasoning_content": None},
        {"content": "e", "reasoning_content": None},
        {"content": "s", "reasoning_content": None},
    ]


def test_max_tokens_and_stop_strings_count_the_thought_and_its_tags(thinking):
    with thinking("<think>\nhm\n</think>\n\nyes") as running:
        for asked, thought, answer, reason in [
            ({"max_tokens": 3}, None, "<th", "length"),
            ({"max_tokens": 7}, "", "", "length"),
            ({"max_tokens": 9}, "h", "", "length"),
            ({"max_tokens": 15}, "hm\n</th", "", "length"),
            ({"max_tokens": 21}, "hm", "", "length"),
            ({"max_tokens": 22}, "hm", "y", "length"),
            ({"stop": "m\n</th"}, "h", "", "stop"),
            ({"stop": ["</think>"]}, "hm\n", "", "stop"),
            ({"stop": ["\n\nye", "zzz"]}, "hm", "", "stop"),
            ({"stop": "s"}, "hm", "ye", "stop"),
            ({"stop": "think>"}, None, "<", "stop"),
            ({"stop": "yes!"}, "hm", "yes", "stop"),
        ]:
            wanted = {"role": "assistant", "content": answer}
            if thought is not None:
                wanted["reasoning_content"] = thought
            assert whole(running, **asked) == [(wanted, reason)], asked
            [(pieces, finished)] = deltas(running, **asked)
            assert (joined(pieces), finished) == (wanted, reason), asked


def test_what_a_time_limit_cuts_off_is_part_of_the_thought(held):
    running, permits = held("<think>hm\n</think>", max_seconds=1)
    permits.release(len("<think>hm\n</th"))
    [(message, reason)] = whole(running)
    assert (message["reasoning_content"], message["content"], reason) == ("hm\n</th", "", "length")


def test_the_loop_of_deepseeks_documentation_reads_a_stream(thinking):
    """It takes the content of pieces without a thought only, and adds it to a string."""
    with thinking("<think>\nhm\n</think>\n\nyes", stride=100) as running:
        asked = {"model": "drawn", "messages": HI, "stream": True}
        thought, content = "", ""
        for piece in client_of(running).chat.completions.create(**asked):
            delta = piece.choices[0].delta
            if delta.reasoning_content:
                thought += delta.reasoning_content
            else:
                content += delta.content
    assert (thought, content) == ("hm", "yes")


def test_a_thought_that_is_sent_back_does_not_reach_the_model(thinking):
    with thinking("hm</think>yes", R1) as running:
        [(message, _)] = whole(running)
        assert message["reasoning_content"] == "hm"
        for sent in (
            message,
            {**message, "reasoning_content": None},
            {"role": "assistant", "content": "yes"},
        ):
            assert whole(running, messages=[*HI, sent, *HI])[0][0] == message
        prompts = [bytes(request.prompt) for request in running.served.worker.engine.requests]
    assert prompts == [b"[hi]<think>\n"] + [b"[hi][yes][hi]<think>\n"] * 3


def test_choices_think_or_not_independently():
    shape = Shape(Chat(messages=HI, n=2), "drawn")
    [one, two] = shape.whole([Said("hm", "yes", "stop"), Said(None, "no", "length")], {})["choices"]
    assert one["message"] == {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
    assert two["message"] == {"role": "assistant", "content": "no"} and two["finish_reason"] == "length"
    both = [piece["choices"][0] for piece in shape.pieces(1, Said("hm", "yes", "stop"), first=True)]
    assert [choice["finish_reason"] for choice in both] == [None, "stop"]
    assert [choice["delta"].get("role") for choice in both] == ["assistant", None]
