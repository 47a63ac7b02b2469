"""Finding and replacing a function's body, to the byte."""

import pytest

from exercises.grader import source
from tests.helpers import refused

TEXT = '''"""A module."""

import math


def plain(a, b=1):
    # the idea
    c = a + b

    return c
    # an afterthought


class Outer:
    """A class."""

    x = 1

    def method(
        self,
        a: int,  # a comment
    ) -> int:
        """What it does.

        More of it.
        """
        if a < 0:
            raise ValueError("a")
        b = a * 2
        # more
        return b

    class Inner:
        def method(self):
            return {
                "a": 1,
            }  # the end


def one_line(x): return x


def crowded():
    """A docstring."""; y = 1
    return y


def empty():
    """Nothing to write."""


async def later(): # head
    return 1
'''


def cut(name, first=""):
    start, stop = source.body_lines(TEXT, name, first)
    return TEXT.splitlines()[start:stop]


def test_a_body_starts_after_signature_and_docstring():
    assert cut("plain") == ["    # the idea", "    c = a + b", "", "    return c", "    # an afterthought"]
    assert cut("Outer.method")[0] == "        if a < 0:" and cut("Outer.method")[-1] == "        return b"
    assert cut("Outer.Inner.method") == [
        "            return {",
        '                "a": 1,',
        "            }  # the end",
    ]
    assert cut("later") == ["    return 1"]


def test_a_body_may_start_at_a_given_line():
    assert cut("Outer.method", "b = a") == ["        b = a * 2", "        # more", "        return b"]
    for first in ("raise", "nothing", "if a <= 0"):
        said = f"Outer.method: 0 lines of its body begin with '{first}'; exactly one must"
        refused(lambda first=first: cut("Outer.method", first), said)


@pytest.mark.parametrize(
    "name, said",
    [
        ("one_line", "one_line: its body must start on a new line"),
        ("crowded", "crowded: its body must start on a new line"),
        ("empty", "empty has a docstring but no body"),
        ("missing", "no function missing in this module"),
        ("Outer.missing", "no function Outer.missing in this module"),
        ("Missing.method", "no function Missing.method in this module"),
        ("Outer", "no function Outer in this module"),
    ],
)
def test_a_function_without_a_separate_body_is_refused(name, said):
    assert refused(lambda: cut(name)).startswith(said)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["plain", "Outer.method", "Outer.Inner.method", "later"])
def test_replacing_a_body_changes_no_other_byte(name, end):
    text = TEXT.replace("\n", end)
    start, stop = source.body_lines(text, name)
    lines = text.splitlines(keepends=True)
    new = source.replaced(text, name, "one\n\nif two:\n    three")
    indent = " " * (4 if name in ("plain", "later") else 8 if name == "Outer.method" else 12)
    body = f"{indent}one{end}{end}{indent}if two:{end}{indent}    three{end}"
    assert new == "".join(lines[:start]) + body + "".join(lines[stop:])


@pytest.mark.parametrize(
    "content, said",
    [
        (b"def f(:\n", "answer.py:1: invalid syntax: def f(:"),
        (b"x = (\n", "answer.py:1: '(' was never closed"),
        (b"x = 1\n\0", "answer.py:1: source code string cannot contain null bytes"),
        (b"(" * 5000, ""),
        (b"\xff\xfe", "answer.py: is not UTF-8 text"),
        (None, "answer.py: no such file"),
    ],
)
def test_an_unreadable_file_is_refused_in_one_line(tmp_path, content, said):
    path = tmp_path / "answer.py"
    if content is not None:
        path.write_bytes(content)
    refused(lambda: source.parse(source.read(path), path), "answer.py", said)


def test_links_and_folders_are_refused(tmp_path):
    (tmp_path / "link.py").symlink_to(__file__)
    link = tmp_path / "link.py"
    refused(lambda: source.read(link), f"{link}: is a symbolic link; hand in a regular file")
    refused(lambda: source.read(tmp_path), f"{tmp_path}: no such file")
