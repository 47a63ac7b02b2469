import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.tokenizer import ByteTokenizer

tokenizer = ByteTokenizer()


@given(st.binary())
def test_any_bytes_survive(content):
    tokens = tokenizer.encode(content)
    assert tokens == list(content)
    assert tokenizer.decode_bytes(tokens) == content


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_survives_as_utf8(text):
    assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.binary())
def test_bytes_from_the_command_line_are_themselves_again(content):
    argument = content.decode("utf-8", "surrogateescape")  # what Python makes of argv
    assert tokenizer.encode(argument) == list(content)


@given(st.lists(st.integers(0, 255)))
def test_every_sequence_of_tokens_can_be_shown(tokens):
    assert isinstance(tokenizer.decode(tokens), str)


def test_bytes_that_are_no_text_become_replacement_characters():
    assert tokenizer.decode([104, 105, 255, 33]) == "hi\ufffd!"


def test_end_of_text_is_a_control_character_within_the_vocabulary():
    assert tokenizer.vocab_size == 256
    assert bytes([tokenizer.end_of_text]) == b"\x03"


@pytest.mark.parametrize("token", [256, 299, 10**6])
def test_tokens_beyond_the_bytes_are_shown_as_what_is_no_text(token):
    """A model's vocabulary may be larger than the tokenizer's; such a token can then be drawn."""
    assert tokenizer.decode([104, token, 105]) == "h\ufffdi"
    assert len(tokenizer.decode_bytes([token])) == 1
