"""Does reward alone teach a small model to think?

lm experiment r1_zero [--quick]  ->  experiments/results/r1_zero.json and .png

Claim: reinforcement learning with a reward for right answers alone raises accuracy, and with it the length of
the thought, which nothing rewards (DeepSeek-R1, arXiv 2501.12948 section 2.2.4; pass@1 on AIME from 0.156 to
0.710). Here: three base models, each with three runs of GRPO, on chains of sums; pass@1 is over 512 held-out
problems with one completion each.
"""

from . import command, common, reasoning


def main(arguments: list[str] | None = None) -> None:
    """Train bases, then each with GRPO and several seeds."""
    given = command.options("r1_zero", __doc__, reasoning.STEPS, arguments)
    bases, seeds = reasoning.bases(given), range(given.seeds)
    options = reasoning.options(given)
    learners = {
        (base, seed): reasoning.Learner(folder, reasoning.seeded(options, seed))
        for base, folder in bases.items()
        for seed in seeds
    }
    found = reasoning.learn_all(learners, given)
    rows = [
        {"model": f"base {base}", "seed": seed, "steps": given.steps, **row}
        for (base, seed), row in found.items()
    ]
    before = [found[base, 0]["base"] for base in bases]
    after = [row["pass_at_1"] for row in rows]
    longer = [row["length"] / row["base"]["length"] for row in rows]
    table = [["", "pass@1", "in form", "length (tokens)", "entropy (nats per token)"]]
    for base in bases:
        one = found[base, 0]["base"]
        table.append([f"base {base}", *(f"{one[key]:.3f}" for key in ("pass_at_1", "in_form")),
                      f"{one['length']:.1f}", ""])  # fmt: skip
        mine = [found[base, seed] for seed in seeds]
        cells = [common.shown([row[key] for row in mine]) for key in ("pass_at_1", "in_form")]
        length = common.shown([row["length"] for row in mine], 1)
        entropy = common.shown([row["entropy"] for row in mine])
        table.append([f"base {base}, after GRPO", *cells, length, entropy])
    answer = [
        f"pass@1 rises from {common.shown([one['pass_at_1'] for one in before])} to {common.shown(after)} "
        f"(worst of {len(rows)} runs: {min(after):.3f}), the length by a factor of "
        f"{common.shown(longer, 2)}, "
        f"and {min(row['in_form'] for row in rows):.3f} or more of the completions have the form, after "
        f"{rows[0]['responses']:,} completions."
    ]
    gains = [row["pass_at_1"] - row["base"]["pass_at_1"] for row in rows]
    claimed = common.as_claimed(gains, [factor - 1 for factor in longer])
    common.write("r1_zero", given, claimed, answer, table, rows, {})
    figure, axes = common.plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, key, label in zip(axes, ("pass_at_1", "length"), ("pass@1, held out", "length (tokens)")):
        for row in rows:
            colour = f"C{row['model'].split()[1]}"
            axis.plot(row["evaluated_after"], row["curve"][key], color=colour, alpha=0.7)
        axis.set(xlabel="step", ylabel=label)
        common.tidy(axis)
    for base in bases:
        axes[0].plot([], [], color=f"C{base}", label=f"base {base}")
    axes[0].legend(frameon=False)
    common.save(figure, "r1_zero", given)


if __name__ == "__main__":
    main()
