"""A thought and its answer are split at the tags, wherever the pieces of the text end."""

import itertools
import re
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.hub.thinking import Splitter, splitter_for
from lm.tokenizer import ByteTokenizer

R1 = "<User>{{ messages[-1].content }}<Assistant>{{ '<think>\\n' }}"  # its end, as in DeepSeek-R1's template
CASES = [
    # text, where it starts, thought (None: none), answer
    ("<think>\nhm\n</think>\n\n7", "start", "hm", "7"),
    ("<think>hm</think>7", "start", "hm", "7"),
    ("hm\n</think>\n\n7", "opened", "hm", "7"),
    ("\nhm\n</think>7\n\n", "opened", "hm", "7\n\n"),
    ("<think>a\n\nb < c\n</thin </think>\n7", "start", "a\n\nb < c\n</thin ", "7"),
    ("<think>never \n\n</thi", "start", "never \n\n</thi", ""),
    ("never closed\n", "opened", "never closed\n", ""),
    ("<think>\n\n</think>\n\n7", "start", "", "7"),
    ("</think>7", "opened", "", "7"),
    ("<think>", "start", "", ""),
    ("", "opened", "", ""),
    ("<think>a</think>\n", "start", "a", ""),
    ("<think>a</think>b<think>c</think>\n", "start", "a", "b<think>c</think>\n"),
    ("<think>a<think>b</think>c</think>", "start", "a<think>b", "c</think>"),
    ("<think>a</think> \n7", "start", "a", " \n7"),
    ("\n\n7 <think>a</think>\n", "start", None, "\n\n7 <think>a</think>\n"),
    ("\n<think>a</think>", "start", None, "\n<think>a</think>"),
    ("<thin", "start", None, "<thin"),
    ("</think>7", "start", None, "</think>7"),
    ("<think>a</think>7", "answer", None, "<think>a</think>7"),
    ("", "start", None, ""),
]


def split(pieces, state):
    """The parts of a text that comes in pieces, the last of which is followed by an end without text."""
    splitter = Splitter(state)
    parts = [splitter.add(piece) for piece in pieces] + [splitter.add("", last=True)]
    thought, answer = ("".join(part) for part in zip(*parts))
    assert splitter.thinks or thought == ""
    return thought if splitter.thinks else None, answer


@pytest.mark.parametrize("text, state, thought, answer", CASES, ids=lambda value: repr(value)[:40])
def test_a_text_is_split_the_same_way_wherever_its_pieces_end(text, state, thought, answer):
    assert split([text], state) == split(text, state) == (thought, answer)
    whole = Splitter(state)
    assert whole.add(text, last=True) == (thought or "", answer) and whole.held == ""
    for first, second in itertools.combinations(range(len(text) + 1), 2):
        pieces = [text[:first], text[first:second], text[second:]]
        assert split(pieces, state) == (thought, answer), pieces


def by_expression(text, state):
    """The parts, by one regular expression for the whole text."""
    if state == "opened":
        text = "<think>" + text
    closed = re.fullmatch(r"<think>\n*((?:(?!\n*</think>).)*)\n*</think>\n*(.*)", text, re.S)
    if closed:
        return closed[1], closed[2]
    unclosed = re.fullmatch(r"<think>\n*(.*)", text, re.S)
    return (unclosed[1], "") if unclosed and state != "answer" else (None, text)


PARTS = ["<think>", "</think>", "<think", "</", "think>", ">", "<", "\n", "\n\n", "a", "é", " "]


@given(
    st.lists(st.sampled_from(PARTS), max_size=8).map("".join),
    st.booleans(),
    st.sampled_from(["start", "opened"]),
    st.lists(st.integers(0, 60)),
)
def test_any_pieces_of_any_text(text, begins, state, cuts):
    text = "<think>" * begins + text
    ends = sorted({min(cut, len(text)) for cut in cuts})
    pieces = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)])]
    assert split(pieces, state) == by_expression(text, state)


def test_text_is_shown_as_soon_as_it_is_certain():
    splitter = Splitter()
    shown = [splitter.add(piece) for piece in ["<think>", "a", " <", "b\n", "c</think", ">", "\n", "7", "\n"]]
    thoughts = ["", "a", " ", "<b", "\nc", "", "", "", ""]
    assert shown == list(zip(thoughts, ["", "", "", "", "", "", "", "7", "\n"]))
    assert Splitter().add("7") == ("", "7") and Splitter().add("<thing") == ("", "<thing")


