"""The default text and its n-gram baselines. The rebuild itself needs the source archive and isn't tested."""

import hashlib
import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest

from lm.corpus import build, ngram

FOLDER = Path(build.__file__).parent
WORKS = {"train": 38, "validation": 4}
TEXTS = {name: (FOLDER / f"{name}.txt").read_bytes() for name in WORKS}
BASELINES = json.loads((FOLDER / "baselines.json").read_text())


@pytest.mark.parametrize("name", WORKS)
def test_the_files_are_the_documented_ones(name):
    digest = hashlib.sha256(TEXTS[name]).hexdigest()
    row = f"| `{name}.txt` | {WORKS[name]} | {len(TEXTS[name])} | `{digest}` |"
    assert row in (FOLDER / "README.md").read_text()
    assert BASELINES[f"{name}_sha256"] == digest


def test_the_readme_names_the_archive_that_the_script_checks():
    assert f"`{build.ARCHIVE_SHA256}`" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("name", WORKS)
def test_every_work_ends_with_end_of_text(name):
    assert TEXTS[name].count(b"\x03") == WORKS[name]
    works = TEXTS[name].split(b"\x03")
    assert works.pop() == b""
    assert all(work.endswith(b"\n") and work[:1].isalpha() for work in works)


@pytest.mark.parametrize("name", WORKS)
def test_only_plain_lines_are_left(name):
    text = TEXTS[name].decode("ascii")
    assert set(text) <= {chr(code) for code in range(32, 127)} | {"\n", "\x03"}
    assert "\n\n\n" not in text
    assert not re.search(r"^ | $|  ", text, re.MULTILINE)


@pytest.mark.parametrize("name", WORKS)
@pytest.mark.parametrize(
    "leftover",
    [
        r"[][{}_@*<>#\\|~^+=/]",
        r"\bExeunt\b|\bExit\b|\bRe-enter\b|\[Enter|Gutenberg|Etext",
        r"^(ACT|SCENE|Act|Scene) [IVX\d]|^INDUCTION|^SONG\b|^THE END|DRAMATIS|PERSONS REPRESENTED",
        r"^[IVXLC]{2,}\.?$|^\d+$",
        r"^[A-Z][A-Z ]{3,}\.?$(?<!PAROLLES\.)(?<!DON ADRIANO DE ARMADO\.)",  # both are signatures in letters
    ],
)
def test_no_stage_machinery_is_left(name, leftover):
    assert re.findall(leftover, TEXTS[name].decode("ascii"), re.MULTILINE) == []


@pytest.mark.parametrize(
    "line",
    [
        b"Is this a dagger which I see before me,",
        b"This royal throne of kings, this scepter'd isle,",
        b"Full fathom five thy father lies:",
        b"If music be the food of love, play on,",
        b"\nLady Macbeth:\n",
        b"\nBolingbroke:\nMy lord,",
        b"\nProspero:\n",
        b"\nMalvolio:\n",
    ],
)
def test_the_held_out_plays_are_not_in_the_training_text(line):
    assert line in TEXTS["validation"]
    assert line not in TEXTS["train"]


def test_cleaning_a_play():
    paragraphs = [
        "ACT I.",
        "SCENE 1. A heath.\nThunder.",
        "Storm still.",
        "[Enter two LORDS.]",
        "FIRST LORD. [Aside.]\nWho's [Knocking within] there?--[To him.] Speak.\n[Exit Servant.]",
        "Nay, answer me.",
        "SECOND LORD.",
        "[Within.] Ay.",
        "SONG.\nI.\nHey, ho,",
        "II.\nThe wind.",
        "[Exeunt [all but the KING.]",
        "FIRST LORD. Good night.\nSECOND LORD.\nSo, to the king,\nYours, FIRST LORD.",
        "THE END",
    ]
    assert build.clean_play(paragraphs) == (
        "First Lord:\nWho's there?--Speak.\nNay, answer me.\n\n"
        "Second Lord:\nAy.\n\nHey, ho,\n\nThe wind.\n\n"
        "First Lord:\nGood night.\n\n"
        "Second Lord:\nSo, to the king,\nYours, FIRST LORD."
    )


