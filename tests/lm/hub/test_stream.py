"""Text that is decoded token by token equals the decoding of all tokens, for every kind of tokenizer."""

import json
import random
import time

import pytest
import torch

import lm
from lm.hub.stream import Decoding
from lm.hub.tokenizer import open_tokenizer
from lm.serve import answers
from lm.tokenizer import ByteTokenizer
from tests.lm.hub import tokenizers_made
from tests.lm.serve.client import client_of, joined

tokenizers = pytest.importorskip("tokenizers")
decoders = tokenizers.decoders
SEQUENCES = 20_000  # over all kinds, in the long test
METASPACE, LATE = decoders.Metaspace(), decoders.Replace(tokenizers.Regex("o h"), "H")
KINDS = {
    **tokenizers_made.KINDS,
    "bytes": None,
    # decoders that look at more than one token
    "BPE with word ends": lambda: with_decoder(tokenizers_made.word_piece, decoders.BPEDecoder("e")),
    "CTC": lambda: with_decoder(tokenizers_made.word_piece, decoders.CTC("a", "o")),
    "Metaspace alone": lambda: with_decoder(tokenizers_made.fallback_bpe, METASPACE),
    "Replace after Fuse": lambda: with_decoder(tokenizers_made.word_piece, sequence(decoders.Fuse(), LATE)),
    "Metaspace after Fuse": lambda: with_decoder(
        tokenizers_made.fallback_bpe, sequence(decoders.Fuse(), decoders.Metaspace())
    ),
    "ByteLevel in a sequence": lambda: with_decoder(
        tokenizers_made.byte_level, sequence(decoders.ByteLevel(), decoders.Strip(" ", 2, 0))
    ),
    "no decoder": lambda: with_decoder(tokenizers_made.fallback_bpe, None),
}


def sequence(*parts):
    return decoders.Sequence(list(parts))


def with_decoder(make, decoder):
    made = make()
    if decoder is None:
        return tokenizers.Tokenizer.from_str(json.dumps({**json.loads(made.to_str()), "decoder": None}))
    made.decoder = decoder
    return made


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """opened(kind) -> our tokenizer, and a function tokens -> text that the library decodes"""

    def make(kind):
        if kind == "bytes":
            return ByteTokenizer(), lambda tokens: bytes(min(t, 255) for t in tokens).decode(
                "utf-8", "replace"
            )
        folder, theirs = tmp_path_factory.mktemp("tokenizer"), KINDS[kind]()
        theirs.save(str(folder / "tokenizer.json"))
        return open_tokenizer(folder, 400), lambda tokens: theirs.decode(tokens, skip_special_tokens=True)

    return make


def streamed(tokenizer, tokens, before=()):
    """The text of the pieces."""
    writer = tokenizer.writer(before)
    return (b"".join(map(writer, tokens)) + writer.end()).decode("utf-8", "replace")


