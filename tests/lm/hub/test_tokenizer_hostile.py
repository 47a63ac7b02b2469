"""Tokenizer folders that are valid JSON but make the `tokenizers` library fail: one line, or they work."""

import json

import pytest

from lm.hub.tokenizer import encode_chat, open_tokenizer
from tests.lm.hub import tokenizers_made

pytest.importorskip("tokenizers")
VOCABULARY = 700
MADE = {kind: json.loads(make().to_str()) for kind, make in tokenizers_made.KINDS.items()}


def use(folder):
    """Read and write text as the commands do."""
    tokenizer = open_tokenizer(folder, VOCABULARY)
    ids = tokenizer.encode("Go home <s> é 日本")
    writer = tokenizer.writer(ids[:2])
    for token in [*ids, *range(0, VOCABULARY, 7)]:
        writer(token)
    writer.end()
    tokenizer.decode(ids)
    encode_chat(tokenizer, [{"role": "user", "content": "hi </s>"}])


def works_or_one_line(folder, capfd):
    """Whether it works; else a ValueError in one line, with nothing on standard error."""
    try:
        use(folder)
    except ValueError as error:
        assert "\n" not in str(error) and str(error)
        return False
    finally:
        assert capfd.readouterr().err == ""
    return True


PARTS = [  # that the library reads, but fails on
    ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    ("normalizer", {"type": "Prepend", "prepend": ""}),
    ("normalizer", {"type": "Replace", "pattern": {"Regex": "*"}, "content": "a"}),
    ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
    ("pre_tokenizer", {"type": "Sequence", "pretokenizers": []}),
    ("decoder", {"type": "Strip", "content": " ", "start": 10**9, "stop": 10**9}),
    ("decoder", {"type": "Sequence", "decoders": []}),
    ("decoder", {"type": "unknown"}),
    (
        "post_processor",
        {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "zz", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        },
    ),
    ("post_processor", {"type": "BertProcessing", "sep": ["x", 9999], "cls": ["y", 99999]}),
    ("model", {"type": "WordLevel", "vocab": {"to": 0}, "unk_token": "absent"}),
    ("model", {"type": "WordPiece", "vocab": {}, "unk_token": "<unk>"}),
    ("model", {"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": None, "byte_fallback": False}),
    ("model", {"type": "BPE", "vocab": {}, "merges": []}),
    ("added_tokens", []),
    ("added_tokens", [{"id": 5, "content": ""}]),
    ("model", None),
    ("version", "9.0"),
]


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("part, value", PARTS, ids=lambda value: str(value)[:40])
def test_a_part_that_the_library_fails_on_is_one_line(kind, part, value, tmp_path, capfd):
    (tmp_path / "tokenizer.json").write_text(json.dumps({**MADE[kind], part: value}))
    works_or_one_line(tmp_path, capfd)


def test_a_panic_and_a_plain_exception_of_the_library_are_errors(tmp_path, capfd):
    path = tmp_path / "tokenizer.json"
    for kind, part, value in (("byte-level BPE", *PARTS[0]), ("WordLevel", *PARTS[10])):
        path.write_text(json.dumps({**MADE[kind], part: value}))
        assert not works_or_one_line(tmp_path, capfd)


@pytest.mark.parametrize(
    "template",
    [
        "\ud800",
        ["x"],
        [{"name": ["a"], "template": "x"}],
        [{"name": {}}],
        [{"name": "default", "template": 1}],
        {"default": []},
        1,
    ],
    ids=ascii,
)
def test_a_chat_template_of_another_shape_is_ignored_or_refused(template, tmp_path, capfd):
    (tmp_path / "tokenizer.json").write_text(json.dumps(MADE["byte-level BPE"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert works_or_one_line(tmp_path, capfd) == (template != "\ud800")
