"""A folder's tokenizer files give the ids and special tokens of transformers' AutoTokenizer."""

import json

import pytest

from lm.hub.tokenizer import keep_ends, open_tokenizer, stated_ends
from tests.helpers import refused
from tests.lm.hub import tokenizers_made

pytest.importorskip("tokenizers")
from tokenizers import processors

TEXT = "Go home <s><|a|> <|b|> <t> <|end|>x</s> y <|q|><|p|> to be<x><y> <i><j><k><l> <pad>. home homes [P]"


def entry(content, **flags):
    """A token as tokenizer files list it."""
    common = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return {"content": content, **common, **flags}


def settings(**keys):
    return {"tokenizer_config.json": keys}


FOLDERS = {
    "tokenizer.json alone": {},
    "named tokens": settings(bos_token="<s>", eos_token="<|end|>", pad_token="<pad>"),
    "added_tokens_decoder": settings(
        eos_token="<|a|>",
        added_tokens_decoder={
            "400": entry("<|a|>", special=True),
            "402": entry("<t>", special=False, normalized=True),
            "401": entry("<|b|>", special=True, lstrip=True),
        },
    ),
    "other flags": settings(
        added_tokens_decoder={"1": entry("</s>", special=True, rstrip=True, lstrip=True)}
    ),
    "special_tokens_map.json": {
        "special_tokens_map.json": {
            "eos_token": entry("<|end|>", rstrip=True),
            "additional_special_tokens": ["<x>", "<y>"],
            "pad_token": "</s>",
        }
    },
    "added_tokens.json": {
        "added_tokens.json": {"<|q|>": 401, "<|p|>": 400, "home": 402},
        "special_tokens_map.json": {"eos_token": "<|p|>"},
    },
    "all four files": {
        **settings(added_tokens_decoder={"400": entry("<|a|>", special=True)}),
        "added_tokens.json": {"<|q|>": 401},
        "special_tokens_map.json": {"eos_token": "<|p|>"},
    },
    "extra_special_tokens": settings(extra_special_tokens=["<i>", "<j>"], additional_special_tokens=["<k>"]),
    "extra tokens by name": settings(extra_special_tokens={"image_token": "<i>"}, boi_token="<j>"),
    "additional_special_tokens": {
        **settings(
            additional_special_tokens=["<k>"], add_bos_token=True, add_eos_token=True, bos_token="<s>"
        ),
        "special_tokens_map.json": {"additional_special_tokens": ["<l>"]},
    },
    "a token as an object": settings(
        bos_token={**entry("<|b|>"), "__type": "AddedToken", "normalized": True}, split_special_tokens=False
    ),
    "split_special_tokens": settings(split_special_tokens=True, eos_token="</s>"),
    "a class and a length": settings(
        tokenizer_class="PreTrainedTokenizerFast", eos_token="<|end|>", model_max_length=4
    ),
    "a named token listed as not special": settings(
        eos_token="<t>", added_tokens_decoder={"400": entry("<t>", special=False)}
    ),
    "a word of the vocabulary": settings(eos_token="home", pad_token=None),
}


@pytest.fixture
def write(tmp_path):
    """write(tokenizer, files) -> a folder with them"""

    def make(tokenizer, files):
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
        for name, content in files.items():
            (tmp_path / name).write_text(json.dumps(content))
        return tmp_path

    return make


def compare(transformers, folder):
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), open_tokenizer(folder, 1000)
    for text in (TEXT, "", "home", "a\n\n b", "<|end|> <|end|>"):
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.encode(text, special=False) == theirs.encode(text, add_special_tokens=False)
    ids = theirs.encode(TEXT)
    assert ours.decode(ids) == theirs.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert ours.special == theirs.special_tokens_map


@pytest.mark.parametrize("files", FOLDERS.values(), ids=FOLDERS)
@pytest.mark.parametrize("kind", tokenizers_made.KINDS)
def test_ids_are_those_of_transformers(kind, files, write, transformers):
    tokenizer = tokenizers_made.KINDS[kind]()
    around = {"single": "<s> $A", "special_tokens": [("<s>", 0)]}
    tokenizer.post_processor = processors.TemplateProcessing(**around)
    compare(transformers, write(tokenizer, files))


