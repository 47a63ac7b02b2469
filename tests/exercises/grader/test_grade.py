"""Grading a class: what one student hands in costs at most that student's points."""

import csv
import json
import os
import textwrap

import pytest

from exercises.grader import exercise, grade, homework, source, submissions, verdict
from lm import cli
from tests.helpers import ROOT, refused

ABOUT = exercise.load_all(ROOT / "exercises")["rms-norm"]
TEXT = (ROOT / "mla" / "norm.py").read_text()
RIGHT = "wide = x.float()\nscale = (wide.pow(2).mean(-1, keepdim=True) + eps).rsqrt()\n"
RIGHT += "return (wide * scale * weight).to(x.dtype), scale"
WRONG = "return x * weight, x.float().square().sum(-1, keepdim=True)"


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    monkeypatch.chdir(ROOT)


def answer(body, top=""):
    text = ABOUT.with_body(TEXT, body)
    place = text.index("import torch")
    return text[:place] + top + text[place:]


READS = """
names = {}
text = open("mla/norm.py").read().partition("@torch")[0].partition("class RMSNorm")[0]
exec(text, names)
return names["rms_norm"](x, weight, eps)
"""
HELPER = f"def help_me(x, weight, eps):\n{textwrap.indent(RIGHT, '    ')}\n"
NO = "an answer may not replace"
ALWAYS = "lambda *a, **k: torch.tensor(True)"
STUDENTS = {  # the file, full points or not, what the row says and flags
    "bom": ("\ufeff" + answer(RIGHT), True, "", ""),
    "crlf": (answer(RIGHT).replace("\n", "\r\n"), True, "", ""),
    "imports": (
        answer(RIGHT, "from mla import RMSNorm, MultiheadLatentAttention\nimport moe\n"),
        True,
        "",
        "",
    ),
    "renamed": (
        answer(RIGHT, "from mla.rope import frequencies as f, YaRN\nimport math, torch\n"),
        True,
        "",
        "",
    ),
    "helper": (answer("return help_me(x, weight, eps)") + f"\n\n{HELPER}", True, "", ""),
    "tuple": (answer(RIGHT.replace("2", "TWO"), "ONE, TWO = 1, 2\n"), True, "", ""),
    "reads": (answer(READS), None, "", "reads the package's source"),
    "star": (
        answer(RIGHT, "from mla import *\n"),
        False,
        "from mla import *: import the names that you use",
        "",
    ),
    "missing": (
        answer(f"nothing\n{RIGHT}", "from mla import nothing\n"),
        False,
        "cannot import name 'nothing'",
        "",
    ),
    "escape": (
        answer("raise ValueError('\\x1b[2J\\x1b]0;mine\\x07 boo')"),
        False,
        "\\x1b[2J\\x1b]0;mine\\x07 boo",
        "",
    ),
    "deep": (answer("return " + "+".join(["x"] * 20000)), False, "", ""),
    "isclose": (answer(f"torch.isclose = {ALWAYS}\n{WRONG}"), False, f"{NO} torch.isclose", ""),
    "assert_close": (
        answer(f"torch.testing.assert_close = {ALWAYS}\n{WRONG}"),
        False,
        f"{NO} torch.testing.assert_close",
        "",
    ),
    "equal": (answer(f"torch.Tensor.__eq__ = {ALWAYS}\n{WRONG}"), False, f"{NO} torch.Tensor.__eq__", ""),
    "top": (
        answer(WRONG, f"import torch\nSPOILT = setattr(torch, 'allclose', {ALWAYS})\n"),
        False,
        f"{NO} torch.allclose",
        "setattr",
    ),
    "grader": (
        answer("import exercises.grader.compare as c\nc.difference = lambda *a: ''\n" + WRONG),
        False,
        NO,
        "",
    ),
    "list": (answer("return [1, 2], 3"), False, "", ""),
    "subclass": (
        answer("class T(torch.Tensor):\n    pass\nreturn x.as_subclass(T), x.as_subclass(T)"),
        False,
        "its type is T, expected a tensor",
        "",
    ),
    "formula": (answer("raise ValueError('=1+1')"), False, "=1+1", ""),
    "exits": (answer("import sys\nsys.exit(0)"), False, "SystemExit 0", "imports sys"),
}
NOTES = {
    "brackets": "[" * 200_000,
    "list": "[1, 2]",
    "number": "3",
    "entries": '{"rms-norm": 7}',
    "text": '{"rms-norm": {"hints": "9"}}',
}


