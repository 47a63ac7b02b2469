"""Find a function's body in the source of a module, and replace it."""

import ast
import io
import json
import stat
import textwrap
import tokenize
from pathlib import Path
from typing import Any

MOST_BYTES = 1 << 20  # of a file that is read
Function = ast.FunctionDef | ast.AsyncFunctionDef


def parse(source: str, path: Path) -> ast.Module:
    """Parse a student's file.

    Raises:
        ValueError: the file is not valid Python; the message is one line.
    """
    try:
        return ast.parse(source, str(path))
    except SyntaxError as error:
        line = (error.text or "").strip()[:200]
        raise ValueError(f"{path}:{error.lineno or 1}: {error.msg}" + (f": {line}" if line else "")) from None
    except (ValueError, RecursionError, MemoryError) as error:  # a null byte, deeply nested brackets
        raise ValueError(f"{path}: not valid Python: {error or type(error).__name__}") from None


def check_regular(path: Path) -> None:
    """Raise ValueError unless this is a regular file; no link is followed, nothing is opened."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        raise ValueError(f"{path}: no such file") from None
    if stat.S_ISLNK(mode):
        raise ValueError(f"{path}: is a symbolic link; hand in a regular file")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: no such file" if stat.S_ISDIR(mode) else f"{path}: is not a regular file")


def read(path: Path) -> str:
    """The text of a file, without a byte order mark.

    Raises:
        ValueError: it is a symbolic link, not a regular file, too large, not readable or not UTF-8.
    """
    check_regular(path)
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > MOST_BYTES:
        raise ValueError(f"{path}: is larger than {MOST_BYTES >> 20} MB")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not UTF-8 text; save it as UTF-8") from None


def notes(path: Path) -> dict[str, dict[str, Any]]:
    """A record of progress: exercise -> its notes.

    Raises:
        ValueError: the file is unreadable or not such a record.
    """
    try:
        found = json.loads(read(path))
    except RecursionError:
        raise ValueError(f"{path}: brackets are nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(one, dict) for one in found.values()):
        raise ValueError(f"{path}: expected one JSON object per exercise")
    kinds = {"hints": int, "minutes": int, "started": int | float, "done": bool, "solution": bool}
    for one in found.values():
        for name, kind in kinds.items():
            if not isinstance(one.get(name, kind() if isinstance(kind, type) else 0), kind):
                raise ValueError(f"{path}: {name} is {str(one[name])[:40]!r}")
    return found


def find(tree: ast.Module, name: str) -> tuple[list[ast.stmt], Function] | None:
    """A function by its dotted name, the last definition if there are several -> the list it is in, and it"""
    body: list[ast.stmt] = tree.body
    *classes, last = name.split(".")
    for part in classes:
        inner = [node for node in body if isinstance(node, ast.ClassDef) and node.name == part]
        if not inner:
            return None
        body = inner[-1].body
    found = [node for node in body if isinstance(node, Function) and node.name == last]
    return (body, found[-1]) if found else None


def body_lines(source: str, name: str, first: str = "") -> tuple[int, int]:
    """The lines of a function's body, without its docstring -> (start, stop), counted from 0

    Args:
        first: start at the line of the body that begins with this text.

    Raises:
        ValueError: the function or line does not exist, or its lines hold other code too.
    """
    tree = ast.parse(source)
    found = find(tree, name)
    if found is None:
        raise ValueError(f"no function {name} in this module")
    node = found[1]
    lines = source.splitlines()
    statements = node.body[1:] if ast.get_docstring(node) is not None else node.body
    if not statements:
        raise ValueError(f"{name} has a docstring but no body")
    if statements is not node.body:
        start = node.body[0].end_lineno or 0
    else:
        start = end_of_logical_line(source, node.lineno)
    if statements[0].lineno <= start:
        raise ValueError(f"{name}: its body must start on a new line, below the signature and the docstring")
    indent = statements[0].col_offset
    if first:
        begins = " " * indent + first
        at = [number for number in range(start, node.end_lineno or 0) if lines[number].startswith(begins)]
        if len(at) != 1:
            raise ValueError(f"{name}: {len(at)} lines of its body begin with {first!r}; exactly one must")
        start = at[0]
    stop = node.end_lineno or start
    for number in range(stop, len(lines)):  # comments after the last statement are not in the tree
        text = lines[number]
        if text.strip() and not (text.lstrip().startswith("#") and len(text) - len(text.lstrip()) >= indent):
            break
        if text.strip():
            stop = number + 1
    return start, stop


def end_of_logical_line(source: str, line: int) -> int:
    """The last line, counted from 1, of the statement header that starts on `line`; it may span several."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NEWLINE and token.end[0] >= line:
            return token.end[0]
    return line


def replaced(source: str, name: str, body: str, first: str = "") -> str:
    """The source with `body`, given unindented, as the function's body; all other bytes stay the same."""
    start, stop = body_lines(source, name, first)
    lines = source.splitlines(keepends=True)
    given = next(line for line in lines[start:stop] if line.strip())
    indent = given[: len(given) - len(given.lstrip())]
    end = "\r\n" if given.endswith("\r\n") else "\n"
    new = textwrap.indent(body.strip("\n") + "\n", indent).replace("\n", end)
    return "".join([*lines[:start], new, *lines[stop:]])
