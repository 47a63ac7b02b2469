"""Do the successors of GRPO learn more from as many samples?

lm experiment objectives [--quick]  ->  experiments/results/objectives.json and .png

Claim: Dr. GRPO removes a bias to long wrong answers (arXiv 2503.20783), DAPO needs half the steps (arXiv
2503.14476), GSPO is more stable with experts (arXiv 2507.18071), and Kimi 1.5 trains with mirror descent and
shortens thoughts by a length reward (arXiv 2501.12599). Prediction: at this size, and at equal samples, GRPO,
Dr. GRPO and DAPO end within 0.05 of each other. DAPO's dynamic sampling is left out, since it takes more
samples; each objective has the clip of its paper.
"""

from . import command, common, reasoning

KINDS = {
    "GRPO": {},
    "Dr. GRPO": {"objective": "dr_grpo"},
    "DAPO": {"objective": "dapo"},
    "GSPO": {"objective": "gspo"},
    "Kimi 1.5": {"objective": "kimi"},
    "Kimi 1.5, length reward": {"objective": "kimi", "length_reward": 0.5},
    "GRPO, length reward": {"length_reward": 0.5},
}


def main(arguments: list[str] | None = None) -> None:
    """Train each base with each objective."""
    given = command.options("objectives", __doc__, reasoning.STEPS, arguments)
    bases, found = range(given.seeds), reasoning.compare(given, KINDS)
    rows = [{"model": name, "seed": seed, "steps": given.steps, **row} for (name, seed), row in found.items()]
    value = {name: [found[name, seed]["pass_at_1"] for seed in bases] for name in KINDS}
    length = {name: [found[name, seed]["length"] for seed in bases] for name in KINDS}
    table = [["", "pass@1", "length (tokens)", "of right ones", "of wrong ones", "groups without variance"]]
    for name in KINDS:
        mine = [found[name, seed] for seed in bases]
        parts = [[row[key] for row in mine if row[key]] for key in ("length_right", "length_wrong")]
        lengths = [common.shown(part, 1) if len(part) > 1 else "" for part in parts]
        flat = common.shown([row["flat"] for row in mine], 2)
        table.append([name, common.shown(value[name]), common.shown(length[name], 1), *lengths, flat])
    alike = ("GRPO", "Dr. GRPO", "DAPO")
    shorter, plain = (common.shown(length[name], 1) for name in ("Kimi 1.5, length reward", "Kimi 1.5"))
    answer = [
        "At equal samples: " + ", ".join(f"{name} {common.shown(value[name])}" for name in KINDS) + ". "
        f"With the length reward, Kimi's completions have {shorter} tokens, without it {plain}."
    ]
    spread = [
        0.05 - abs(found[a, seed]["pass_at_1"] - found[b, seed]["pass_at_1"])
        for seed in bases
        for a, b in ((alike[0], alike[1]), (alike[0], alike[2]))
    ]
    common.write("objectives", given, common.as_claimed(spread), answer, table, rows, {})
    figure, axis = common.plt.subplots(figsize=(5, 3))
    common.points(axis, value, "pass@1, held out")
    common.save(figure, "objectives", given)


if __name__ == "__main__":
    main()
