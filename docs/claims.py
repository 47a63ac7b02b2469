"""Write docs/claims.md from the result files of experiments, and the claims of README.md.

python docs/claims.py
"""

import ast
import json
import re
from pathlib import Path
from statistics import fmean as mean

ROOT = Path(__file__).parent.parent
EXPERIMENTS = ROOT / "experiments"
ORDER = (
    *("faster", "cache", "balance", "shared_expert", "fineness", "architectures", "specialization"),
    *("expert_choice", "rope", "rivals", "convert", "projects"),
    *("r1_zero", "what_rl_adds", "objectives", "thinking"),
)
NOT_HERE = "Does not reproduce here, because"  # begins a paragraph that comes after what was found
HEAD = """# The claims, measured

Made by `python docs/claims.py` from the result files in [experiments/results](../experiments/results), which
hold every training with its seed, and the machine. Unless stated otherwise, a loss is in nats per byte on
four held-out plays, as mean ± standard error over seeds. Differences are taken seed by seed, since models of
one seed see the same text in the same order. "As claimed" is yes where every seed agrees with the prediction,
and no where every seed contradicts a part of it. The models are variants of the preset `mini`; in `rivals`
and `convert`, of `toy`; on reinforcement learning, of `reason`. `lm experiment NAME` repeats one, `make
experiments` all; trainings that are kept in
runs/experiments are reused.
"""


