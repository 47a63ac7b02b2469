"""Replace functions of the package by a student's, before the package is imported.

The module is compiled from its own source with one function's syntax tree taken from the student's file. Each
class exists only once, so every import sees the student's version. Tracebacks name the student's file and
line. Nothing is written into the package.
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

PROJECT = ("moe", "mla", "lm", "rl", "experiments", "exercises")


class Piece(NamedTuple):
    """A function to take from a student's file."""

    module: str
    name: str  # dotted name within the module
    path: Path


def merge(tree: ast.Module, student: str, name: str, path: Path) -> set[str]:
    """Put the student's function into the module's tree -> the names that now come from the student.

    The student's own helpers and imports are added if the module does not define those names.

    Raises:
        ValueError: the student's file does not parse, lacks the function, or changes its parameters.
    """
    theirs = parse(student, path)
    body, ours = find(tree, name)  # type: ignore[misc]
    found = find(theirs, name)
    if found is None:
        raise ValueError(f"{path}: {name} not found; keep the names of the function and its class")
    new = found[1]
    if type(new) is not type(ours):
        raise ValueError(f"{path}:{new.lineno}: async def {name}: write def, without async")
    if head(new) != head(ours):
        raise ValueError(f"{path}:{new.lineno}: {name}({head(new)}): keep the signature {name}({head(ours)})")
    new.decorator_list = ours.decorator_list
    for decorator in new.decorator_list:
        for node in ast.walk(decorator):
            if isinstance(node, ast.expr):
                node.lineno = node.end_lineno = new.lineno
    added = additions(tree, theirs)
    body[body.index(ours)] = new
    imports = [node for node in added if isinstance(node, ast.Import | ast.ImportFrom)]
    late = [node for node in imports if is_of_project(node)]
    for node in late:
        if names(node) == ["*"]:
            raise ValueError(f"{path}:{node.lineno}: {ast.unparse(node)}: import the names that you use")
    others = [node for node in added if node not in imports]
    for node in [new, *others]:
        for function in ast.walk(node):
            if isinstance(function, Function):
                import_inside(function, late)
    docstring = 0 if ast.get_docstring(tree) is None else 1
    early = [node for node in imports if node not in late]
    tree.body[docstring:docstring] = sorted(early, key=lambda node: not is_future(node))
    tree.body += others
    return {name, *(helper for node in added for helper in names(node))}


def additions(tree: ast.Module, theirs: ast.Module) -> list[ast.stmt]:
    """The top-level statements of a student's file that define names which the module does not; imports split."""
    known = {known for node in tree.body for known in names(node)}
    split: list[ast.stmt] = []
    for node in theirs.body:
        if isinstance(node, ast.Import | ast.ImportFrom) and len(node.names) > 1:
            for alias in node.names:
                one = copy.copy(node)
                one.names = [alias]
                split.append(one)
        else:
            split.append(node)
    return [node for node in split if names(node) and not set(names(node)) & known]


def is_of_project(node: ast.Import | ast.ImportFrom) -> bool:
    """Whether an import may be circular: the package is being imported when the module's top level runs."""
    module = node.names[0].name if isinstance(node, ast.Import) else node.module or ""
    return bool(isinstance(node, ast.ImportFrom) and node.level) or module.partition(".")[0] in PROJECT


def is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def import_inside(function: Function, imports: Sequence[ast.Import | ast.ImportFrom]) -> None:
    """Let a function import the names that it uses, when it is called."""
    used = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    own = {node.arg for node in ast.walk(function.args) if isinstance(node, ast.arg)}
    start = 0 if ast.get_docstring(function) is None else 1
    function.body[start:start] = [node for node in imports if set(names(node)) & (used - own)]


def head(node: Function) -> str:
    """A function's parameters with their defaults, without annotations."""
    arguments = copy.deepcopy(node.args)
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return ast.unparse(arguments)


def names(node: ast.AST) -> list[str]:
    """The names that a module-level statement defines."""
    if isinstance(node, Function | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [(alias.asname or alias.name).split(".")[0] for alias in node.names]
    if isinstance(node, ast.Name):
        return [node.id] if isinstance(node.ctx, ast.Store) else []
    if isinstance(node, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        return []
    return [name for child in ast.iter_child_nodes(node) for name in names(child)]


def compiled(installed: str, origin: str, pieces: Sequence[Piece]) -> types.CodeType:
    """A module's code with students' functions in it, each attributed to the student's file."""
    tree = ast.parse(installed)
    owner = {}
    for piece in pieces:
        for name in merge(tree, read(piece.path), piece.name, piece.path):
            owner[name] = str(piece.path)
    return owned(compile(tree, origin, "exec", dont_inherit=True), owner)


def owned(code: types.CodeType, owner: dict[str, str]) -> types.CodeType:
    """The same code, with the functions named in `owner` attributed to their files."""
    if code.co_qualname in owner:
        return from_file(code, owner[code.co_qualname])
    inner = tuple(owned(c, owner) if isinstance(c, types.CodeType) else c for c in code.co_consts)
    return code.replace(co_consts=inner)


def from_file(code: types.CodeType, path: str) -> types.CodeType:
    """The same code and all functions inside it, attributed to this file."""
    inner = tuple(
        from_file(part, path) if isinstance(part, types.CodeType) else part for part in code.co_consts
    )
    return code.replace(co_consts=inner, co_filename=path)


class Loader(importlib.machinery.SourceFileLoader):
    """Loads a module from its source with students' functions in it."""

    def __init__(self, name: str, origin: str, pieces: Sequence[Piece]):
        super().__init__(name, origin)
        self.pieces = pieces

    def get_code(self, fullname: str) -> types.CodeType:
        return compiled(Path(self.path).read_text("utf-8"), self.path, self.pieces)


class Finder(importlib.abc.MetaPathFinder):
    """Finds the modules that are to be patched."""

    def __init__(self, pieces: Sequence[Piece]):
        self.pieces = pieces

    def find_spec(self, fullname, path, target=None):
        pieces = [piece for piece in self.pieces if piece.module == fullname]
        spec = importlib.machinery.PathFinder.find_spec(fullname, path) if pieces else None
        if spec is not None and spec.origin:
            spec.loader = Loader(fullname, spec.origin, pieces)
        return spec


def install(pieces: Sequence[Piece]) -> None:
    """Make later imports of these modules use the students' functions.

    Raises:
        ImportError: one of the modules is already imported.
    """
    early = {piece.module for piece in pieces} & set(sys.modules)
    if early:
        raise ImportError(f"{', '.join(sorted(early))} is already imported")
    sys.meta_path.insert(0, Finder(pieces))


def remove(module: str) -> None:
    """Undo `install`, and drop from sys.modules this module and those that may have imported it."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, Finder)]
    for name in list(sys.modules):
        if name == module or name.partition(".")[0] in ("moe", "mla"):
            del sys.modules[name]
