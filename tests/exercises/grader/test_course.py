"""`lm exercise`, as students and teachers use it."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from exercises.grader import exercise
from lm import cli
from tests.helpers import ROOT

ABOUT = exercise.load_all(ROOT / "exercises")


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def lm_exercise(capsys, tmp_path):
    """Run the command with a homework folder -> exit status, stdout, stderr"""

    def run(command, *arguments, folder=tmp_path / "homework"):
        where = ("--homework", str(folder)) if command not in ("grade", "new", "self-test", "run") else ()
        code = cli.main(["exercise", command, *map(str, arguments), *where])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def solve(folder, name):
    """Hand in the package's own module."""
    path = folder / ABOUT[name].file
    path.parent.mkdir(exist_ok=True)
    module = ABOUT[name].module.replace(".", "/")
    path.write_text((ROOT / f"{module}.py").read_text())
    return path


def test_a_student_starts_fails_asks_for_hints_and_passes(lm_exercise, tmp_path):
    folder = tmp_path / "homework"
    code, said, _ = lm_exercise("list")
    assert code == 0 and f"0 of {len(ABOUT)} done" in said and len(said.splitlines()) == len(ABOUT) + 2
    code, said, _ = lm_exercise("start", "rms-norm")
    path = folder / "rms_norm.py"
    blank = path.read_text()
    line = 1 + blank.splitlines().index("    # exercise rms-norm: the body goes here")
    assert code == 0 and f"{path}:{line}  write the body of rms_norm" in said
    code, said, _ = lm_exercise("check")  # the current one
    assert code == 1 and f"{path}:{line + 1}: not written yet" in said and "  0 of " in said
    code, said, _ = lm_exercise("hint")
    assert code == 0 and "hint 1 of 3" in said and "2. " not in said
    lm_exercise("hint", "rms_norm")
    stub = "".join(blank.splitlines(keepends=True)[line - 1 : line + 1])
    path.write_text(blank.replace(stub, "    return x * weight, x.square().sum(-1, keepdim=True)\n"))
    code, said, _ = lm_exercise("check", "rms-norm")
    assert code == 1 and "run once the checks above pass" in said
    about = ABOUT["rms-norm"]
    path.write_text(about.with_mistakes((ROOT / "mla/norm.py").read_text(), [2]))
    code, said, _ = lm_exercise("check", "rms-norm")
    assert code == 1 and f"-> {about.mistakes[2][2]}" in said
    code, said, _ = lm_exercise("solution", "rms-norm")
    assert said.startswith("mla/norm.py:") and "-    scale = torch.rsqrt(wide.square().sum" in said
    path.write_text(about.with_body((ROOT / "mla/norm.py").read_text(), textwrap.dedent(about.right[0])))
    code, said, _ = lm_exercise("check", "rms-norm")
    assert code == 0 and "rms-norm is done" in said and "project tests   ok, 3 of 3" in said
    code, said, _ = lm_exercise("list")
    row = said.splitlines()[0]
    assert "done" in row and "2 hints, solution seen" in row and f"1 of {len(ABOUT)} done" in said


def test_a_students_file_is_never_overwritten(lm_exercise, tmp_path):
    path = tmp_path / "homework" / "rope.py"
    lm_exercise("start", "rope")
    path.write_text("mine")
    code, said, _ = lm_exercise("start", "rope")
    assert code == 0 and "exists and is left unchanged" in said and path.read_text() == "mine"
    for number in (1, 2):
        code, said, _ = lm_exercise("reset", "rope")
        assert code == 0 and f"your old file: {path.with_suffix(f'.bak{number}')}" in said
        path.write_text(f"mine {number}")
    assert [path.with_suffix(f".bak{n}").read_text() for n in (1, 2)] == ["mine", "mine 1"]
    path.unlink()
    path.symlink_to(__file__)
    code, said, _ = lm_exercise("start", "rope")
    assert "is left unchanged" in said and path.is_symlink()


