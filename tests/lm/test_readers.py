"""Files from outside that are not what their reader expects: one line within five seconds, or they work."""

import os

import pytest

from lm import data, terminal
from lm.config import Config
from lm.hub import tokenizer
from tests.lm.hub import tokenizers_made
from tests.lm.hub.folders import UNUSUAL, within

pytest.importorskip("tokenizers")
VOCABULARY = 400
TOKENIZER_JSON = tokenizers_made.byte_level().to_str()


def open_folder(name):
    """A reader of a model folder with a tokenizer and this file."""

    def read(path):
        own = path.parent / "tokenizer.json"
        if not os.path.lexists(own):
            own.write_text(TOKENIZER_JSON)
        return tokenizer.open_tokenizer(path.parent, VOCABULARY).chat_template

    return name, read


READERS = {
    "config": ("config.toml", Config.load),
    "preset": ("own.toml", lambda path: Config.preset(str(path))),
    "tokenizer": open_folder("tokenizer.json"),
    "tokenizer's settings": open_folder("tokenizer_config.json"),
    "special tokens": open_folder("special_tokens_map.json"),
    "added tokens": open_folder("added_tokens.json"),
    "settings of generate": open_folder("generation_config.json"),
    "ids in config.json": open_folder("config.json"),
    "chat template": open_folder("chat_template.jinja"),
    "text": ("text.txt", data.open_text),
    "prompt": ("prompt", lambda path: terminal.read_prompt(f"FILE:{path}")),
}
every_reader = pytest.mark.parametrize("name, read", READERS.values(), ids=READERS)


@every_reader
@pytest.mark.parametrize("make", [*UNUSUAL.values(), lambda path: path.symlink_to("/dev/full")], ids=range(8))
def test_what_is_not_a_file_to_read_is_one_line(tmp_path, name, read, make):
    path = tmp_path / name
    make(path)
    if read is data.open_text and path.is_file():  # a terabyte of text is a text
        return
    with within(5), pytest.raises(ValueError) as caught:
        read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


CONTENTS = {
    "empty": b"",
    "UTF-16": "[train]\nsteps = 3\n".encode("utf-16"),
    "NUL bytes": b"\0" * 1000,
    "invalid UTF-8": b'{"a": "\xff"}',
    "cut": b'{"a',
    "deep": b"[" * 200_000,
    "a number of 5,000 digits": b'{"eos_token_id": ' + b"9" * 5000 + b"}",
    "a lone surrogate": b'{"chat_template": "\\ud800", "eos_token": "\\ud800"}',
    "a list": b"[]",
    "null": b"null",
    "line ends": b"\r\r\n\n",
}


@every_reader
@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_contents_that_no_reader_expects_work_or_are_one_line(tmp_path, name, read, content):
    path = tmp_path / name
    path.write_bytes(content)
    with within(5):
        try:
            read(path)
        except ValueError as error:
            assert str(tmp_path) in str(error) and "\n" not in str(error)


def test_a_config_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "own.toml").write_bytes(b"\xef\xbb\xbf[train]\nsteps = 3\n")
    assert Config.load(tmp_path / "own.toml").train.steps == 3


def test_a_prompt_and_a_text_are_any_bytes(tmp_path):
    path = tmp_path / "any"
    for content in (b"\xff\xfe\0", b"\xef\xbb\xbfa", b"\0" * 10):
        path.write_bytes(content)
        assert terminal.read_prompt(f"FILE:{path}") == data.open_text(path).tobytes() == content
