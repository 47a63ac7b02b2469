"""`lm new`: write a custom router or attention that already works, for the student to change."""

import keyword
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from lm.cli import parse
from lm.config import PRESETS
from lm.files import write_file

FOLDER = Path("exercises") / "projects"


@dataclass
class New:
    """Write a custom router or attention: a module, its test, and a config that trains it."""

    kind: tyro.conf.Positional[Literal["router", "attention"]]
    name: tyro.conf.Positional[str]  # name of the module, such as my_router


def main(arguments: list[str]) -> int:
    """lm new"""
    options = parse(New, "new", arguments)
    return begin(options.kind, options.name)


def begin(kind: str, name: str) -> int:
    """Write the module, its test and a config that trains it: all three files, or none.

    Args:
        kind: router or attention.
        name: of the module.

    Raises:
        ValueError: the name is not valid or taken, or the working folder is not a clone of the project.
    """
    module = name.replace("-", "_")
    if not FOLDER.is_dir():
        raise ValueError(f"{FOLDER.absolute()}: no such folder; run this in a clone of the project")
    reserved = (
        *keyword.kwlist,
        "conftest",
        "multihead_latent",
    )  # the last one's class would have the name of its base
    if module in reserved or module.startswith("test_") or not re.fullmatch("[a-z][a-z0-9_]{0,49}", module):
        form = "up to 50 lower-case letters, digits and underscores, and no reserved word"
        raise ValueError(f"name {name!r}: expected {form}, such as my_{kind}")
    title = module.title().replace("_", "")
    cls = title if title.endswith(kind.title()) else title + kind.title()
    made = {
        FOLDER / f"{module}.py": MODULES[kind].format(cls=cls),
        FOLDER / f"test_{module}.py": TESTS[kind].format(module=module, cls=cls),
        FOLDER / f"{module}.toml": config_text(kind, f"{'.'.join(FOLDER.parts)}.{module}:{cls}"),
    }
    for path in made:
        if path.exists() or path.is_symlink():
            raise ValueError(f"{path}: file exists; choose another name")
    written: list[Path] = []
    try:
        for path, text in made.items():
            write_file(path, text, new=True)
            written.append(path)
    except OSError as error:
        for path in written:
            path.unlink()
        raise OSError(f"{FOLDER}: cannot write: {error.strerror}") from None
    own, test, config = made
    print(f"{own}: already works; change it", f"{test}: run it with .venv/bin/pytest {test}", sep="\n")
    print(f"{config}: train it with .venv/bin/lm train --preset {config}")
    print(f"commands that open its run need --trust-code: .venv/bin/lm generate runs/{module} --trust-code")
    print("compare it with the others: .venv/bin/lm experiment projects")
    return 0


def config_text(kind: str, path: str) -> str:
    """The preset mini with 600 steps and this class."""
    _, _, text = (PRESETS / "mini.toml").read_text("utf-8").partition("\n")
    changes = [("steps = 2400\n", "steps = 600\n")]
    if kind == "attention":
        changes.append(("[model.attention]\n", f'[model.attention]\nkind = "{path}"\n'))
        changes.append(("[model.moe]\n", "[model.attention.arguments]\nsharpness = 1.0\n\n[model.moe]\n"))
    else:
        changes.append(("[model.moe]\n", f'[model.moe]\nrouter = "{path}"\n'))
        changes.append(("routed_scaling_factor = 1.73\n", ""))  # the skeleton does not take it
        by_loss = "switch_loss = 0.01  # instead of bias_update_rate: this router has no bias\n"
        changes.append(("bias_update_rate = 0.01\n", by_loss))
    for old, new in changes:
        text = text.replace(old, new)
    return f"# The preset mini with 600 steps and a custom {kind}.\n{text}"


MODULES = {
    "router": '''"""What it does differently from other routers, and why that should be better."""

from torch import Tensor

from moe import Routing
from moe.router import router_logits
from moe.zoo import Gate


class {cls}(Gate):
    """x (..., dim) -> Routing"""

    # An __init__ receives the config values that it names, and [model.moe.arguments].

    def forward(self, x: Tensor) -> Routing:
        logits = router_logits(x, self.weight)  # (..., experts)
        scores = logits.softmax(-1)
        weights, experts = scores.topk(self.top_k)  # (..., top_k)
        return Routing(experts, weights / weights.sum(-1, keepdim=True), scores, logits)
''',
    "attention": '''"""What it does differently from latent attention, and why that should be better."""

from torch import nn

from mla import MultiheadLatentAttention


class {cls}(MultiheadLatentAttention):
    """x (batch, time, dim) -> y (batch, time, dim)"""

    # __init__ receives the config values that it names, and [model.attention.arguments]. It may change what
    # the base made, such as self.scale, self.rope or self.kv_norm. You may also override any method, but with
    # forward, query, compress, rotate, expanded, absorbed, split_kv_b or new_cache the model decodes without
    # pages, several times slower, and warns about it once.
    def __init__(
        self,
        dim: int,
        num_heads: int,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        q_lora_rank: int | None = None,
        rope: nn.Module | None = None,
        sharpness: float = 1.0,
    ):
        sizes = (dim, num_heads, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim)
        super().__init__(*sizes, q_lora_rank, rope)
        self.scale *= sharpness  # of the scores before the softmax
''',
}

TESTS = {
    "router": '''"""Tests of {module}."""

from exercises.projects.checks import check_router
from exercises.projects.{module} import {cls}


def test_it_is_a_router():
    router = {cls}(dim=12, num_experts=10, top_k=3)
    check_router(router, dim=12, num_experts=10, top_k=3)
''',
    "attention": '''"""Tests of {module}."""

from exercises.projects.checks import check_attention
from exercises.projects.{module} import {cls}


def test_it_is_an_attention():
    attention = {cls}(20, 3, kv_lora_rank=7, qk_nope_head_dim=5, qk_rope_head_dim=4, v_head_dim=6)
    check_attention(attention, dim=20)
''',
}
