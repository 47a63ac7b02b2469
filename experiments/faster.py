"""Does a mixture of experts train faster, with fewer active parameters?

lm experiment faster [--quick]  ->  experiments/results/faster.json and .png

Claim: "MoE trains models faster with fewer parameters" (of DeepSeek-V3, in the news); at equal FLOPs a
DeepSeekMoE reaches 1.808 where a dense model reaches 2.060 (DeepSeekMoE, arXiv 2401.06066 table 1); at small
size, better per FLOP and slower per second (nanochat). Prediction: a MoE needs at most half the FLOPs of a
dense model of equal active width for the same loss; in seconds the gain is smaller, since small products are
slow.

Every number of steps is a separate training with its own learning-rate schedule. Seconds are steps times
the fastest step, with the models measured in turns on all threads of the machine. Memory is the peak of
three steps: weights, gradients, moments and activations. The range behind a ratio is its 95 % confidence
interval (Student's t over seeds); seeds whose curve does not reach the loss are left out. With a quarter of
the batch a training sees a quarter of the tokens.
"""

from collections.abc import Sequence
from typing import Any

from lm import count
from lm.config import Config

from . import command, common
from .fineness import split

BUDGETS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)  # shares of the steps
LEAST = (1 / 8,)  # for the dense model of equal parameters, which is slow
DIMS = {64: BUDGETS[:4]}  # besides the config's own, for the frontier
VARIED = 1 / 4  # budget of the variants of the MoE
RIVALS = ("dense", "dense, as many parameters")
NUMBERS = (8, 16, 32, 128)  # of experts
NAMES = (  # of RIVALS, in a sentence
    "a dense model of equal active width ends with",
    "a dense model of equal parameters has after an eighth of the steps",
)
KEYS = {"flops": "FLOPs", "seconds": "seconds"}


def dense(config: Config, hidden_dim: int) -> Config:
    """The model with dense MLPs instead of experts."""
    return common.changed(
        config, model={"num_dense_layers": config.model.num_layers, "hidden_dim": hidden_dim}
    )


def active_width(config: Config) -> int:
    """Total width of the experts that a token uses."""
    moe = config.model.moe
    return (moe.top_k + moe.num_shared_experts) * moe.hidden_dim


def at_dim(config: Config, dim: int) -> Config:
    """The model scaled to `dim`: all widths in proportion, init_std and learning rate by dim^-0.5."""
    model, times = config.model, dim / config.model.dim
    a, moe = model.attention, model.moe
    names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return common.changed(
        config,
        model={"dim": dim, "init_std": model.init_std * times**-0.5},
        attention={name: max(2, round(getattr(a, name) * times)) for name in names},
        moe={"hidden_dim": round(moe.hidden_dim * times)},
        train={"learning_rate": config.train.learning_rate * times**-0.5},
    )


