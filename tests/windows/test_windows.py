"""Windows: every use of what Python lacks there is known, and the commands work without it.

sitecustomize.py takes it away in a new process, and in the processes that this one starts.
"""

import ast
import csv
import json
import os
import subprocess
import sys
import zipfile

import pytest

from exercises.grader import submissions, system, verdict
from exercises.grader.exercise import load_all
from lm import train
from lm.config import Config
from tests.helpers import ROOT, content
from tests.lm.runs import equal_runs
from tests.windows import missing

PACKAGES = ("lm", "moe", "mla", "exercises", "experiments", "notebooks")
GUARDED = {  # each one is caught, or asked for with hasattr or getattr
    "lm/budget.py": {"resource"},
    "lm/files.py": {"fcntl", "os.O_NOFOLLOW"},
    "lm/hub/template.py": {"resource"},
    "lm/machine.py": {"os.sysconf"},
    "lm/run.py": {"signal.setitimer"},
    "lm/serve/connections.py": {"resource"},
    "exercises/grader/server.py": {"os.fork"},
    "exercises/grader/system.py": {"os.killpg", "os.setpgrp", "resource", "termios", "tty"},
    "experiments/common.py": {"os.setpgrp", "resource"},
}
ABOUT = load_all(ROOT / "exercises")
RUN = """
import json, signal, sys
import pytest
from lm.cli import main
from tests.lm.runs import stop_at
for expected, words in json.loads(sys.argv[1]):
    with pytest.MonkeyPatch.context() as patch:
        if expected == 130:
            stop_at(patch, [4], signal.SIGINT)
        status = main(words)
    assert status == expected, (words, status)
"""
TINY = (
    *("--preset", "nano", "--train.steps", "8", "--train.batch-size", "2", "--train.context", "16"),
    *("--train.save-every", "2", "--train.eval-every", "4", "--train.eval-tokens", "64"),
    *("--train.sample-every", "8", "--train.log-every", "1", "--train.keep", "2"),
)


def on_windows(*arguments):
    """Run Python as if on Windows -> the finished process"""
    path = os.pathsep.join([str(ROOT / "tests" / "windows"), str(ROOT)])
    environment = {"PYTHONPATH": path, "PYTHONWARNDEFAULTENCODING": "1", "PYTHONIOENCODING": "cp1252"}
    environment |= {"PYTHONWARNINGS": "ignore::EncodingWarning", "PYTHONDONTWRITEBYTECODE": "1"}
    command, whole = [sys.executable, *map(str, arguments)], {**os.environ, **environment}
    done = subprocess.run(command, cwd=ROOT, env=whole, capture_output=True)
    shown = done.stdout.decode("cp1252", "replace"), done.stderr.decode("cp1252", "replace")
    return done.returncode, *shown


def run_all(*commands):
    """Run `lm` commands, given with their exit status, in one process -> its output"""
    jobs = [[code, [*map(str, words)]] for code, words in commands]
    status, out, err = on_windows("-c", RUN, json.dumps(jobs))
    assert status == 0 and "Traceback" not in err, out + err
    return out, err


def source(name):
    """The package's module with the answer to an exercise."""
    return (ROOT / f"{ABOUT[name].module.replace('.', '/')}.py").read_text("utf-8")


