"""Does routing replay help?

lm experiment replay [--quick]  ->  experiments/results/replay.json and .png

Claim: when the update uses the experts that were chosen while sampling, reinforcement learning of MoE models
becomes stable (GSPO, arXiv 2507.18071 section 5.3: without it, GRPO fails to converge on a 30 B MoE). What
moves the experts there is the number of updates from one batch of samples. Prediction: with 2 updates a step,
under 3 % of the choices move and replay changes nothing; with 8 updates, more move, and replay does not help
at this size.
"""

from . import command, common, reasoning

KINDS = {
    "2 updates": {"replay": False, "updates": 2},
    "2 updates, replay": {"replay": True, "updates": 2},
    "8 updates": {"replay": False, "updates": 8},
    "8 updates, replay": {"replay": True, "updates": 8},
}


def main(arguments: list[str] | None = None) -> None:
    """Train each base with few and many updates, with replay and without."""
    given = command.options("replay", __doc__, reasoning.STEPS, arguments)
    bases, found = range(given.seeds), reasoning.compare(given, KINDS)
    rows = [{"model": name, "seed": seed, "steps": given.steps, **row} for (name, seed), row in found.items()]
    value = {name: [found[name, seed]["pass_at_1"] for seed in bases] for name in KINDS}
    moved = {
        name: [common.mean(found[name, seed]["experts_moved"]) for seed in bases]
        for name in KINDS
        if found[name, 0]["experts_moved"]
    }
    table = [["", "pass@1", "in form", "choices moved by a step's updates"]]
    for name in KINDS:
        form = common.shown([found[name, seed]["in_form"] for seed in bases])
        table.append(
            [name, common.shown(value[name]), form, common.shown(moved[name], 4) if name in moved else ""]
        )
    few, many = "2 updates, replay", "8 updates, replay"
    of = {name: common.shown(values) for name, values in value.items()}
    answer = [
        f"With 2 updates a step, {common.shown(moved[few], 4)} of the choices move, and pass@1 is "
        f"{of['2 updates']} without and {of[few]} with replay. With 8 updates, "
        f"{common.shown(moved[many], 4)} move, and it is {of['8 updates']} without and {of[many]} with it. "
        "In fp32, sampling and training choose the same experts: there is no other mismatch to mend."
    ]
    gains = [a - b for a, b in zip(value[many], value["8 updates"])]
    common.write("replay", given, common.as_claimed(gains), answer, table, rows, {})
    figure, axis = common.plt.subplots(figsize=(5, 2.4))
    common.points(axis, value, "pass@1, held out")
    common.save(figure, "replay", given)


if __name__ == "__main__":
    main()
