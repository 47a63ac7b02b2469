"""The files that a token crosses in a forward pass of training, found by running one.

python -m docs.path
"""

import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from docs.equations import PACKAGES, ROOT
from lm import loss
from lm.config import Config
from lm.model import Transformer

LAST = {"moe/fast.py", "moe/modes.py"}  # the same numbers, faster: not needed to follow a token
Row = tuple[str, int, str]  # file, its lines, the function that is called first


def crossed(call: Callable[[], Any]) -> list[Row]:
    """The files of the packages in which a function is called, in the order of their first calls."""
    first: dict[str, str] = {}
    inside = tuple(f"{ROOT / package}{os.sep}" for package in PACKAGES)

    def see(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        # CO_OPTIMIZED: the body of a function, not of a module or a class
        if event == "call" and code.co_filename.startswith(inside) and code.co_flags & inspect.CO_OPTIMIZED:
            first.setdefault(Path(code.co_filename).relative_to(ROOT).as_posix(), code.co_qualname)

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(before)
    return [(file, len((ROOT / file).read_text("utf-8").splitlines()), name) for file, name in first.items()]


def passes() -> tuple[list[Row], list[Row]]:
    """-> the files of a forward pass of a small model in training mode, those that its losses add"""
    config = Config.preset("nano")
    model = Transformer(config.model).train()
    inputs = torch.arange(256).view(4, 64)
    forward = crossed(lambda: model(inputs))
    losses = crossed(lambda: loss.training_losses(model, inputs, inputs, config.train))
    seen = {file for file, *_ in forward}
    return forward, [row for row in losses if row[0] not in seen]


def table() -> str:
    """The files as a table, with links for a page in docs and running totals."""
    forward, losses = passes()
    parts = (
        ("the forward pass", [row for row in forward if row[0] not in LAST]),
        ("with those to read last", [row for row in forward if row[0] in LAST]),
        ("with the training losses", losses),
    )
    lines = ["| file | lines | first called |", "| --- | ---: | --- |"]
    files = total = 0
    for what, rows in parts:
        lines += [f"| [{file}](../{file}) | {count:,} | `{name}` |" for file, count, name in rows]
        files, total = files + len(rows), total + sum(count for _, count, _ in rows)
        lines.append(f"| **{what}: {files} files** | **{total:,}** | |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