def varied(config: Config) -> dict[str, Config]:
    """Variants of the MoE, at equal active width."""
    moe, batch = config.model.moe, config.train.batch_size
    found = {f"{number} experts": common.changed(config, moe={"num_experts": number}) for number in NUMBERS}
    number, top_k = (count + moe.num_shared_experts for count in (moe.num_experts, moe.top_k))
    halves = split(config, 2 * number - 1, 2 * top_k - 1, 1, moe.hidden_dim // 2)
    found["twice as many of half the width"] = halves
    found["no shared expert"] = split(config, number, top_k, 0, moe.hidden_dim)
    for name, one in (("MoE", config), ("dense", dense(config, active_width(config)))):
        for times, rate in ((0.5, "half"), (2, "twice")):
            learning_rate = config.train.learning_rate * times
            other = common.changed(one, train={"learning_rate": learning_rate})
            found[f"{name}, {rate} the learning rate"] = other
        found[f"{name}, quarter of the batch"] = common.changed(one, train={"batch_size": batch // 4})
    return found


def ratios(rows: list[dict[str, Any]], of: str, to: str, key: str, steps: int = 0) -> list[float]:
    """For each seed, what `of` needs for the loss that `to` has after `steps`, as a share of what `to` needs.

    Seeds whose curve does not reach that loss are left out.

    Args:
        steps: 0: the longest training of `to`.
    """
    steps = steps or max(row["steps"] for row in rows if row["model"] == to)
    found = []
    for goal in (row for row in rows if row["model"] == to and row["steps"] == steps):
        curve = [row for row in rows if row["model"] == of and row["seed"] == goal["seed"]]
        curve.sort(key=lambda row: row["steps"])
        xs, losses = ([row[name] for row in curve] for name in (key, "held_out_loss"))
        x = common.reach(xs, losses, goal["held_out_loss"])
        found += [] if x is None else [x / goal[key]]
    return found


def described(values: Sequence[float]) -> dict[str, Any]:
    """Ratios with their mean and its interval over seeds."""
    low, high = common.interval(values) if len(values) > 1 else (None, None)
    return {
        "of_each_seed": [round(value, 3) for value in values],
        "mean": round(sum(values) / len(values), 3) if values else None,
        "interval_95": [None if end is None else round(end, 3) for end in (low, high)],
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the MoE needs for the final loss of each rival, as shares of the rival's FLOPs and seconds."""
    return {rival: {key: described(ratios(rows, "MoE", rival, key)) for key in KEYS} for rival in RIVALS}


def frontier(
    rows: list[dict[str, Any]], pairs: dict[int, tuple[str, str]], key: str
) -> dict[int, dict[int, dict[str, Any]]]:
    """{dim: {steps of the dense model: what the MoE needs}}, where its curve reaches the dense model's loss.

    pairs: for each dim, the names of the MoE and the dense model
    """
    found: dict[int, dict[int, dict[str, Any]]] = {}
    for dim, (moe, rival) in pairs.items():
        for steps in sorted({row["steps"] for row in rows if row["model"] == rival}):
            values = ratios(rows, moe, rival, key, steps)
            if values:
                found.setdefault(dim, {})[steps] = described(values)
    return found


def answers(found: dict[str, Any]) -> list[str]:
    """The findings in sentences."""
    said = [
        f"For the loss that {rival}, the MoE needs {share(values['flops'])} of its FLOPs and "
        f"{share(values['seconds'])} of its seconds."
        for rival, values in zip(NAMES, found["summary"].values())
    ]
    ahead, behind = (
        [
            f"dim {dim}, {steps:,} steps ({value['mean']:.2f}, {len(value['of_each_seed'])})"
            for dim, by_steps in found["frontier"]["seconds"].items()
            for steps, value in by_steps.items()
            if (value["mean"] < 1) == is_ahead
        ]
        for is_ahead in (True, False)
    )
    for word, places in (("ahead", ahead), ("behind", behind)):
        if places:
            said.append(f"In seconds (ratio, number of seeds) the MoE is {word} at {'; '.join(places)}.")
    return said


def share(value: dict[str, Any]) -> str:
    """A ratio with its interval, as text."""
    if value["mean"] is None:
        return "an unknown share (the curves do not meet)"
    low, high = value["interval_95"]
    return f"{value['mean']:.2f}" + ("" if low is None else f" ({low:.2f} to {high:.2f})")


def draw(rows: list[dict[str, Any]], found: dict[str, Any], given: Any) -> None:
    """Plot loss against tokens, FLOPs, seconds and memory; the variants; the frontier."""
    figure, axes = common.plt.subplots(2, 3, figsize=(15, 8))
    curves = common.by_model(rows)
    for axis, (key, label) in zip(axes.flat, {"tokens": "tokens", **KEYS}.items()):
        for name in ("MoE", *RIVALS):
            losses = [common.mean_and_error(values) for values in curves[name].values()]
            at = [values[0] for values in common.by_model(rows, key)[name].values()]
            axis.errorbar(at, *zip(*losses), marker="o", ms=3, capsize=2, label=name)
        common.log_axis(axis)
        axis.set_xlabel(f"{label} of training")
        axis.set_ylabel("held-out loss, nats a byte")
    axes[0, 0].legend(frameon=False)
    at = round(given.steps * LEAST[0])
    for name in ("MoE", *RIVALS):
        mean, error = common.mean_and_error(curves[name][at])
        megabytes = found["models"][name]["peak_megabytes"]
        axes[1, 0].errorbar(megabytes, mean, error, marker="o", capsize=2, label=name)
    axes[1, 0].set_xlabel(f"peak memory of a step, MB (loss after {at:,} steps)")
    axes[1, 0].set_ylabel("held-out loss, nats a byte")
    at = round(given.steps * VARIED)
    varied = {name: by_steps[at] for name, by_steps in curves.items() if at in by_steps and "dim" not in name}
    common.points(axes[1, 1], varied, f"held-out loss after {at:,} steps")
    draw_frontier(axes[1, 2], found["frontier"])
    for axis in axes.flat:
        common.tidy(axis)
    figure.tight_layout()
    common.save(figure, "faster", given)


def draw_frontier(axis: Any, found: dict[str, dict[int, dict[int, dict[str, Any]]]]) -> None:
    """What the MoE needs relative to the dense model, over the dense model's steps; one line per dim."""
    for key, style in (("flops", "--"), ("seconds", "-")):
        for number, (dim, by_steps) in enumerate(found[key].items()):
            spread = [value["of_each_seed"] for value in by_steps.values()]
            errors = [common.mean_and_error(values)[1] if len(values) > 1 else 0 for values in spread]
            means = [value["mean"] for value in by_steps.values()]
            how = {"marker": "o", "ms": 3, "ls": style, "color": f"C{number}", "capsize": 2}
            axis.errorbar(list(by_steps), means, errors, label=f"dim {dim}, {KEYS[key]}", **how)
    axis.axhline(1, color="black", lw=0.8)
    common.log_axis(axis, sorted({steps for of_dim in found["flops"].values() for steps in of_dim}))
    axis.set_xlabel("steps of the dense model")
    axis.set_ylabel("MoE / dense for the same loss")
    axis.legend(frameon=False, fontsize=8)


def main(arguments: list[str] | None = None) -> None:
    """Train, time, compare, draw."""
    given = command.options("faster", __doc__, 2400, arguments)
    config = common.base(given)
    moe = config.model.moe
    width = active_width(config)
    whole = (moe.num_experts + moe.num_shared_experts) * moe.hidden_dim
    configs = {
        "MoE": config,
        "dense": dense(config, width),
        "dense, as many parameters": dense(config, whole),
    }
    shares: dict[str, Sequence[float]] = {"MoE": BUDGETS, "dense": BUDGETS, RIVALS[1]: LEAST}
    pairs = {config.model.dim: ("MoE", "dense")}
    for dim, of_dim in ({} if given.quick else DIMS).items():
        scaled = at_dim(config, dim)
        pairs[dim] = f"MoE, dim {dim}", f"dense, dim {dim}"
        for name, one in zip(pairs[dim], (scaled, dense(scaled, active_width(scaled)))):
            configs[name], shares[name] = one, of_dim
    for name, one in ({} if given.quick else varied(config)).items():
        configs[name], shares[name] = one, (VARIED,)
    print(f"time and memory of {len(configs)} models", flush=True)
    seconds = common.step_seconds(configs, 2 if given.quick else 10)
    with common.processes(1, calls=1) as pool:
        running = {name: pool.submit(common.peak_bytes, one) for name, one in configs.items()}
        peaks = common.wait(
            running, lambda name, peak: f"{name}: {1e3 * seconds[name]:.1f} ms a step, {peak / 1e6:.0f} MB"
        )
    rows = common.train_all(configs, given, shares)
    for row in rows:
        row["seconds"] = round(row["steps"] * seconds[row["model"]], 2)
    models = {
        name: {
            **common.sizes(one.model),
            "flops_per_token": count.training_flops_per_token(one.model, one.train.context),
            "milliseconds_a_step": round(1e3 * seconds[name], 2),
            "peak_megabytes": round(peaks[name] / 1e6, 1),
        }
        for name, one in configs.items()
    }
    fronts = {key: frontier(rows, pairs, key) for key in KEYS}
    found = {"summary": summary(rows), "frontier": fronts, "models": models}
    losses = common.by_model(rows)
    table = [["", "parameters", "active", "ms a step", "peak, MB", "steps", "held-out loss"]]
    for name, one in configs.items():
        step, peak = f"{1e3 * seconds[name]:.1f}", f"{peaks[name] / 1e6:.0f}"
        steps = max(losses[name])
        shown = common.shown(losses[name][steps])
        table.append([name, *common.size_cells(one), step, peak, f"{steps:,}", shown])
    final = (found["summary"]["dense"][key]["of_each_seed"] for key in KEYS)
    claimed = common.as_claimed(*([1 - value for value in values] for values in final))
    common.write("faster", given, claimed, answers(found), table, rows, configs, **found)
    draw(rows, found, given)


if __name__ == "__main__":
    main()