def missing_in(tree):
    """What a module uses that Windows lacks."""
    names = {f"{module}.{name}" for module, names in missing.NAMES.items() for name in names.split()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in names:
            yield ast.unparse(node)
        elif isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & {*missing.MODULES}
        elif isinstance(node, ast.ImportFrom) and node.module in ("os", "signal", *missing.MODULES):
            yield f"from {node.module}"


def test_each_use_of_what_windows_lacks_is_guarded():
    found = {}
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        if used := set(missing_in(ast.parse(path.read_text("utf-8")))):
            found[str(path.relative_to(ROOT))] = used
    assert found == GUARDED


def test_the_pretended_windows_lacks_them():
    said = "import os, signal; print(hasattr(os, 'fork'), hasattr(signal, 'SIGKILL')); import resource"
    status, out, err = on_windows("-c", said)
    assert (status, out.split()) == (1, ["False", "False"]) and "ModuleNotFoundError" in err


@pytest.mark.long
def test_every_module_is_imported():
    paths = [path for package in PACKAGES[:-1] for path in (ROOT / package).rglob("[a-z_]*.py")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    status, _, err = on_windows(
        "-c", f"import importlib; [importlib.import_module(name) for name in {names}]"
    )
    assert status == 0, err


@pytest.mark.long
def test_a_training_is_stopped_resumed_and_pruned_and_its_model_used(tmp_path):
    run, text = tmp_path / "run", tmp_path / "text"
    text.write_bytes(bytes(range(256)) * 16)
    run_all(
        (130, ["train", *TINY, "--out-dir", run, "--data.path", text]),
        (0, ["train", "--resume", "--out-dir", run]),
        (0, ["generate", run, "--prompt", "To be", "--max-new-tokens", "4"]),
        (0, ["info", run]),
        (0, ["eval", run]),
        (0, ["report", run]),
        (0, ["export", run, tmp_path / "hf"]),
        (0, ["import", tmp_path / "hf", tmp_path / "back"]),
        (2, ["import", tmp_path / "hf", tmp_path / "back"]),
    )
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000006", "step-000008"]
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith((".tmp", ".tmp.lock"))]
    config = Config.load(run / "config.toml")
    assert train.train(config, tmp_path / "linux") == 0
    equal_runs(run, tmp_path / "linux")


@pytest.mark.long
def test_answers_are_checked_and_a_class_is_graded(tmp_path):
    about, text, rows = ABOUT["gate-scale"], source("gate-scale"), tmp_path / "rows.csv"
    for name, answer in (("right", text), ("wrong", about.with_mistakes(text, [0]))):
        (tmp_path / "class" / name).mkdir(parents=True)
        (tmp_path / "class" / name / about.file).write_text(answer, encoding="utf-8")
    homework = ("--homework", tmp_path / "homework")
    out, err = run_all(
        (0, ["exercise", "start", "gate-scale", *homework]),
        (0, ["exercise", "check", tmp_path / "class" / "right" / about.file]),
        (1, ["exercise", "check", "gate-scale", *homework]),
        (1, ["exercise", "grade", tmp_path / "class", "--only", "gate-scale", "--csv", rows]),
    )
    assert about.mistakes[0][2][:40] in out and "not written yet" in out and system.UNCONFINED in err
    with open(rows, encoding="utf-8", newline="") as file:
        scores = {row["student"]: float(row["score"]) for row in csv.DictReader(file)}
    assert scores["right"] == about.points > scores["wrong"]


CHECK = """
import dataclasses, sys
from pathlib import Path
from exercises.grader import homework
about = dataclasses.replace(homework.load_all(homework.EXERCISES)["gate-scale"], seconds=15)
with homework.Checker() as checker:
    print(checker.check(about, Path(sys.argv[1]))["raised"])
"""


@pytest.mark.long
def test_an_endless_answer_is_stopped(tmp_path):
    path = tmp_path / "gate_scale.py"
    endless = ABOUT["gate-scale"].with_body(source("gate-scale"), "while True:\n    pass")
    path.write_text(endless, encoding="utf-8")
    status, out, err = on_windows("-c", CHECK, path)
    assert status == 0 and "not finished after 15 s" in out, out + err


class Console:
    """Windows' module msvcrt, with a user who presses these keys."""

    def __init__(self, pressed):
        self.pressed = list(pressed)

    def kbhit(self):
        return bool(self.pressed)

    def getwch(self):
        return self.pressed.pop(0)


def test_keys_are_read_from_windows_console(monkeypatch):
    monkeypatch.setitem(sys.modules, "termios", None)
    monkeypatch.setitem(sys.modules, "msvcrt", Console("hq"))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    with system.keys() as pressed:
        assert [pressed(0.05) for _ in range(3)] == ["h", "q", ""]


def test_an_archive_cannot_name_a_drive(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("C:evil.py", "C:/evil.py", "router.py:stream", "router.py"):
            archive.writestr(name, "x = 1\n")
    assert submissions.unzip(tmp_path / "a.zip", tmp_path / "out") == ""
    made = {name for name, value in content(tmp_path / "out").items() if value is not None}
    assert made == {"C_evil.py", "C_/evil.py", "router.py_stream", "router.py"}


FILES = """
import os, sys
from pathlib import Path
from lm import files
folder = Path(sys.argv[1])
files.write_file(folder / "a", "one", new=True)
files.write_file(folder / "a", "two")
try:
    files.write_file(folder / "a", "three", new=True)
except FileExistsError:
    print("exists")
(folder / "empty").mkdir()
files.commit(folder / "empty", lambda into: (into / "b").write_text("b", encoding="utf-8"))
def nested(into):
    (into / "c").write_text("c", encoding="utf-8")
    files.commit(folder / "empty", lambda into: None)
for final in (folder / "empty", folder / "a"):
    try:
        files.commit(final, lambda into: (into / "d").write_text("d", encoding="utf-8"))
    except ValueError as error:
        print(error)
try:
    files.commit(folder / "twice", lambda into: files.commit(folder / "twice", nested))
except ValueError as error:
    print(error)
with open(folder / "a", encoding="utf-8") as reader:
    try:
        files.rename(folder / "a", folder / "e")
    except PermissionError:
        print("in use")
"""


def test_files_are_renamed_only_where_windows_can(tmp_path):
    status, out, err = on_windows("-c", FILES, tmp_path)
    assert status == 0, err
    assert out.splitlines() == [
        "exists",
        f"{tmp_path / 'empty'}: was created by another process meanwhile; it is kept",
        f"{tmp_path / 'a'}: was created by another process meanwhile; it is kept",
        f"{tmp_path / 'twice'}: another process is writing it; choose another folder",
        "in use",
    ]
    assert content(tmp_path) == {"a": b"two", "empty": None, "empty/b": b"b"}


def test_a_check_whose_tests_end_without_a_result_is_not_done():
    report = {"checks": [{"passed": True}], "tests": None, "raised": {"says": "killed by SIGKILL"}}
    assert not verdict.is_done(report) and verdict.points(report) == (1, 2)


PRUNE = """
import sys
from pathlib import Path
from safetensors import safe_open
from lm import history
run = Path(sys.argv[1])
first, second, third = history.checkpoints(run)
unfinished = first.with_name(".step-000009.tmp")
unfinished.mkdir()
with safe_open(first / "model.safetensors", framework="pt"), open(unfinished / "a", "wb"):
    history.prune(run, 1, third)
    print([path.name for path in history.checkpoints(run)], unfinished.exists())
history.prune(run, 1, third)
print([path.name for path in history.checkpoints(run)], unfinished.exists())
"""


@pytest.mark.long
def test_a_checkpoint_that_is_read_is_pruned_later(tmp_path):
    run, text = tmp_path / "run", tmp_path / "text"
    text.write_bytes(bytes(range(256)) * 16)
    more = ("--train.steps", "6", "--train.keep", "9", "--data.path", text, "--out-dir", run)
    run_all((0, ["train", *TINY, *more]))
    status, out, err = on_windows("-c", PRUNE, run)
    assert status == 0, err
    assert out.splitlines() == ["['step-000002', 'step-000006'] True", "['step-000006'] False"]
