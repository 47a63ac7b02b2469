"""Lay students' functions over the package's own, before it is imported.

The module is compiled from the installed source, with one function's node from the student's file: classes
are made once, and every import of them anywhere is right. Tracebacks name the student's file and line, and
nothing is ever written into the package.
"""

import ast
import copy
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .source import Function, find, parse, read


class Piece(NamedTuple):
    """A function that is taken from a student's file."""

    module: str
    name: str  # within the module, with dots
    path: Path


def merge(tree: ast.Module, student: str, name: str, path: Path) -> set[str]:
    """Put the student's function into the installed source's tree -> all names that are now the student's.

    Helpers and imports of the student that the module lacks come along.

    Raises:
        ValueError: the student's file does not parse, lacks the function, or has it with other parameters.
    """
    theirs = parse(student, path)
    body, ours = find(tree, name)  # type: ignore[misc]
    found = find(theirs, name)
    if found is None:
        raise ValueError(f"{path}: has no {name}; the function's name, and its class's, must stay")
    new = found[1]
    if head(new) != head(ours) or type(new) is not type(ours):
        raise ValueError(f"{path}:{new.lineno}: {name}({head(new)}): must stay {name}({head(ours)})")
    new.decorator_list = ours.decorator_list
    for decorator in new.decorator_list:
        for node in ast.walk(decorator):
            if isinstance(node, ast.expr):
                node.lineno = node.end_lineno = new.lineno
    body[body.index(ours)] = new
    known = {known for node in tree.body for known in names(node)}
    added = [node for node in theirs.body if names(node) and not set(names(node)) & known]
    imports = [node for node in added if isinstance(node, ast.Import | ast.ImportFrom)]
    docstring = 0 if ast.get_docstring(tree) is None else 1
    tree.body[docstring:docstring] = imports
    tree.body += [node for node in added if node not in imports]
    return {name, *(helper for node in added for helper in names(node))}


def head(node: Function) -> str:
    """The parameters of a function, with their defaults and without annotations."""
    arguments = copy.deepcopy(node.args)
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return ast.unparse(arguments)


def names(node: ast.stmt) -> list[str]:
    """What a statement at the top of a module gives a name to."""
    if isinstance(node, Function | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [(alias.asname or alias.name).split(".")[0] for alias in node.names]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return []


def compiled(installed: str, origin: str, pieces: Sequence[Piece]) -> types.CodeType:
    """The code of a module with students' functions in it, each said to be from its student's file."""
    tree = ast.parse(installed)
    owner = {}
    for piece in pieces:
        for name in merge(tree, read(piece.path), piece.name, piece.path):
            owner[name] = str(piece.path)
    return owned(compile(tree, origin, "exec", dont_inherit=True), owner)


def owned(code: types.CodeType, owner: dict[str, str]) -> types.CodeType:
    """The same code, in which each function of these names is from its own file, with all that it holds."""
    if code.co_qualname in owner:
        return from_file(code, owner[code.co_qualname])
    inner = tuple(owned(c, owner) if isinstance(c, types.CodeType) else c for c in code.co_consts)
    return code.replace(co_consts=inner)


def from_file(code: types.CodeType, path: str) -> types.CodeType:
    """The same code, said to be from a file, with all functions in it."""
    inner = tuple(
        from_file(part, path) if isinstance(part, types.CodeType) else part for part in code.co_consts
    )
    return code.replace(co_consts=inner, co_filename=path)


class Loader(importlib.machinery.SourceFileLoader):
    """Loads a module from its source with pieces of students laid over it."""

    def __init__(self, name: str, origin: str, pieces: Sequence[Piece]):
        super().__init__(name, origin)
        self.pieces = pieces

    def get_code(self, fullname: str) -> types.CodeType:
        return compiled(Path(self.path).read_text("utf-8"), self.path, self.pieces)


class Finder(importlib.abc.MetaPathFinder):
    """Finds the modules that pieces are laid over."""

    def __init__(self, pieces: Sequence[Piece]):
        self.pieces = pieces

    def find_spec(self, fullname, path, target=None):
        pieces = [piece for piece in self.pieces if piece.module == fullname]
        spec = importlib.machinery.PathFinder.find_spec(fullname, path) if pieces else None
        if spec is not None and spec.origin:
            spec.loader = Loader(fullname, spec.origin, pieces)
        return spec


def install(pieces: Sequence[Piece]) -> None:
    """From now on these modules are imported with the pieces in them."""
    early = {piece.module for piece in pieces} & set(sys.modules)
    if early:
        raise ImportError(f"{', '.join(sorted(early))} is imported already")
    sys.meta_path.insert(0, Finder(pieces))


def remove(module: str) -> None:
    """Forget the pieces, and all modules that may hold them: this one, and what uses it."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, Finder)]
    for name in list(sys.modules):
        if name == module or name.partition(".")[0] in ("moe", "mla"):
            del sys.modules[name]
