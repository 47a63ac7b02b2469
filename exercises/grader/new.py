"""`lm new`: begin a router or an attention of your own that works before a line of it is changed."""

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
    """Begin a custom router or attention: its module, a test, a config that trains it."""

    kind: tyro.conf.Positional[Literal["router", "attention"]]
    name: tyro.conf.Positional[str]  # of the module, as my_router


def main(arguments: list[str]) -> int:
    """lm new"""
    options = parse(New, "new", arguments)
    return begin(options.kind, options.name)


def begin(kind: str, name: str) -> int:
    """Write the module, its test and a config that trains it: three files, or none.

    Args:
        kind: router or attention.
        name: of the module.

    Raises:
        ValueError: no name for a module, one that is taken, or this is no clone of the project.
    """
    module = name.replace("-", "_")
    if not FOLDER.is_dir():
        raise ValueError(f"{FOLDER.absolute()}: not here; run this in the project's folder")
    reserved = (*keyword.kwlist, "conftest", "multihead_latent")  # the last would be the name of its own base
    if module in reserved or module.startswith("test_") or not re.fullmatch("[a-z][a-z0-9_]{0,49}", module):
        raise ValueError(f"name {name!r}: up to 50 small letters, digits and _ are needed, as in my_{kind}")
    title = module.title().replace("_", "")
    cls = title if title.endswith(kind.title()) else title + kind.title()
    made = {
        FOLDER / f"{module}.py": MODULES[kind].format(cls=cls),
        FOLDER / f"test_{module}.py": TESTS[kind].format(module=module, cls=cls),
        FOLDER / f"{module}.toml": config_text(kind, f"{'.'.join(FOLDER.parts)}.{module}:{cls}"),
    }
    for path in made:
        if path.exists() or path.is_symlink():
            raise ValueError(f"{path}: there is such a file; another name is needed")
    written: list[Path] = []
    try:
        for path, text in made.items():
            write_file(path, text, new=True)
            written.append(path)
    except OSError as error:
        for path in written:
            path.unlink()
        raise OSError(f"{FOLDER}: cannot be written to: {error.strerror}") from None
    own, test, config = made
    print(f"{own}: works as it is; change it", f"{test}: run it with .venv/bin/pytest {test}", sep="\n")
    print(f"{config}: train it by .venv/bin/lm train --preset {config}")
    print("compare it with the others by .venv/bin/lm experiment projects")
    return 0


def config_text(kind: str, path: str) -> str:
    """The preset mini for 600 steps, with this class in it."""
    _, _, text = (PRESETS / "mini.toml").read_text("utf-8").partition("\n")
    changes = [("steps = 2400\n", "steps = 600\n")]
    if kind == "attention":
        changes.append(("[model.attention]\n", f'[model.attention]\nkind = "{path}"\n'))
    else:
        changes.append(("[model.moe]\n", f'[model.moe]\nrouter = "{path}"\n'))
        changes.append(("routed_scaling_factor = 1.73\n", ""))  # the skeleton has none
        by_loss = "switch_loss = 0.01  # in place of bias_update_rate: this router has no bias\n"
        changes.append(("bias_update_rate = 0.01\n", by_loss))
    for old, new in changes:
        text = text.replace(old, new)
    return "# The preset mini for 600 steps, with a part of one's own.\n" + text


MODULES = {
    "router": '''"""What it does otherwise than other routers, and why that should be better."""

from torch import Tensor

from moe import Routing
from moe.router import router_logits
from moe.zoo import Gate


class {cls}(Gate):
    """x (..., dim) -> Routing"""

    # an __init__ of yours is given the config's numbers that it names, and [model.moe.arguments]

    def forward(self, x: Tensor) -> Routing:
        logits = router_logits(x, self.weight)  # (..., experts)
        scores = logits.softmax(-1)
        weights, experts = scores.topk(self.top_k)  # (..., top_k)
        return Routing(experts, weights / weights.sum(-1, keepdim=True), scores, logits)
''',
    "attention": '''"""What it does otherwise than latent attention, and why that should be better."""

from torch import Tensor

from mla import LatentCache, MultiheadLatentAttention


class {cls}(MultiheadLatentAttention):
    """x (batch, time, dim) -> y (batch, time, dim)"""

    # an __init__ of yours is given the config's numbers that it names, and [model.attention.arguments]

    def forward(
        self,
        x: Tensor,
        cache: LatentCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        return super().forward(x, cache, positions, mask)
''',
}

TESTS = {
    "router": '''"""What {module} promises."""

from exercises.projects.laws import check_router
from exercises.projects.{module} import {cls}


def test_it_is_a_router():
    router = {cls}(dim=12, num_experts=10, top_k=3)
    check_router(router, dim=12, num_experts=10, top_k=3)
''',
    "attention": '''"""What {module} promises."""

from exercises.projects.laws import check_attention
from exercises.projects.{module} import {cls}


def test_it_is_an_attention():
    attention = {cls}(20, 3, kv_lora_rank=7, qk_nope_head_dim=5, qk_rope_head_dim=4, v_head_dim=6)
    check_attention(attention, dim=20)
''',
}
