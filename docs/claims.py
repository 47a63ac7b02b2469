"""Write docs/claims.md from the result files of experiments, and the claims of README.md.

python docs/claims.py
"""

import ast
import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXPERIMENTS = ROOT / "experiments"
ORDER = (
    *("faster", "cache", "balance", "shared_expert", "fineness", "architectures", "specialization"),
    *("expert_choice", "rope", "rivals", "convert", "projects"),
)
NOT_HERE = "Does not reproduce here, because"  # begins a paragraph that comes after what was found
HEAD = """# The claims, measured

Made by `python docs/claims.py` from the result files in [experiments/results](../experiments/results), which
hold every training with its seed, and the machine. Losses are nats a byte on four held-out plays where
nothing else is said, as mean ± standard error over seeds; differences are taken seed by seed, since models of
one seed see the same text in the same order. "As claimed" is yes where every seed agrees with the prediction,
no where every seed says the opposite of a part of it. The models are those of the preset `mini`, changed in
what is compared, in `rivals` and `convert` of `toy`. To repeat one: `lm experiment NAME`, all: `make
experiments`; trainings that are kept in runs/experiments are taken from there.
"""


def section(name: str) -> str:
    """What is claimed, what was found."""
    doc = ast.get_docstring(ast.parse((EXPERIMENTS / f"{name}.py").read_text())) or ""
    question, _, *said = doc.split("\n\n")
    claim, why = ([text for text in said if text.startswith(NOT_HERE) == late] for late in (False, True))
    found = json.loads((EXPERIMENTS / "results" / f"{name}.json").read_text())
    machine = f"{found['machine']['cores']} cores, {found['machine']['cpu_capability']}"
    made = f"{found['steps']:,} steps at most, {found['seeds']} seeds; {machine}; `lm experiment {name}`."
    parts = [
        f"## {question}",
        *claim,
        f"**As claimed: {found['as_claimed']}.** " + " ".join(found["answer"]),
        *why,
        table(found["table"]).strip(),
    ]
    if found["seeds"] < 3:
        raise ValueError(f"{name}.json: {found['seeds']} seeds; a claim needs 3")
    if (EXPERIMENTS / "results" / f"{name}.png").exists():
        parts.append(f"![{question}](../experiments/results/{name}.png)")
    return "\n\n".join([*parts, made]) + "\n"


def table(rows: list[list[str]]) -> str:
    """In Markdown."""
    head, *rest = rows
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *rest])


def page() -> str:
    """docs/claims.md"""
    return "\n".join([HEAD, *(section(name) for name in ORDER)])


def readme() -> str:
    """README.md with what was found of each claim."""
    rows = [["question", "as claimed?", "found"]]
    for name in ORDER:
        doc = ast.get_docstring(ast.parse((EXPERIMENTS / f"{name}.py").read_text())) or ""
        found = json.loads((EXPERIMENTS / "results" / f"{name}.json").read_text())
        rows.append([doc.splitlines()[0], found["as_claimed"], found["answer"][0]])
    place = re.compile(r"(?<=<!-- claims -->\n).*?(?=<!-- end of claims -->)", re.S)
    text, places = place.subn(lambda _: table(rows), (ROOT / "README.md").read_text())
    if places != 1:
        raise ValueError(f"README.md: {places} places for the claims; there must be one")
    return text


if __name__ == "__main__":
    (ROOT / "docs" / "claims.md").write_text(page())
    (ROOT / "README.md").write_text(readme())