def check(kind, count, opened):
    """Compare random sequences, some of mostly bytes or mostly words, split into prompt and completion."""
    tokenizer, decode = opened(kind)
    draw = random.Random(kind)
    ranges = [(0, 290), (3, 259), (240, 290), (0, 80), (3, 12)]
    continued = 0
    for _ in range(count):
        tokens = [draw.randrange(*draw.choice(ranges)) for _ in range(draw.randrange(40))]
        whole = decode(tokens)
        assert tokenizer.decode(tokens) == streamed(tokenizer, tokens) == whole, tokens
        cut = draw.randrange(len(tokens) + 1)
        prompt = decode(tokens[:cut])
        if whole.startswith(prompt):  # else its last bytes became another character
            continued += 1
            if kind != "bytes" or "\ufffd" not in prompt:
                assert prompt + streamed(tokenizer, tokens[cut:], tokens[:cut]) == whole, (tokens, cut)
    assert continued > count / 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_pieces_add_up_to_the_decoding_of_all_tokens(kind, opened):
    check(kind, 200, opened)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_the_pieces_add_up_for_twenty_thousand_sequences(kind, opened):
    check(kind, SEQUENCES // 6, opened)


@pytest.mark.parametrize(
    "tokens, pieces",
    [
        (["▁Go", "▁home"], ["Go", " home", ""]),
        (["▁", "▁", "Go"], ["", " ", "Go", ""]),
        (["Go", "<0xC3>", "<0xA9>", "Go"], ["Go", "", "", "éGo", ""]),
        (["Go", "<0xC3>", "<0xA9>"], ["Go", "", "", "é"]),
        (["Go", "<0xC3>", "<0xA9>", "<0xFF>", "Go"], ["Go", "", "", "", "\ufffd\ufffd\ufffdGo", ""]),
        (["<0xE2>", "<s>", "<0x82>", "</s>", "<0xAC>"], ["", "", "", "", "", "€"]),
    ],
)
def test_byte_tokens_are_held_back_until_their_run_ends(tokens, pieces, opened):
    tokenizer, _ = opened("BPE with byte fallback")
    writer = tokenizer.writer()
    said = [writer(tokenizer.tokenizer.token_to_id(token)).decode() for token in tokens]
    assert [*said, writer.end().decode()] == pieces


def test_a_prompt_may_end_within_a_character(opened):
    tokenizer, decode = opened("byte-level BPE")
    letters = {letter: tokenizer.tokenizer.token_to_id(letter) for letter in "âĤ¬"}  # the bytes of €
    first, second, third = letters.values()
    assert decode([first, second, third]) == "€" and decode([first]) == decode([first, second]) == "\ufffd"
    assert streamed(tokenizer, [second], [first]) == ""
    assert streamed(tokenizer, [third], [first, second]) == "€"
    assert streamed(tokenizer, [first], [first, second]) == "\ufffd"


def test_words_are_streamed_at_once(opened):
    for kind in tokenizers_made.KINDS:
        tokenizer, _ = opened(kind)
        writer = tokenizer.writer()
        assert all(writer(token) for token in tokenizer.encode("to be home . to be home")), kind


@pytest.mark.parametrize("kind", ["byte-level BPE", "BPE with byte fallback"])
def test_time_is_linear_in_the_tokens_even_if_every_byte_is_invalid(kind, opened):
    tokenizer, decode = opened(kind)
    invalid = next(token for token in range(3, 270) if decode([token]) == "\ufffd")
    seconds = []
    for length in (1_000, 16_000):
        start = time.perf_counter()
        assert streamed(tokenizer, [invalid] * length) == "\ufffd" * length
        seconds.append(time.perf_counter() - start)
    assert seconds[1] < 80 * seconds[0] + 0.1  # 256 times if quadratic


# --- commands and the server, with a model that draws any token


@pytest.fixture(scope="module", params=["byte-level BPE", "BPE with byte fallback"])
def babbling(request, tiny, make_model, tmp_path_factory):
    """A saved model with random weights and a tokenizer of this kind."""
    tokenizer = tokenizers_made.KINDS[request.param]()
    folder = tmp_path_factory.mktemp("babbling") / "model"
    size = tokenizer.get_vocab_size()
    config = tiny(model={"max_length": 96, "vocab_size": size}).model
    lm.save(make_model(config, torch.float32, std=0.05), folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder, tokenizer


OPTIONS = ("--temperature", 1, "--max-new-tokens", 60)


def drawn(folder, tokenizer, prompt, seed):
    """The text of the prompt and 60 drawn tokens."""
    ids = tokenizer.encode(prompt).ids
    made = lm.generate(lm.load(folder), torch.tensor([ids]), 60, seed=seed)[0].tolist()
    return tokenizer.decode(made, skip_special_tokens=True)


def test_generate_continues_the_prompt_as_all_tokens_decode(babbling, invoke):
    folder, tokenizer = babbling
    for seed in range(5):
        status, out, err = invoke("generate", folder, "--prompt", "Go home", *OPTIONS, "--seed", seed)
        assert (status, err, out) == (0, "", drawn(folder, tokenizer, "Go home", seed) + "\n")


def test_chat_continues_the_line_as_all_tokens_decode(babbling, invoke):
    folder, tokenizer = babbling
    texts = ((seed, drawn(folder, tokenizer, "Go home\n", seed)) for seed in range(100))
    # in the others the newline, a byte token, became part of an invalid run
    seed, whole = next((seed, text) for seed, text in texts if text.startswith("Go home\n"))
    status, out, err = invoke("chat", folder, *OPTIONS, "--seed", seed, said="Go home\n\n")
    assert (status, err) == (0, "")
    assert out.endswith("> " + whole.removeprefix("Go home\n") + "\n> ")


def test_the_server_streams_the_text_that_it_sends_whole(babbling, serving):
    folder, tokenizer = babbling
    opened = lm.hub.folder.open_folder(folder, device="cpu")
    with serving(answers.Served(*opened, "drawn", answers.Limits())) as running:
        create = client_of(running).completions.create
        for seed in range(3):
            asked = {"model": "drawn", "prompt": "Go home", "seed": seed, "max_tokens": 60}
            whole = create(**asked).choices[0].text
            assert "Go home" + whole == drawn(folder, tokenizer, "Go home", seed)
            assert joined(create(**asked, stream=True))[0][0] == whole


def test_a_context_token_is_an_ordinary_word(opened):
    """It stands for all previous text, so its own text must end a character and a run of bytes."""
    for kind in tokenizers_made.KINDS:
        decoding = Decoding(opened(kind)[0].tokenizer)
        assert decoding.text([decoding.context]).isalnum() and decoding.context not in decoding.bytes