@pytest.mark.parametrize(
    "command, said",
    [
        (["check", "ropes"], "no exercise 'ropes' (did you mean 'rope'?); the exercises are rms-norm"),
        (["hint", "nothing"], "no exercise 'nothing'; the exercises are"),
        (["check", "rope"], "rope.py: not started yet; start it: lm exercise start rope"),
        (["check", "--all"], "no exercise started yet; start one: lm exercise start NAME"),
        (["chekc"], "no command 'chekc' (did you mean 'check'?); the commands are list"),
        (["grade", "no/such/folder"], "no/such/folder: no such folder"),
        (["run", "experiment", "faster"], "experiment: its training processes use the original functions"),
        (["new", "moe.balance"], "target 'moe.balance': expected module:function of this project"),
        (
            ["new", "moe.balanse:z_loss"],
            "target 'moe.balanse:z_loss': expected module:function",
        ),
        (["new", "moe.balance:zz"], "no function zz in this module"),
        (["new", "moe.balance:z_loss", "--name", "rope"], "name 'rope': already taken"),
    ],
)
def test_wrong_use_is_one_line_and_exit_status_2(lm_exercise, command, said):
    code, out, complaint = lm_exercise(*command)
    assert code == 2 and out == "" and complaint.startswith("lm exercise: ") and complaint.count("\n") == 1
    assert said in complaint


@pytest.mark.parametrize(
    "content, said",
    [
        (b"def rms_norm(x:\n", "rms_norm.py:1: '(' was never closed"),
        (b"x = 1\n", "rms_norm.py: rms_norm not found; keep the names of the function and its class"),
        (
            b"def rms_norm(x):\n    return x\n",
            "rms_norm.py:1: rms_norm(x): keep the signature rms_norm(x, weight, eps)",
        ),
        (b"\x00\xff\xfe", "rms_norm.py: is not UTF-8 text"),
        (b"import nothing_like_it\n\n\ndef rms_norm(x, weight, eps):\n    return x, x\n", "No module named"),
    ],
)
def test_an_unusable_answer_is_reported_in_one_line(lm_exercise, tmp_path, content, said):
    path = tmp_path / "homework" / "rms_norm.py"
    path.parent.mkdir()
    path.write_bytes(content)
    code, out, _ = lm_exercise("check", "rms-norm")
    assert code == 1 and said in out and str(Path.cwd()) not in out.replace(str(tmp_path), "")
    assert path.read_bytes() == content


@pytest.mark.long
def test_a_file_is_checked_by_its_path_and_matched_by_its_name(lm_exercise, tmp_path):
    path = solve(tmp_path / "elsewhere", "rms-norm").rename(tmp_path / "elsewhere" / "My RMS_Norm (1).py")
    code, said, _ = lm_exercise("check", path)
    assert code == 0 and said.startswith("rms-norm") and str(path) in said
    assert not (tmp_path / "homework").exists()  # progress is that of the homework folder
    path = solve(tmp_path / "homework", "rms-norm")
    assert lm_exercise("check", path)[0] == 0
    assert json.loads((tmp_path / "homework" / ".progress.json").read_text())["rms-norm"]["done"] is True


@pytest.mark.parametrize(
    "name, said",
    [
        ("essay.py", "essay.py: the name fits no exercise; expected one such as rms_norm.py for rms-norm"),
        ("gone.py", "gone.py: no such file"),
        ("router.py", "router.py: is a symbolic link; hand in a regular file"),
    ],
)
def test_a_file_that_cannot_be_checked_is_refused(lm_exercise, tmp_path, name, said):
    (tmp_path / "essay.py").write_text("x = 1\n")
    (tmp_path / "router.py").symlink_to(tmp_path / "essay.py")
    code, out, complaint = lm_exercise("check", tmp_path / name)
    assert code == 2 and out == "" and said in complaint and complaint.count("\n") == 1


