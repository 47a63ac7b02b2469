"""A function in the text of a module: where its body is, and the text with another one."""

import ast
import io
import textwrap
import tokenize
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


def parse(source: str, path: Path) -> ast.Module:
    """A student's file, parsed.

    Raises:
        ValueError: it is no Python, in a line of its own.
    """
    try:
        return ast.parse(source, str(path))
    except SyntaxError as error:
        line = (error.text or "").strip()
        raise ValueError(f"{path}:{error.lineno or 1}: {error.msg}" + (f": {line}" if line else "")) from None
    except (ValueError, RecursionError, MemoryError) as error:  # a null byte; brackets without end
        raise ValueError(f"{path}: is no Python that can be read: {error or type(error).__name__}") from None


def read(path: Path) -> str:
    """The text of a file.

    Raises:
        ValueError: it is a link, no file, or no UTF-8.
    """
    if path.is_symlink():
        raise ValueError(f"{path}: a link; a file of its own is needed")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: no text (UTF-8)") from None


def find(tree: ast.Module, name: str) -> tuple[list[ast.stmt], Function] | None:
    """A function by its name with dots, the last of the name -> the statements among which it is, and it"""
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
    """Which lines of a source are a function's body, but for its docstring -> from, to; counted from 0

    Args:
        first: how the line begins that the body is counted from, where what stands before it is given.

    Raises:
        ValueError: there is no such function or line, or a cut there would take something else along.
    """
    tree = ast.parse(source)
    found = find(tree, name)
    if found is None:
        raise ValueError(f"no function {name} here")
    node = found[1]
    lines = source.splitlines()
    statements = node.body[1:] if ast.get_docstring(node) is not None else node.body
    if not statements:
        raise ValueError(f"{name} has no body to write")
    if statements is not node.body:
        start = node.body[0].end_lineno or 0
    else:
        start = end_of_logical_line(source, node.lineno)
    if statements[0].lineno <= start:
        raise ValueError(f"{name} has code on the last line of its docstring or of its head; give it its own")
    indent = statements[0].col_offset
    if first:
        begins = " " * indent + first
        at = [number for number in range(start, node.end_lineno or 0) if lines[number].startswith(begins)]
        if len(at) != 1:
            raise ValueError(f"{name}: {len(at)} lines of its body begin with {first!r}; one must")
        start = at[0]
    stop = node.end_lineno or start
    for number in range(stop, len(lines)):  # comments behind the last statement, which the tree does not know
        text = lines[number]
        if text.strip() and not (text.lstrip().startswith("#") and len(text) - len(text.lstrip()) >= indent):
            break
        if text.strip():
            stop = number + 1
    return start, stop


def end_of_logical_line(source: str, line: int) -> int:
    """The last line, counted from 1, of what begins on this one: a head may go over several."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NEWLINE and token.end[0] >= line:
            return token.end[0]
    return line


def replaced(source: str, name: str, body: str, first: str = "") -> str:
    """The source with another body of a function, every other byte as it was; the body without its indent."""
    start, stop = body_lines(source, name, first)
    lines = source.splitlines(keepends=True)
    given = next(line for line in lines[start:stop] if line.strip())
    indent = given[: len(given) - len(given.lstrip())]
    end = "\r\n" if given.endswith("\r\n") else "\n"
    new = textwrap.indent(body.strip("\n") + "\n", indent).replace("\n", end)
    return "".join([*lines[:start], new, *lines[stop:]])