@pytest.mark.parametrize(
    ("source", "written"),
    [
        ("LADY MACBETH.", "Lady Macbeth:"),
        ("Mar. and Ber.", "Mar. and Ber:"),
        ("ANTIPHOLUS OF EPHESUS.", "Antipholus of Ephesus:"),
        ("I Player.", "1 Player:"),
        ("THE PROLOGUE.", "Prologue:"),
    ],
)
def test_names_of_speakers(source, written):
    assert build.is_speaker([source, "Words."])
    assert build.speaker_name(source) == written


@pytest.mark.parametrize("line", ["How now!", "Come hither, sir.", "So,--", "What, is Horatio there?"])
def test_short_lines_are_not_speakers(line):
    assert not build.is_speaker([line, "Words."])


def test_a_different_archive_is_rejected(tmp_path):
    archive = tmp_path / "other.tar.gz"
    archive.write_bytes(b"other")
    with pytest.raises(ValueError, match="sha256"):
        build.read_works(archive)


def test_a_changed_source_text_is_rejected():
    with pytest.raises(ValueError, match="must occur once, but occurs 0 times"):
        build.clean("twelfth_night", "TWELFTH NIGHT\n\nby William Shakespeare\n\nACT I.\n")


def witten_bell(text: bytes, context: bytes, following: int) -> float:
    """The formula's estimate for one byte after one context."""
    lower = witten_bell(text, context[1:], following) if context else 1 / 256
    followers = [
        text[end] for end in range(len(context), len(text)) if text[end - len(context) : end] == context
    ]
    if not followers:
        return lower
    kinds = len(set(followers))
    return (followers.count(following) + kinds * lower) / (len(followers) + kinds)


def test_ngrams_match_the_formula():
    counted, scored = b"abracadabra, abra\x00\xff\xff\xffcad", b"abrab\xff\xffcadz, abracadabra"
    model = ngram.WittenBell(np.frombuffer(counted, np.uint8), order=7)
    found = model.probabilities(np.frombuffer(scored, np.uint8))
    for order in range(8):
        wanted = [witten_bell(counted, scored[max(0, i - order) : i], byte) for i, byte in enumerate(scored)]
        np.testing.assert_allclose(found[order], wanted, rtol=1e-12)


def test_ngrams_are_distributions():
    text = TEXTS["train"][:200_000]
    model = ngram.WittenBell(np.frombuffer(text, np.uint8))
    generator = random.Random(0)
    for _ in range(100):
        start, length = generator.randrange(len(text)), generator.randrange(10)
        context = text[start : start + length]
        if generator.random() < 0.5:
            context = generator.randbytes(generator.randrange(4)) + context[1:]
        distribution = model.distribution(context)
        assert distribution.min() > 0
        assert math.isclose(distribution.sum(), 1, rel_tol=1e-12)
        following = generator.randrange(256)
        scored = np.frombuffer(context[-model.order :] + bytes([following]), np.uint8)
        assert math.isclose(distribution[following], model.probabilities(scored)[-1, -1], rel_tol=1e-12)


@pytest.mark.parametrize("order", [-1, 8])
def test_invalid_orders_are_rejected(order):
    with pytest.raises(ValueError, match=f"order={order}"):
        ngram.WittenBell(np.arange(20, dtype=np.uint8), order)


def test_the_baselines_are_what_the_code_computes():
    train, validation = (np.frombuffer(TEXTS[name], np.uint8) for name in ("train", "validation"))
    losses = -np.log(ngram.WittenBell(train).probabilities(validation)).mean(axis=1)
    np.testing.assert_allclose(losses, [BASELINES["loss"][str(order)] for order in range(8)], atol=1e-4)
    assert BASELINES["best"] == min(BASELINES["loss"].values())
    assert BASELINES["loss"][str(BASELINES["best_order"])] == BASELINES["best"]
