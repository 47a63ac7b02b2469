"""The exercises themselves: their edits apply to the package, and their checks work."""

import ast
import dataclasses
import textwrap

import pytest

from exercises.grader import exercise, homework, source, teacher, verdict
from tests.helpers import ROOT, refused

EXERCISES = exercise.load_all(ROOT / "exercises")
EACH = pytest.mark.parametrize("about", EXERCISES.values(), ids=EXERCISES)


def text_of(about):
    return (ROOT / homework.origin(about)).read_text()


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_exercises_are_numbered_without_gaps():
    assert len(EXERCISES) >= 14
    assert [about.number for about in EXERCISES.values()] == list(range(len(EXERCISES)))


@EACH
def test_every_edit_applies_to_the_source(about):
    text = text_of(about)
    tree = ast.parse(text)
    blank = about.blank(text)
    assert f'raise NotImplementedError("exercise {about.name}")' in blank
    assert len(source.find(tree, about.function)[1].body) < 25
    for number, (_, _, sentence) in enumerate(about.mistakes):
        wrong = about.with_mistakes(text, [number])
        assert wrong is not None, f"its text does not occur exactly once: {sentence}"
        assert ast.dump(ast.parse(wrong)) != ast.dump(tree)
    sentences = [sentence for _, _, sentence in about.mistakes]
    assert len(sentences) >= 5 and len(set(sentences)) == len(sentences)
    bodies = {ast.dump(ast.parse(about.with_body(text, textwrap.dedent(body)))) for body in about.right}
    assert len(bodies | {ast.dump(tree)}) == 4  # three more, all different
    for test in about.tests:
        assert (ROOT / test.partition("::")[0]).is_file()


@EACH
def test_the_blank_does_not_give_the_answer_away(about):
    text = text_of(about)
    start, stop = source.body_lines(text, about.function, about.begin)
    lines = [line.split("#")[0].strip() for line in text.splitlines()[start:stop]]
    blank = about.blank(text)
    for line in lines:
        if len(line) > 50 and text.count(line) == 1:  # similar code may stand elsewhere
            assert line not in blank, line
    hints = " ".join(about.hints)
    assert not any(len(line) > 25 and line in hints for line in lines)


@pytest.mark.parametrize(
    "change, said",
    [
        (("TARGET = ", "TARGET = 1 + "), "TARGET must be a literal, not an expression"),
        (("LEARN = ", "LEARNED = "), "learned"),
        (("EQUATION = ", "_EQUATION = "), "missing 1 required argument: 'equation'"),
        (('"mla.norm:rms_norm"', '"rms_norm"'), "TARGET 'rms_norm' must have the form module:function"),
        (("RIGHT = (", "RIGHT = (("), "never closed"),
    ],
)
def test_a_malformed_exercise_is_refused_in_one_line(tmp_path, change, said):
    path = tmp_path / "00_rms_norm.py"
    path.write_text((ROOT / "exercises" / path.name).read_text().replace(*change, 1))
    refused(lambda: exercise.load(path), path, said)


@pytest.mark.long
@EACH
def test_the_self_test_passes(about, tmp_path):
    with homework.Checker() as checker:
        assert teacher.problems(about, checker, tmp_path) == []


@pytest.mark.long
@EACH
def test_mistakes_are_recognised_on_the_inputs_of_grade(about, tmp_path):
    """`grade` uses another seed than `check`: the package passes, and mistakes are recognised there too."""
    text, path, seed = text_of(about), tmp_path / about.file, 2
    with homework.Checker() as checker:
        path.write_text(text)
        assert not [row for row in checker.check(about, path, seed)["checks"] if not row["passed"]]
        for number, (_, _, sentence) in enumerate(about.mistakes):
            path.write_text(about.with_mistakes(text, [number]))
            assert checker.check(about, path, seed)["mistakes"] == [sentence]


@pytest.mark.long
def test_two_mistakes_at_once_are_both_recognised(tmp_path):
    about = EXERCISES["router"]
    path = tmp_path / about.file
    path.write_text(about.with_mistakes(text_of(about), [0, 6]))
    with homework.Checker() as checker:
        found = checker.check(about, path)["mistakes"]
    assert found == [about.mistakes[0][2], about.mistakes[6][2]]


HOSTILE = {
    "loop": ("while True:\n    pass", "not finished after 3 s"),
    "sleep": ("import time\ntime.sleep(1000)", "not finished after 3 s"),
    "exit": ("raise SystemExit(0)", "SystemExit: 0"),
    "hard exit": ("import os\nos._exit(0)", "PermissionError: an answer may not use os._exit"),
    "interrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt: "),
    "fork": ("import os\nwhile True:\n    os.fork()", "PermissionError: an answer may not use os.fork"),
    "process": (
        "import subprocess\nsubprocess.run(['sleep', '1000'])",
        "an answer may not use subprocess.Popen",
    ),
    "memory": ("return torch.zeros(25 * 10**9), None", "RuntimeError: "),
    "list": ("return [0] * (25 * 10**9), None", "MemoryError: "),
    "print": ("while True:\n    print('x' * 1000)", "OSError: [Errno 27] File too large"),
    "recursion": ("return rms_norm(x, weight, eps)", "RecursionError: maximum recursion depth exceeded"),
    "write": ("open('tests/mla/test_norm.py', 'w')", "an answer may not use open tests/mla/test_norm.py"),
    "low write": (
        "import os\nos.open('tests/mla/test_norm.py', os.O_RDWR)",
        "may not use open tests",
    ),
    "remove": ("import os\nos.remove('tests/mla/test_norm.py')", "an answer may not use os.remove"),
    "kill": ("import os\nos.kill(os.getppid(), 9)", "an answer may not use os.kill"),
    "crash": ("import ctypes\nctypes.string_at(0)", "killed by SIGSEGV"),
    "import": ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
}


@pytest.mark.long
def test_a_hostile_answer_harms_only_itself_and_is_reported_with_its_line(tmp_path):
    about = dataclasses.replace(EXERCISES["rms-norm"], seconds=3)
    test = (ROOT / "tests" / "mla" / "test_norm.py").read_bytes()
    path = tmp_path / about.file
    with homework.Checker() as checker:
        for name, (body, said) in HOSTILE.items():
            path.write_text(about.with_body(text_of(about), body))
            report = checker.check(about, path)
            shown = verdict.shown(about, path, report)
            first = source.body_lines(path.read_text(), about.function)[0] + 1
            assert said in shown, f"{name}: {shown}"
            lines = range(first, first + body.count("\n") + 1)
            assert any(f"{path}:{line}: " in shown for line in lines), f"{name}: {shown}"
            assert not verdict.is_done(report) and verdict.points(report)[0] == 0
            assert len(report["output"]) < 2**21
        path.write_text(text_of(about))  # the checker still works
        assert verdict.is_done(checker.check(about, path))
    assert (ROOT / "tests" / "mla" / "test_norm.py").read_bytes() == test
