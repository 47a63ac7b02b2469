"""What generated text looks like on a terminal: control characters are visible; a pipe gets the bytes."""

import io
import os
import pty
import sys

import pytest

from lm import terminal
from lm.console import visible
from lm.tokenizer import ByteTokenizer
from tests.lm.command import PATH, SCRIPT

HOSTILE = {
    b"\x1b]0;title\x07": r"\x1b]0;title\x07",
    b"\x1b[2J\x1b[31mred": r"\x1b[2J\x1b[31mred",
    b"a\rb\x08\x7f\x00\x03": r"a\rb\x08\x7f\x00\x03",
    "\x9b31m\x85".encode(): r"\x9b31m\x85",  # C1
    "a\u202eb\u2066\u200f".encode(): r"a\u202eb\u2066\u200f",  # reorders the text after it
    b"\xff\xfe": "\ufffd\ufffd",
    b"\x9b31m": "\ufffd31m",
    "é 日\t🙂\nb".encode(): "é 日\t🙂\nb",
}


class Terminal(io.TextIOWrapper):
    def isatty(self):
        return True


def written(monkeypatch, text, size, encoding="utf-8", kind=Terminal):
    """The bytes that reach a stream when `text` comes in pieces of `size` bytes."""
    stream = kind(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    output = terminal.Output()
    for start in range(0, len(text), size):
        assert output.write(text[start : start + size]) == text[start : start + size]
    output.write(b"", last=True)
    return stream.buffer.getvalue()


@pytest.mark.parametrize("text, shown", HOSTILE.items())
@pytest.mark.parametrize("size", [1, 2, 100])
def test_control_characters_are_visible_on_a_terminal_and_raw_in_a_pipe(monkeypatch, text, shown, size):
    assert written(monkeypatch, text, size).decode() == shown
    assert written(monkeypatch, text, size, kind=io.TextIOWrapper) == text


@pytest.mark.parametrize("code", range(256))
def test_no_byte_but_newline_and_tab_controls_a_terminal(monkeypatch, code):
    shown = written(monkeypatch, bytes([code]), 1).decode()
    assert shown.replace("\n", "").replace("\t", "").isprintable()


def test_a_terminal_of_another_encoding_gets_what_it_can_show(monkeypatch):
    assert written(monkeypatch, "é日\x1b".encode(), 1, "latin-1") == b"\xe9?\\x1b"
    assert written(monkeypatch, "é日".encode(), 1, "ascii") == b"??"


def test_an_incomplete_character_is_shown_before_the_next_sample(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal(io.BytesIO(), "utf-8"))
    output = terminal.Output()
    output.write(b"a\xe2\x82")
    output.write(b"", last=True)
    output.write(b"\nb")
    assert sys.stdout.buffer.getvalue().decode() == "a\ufffd\nb"


@pytest.mark.long
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_commands_write_visible_text_to_a_terminal(trained_once, command):
    """The model's text is that of a prompt with control characters, and whatever it draws."""
    options = ["--max-new-tokens", "200", "--temperature", "5", "--seed", "1"]
    if command == "generate":
        options += ["--prompt", "a\x1b[31mb\x07\r"]
    child, screen = pty.fork()
    if child == 0:
        environment = {**os.environ, **PATH, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
        arguments = [sys.executable, "-P", "-c", SCRIPT, command, str(trained_once), *options]
        os.execve(sys.executable, arguments, environment)
    if command == "chat":
        os.write(screen, b"to be\n\n")
    shown = b""
    while True:
        try:
            piece = os.read(screen, 4096)
        except OSError:  # the other side is closed
            break
        shown += piece
        if not piece:
            break
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, shown
    text = shown.decode().replace("\r\n", "").replace("\t", "").replace("\n", "")
    assert visible(text) == text and "\\x" in text
    if command == "generate":
        assert text.startswith(r"a\x1b[31mb\x07\r")


def test_a_byte_tokenizer_streams_its_bytes():
    writer = ByteTokenizer().writer([1, 2])
    assert [writer(token) for token in (0xE2, 0x82, 300)] == [b"\xe2", b"\x82", b"\xff"]
    assert writer.end() == b""