def section(name: str) -> str:
    """What is claimed, what was found."""
    doc = ast.get_docstring(ast.parse((EXPERIMENTS / f"{name}.py").read_text("utf-8"))) or ""
    question, _, *said = doc.split("\n\n")
    claim, why = ([text for text in said if text.startswith(NOT_HERE) == late] for late in (False, True))
    found = json.loads((EXPERIMENTS / "results" / f"{name}.json").read_text("utf-8"))
    machine = f"{found['machine']['cores']} cores, {found['machine']['cpu_capability']}"
    made = f"{found['steps']:,} steps at most, {found['seeds']} seeds; {machine}; `lm experiment {name}`."
    verdict = (
        f"As claimed: {found['as_claimed']}" if found["as_claimed"] else f"No verdict: {found['no_verdict']}"
    )
    parts = [
        f"## {question}",
        *claim,
        f"**{verdict}.** " + " ".join(found["answer"]),
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


def cell(name: str, row: str, column: str) -> str:
    """A cell of an experiment's table, without its standard error."""
    head, *rows = json.loads((EXPERIMENTS / "results" / f"{name}.json").read_text("utf-8"))["table"]
    return next(one for one in rows if one[0] == row)[head.index(column)].partition(" ± ")[0]


def loss(name: str, row: str) -> str:
    return cell(name, row, "held-out loss")


def by_loss(name: str) -> list[str]:
    """An experiment's models, from the lowest held-out loss to the highest."""
    rows = json.loads((EXPERIMENTS / "results" / f"{name}.json").read_text("utf-8"))["table"][1:]
    return sorted((row[0] for row in rows), key=lambda row: float(loss(name, row)))


def brief() -> dict[str, tuple[str, str, str]]:
    """The README's rows: the question, what was found here, what others found."""
    needed = json.loads((EXPERIMENTS / "results" / "faster.json").read_text("utf-8"))["summary"]["dense"]
    flops, seconds = (f"{needed[unit]['mean']:.2f}" for unit in ("flops", "seconds"))
    cache = float(cell("cache", "MLA, rank 8", "of MHA's"))
    violation = [cell("balance", row, "global MaxVio") for row in ("none", "Switch loss, 0.01")]
    violation.append(cell("balance", "bias, proportional", "global MaxVio"))
    order = [name for name in reversed(by_loss("architectures")) if "router" not in name]
    hidden = {
        who: float(cell("expert_choice", f"{who} choose", "nothing of what follows"))
        - float(cell("expert_choice", f"{who} choose", "many texts in a call"))
        for who in ("experts", "tokens")
    }
    all_rotated = float(cell("rope", "all turned", "absorbed is off by (worst seed)"))
    without = {
        who: float(cell("specialization", "0.03125", who)) - float(cell("specialization", "0", who))
        for who in ("DeepSeekMoE", "GShard")
    }
    kept, thirds = "MLPs, left as they were", "16 thirds, top 2, and a shared third"
    behind = float(cell("convert", thirds, "repaired")) - float(cell("convert", kept, "repaired"))
    zero = json.loads((EXPERIMENTS / "results" / "r1_zero.json").read_text("utf-8"))["trainings"]
    before, after = (
        mean([row["base"]["pass_at_1"] for row in zero]),
        mean([row["pass_at_1"] for row in zero]),
    )
    longer = mean([row["length"] / row["base"]["length"] for row in zero])
    return {
        "faster": (
            "Does MoE train faster at equal active parameters?",
            f"same loss with {flops} of the FLOPs, {seconds} of the seconds",
            "twice as fast at 1.3 B active (arXiv 2409.02060)",
        ),
        "cache": (
            "Does MLA store more in less memory?",
            f"MHA's loss with {cache:.1%} of its cache",
            "yes, at 16 B and 250 B (arXiv 2405.04434)",
        ),
        "balance": (
            "What balances expert load?",
            f"MaxVio {violation[0]} unbalanced, {violation[1]} with a loss, {violation[2]} with biases",
            "biases: 0.04, at 1 B (arXiv 2408.15664)",
        ),
        "shared_expert": (
            "Is the shared expert irreplaceable once trained?",
            f"disabled, one routed expert more: {loss('shared_expert', 'as trained')} to "
            f"{loss('shared_expert', 'no shared expert, one routed expert more')}",
            "trained without one: slightly better at 6.9 B (arXiv 2409.02060)",
        ),
        "fineness": (
            "Are many fine-grained experts better?",
            f"{loss('fineness', '2 of 32')} with 2 of 32, "
            f"{loss('fineness', '1 shared, 7 of 127')} with 8 of 128",
            "yes, 64 over 8, at 6.9 B (arXiv 2409.02060)",
        ),
        "architectures": (
            "Dense, Hash, Switch, GShard, DeepSeekMoE: ever lower loss?",
            "worst to best: " + ", ".join(order),
            "yes, at 2 B (arXiv 2401.06066)",
        ),
        "specialization": (
            "Are DeepSeekMoE's experts harder to replace than GShard's?",
            f"best 32nd disabled: +{without['DeepSeekMoE']:.2f}; GShard +{without['GShard']:.2f}",
            "yes, at 2 B (arXiv 2401.06066)",
        ),
        "expert_choice": (
            "Does expert choice see the future?",
            f"future hidden: loss +{hidden['experts']:.2f}; token choice +{hidden['tokens']:.2f}",
            "it leaks (arXiv 2408.15664 section 5)",
        ),
        "rope": (
            "Must MLA keep position in separate dims?",
            f"all dims rotated, the absorbed form is {all_rotated:.0%} off",
            "yes (arXiv 2405.04434)",
        ),
        "rivals": (
            "Does DeepSeek's style beat Llama's, Mixtral's, Qwen's?",
            "best to worst: " + ", ".join(name.removesuffix(" style") for name in by_loss("rivals")),
            "V2 is top-tier with 21 B active (arXiv 2405.04434)",
        ),
        "convert": (
            "Can trained GQA become MLA, and an MLP experts?",
            f"GQA exactly; an MLP in 16 thirds ends {behind:.3f} behind",
            "MLA: yes, with little training (arXiv 2502.07864)",
        ),
        "r1_zero": (
            "Does reward alone teach a small model to think?",
            f"pass@1 {before:.2f} to {after:.2f}, thoughts {longer:.1f} times as long",
            "pass@1 0.156 to 0.710 (arXiv 2501.12948)",
        ),
        "projects": (
            "Can your own router or attention keep up?",
            f"best: {by_loss('projects')[0]}; worst: {by_loss('projects')[-1]}",
            "",
        ),
    }


def readme() -> str:
    """README.md with its table of claims."""
    rows = [["question", "holds here?", "found here", "found elsewhere"]]
    for name, (question, here, elsewhere) in brief().items():
        doc = ast.get_docstring(ast.parse((EXPERIMENTS / f"{name}.py").read_text("utf-8"))) or ""
        anchor = re.sub(r"[^\w -]", "", doc.splitlines()[0].lower()).replace(" ", "-")
        found = json.loads((EXPERIMENTS / "results" / f"{name}.json").read_text("utf-8"))
        holds = found["as_claimed"] or "no verdict"
        rows.append([f"[{question}](docs/claims.md#{anchor})", holds, here, elsewhere])
    place = re.compile(r"(?<=<!-- claims -->\n).*?(?=<!-- end of claims -->)", re.S)
    text, places = place.subn(lambda _: table(rows), (ROOT / "README.md").read_text("utf-8"))
    if places != 1:
        raise ValueError(f"README.md: {places} places for the claims; there must be one")
    return text


if __name__ == "__main__":
    (ROOT / "docs" / "claims.md").write_text(page(), "utf-8")
    (ROOT / "README.md").write_text(readme(), "utf-8")
