"""Make docs/names.md: one thing under three names, from the tables in lm/hub/families.py."""

from pathlib import Path

from lm.hub import families as names
from lm.hub.families import BLOCK, FAMILIES, Q_NORM, ROPE, WHOLE, Name

ROOT = Path(__file__).parent.parent


def page() -> str:
    """The whole of docs/names.md."""
    used: dict[Name, list[str]] = {}
    for model_type, family in FAMILIES.items():
        for name in family.names:
            used.setdefault(name, []).append(model_type)
    lines = ["# Our name, the papers' symbol, their key", ""]
    lines += ["Made by `make tables` from lm/hub/families.py; do not edit. Symbols as in V2 and V3.", ""]
    lines += ["## Options: config.toml and config.json", ""]
    lines += ["| ours, in [model] | symbol | theirs | in |", "| --- | --- | --- | --- |"]
    for name, families in used.items():
        where = "all" if len(families) == len(FAMILIES) else ", ".join(families)
        lines.append(f"| `{name.ours}` | {symbol(name)} | `{name.theirs}` | {where} |")
    for scaling, fields in ROPE.items():
        for ours, theirs in fields.items():
            lines.append(f"| `rope.{ours}` | | `rope_scaling.{theirs}` | {scaling} |")
    lines += ["", "What is the same in every model of a family:", ""]
    lines += ["| family | ours | theirs, if it says anything |", "| --- | --- | --- |"]
    for model_type, family in FAMILIES.items():
        rows = (family.ours, {**names.MUST, **family.must})
        ours, theirs = (", ".join(f"`{key}` {value}" for key, value in row.items()) for row in rows)
        lines.append(f"| {model_type} | {ours} | {theirs} |")
    lines += ["", "## Weights: blocks.N and model.layers.N", ""]
    lines += ["Two names of theirs are stacked to one of ours, rows below rows; {e} is an expert.", ""]
    lines += ["| ours | symbol | theirs |", "| --- | --- | --- |"]
    norms = [Name("attention.q_norm.weight", "", f"{Q_NORM['mla']} or {Q_NORM['gqa']}")]
    for name in [*WHOLE, *norms, *BLOCK]:
        theirs = name.theirs if " or " in name.theirs else " + ".join(name.theirs.split())
        lines.append(f"| `{name.ours}` | {symbol(name)} | `{theirs}` |")
    others = ", ".join(f"`{other}` for `{word}`" for word, other in names.MIXTRAL.items())
    lines += ["", f"mixtral has {others}."]
    return "\n".join(lines) + "\n"


def symbol(name: Name) -> str:
    """The paper's symbol, as code."""
    return f"`{name.symbol}`" if name.symbol else ""


if __name__ == "__main__":
    (ROOT / "docs" / "names.md").write_text(page(), encoding="utf-8")