def test_a_prompt_that_ends_in_the_tag_opens_the_thought_if_the_template_wrote_it():
    def state(template, prompt):
        tokenizer = ByteTokenizer()
        tokenizer.chat_template = template
        return splitter_for(tokenizer, tokenizer.encode(prompt)).state

    assert state(R1, "<User>hi<Assistant><think>\n") == "opened"
    assert state(R1, "<think>") == "opened"
    qwen = R1 + "{% if not thinking %}\n</think>\n\n{% endif %}"
    assert state(qwen, "<User>hi<Assistant><think>\n\n</think>\n\n") == "start"
    assert state(R1, "<think>\nhi") == "start"
    # a user's message ends with the tag: without a template, and with one that says nothing after it
    assert state(None, "what is <think>\n") == "start"
    assert state("{{ messages[-1].content }}", "what is <think>") == "start"


def test_a_tokens_tag_opens_the_thought(tmp_path):
    """The tag is one token, or several."""
    pytest.importorskip("tokenizers")
    from tokenizers import AddedToken

    from lm.hub.tokenizer import encode_chat, open_tokenizer
    from tests.lm.hub import tokenizers_made

    hi = [{"role": "user", "content": "hi"}]
    for added in (True, False):
        made = tokenizers_made.byte_level()
        if added:
            made.add_tokens([AddedToken("<think>", normalized=False)])
        made.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "chat_template.jinja").write_text(R1)
        tokenizer = open_tokenizer(tmp_path, 1000)
        prompt = encode_chat(tokenizer, hi)
        assert (made.token_to_id("<think>") in prompt) == added
        assert splitter_for(tokenizer, prompt).state == "opened"
        assert splitter_for(tokenizer, prompt[:-3]).state == "start"


# --- lm chat


@pytest.fixture
def talk(invoke, monkeypatch, tmp_path):
    """talk(template, said, *answers): `lm chat` with a model of these answers -> its prompts, stdout"""
    from lm import terminal

    def run(template, said, *answers, command=("chat",)):
        tokenizer, prompts, left = ByteTokenizer(), [], list(answers)
        tokenizer.chat_template, tokenizer.special = template, {}

        class Engine:
            def __init__(self, *_, **__): ...

            def submit(self, prompt, *_):
                prompts.append(bytes(prompt))
                return SimpleNamespace(tokens=list(left.pop(0)), finished="stop", start=0)

        config = SimpleNamespace(model=SimpleNamespace(max_length=64))
        monkeypatch.setattr(terminal, "Engine", Engine)
        monkeypatch.setattr(terminal, "open_folder", lambda *_: (None, config, tokenizer))
        status, out, err = invoke(command[0], tmp_path, *command[1:], said=said)
        assert (status, err) == (0, "")
        return prompts, out

    return run


def test_chat_shows_the_thought_apart_and_leaves_it_out_of_the_conversation(talk):
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]{{ '<think>\\n' }}"
    prompts, out = talk(template, "a\nb\n\n", b"hm\n</think>\n\nyes", b"cut off")
    assert prompts[1] == b"[user]a[assistant]yes[user]b[assistant]<think>\n"
    assert out.partition("> ")[2] == "thinking:\nhm\nanswer:\nyes\n> thinking:\ncut off\n> "
    prompts, _ = talk(template, "a\nb\nc\n\n", b"cut off", b"</think>7", b"")
    assert prompts[2] == b"[user]a[assistant][user]b[assistant]7[user]c[assistant]<think>\n"


def test_chat_without_a_template_leaves_the_thought_out_too(talk):
    prompts, out = talk(None, "a\nb\nc\n\n", b"<think>hm</think>\xff7", b"<think> \xff", b"")
    assert prompts == [b"a\n", b"a\n\xff7\nb\n", b"a\n\xff7\nb\n\nc\n"]
    shown = "thinking:\nhm\nanswer:\n\ufffd7\n> thinking:\n \ufffd\n> \n> "
    assert out.partition("> ")[2] == shown
    prompts, out = talk(None, "a\nb\n\n", b"\xff no <think>", b"")
    assert prompts[1] == b"a\n\xff no <think>\nb\n"
    assert out.partition("> ")[2] == "\ufffd no <think>\n> \n> "


def test_generate_writes_the_whole_text_as_it_is(talk):
    text = "<think>\nhm\n</think>\n\nyes"
    _, out = talk(R1, "", text.encode(), command=("generate", "--prompt", "a"))
    assert out == "a" + text + "\n"
