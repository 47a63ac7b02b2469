import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.hub.tokenizer import open_tokenizer
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
    argument = content.decode("utf-8", "surrogateescape")  # as Python decodes argv
    assert tokenizer.encode(argument) == list(content)


@given(st.lists(st.integers(0, 255)))
def test_every_sequence_of_tokens_can_be_decoded(tokens):
    assert isinstance(tokenizer.decode(tokens), str)


def test_invalid_utf8_becomes_replacement_characters():
    assert tokenizer.decode([104, 105, 255, 33]) == "hi\ufffd!"


def test_end_of_text_is_a_control_character_within_the_vocabulary():
    assert tokenizer.vocab_size == 256
    assert bytes([tokenizer.end_of_text]) == b"\x03"


@pytest.mark.parametrize("token", [256, 299, 10**6])
def test_tokens_beyond_the_bytes_become_replacement_characters(token):
    """A model may sample such tokens where its vocabulary is larger than the tokenizer's."""
    assert tokenizer.decode([104, token, 105]) == "h\ufffdi"
    assert len(tokenizer.decode_bytes([token])) == 1


# --- a folder's tokenizer


@pytest.fixture
def folder(tmp_path):
    """A byte-level BPE of 300 tokens, as DeepSeek, Llama 3 and Qwen have them."""
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<b>", "<e>", "<u>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["to be or not to be, that is the question " * 20], trainer)
    around = tokenizers.processors.TemplateProcessing(single="<b> $A", special_tokens=[("<b>", 0)])
    bpe.post_processor = around
    bpe.save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": "<b>", "eos_token": {"content": "<e>"}, "chat_template": "{{ bos_token }}!"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def test_a_folders_tokenizer_is_found_and_round_trips(folder):
    found = open_tokenizer(folder, 300)
    tokens = found.encode("to be é 日")
    assert tokens[0] == 0 and found.encode("to be é 日", special=False) == tokens[1:]
    assert len(tokens) < len("to be é 日".encode())
    assert found.decode(tokens) == "to be é 日"
    assert found.encode(b"to be \xc3\xa9") == found.encode("to be é")
    assert found.encode("a\udcffb") == found.encode("a\ufffdb")  # an undecodable byte of a command line
    assert found.special == {"bos_token": "<b>", "eos_token": "<e>"}
    assert found.chat_template == "{{ bos_token }}!"


def test_text_is_written_only_in_complete_characters(folder):
    found = open_tokenizer(folder, 300)
    write = found.writer()
    parts = [write(token) for token in found.encode("é日 to be")]
    assert b"".join(parts).decode() == "é日 to be"
    for part in parts:
        part.decode()  # fails on an incomplete character
    assert len([part for part in parts if part]) > 2


@pytest.mark.parametrize(
    "files, ends",
    [
        ({}, {1}),
        ({"config.json": {"eos_token_id": 7}}, {7}),
        ({"config.json": {"eos_token_id": 7}, "generation_config.json": {"eos_token_id": [5, 6]}}, {5, 6}),
        ({"config.json": {"eos_token_id": None}, "tokenizer_config.json": {}}, set()),
    ],
)
def test_where_the_end_of_text_token_is_stored(folder, files, ends):
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    assert open_tokenizer(folder, 300).ends == ends


TOOL = {"name": "tool", "template": "t"}


@pytest.mark.parametrize(
    "settings, file, wanted",
    [
        ({"chat_template": "a"}, None, "a"),
        ({"chat_template": "a"}, "b", "b"),
        ({"chat_template": [TOOL, {"name": "default", "template": "d"}]}, None, "d"),
        ({"chat_template": [TOOL]}, None, None),
        ({}, None, None),
    ],
)
def test_where_the_chat_template_is_stored(folder, settings, file, wanted):
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if file is not None:
        (folder / "chat_template.jinja").write_text(file)
    assert open_tokenizer(folder, 300).chat_template == wanted


def test_without_a_tokenizer_the_tokens_are_bytes_or_unknown(tmp_path):
    assert isinstance(open_tokenizer(tmp_path, 256), ByteTokenizer)
    with pytest.raises(ValueError, match=r"no tokenizer\.json; a model of 102400 tokens does not read"):
        open_tokenizer(tmp_path, 102400)


def test_an_invalid_tokenizer_is_rejected(folder):
    size = open_tokenizer(folder, 300).tokenizer.get_vocab_size()
    assert open_tokenizer(folder, size).vocab_size == size
    told = rf"tokenizer.json: has token {size - 1}; the model knows 0..{size - 2}$"
    with pytest.raises(ValueError, match=told):
        open_tokenizer(folder, size - 1)
    (folder / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"tokenizer_config.json: holds a list; expected an object"):
        open_tokenizer(folder, 300)
    (folder / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"tokenizer.json: not a tokenizer: "):
        open_tokenizer(folder, 300)
