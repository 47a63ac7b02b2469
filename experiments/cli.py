"""`lm experiment`: list the experiments in this folder, or run one."""

import ast
from pathlib import Path

from lm.config import nearest
from lm.parts import import_here


def main(arguments: list[str]) -> int:
    """Run the experiment NAME with its options, or list all without a name -> exit status"""
    folder = Path("experiments")
    known: dict[str, str] = {}
    for path in sorted(folder.glob("*.py")):
        if path.stem not in ("common", "cli", "command", "reasoning"):
            try:
                known[path.stem] = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
            except (SyntaxError, ValueError) as error:  # unfinished: the others still run
                known[path.stem] = f"(cannot be read: {error})"
    if not known:
        raise ValueError(f"{folder.absolute()}: no experiments here; run this in the project's folder")
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print("usage: lm experiment NAME ... (lm experiment NAME --help shows its options)\n")
        print("\n".join(f"  {name:16}{(text.splitlines() or [''])[0]}" for name, text in known.items()))
        return 0
    if name.startswith("-"):
        raise ValueError(f"{name}: the experiment's name comes first; there are {', '.join(known)}")
    if name not in known:
        raise ValueError(f"no experiment {name!r}{nearest(name, list(known))}; there are {', '.join(known)}")
    try:
        module = import_here(f"experiments.{name}")
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{folder / name}.py: {error}") from None
    if not hasattr(module, "main"):
        raise ValueError(f"{folder / name}.py: has no main(arguments)")
    module.main(rest)
    return 0