def test_outside_a_clone_every_command_says_so(lm_exercise, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = (["list"], ["check", "rope"], ["self-test"], ["grade", "."], ["run", "info", "nano"])
    for command in commands:
        code, _, complaint = lm_exercise(*command)
        assert code == 2 and complaint.endswith("run this in a clone of the project\n")
    (tmp_path / "exercises" / "grader").mkdir(parents=True)  # the commands, without the exercises
    for command in commands:
        code, _, complaint = lm_exercise(*command)
        assert code == 2 and "exercises: no exercises found; run this in a clone" in complaint


def test_an_unreadable_progress_file_is_named(lm_exercise, tmp_path):
    (tmp_path / "homework").mkdir()
    (tmp_path / "homework" / ".progress.json").write_text("{")
    code, _, complaint = lm_exercise("list")
    assert code == 2 and ".progress.json: cannot be read (" in complaint
    assert complaint.endswith("); delete it to reset the progress\n")


@pytest.mark.long
def test_a_folder_of_submissions_is_graded(lm_exercise, tmp_path):
    folder = tmp_path / "submissions"
    for student in ("ann", "bob", "cyd", "dee", "eve"):
        (folder / student).mkdir(parents=True)
    solve(folder / "ann", "rms-norm")
    (folder / "ann" / ".progress.json").write_text('{"rms-norm": {"hints": 2, "solution": true}}')
    about, text = ABOUT["rms-norm"], (ROOT / "mla/norm.py").read_text()
    (folder / "bob" / "homework").mkdir()
    (folder / "bob" / "homework" / "rms_norm.py").write_text(about.with_mistakes(text, [0]))
    (folder / "cyd" / "rms_norm.py").write_text("def rms_norm(")
    (folder / "dee" / "rms_norm.py").write_text(
        about.with_body(text, "import os, json\nopen('x')\nos._exit(0)")
    )
    found = []
    for _ in range(2):
        code, said, _ = lm_exercise(
            "grade", folder, "--only", "rms-norm",
            "--json", tmp_path / "out" / "grades.json", "--csv", tmp_path / "grades.csv",
        )  # fmt: skip
        assert code == 1 and len(said.splitlines()) == 5
        found.append(json.loads((tmp_path / "out" / "grades.json").read_text()))
    ann, bob, cyd, dee, eve = found[0]["rows"]
    assert (ann["score"], ann["hints"], ann["solution"]) == (10, 2, True)
    assert ann["flags"] == ["identical to the package's"] and ann["tests_passed"] == ann["tests"] == 3
    assert 0 < bob["score"] < 10 and bob["mistakes"] == [about.mistakes[0][2]] and bob["flags"] == []
    assert bob["checks"] == ann["checks"] == ann["checks_passed"] > bob["checks_passed"]
    assert cyd["score"] == 0 and cyd["says"] == "rms_norm.py:1: '(' was never closed: def rms_norm("
    assert dee["score"] == 0 and dee["flags"] == ["imports json, os", "uses open"]
    assert (eve["score"], eve["says"]) == (0, "not submitted")
    for rows in found:
        for row in rows["rows"]:
            row.pop("seconds")
    assert found[0] == found[1] and found[0]["seed"] == 2 and found[0]["torch"]
    with open(tmp_path / "grades.csv", newline="") as file:
        assert next(csv.DictReader(file))["score"] == "10.0"


@pytest.mark.long
def test_one_submission_is_written_for_gradescope(lm_exercise, tmp_path):
    solve(tmp_path / "hers", "gate-scale")
    out = tmp_path / "results.json"
    code, _, _ = lm_exercise("grade", tmp_path / "hers", "--only", "gate-scale", "--gradescope", out)
    [test] = json.loads(out.read_text())["tests"]
    assert code == 0 and test == {
        "name": "gate-scale", "score": 10.0, "max_score": 10, "visibility": "visible",
        "output": "all checks and tests pass",
    }  # fmt: skip
    (tmp_path / "more" / "a").mkdir(parents=True)
    (tmp_path / "more" / "b").mkdir()
    code, _, complaint = lm_exercise("grade", tmp_path / "more", "--gradescope", tmp_path / "other.json")
    assert code == 2 and "2 submissions; --gradescope takes one" in complaint
    assert not (tmp_path / "other.json").exists()


def test_a_new_exercise_is_a_template_that_loads(clone, capsys):
    assert cli.main(["exercise", "new", "moe.balance:z_loss"]) == 0
    made = clone / "exercises" / f"{len(ABOUT):02}_z_loss.py"
    assert "fill it in, then run lm exercise self-test z-loss" in capsys.readouterr().out
    about = exercise.load(made)
    assert about.target == "moe.balance:z_loss" and about.tests == ("tests/moe/test_balance.py",)
    assert cli.main(["exercise", "new", "moe.balance:z_loss"]) == 2


def test_lm_runs_with_the_students_functions(clone, lm):
    path = solve(clone / "homework", "flops")
    path.write_text(ABOUT["flops"].with_body(path.read_text(), "return 12345"))
    (path.parent / ".progress.json").write_text('{"flops": {"done": true}}')
    done = lm("exercise", "run", "--", "info", "nano")
    assert done.returncode == 0, done.stderr
    assert "using your lm.count:training_flops_per_token" in done.stderr and "12,345" in done.stdout


def test_a_file_in_the_working_folder_never_shadows_a_standard_module(clone, lm):
    """Every command runs where the student works, next to whatever files are there."""
    for name in filter(importlib.util.find_spec, sys.stdlib_module_names):  # others are of other systems
        (clone / f"{name}.py").write_text(f"raise SystemExit('imported {name}.py of the working folder')\n")
    solve(clone / "homework", "rms-norm")
    for command in (
        ("exercise", "check", "rms-norm"),
        ("exercise", "run", "info", "nano"),
        ("exercise", "list"),
        ("new", "router", "mine"),
    ):
        done = lm(*command)
        assert done.returncode == 0 and not done.stderr.count("working folder"), done.stdout + done.stderr


def test_without_a_terminal_the_exercises_are_listed(tmp_path):
    command = [sys.executable, "-c", "import sys; from lm.cli import main; sys.exit(main(['exercise']))"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and f"of {len(ABOUT)} done" in done.stdout
    assert not os.path.exists(ROOT / "homework" / ".progress.json.new")


def test_watch_checks_at_every_save_and_answers_keys(tmp_path):
    import pty
    import select
    import time

    folder = tmp_path / "homework"
    me, theirs = pty.openpty()
    code = "import sys; from lm.cli import main; sys.exit(main(['exercise', 'watch', *sys.argv[1:]]))"
    watching = subprocess.Popen(
        [sys.executable, "-c", code, "rms-norm", "--homework", folder],
        cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    said = ""

    def until(text, seconds=120):
        nonlocal said
        deadline = time.monotonic() + seconds
        while text not in said:
            assert time.monotonic() < deadline and watching.poll() is None, said
            if select.select([me], [], [], 0.5)[0]:
                said += os.read(me, 4096).decode()
        said = said.partition(text)[2]

    until("not written yet")
    until("q quit")
    os.write(me, b"h")
    until("hint 1 of 3")
    os.write(me, b"l")
    until(f"0 of {len(ABOUT)} done")
    path = solve(folder, "rms-norm")
    until("rms-norm is done")
    os.write(me, b"r")
    until("not written yet")
    assert "the body goes here" in path.read_text()
    assert path.with_suffix(".bak1").read_text() == (ROOT / "mla" / "norm.py").read_text()
    os.write(me, b"s")
    until("mla/norm.py:")
    os.write(me, b"n")
    until("not written yet")
    os.write(me, b"q")
    assert watching.wait(30) == 0