@pytest.mark.long
def test_one_students_files_cost_only_that_student(tmp_path, capsys):
    folder = tmp_path / "class"
    for name, (text, *_) in STUDENTS.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "rms_norm.py").write_bytes(text.encode())
    for name in [*NOTES, "device", "fifo", "link"]:
        (folder / f"notes {name}").mkdir()
        (folder / f"notes {name}" / "rms_norm.py").write_text(answer(RIGHT))
    for name, text in NOTES.items():
        (folder / f"notes {name}" / ".progress.json").write_text(text)
    (folder / "notes device" / ".progress.json").symlink_to("/dev/zero")
    os.mkfifo(folder / "notes fifo" / ".progress.json")
    (folder / "notes link" / ".progress.json").symlink_to(tmp_path)
    for name, make in (("file fifo", os.mkfifo), ("file device", lambda path: path.symlink_to("/dev/zero"))):
        (folder / name).mkdir()
        make(folder / name / "rms_norm.py")
    out = tmp_path / "grades"
    arguments = ["--only", "rms-norm", "--json", str(out / "a.json"), "--csv", str(out / "a.csv")]
    assert cli.main(["exercise", "grade", str(folder), *arguments]) == 1
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\x07" not in said
    rows = {row["student"]: row for row in json.loads((out / "a.json").read_text())["rows"]}
    lines = {line.split("rms-norm")[0].strip(): line for line in said.splitlines()}
    for name, (_, full, says, flag) in STUDENTS.items():
        row = rows[name]
        assert full is None or (row["score"] == 10) == full, row
        assert says in row["says"] and flag in "; ".join(row["flags"]) and flag in lines[name], row
        assert full or row["says"] or row["flags"], row
    for name in [*NOTES, "device", "fifo", "link"]:
        assert (rows[f"notes {name}"]["score"], rows[f"notes {name}"]["hints"]) == (10, 0)
    for name in ("isclose", "assert_close", "equal", "top", "grader"):
        assert rows[name]["score"] == 0
    assert rows["file fifo"]["says"] == "rms_norm.py: is not a regular file"
    assert rows["file device"]["says"] == "rms_norm.py: is a symbolic link; hand in a regular file"
    with open(out / "a.csv", newline="") as file:
        assert not [cell for row in csv.reader(file) for cell in row if cell[:1] in ("=", "+", "@")]


class Busy:
    """A checker on a machine so busy that the blank's checks end without results, at first or always."""

    def __init__(self, failures):
        self.failures = failures

    def check(self, about, path, *_, **__):
        self.failures -= 1
        row = {"name": "y", "stage": "values", "passed": True, "says": ""}
        report = {"raised": None, "mistakes": [], "tests": {"good": True, "passed": 3, "total": 3}}
        report |= {"used": [], "seconds": 1.0, "output": "", "checks": [row] * 12}
        late = {"type": "", "says": "not finished after 60 s", "line": None}
        return {**report, "checks": [], "tests": None, "raised": late} if self.failures >= 0 else report


def test_points_never_exceed_the_maximum_on_a_busy_machine(tmp_path):
    path = tmp_path / "rms_norm.py"
    path.write_text(answer(RIGHT))
    handed_in = submissions.Submission({"rms-norm": path})
    assert grade.blank_total(ABOUT, Busy(1), tmp_path) == 13
    with pytest.raises(RuntimeError, match="its checks cannot be run here: not finished after 60 s"):
        grade.blank_total(ABOUT, Busy(2), tmp_path)
    path.write_text(answer(RIGHT))
    row = grade.graded("ann", handed_in, ABOUT, Busy(0), 2, total=1)
    assert (row["score"], row["checks_passed"], row["checks"]) == (10, 13, 13)
    row = grade.graded("ann", handed_in, ABOUT, Busy(1), 2, total=13)
    assert (row["score"], row["checks"], row["says"]) == (0, 13, "not finished after 60 s")


@pytest.mark.parametrize("content", [*NOTES.values(), "{", "null", '{"rms-norm": null}'])
def test_an_unusable_record_of_progress_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / ".progress.json"
    path.write_text(content)
    refused(lambda: source.notes(path), "")
    refused(lambda: homework.Homework(tmp_path), ".progress.json: cannot be read (", "delete it to reset")


def test_a_record_that_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / ".progress.json")
    refused(lambda: homework.Homework(tmp_path), "is not a regular file")
    (tmp_path / ".progress.json").unlink()
    (tmp_path / ".progress.json").symlink_to("/dev/zero")
    refused(lambda: homework.Homework(tmp_path), "is a symbolic link")


def test_a_byte_order_mark_is_no_error_and_a_huge_file_is(tmp_path):
    path = tmp_path / "rope.py"
    path.write_bytes(b"\xef\xbb\xbfx = 1\n")
    assert source.read(path) == "x = 1\n"
    path.write_bytes(bytes(2 << 20))
    refused(lambda: source.read(path), f"{path}: is larger than 1 MB")


def test_a_refusal_names_what_to_look_at_and_hides_control_characters(tmp_path):
    rows = [{"name": "y", "stage": "values", "passed": False, "says": "differs in 3 of 4 elements"}]
    report = {"raised": None, "checks": rows, "mistakes": [], "tests": None, "output": "a\x1b[31mb\n"}
    shown = verdict.shown(ABOUT, tmp_path / "rms_norm.py", report)
    assert "no known mistake: look at y; compare RMSNorm eq. 4, or: lm exercise hint rms-norm" in shown
    assert "\x1b" not in shown and "| a\\x1b[31mb" in shown
