"""Where a function's body is in a text, to the byte."""

import pytest

from exercises.grader import source

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


def test_a_body_is_what_comes_after_head_and_docstring():
    assert cut("plain") == ["    # the idea", "    c = a + b", "", "    return c", "    # an afterthought"]
    assert cut("Outer.method")[0] == "        if a < 0:" and cut("Outer.method")[-1] == "        return b"
    assert cut("Outer.Inner.method") == [
        "            return {",
        '                "a": 1,',
        "            }  # the end",
    ]
    assert cut("later") == ["    return 1"]


def test_a_body_may_begin_at_a_line():
    assert cut("Outer.method", "b = a") == ["        b = a * 2", "        # more", "        return b"]
    for first in ("raise", "nothing", "if a <= 0"):
        with pytest.raises(
            ValueError, match=rf"^Outer.method: 0 lines of its body begin with '{first}'; one must"
        ):
            cut("Outer.method", first)


@pytest.mark.parametrize(
    "name, said",
    [
        ("one_line", "one_line has code on the last line of its docstring or of its head"),
        ("crowded", "crowded has code on the last line"),
        ("empty", "empty has no body to write"),
        ("missing", "no function missing here"),
        ("Outer.missing", "no function Outer.missing here"),
        ("Missing.method", "no function Missing.method here"),
        ("Outer", "no function Outer here"),
    ],
)
def test_what_cannot_be_cut_is_refused(name, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        cut(name)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["plain", "Outer.method", "Outer.Inner.method", "later"])
def test_every_other_byte_stays(name, end):
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
        (b"def f(:\n", r"answer.py:1: invalid syntax: def f\(:"),
        (b"x = (\n", r"answer.py:1: '\(' was never closed"),
        (b"x = 1\n\0", "answer.py:1: source code string cannot contain null bytes"),
        (b"(" * 5000, "answer.py:?1?: "),
        (b"\xff\xfe", r"answer.py: no text \(UTF-8\)"),
        (None, "answer.py: no such file"),
    ],
)
def test_a_file_that_is_no_answer_is_refused_in_a_line(tmp_path, content, said):
    path = tmp_path / "answer.py"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        source.parse(source.read(path), path)
    assert "\n" not in str(caught.value)


def test_links_and_folders_are_no_answers(tmp_path):
    (tmp_path / "link.py").symlink_to(__file__)
    with pytest.raises(ValueError, match=r"link.py: a link; a file of its own is needed"):
        source.read(tmp_path / "link.py")
    with pytest.raises(ValueError, match="no such file"):
        source.read(tmp_path)
