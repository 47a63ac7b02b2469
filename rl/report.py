"""report.html of a reinforcement learning run: accuracy, length, entropy, rewards, completions over time."""

import base64
from pathlib import Path
from typing import Any

from lm import files
from lm.report import page
from lm.report.figures import plt
from lm.run import read_metrics

from .config import ReasonConfig


def write(run: Path) -> Path:
    """Write report.html, self-contained, and its figures as PNG files beside it -> the page's path

    Raises:
        ValueError: the folder is not a run of `lm reason train` with a row in its log.
    """
    config = ReasonConfig.load(run)
    rows = read_metrics(run)
    if not rows:
        raise ValueError(f"{run / 'metrics.jsonl'}: has no rows yet")
    evaluated = [row for row in rows if "held_out" in row]
    if "base" in rows[0]:
        evaluated = [{**rows[0], "step": 0, "held_out": rows[0]["base"]}, *evaluated]
    pictures = {"accuracy": draw_accuracy(rows, evaluated), "rewards": draw_rewards(rows, config.size)}
    images = {}
    for name, figure in pictures.items():
        figure.savefig(run / f"{name}.png", dpi=110, bbox_inches="tight")
        plt.close(figure)
        images[name] = base64.b64encode((run / f"{name}.png").read_bytes()).decode()
    text = page.render(
        Path(__file__).parent / "report.html",
        name=run.resolve().name,
        config=config,
        first=evaluated[0] if evaluated else None,
        last=evaluated[-1] if evaluated else None,
        rows=rows,
        images=images,
        examples=examples_of(evaluated),
    )
    files.write_file(run / "report.html", text)
    return run / "report.html"


def examples_of(evaluated: list[dict[str, Any]]) -> list[tuple[str, list[tuple[int, str]]]]:
    """A few held-out problems, each with what the model wrote at each evaluation (step, completion)."""
    found: dict[str, list[tuple[int, str]]] = {}
    for row in evaluated:
        for problem, completion in row["held_out"]["examples"]:
            found.setdefault(problem, []).append((row["step"], completion))
    return list(found.items())


def draw_accuracy(rows: list[dict[str, Any]], evaluated: list[dict[str, Any]]) -> Any:
    """Accuracy, length of the completions and entropy against the step."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    steps = [row["step"] for row in rows]
    axes[0].plot(steps, [row["reward"] for row in rows], alpha=0.4, label="sampled problems")
    axes[0].plot(
        [row["step"] for row in evaluated],
        [row["held_out"]["pass_at_1"] for row in evaluated],
        "o-",
        label="held-out problems",
    )
    axes[0].set(ylabel="right and in form", ylim=(0, 1))
    axes[1].plot(steps, [row["length"] for row in rows], color="black", label="all")
    for key, label in (("length_right", "right"), ("length_wrong", "wrong")):
        points = [(row["step"], row[key]) for row in rows if row[key] is not None]
        axes[1].plot(*zip(*points), alpha=0.5, label=label) if points else None
    axes[1].set(ylabel="length (tokens)")
    axes[2].plot(steps, [row["entropy"] for row in rows])
    axes[2].set(ylabel="entropy (nats per token)")
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    axes[1].legend(frameon=False)
    return figure


def draw_rewards(rows: list[dict[str, Any]], size: int) -> Any:
    """How many completions of a group are right, over the steps: flat groups (none, all) teach nothing."""
    figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
    shares = [
        [row["groups"][right] / max(1, sum(row["groups"])) for row in rows] for right in range(size + 1)
    ]
    colours = plt.get_cmap("viridis")([right / size for right in range(size + 1)])
    axis.stackplot([row["step"] for row in rows], shares, colors=colours)
    axis.set(xlabel="step", ylabel="share of the groups", ylim=(0, 1))
    bar = plt.cm.ScalarMappable(plt.Normalize(0, size), "viridis")
    figure.colorbar(bar, ax=axis, label=f"right of {size}")
    return figure
