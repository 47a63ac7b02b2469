"""Extras, address space, numbers beyond any machine, and `lm --version`."""

import importlib.metadata
import os
import resource
import subprocess
import sys

import pytest

import lm
from lm import budget, cli, console
from tests.helpers import content
from tests.lm.command import PATH, SCRIPT, one_line, run_python

HUGE = "1000000000"


def test_the_version_is_that_of_the_package(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"moe-mla {lm.__version__}\n"
    assert "lm --version" in cli.overview()


@pytest.mark.long
@pytest.mark.parametrize(
    "missing, extra, arguments",
    [
        ("tensorboard", "lm,tensorboard", ["train", "--preset", "nano", "--train.tensorboard"]),
        ("matplotlib", "lm", ["train", "--preset", "nano"]),
        ("jinja2", "lm", ["report", "RUN"]),
        ("uvicorn", "lm,serve", ["serve", "RUN"]),
        ("matplotlib", "lm", ["info", "nano", "--plot", "a.png"]),
    ],
)
def test_a_missing_extra_is_named_before_anything_is_written(trained, tmp_path, missing, extra, arguments):
    arguments = [str(trained) if word == "RUN" else word for word in arguments]
    before = content(tmp_path)
    check = (
        f"import sys; sys.modules[{missing!r}] = None\nfrom lm.cli import main\nassert main({arguments}) == 2"
    )
    ended = run_python(check, cwd=tmp_path)
    said = f"lm {arguments[0]}: needs {missing}: pip install -c constraints.txt -e '.[{extra}]'\n"
    assert (ended.stdout, ended.stderr) == ("", said)
    assert content(tmp_path) == before


def test_without_the_lm_extra_the_command_is_one_line():
    script = "import sys; sys.modules['tyro'] = None; from lm.cli import main"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, env={**os.environ, **PATH})
    assert ended.stderr == b"lm: needs tyro: pip install -c constraints.txt -e '.[lm]'\n"


def test_every_extra_is_one_that_the_package_has():
    extras = importlib.metadata.metadata("moe-mla").get_all("Provides-Extra")
    assert {name for extra in console.EXTRAS.values() for name in extra.split(",")} <= set(extras)


@pytest.mark.parametrize("megabytes", [150, 400, 500])
def test_too_little_address_space_is_one_line(trained, megabytes):
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (megabytes * 2**20, resource.RLIM_INFINITY))

    command = [sys.executable, "-P", "-c", SCRIPT]
    how = {"capture_output": True, "text": True, "env": {**os.environ, **PATH}, "preexec_fn": limit}
    for arguments in (["eval", str(trained)], ["train", "--preset", "nano", "--out-dir", "absent"]):
        ended = subprocess.run([*command, *arguments], **how)
        assert ended.returncode == 1 and ended.stderr.count("\n") == 1
        assert f"limited to {megabytes} MiB (ulimit -v); PyTorch needs 600 MiB" in ended.stderr
    assert subprocess.run([*command, "info", "nano"], **how).returncode == 0  # needs no torch


@pytest.mark.parametrize(
    "error, said",
    [
        (ImportError("\n\nlibtorch.so: failed to map segment\nmore"), "libtorch.so: failed to map segment"),
        (MemoryError(), "out of memory"),
        (
            ModuleNotFoundError("No module named 'uvicorn'", name="uvicorn.config"),
            "needs uvicorn: pip install",
        ),
        (ModuleNotFoundError("No module named 'other'", name="other"), "No module named 'other'"),
    ],
)
def test_an_import_that_fails_is_one_line(monkeypatch, capsys, error, said):
    def start(self):
        raise error

    monkeypatch.setattr(cli.Info, "start", start)
    assert cli.main(["info", "nano"]) in (1, 2)
    shown = capsys.readouterr().err
    assert shown.startswith(f"lm info: {said}") and shown.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "RUN", "--num-samples", HUGE],
        ["generate", "RUN", "--num-samples", "9" * 30],
        ["generate", "RUN", "--max-new-tokens", "9" * 12],
        ["generate", "RUN", "--num-samples", "1000000", "--max-new-tokens", "1000000"],
        ["generate", "RUN", *(["--prompt", "a"] * 1000), "--num-samples", "1000000"],
        ["chat", "RUN", "--max-new-tokens", "9" * 12],
        ["info", "nano", "--context", "9" * 12],
        ["info", "nano", "--context", "9" * 400],
    ],
    ids=lambda arguments: " ".join(arguments)[:60],
)
def test_numbers_beyond_any_machine_are_refused(command, trained, monkeypatch, arguments):
    arguments = [trained if word == "RUN" else word for word in arguments]
    said = one_line(command(*arguments), arguments[0])
    assert "this machine has" in said or "less than 2^31" in said


def test_the_bound_on_the_output_is_the_machines_memory(monkeypatch):
    monkeypatch.setattr("lm.machine.memory", lambda: budget.SAMPLE_BYTES + 10 * budget.TOKEN_BYTES)
    budget.check_output(1, 10)
    for samples, tokens in ((1, 11), (2, 0)):
        with pytest.raises(ValueError, match="lower --num-samples or --max-new-tokens"):
            budget.check_output(samples, tokens)
    monkeypatch.setattr("lm.machine.memory", lambda: 0)  # unknown
    budget.check_output(1000, 1000)
    budget.check_output(-1, -1)  # reported by the command itself
