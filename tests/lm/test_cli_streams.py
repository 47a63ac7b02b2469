"""Closed standard streams, terminals of other encodings, and control characters in names."""

import os
import shutil
import subprocess
import sys
import tomllib
import warnings

import pytest
import tomli_w
from safetensors.torch import load_file, save_file

from lm import cli, console
from tests.helpers import ROOT
from tests.lm.command import PATH, SCRIPT

NAME = "rün\x1b[31m\x9b1m\u202e"  # a folder's name: not ASCII, with escape codes
SHOWN = "rün\\x1b[31m\\x9b1m\\u202e"
COMMANDS = {
    "train": ["train", "--resume", "--out-dir", NAME, "--train.steps", "13", "--train.sample-every", "1"],
    "eval": ["eval", NAME],
    "report": ["report", NAME],
    "explore": ["explore", NAME],
    "info": ["info", NAME],
    "generate": ["generate", NAME, "--prompt", "ä", "--max-new-tokens", "2"],
    "chat": ["chat", NAME],
    "export": ["export", NAME, f"{NAME}-out"],
    "exercise": ["exercise", "list"],
    "experiment": ["experiment"],
    "help": ["--help"],
    "no-such-preset": ["info", f"{NAME}-absent"],
    "no-such-option": ["info", "--ünknown"],
    "no-such-command": ["ïnfo"],
}
FAIL = {"no-such-preset", "no-such-option", "no-such-command"}
every_command = pytest.mark.parametrize("name", COMMANDS)


@pytest.fixture
def folder(trained, tmp_path):
    """A folder with a run of that name, and what is needed of a clone."""
    trained.rename(tmp_path / NAME)
    for part in ("exercises", "experiments"):
        (tmp_path / part).symlink_to(ROOT / part)
    return tmp_path


@pytest.mark.long
@every_command
def test_a_terminal_of_another_encoding_stops_no_command(command, folder, name):
    ended = command(*COMMANDS[name], cwd=folder, before=("encode", "ascii"))
    assert ended.code == (2 if name in FAIL else 0), ended.err
    assert "Traceback" not in ended.err and "codec" not in ended.err
    if name != "generate":  # writes the model's own bytes
        assert ended.out.isascii() and ended.err.isascii()
    if name == "train":
        assert "step-000013" in os.listdir(folder / NAME / "checkpoints")
    if name == "report":
        assert ended.out == SHOWN.encode("ascii", "backslashreplace") + b"/report.html\n"


@pytest.mark.long
@every_command
@pytest.mark.parametrize(
    "closed", [["stdin", "stdout"], ["stderr"], ["stdin", "stdout", "stderr"]], ids="-".join
)
def test_closed_standard_streams_stop_no_command(command, folder, name, closed):
    ended = command(*COMMANDS[name], cwd=folder, before=("close", *closed))
    assert ended.code == (2 if name in FAIL else 0), ended.err
    assert "Traceback" not in ended.err
    assert not ended.out if "stdout" in closed else not ended.err
    if "stderr" in closed and name in FAIL:  # the message does not move to standard output
        assert not ended.out


def test_a_prompt_from_a_closed_standard_input_is_empty(command, folder):
    arguments = ["generate", NAME, "--prompt", "-"]
    ended = command(*arguments, cwd=folder, before=("close", "stdin"))
    assert (ended.code, ended.err.count("\n")) == (2, 1) and "the prompt is empty" in ended.err


@pytest.mark.parametrize("redirected", [">&-", "2>&-", "<&-", ">&- 2>&- <&-", "</dev/null", ">/dev/full"])
@pytest.mark.parametrize("arguments", ["info nano", "info absent", "info --help", "--help"])
def test_the_shell_may_close_or_fill_any_stream(arguments, redirected):
    environment = {**os.environ, **PATH, "PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": ""}
    script = f'exec "$0" -P -c "{SCRIPT}" {arguments} {redirected}'
    ended = subprocess.run(["bash", "-c", script, sys.executable], capture_output=True, env=environment)
    invalid = arguments == "info absent"
    full = ">/dev/full" in redirected and not invalid
    assert ended.returncode == (2 if invalid else int(full)), ended.stderr
    assert ended.stderr.count(b"\n") == int((invalid or full) and "2>&-" not in redirected), ended.stderr
    assert not full or b"No space left on device" in ended.stderr


def test_a_message_survives_a_standard_error_that_is_full():
    script = f'"$0" -P -c "{SCRIPT}" info absent 2>/dev/full; echo $?'
    environment = {**os.environ, **PATH, "PYTHONUNBUFFERED": ""}
    ended = subprocess.run(["bash", "-c", script, sys.executable], capture_output=True, env=environment)
    assert (ended.stdout, ended.stderr) == (b"2\n", b"")


def hidden(text):
    """The characters of a text that a terminal would obey."""
    return [letter for letter in text if letter != "\n" and console.HIDDEN.match(letter)]


@every_command
def test_control_characters_in_a_name_are_escaped(command, folder, name):
    ended = command(*COMMANDS[name], cwd=folder)
    if name not in ("generate", "train", "chat"):  # these write the model's own text
        assert not hidden(ended.out.decode())
    assert not hidden(ended.err)


def add_tensor(folder):
    path = next(folder.glob("checkpoints/*12/model.safetensors"))
    tensors = load_file(path)
    tensors["\x1b[2J\n"] = tensors["norm.weight"].clone()
    shutil.rmtree(folder / "checkpoints")
    save_file(tensors, folder / "model.safetensors")


def write_config(folder, text):
    (folder / "config.toml").write_text(text, encoding="utf-8")


def name_text(folder):
    table = tomllib.loads((folder / "config.toml").read_text())
    table["data"]["path"] = "\x1b[2J\n"
    write_config(folder, tomli_w.dumps(table))


@pytest.mark.parametrize(
    "damage, said",
    [
        (add_tensor, "\\x1b[2J"),
        (lambda folder: write_config(folder, '"\\u001b[2J" = 1'), "\\x1b[2J"),
        (name_text, "\\x1b[2J"),
        (lambda folder: write_config(folder, '[model.moe]\nrouter = "a:\\u001b[2J"'), "\\x1b[2J"),
        (lambda folder: write_config(folder, "\x1b[2J"), SHOWN),
        (lambda folder: shutil.rmtree(folder), SHOWN),
    ],
    ids=["tensor", "key", "text file", "router", "syntax", "folder"],
)
def test_control_characters_in_a_file_are_escaped_in_one_line(command, folder, damage, said):
    damage(folder / NAME)
    ended = command("eval", NAME, cwd=folder)
    assert ended.code == 2 and said in ended.err
    assert ended.err.count("\n") == 1 and not hidden(ended.err)


def test_every_control_character_is_escaped_and_nothing_else():
    for code in range(0x10000):
        letter = chr(code)
        shown = console.visible(letter)
        orders = code < 32 or 127 <= code < 160  # C0, DEL, C1
        turns = letter in "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
        assert (shown != letter) == (orders or turns)
        if shown != letter:
            assert shown.isascii() and shown.isprintable()
            assert shown.encode().decode("unicode_escape") == letter
    assert console.visible("a\tb\n\x07", keep="\n") == "a\\tb\n\\x07"


def test_a_warning_is_one_line(capsys, monkeypatch):
    cli.main(["--help"])
    warnings.showwarning(UserWarning("a\nb\x1b"), UserWarning, "", 1)
    assert capsys.readouterr().err == "lm: warning: a\\nb\\x1b\n"