@pytest.mark.parametrize("kind", tokenizers_made.KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_saved_truncation_and_padding_are_not_applied(kind, side, write, transformers):
    tokenizer = tokenizers_made.KINDS[kind]()
    tokenizer.enable_truncation(3, direction=side)
    tokenizer.enable_padding(direction=side, length=200, pad_id=0, pad_token="[P]")
    folder = write(tokenizer, {})
    compare(transformers, folder)
    assert 3 < len(open_tokenizer(folder, 1000).encode(TEXT)) < 200


def test_a_class_of_transformers_makes_no_difference_to_its_own_kind(write, transformers):
    folder = write(
        tokenizers_made.fallback_bpe(), settings(tokenizer_class="LlamaTokenizer", bos_token="<s>")
    )
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), open_tokenizer(folder, 1000)
    for text in ("Go home", "to be é", "<s>"):
        assert ours.encode(text, special=False) == theirs.encode(text, add_special_tokens=False)


def test_a_token_beyond_the_model_is_rejected_only_in_a_text(write):
    tokenizer = tokenizers_made.word_level()
    size = tokenizer.get_vocab_size()
    opened = open_tokenizer(write(tokenizer, settings(pad_token="[PAD]")), size)
    assert opened.encode("to be") == tokenizer.encode("to be").ids
    refused(lambda: opened.encode("to [PAD]"), f"'[PAD]' is token {size}; the model knows 0..{size - 1}")


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": entry("<a>")}}, "invalid literal for int"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"3": {"lstrip": True}}}, "is not a token"),
        ("tokenizer_config.json", {"added_tokens_decoder": ["<a>"]}, "no attribute 'items'"),
        ("tokenizer_config.json", {"extra_special_tokens": [3]}, "3 is not a token"),
        ("tokenizer_config.json", {"extra_special_tokens": 3}, "damaged"),
        ("added_tokens.json", {"<a>": None}, "damaged"),
        ("added_tokens.json", ["<a>"], "added_tokens.json: holds a list; expected an object"),
        ("special_tokens_map.json", {"eos_token": entry("<a>", lstrip=3)}, "damaged"),
    ],
)
def test_damaged_files_are_one_line(name, content, said, write):
    folder = write(tokenizers_made.word_level(), {name: content})
    refused(lambda: open_tokenizer(folder, 1000), folder, said)


# --- the tokens that end a text

GENERATION, CONFIG = "generation_config.json", "config.json"


@pytest.mark.parametrize("generation", [..., None, 5, [5, 6], [], True, "x"])
@pytest.mark.parametrize("config", [..., None, 7, [7, 8]])
def test_end_tokens_are_those_of_transformers_generate_else_of_the_next_file(generation, config, write):
    """generation_config.json comes first, as in transformers; without an id there, config.json counts."""
    stated = {GENERATION: generation, CONFIG: config}
    files = {name: {"eos_token_id": ids} for name, ids in stated.items() if ids is not ...}
    folder = write(tokenizers_made.word_level(), {**files, **settings(eos_token="to")})
    wanted = {5} if generation == 5 else {5, 6} if generation == [5, 6] else {7} if config == 7 else {7, 8}
    if wanted == {7, 8} and config != [7, 8]:
        wanted = set(tokenizers_made.word_level().encode("to").ids)
    assert open_tokenizer(folder, 1000).ends == wanted


def test_a_folder_of_bytes_may_state_its_end_tokens(tmp_path):
    assert open_tokenizer(tmp_path, 256).ends == {3}
    (tmp_path / CONFIG).write_text('{"eos_token_id": [0, 10]}')
    assert open_tokenizer(tmp_path, 256).ends == {0, 10}
    assert open_tokenizer(tmp_path / "other", 256).ends == {3}


@pytest.mark.parametrize("generation", [None, {"top_k": 5}, {"eos_token_id": 9}])
def test_end_tokens_are_kept_in_a_converted_folder(generation, tmp_path):
    source, into = tmp_path / "source", tmp_path / "into"
    for folder in (source, into):
        folder.mkdir()
        if generation is not None:
            (folder / GENERATION).write_text(json.dumps(generation))
    (source / CONFIG).write_text('{"eos_token_id": [7, 8]}')
    keep_ends(source, into)
    assert stated_ends(into) == stated_ends(source) == ({9} if generation == {"eos_token_id": 9} else {7, 8})
    if generation is not None:
        assert json.loads((into / GENERATION).read_text()).items() >= generation.items()
