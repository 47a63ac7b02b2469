"""The report's figures, drawn with matplotlib."""

import math
from typing import Any

import matplotlib
import torch

from .measure import hue

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the backend is chosen
from matplotlib.ticker import EngFormatter


def draw_loss(rows: list[dict[str, Any]], baseline: dict[str, Any] | None) -> Any:
    """Loss against tokens and against seconds, with the best n-gram model as a horizontal line."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    evaluated = [row for row in rows if "val_loss" in row]
    losses = [row["loss"] for row in rows]
    held_out = [row["val_loss"] for row in evaluated]
    for axis, key, label in zip(axes, ("tokens", "seconds"), ("tokens", "seconds of training")):
        axis.plot([row[key] for row in rows], losses, marker_of(rows), alpha=0.5, label="training batch")
        if evaluated:
            axis.plot([row[key] for row in evaluated], held_out, "o-", label="held-out text")
        if baseline:
            name = f"best n-gram ({baseline['best_order']} bytes of context): {baseline['best']:.3f}"
            axis.axhline(baseline["best"], color="black", linestyle="--", linewidth=1, label=name)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("loss (nats per token)")
    axes[0].xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    axes[0].set_ylim(*limits(losses, held_out, baseline["best"] if baseline else None))
    return figure


def limits(losses: list[float], held_out: list[float], baseline: float | None) -> tuple[float, float]:
    """The range of the y axis: all losses and the baseline, except a run's high first losses.

    Losses above twice the minimum, which would flatten the curves, are cut off if they are all in the first
    half of the training rows.
    """
    rest = [*held_out, *([] if baseline is None else [baseline])]
    shown = [*losses, *rest]
    low = min(shown)
    if max([*losses[len(losses) // 2 :], *rest]) < 2 * low:
        shown = [loss for loss in shown if loss < 2 * low]
    margin = 0.05 * (max(shown) - low) or 0.05 * max(low, 1)
    return low - margin, max(shown) + margin


def marker_of(rows: list[dict[str, Any]]) -> str:
    """matplotlib's format of a line, with a marker if it has only one point and would be invisible."""
    return "-" if len(rows) > 1 else "o-"


def draw_balance(rows: list[dict[str, Any]]) -> Any:
    """MaxVio of each layer against the step."""
    figure, axis = plt.subplots(figsize=(7, 3.5))
    for layer, values in enumerate(zip(*(row["max_violations"] for row in rows))):
        axis.plot([row["step"] for row in rows], values, marker_of(rows), label=f"MoE layer {layer + 1}")
    axis.set_xlabel("step")
    axis.set_ylabel("MaxVio (0 = even load)")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def draw_load(load: torch.Tensor) -> Any:
    """Heat map (layer x expert) of the load; 1 is an even share."""
    layers, experts = load.shape
    figure, axis = plt.subplots(figsize=(min(14, 2 + 0.5 * experts), 1.2 + 0.5 * layers))
    relative = (load * experts).numpy()
    highest = max(2.0, float(relative.max()))
    picture = axis.imshow(relative, cmap="viridis", vmin=0, vmax=highest, aspect="auto")
    if experts <= 32:
        for layer in range(layers):
            for expert in range(experts):
                value = relative[layer, expert]
                colour = "white" if value < 0.6 * highest else "black"
                axis.text(expert, layer, f"{value:.1f}", ha="center", va="center", color=colour, fontsize=8)
        axis.set_xticks(range(experts))
    axis.set_yticks(range(layers), [str(layer + 1) for layer in range(layers)])
    axis.set_xlabel("expert")
    axis.set_ylabel("MoE layer")
    figure.colorbar(picture, label="load (1 = even share)")
    return figure


def draw_passage(passage: list[list[dict[str, Any]]]) -> Any:
    """The passage for the first MoE layer: each token in its expert's colour, the expert's number below."""
    width = 48
    tokens = passage[0]
    lines = math.ceil(len(tokens) / width)
    figure, axis = plt.subplots(figsize=(12, 0.55 * lines))
    centred: dict[str, Any] = {"ha": "center", "va": "center"}
    for index, token in enumerate(tokens):
        line, column = divmod(index, width)
        colour = matplotlib.colors.hsv_to_rgb((hue(token["expert"]) / 360, 0.35, 1.0))
        axis.add_patch(plt.Rectangle((column, -line - 1), 1, 1, color=colour, linewidth=0))
        axis.text(column + 0.5, -line - 0.38, token["text"], fontsize=9, family="DejaVu Sans Mono", **centred)
        axis.text(column + 0.5, -line - 0.8, token["expert"], fontsize=6, **centred)
    axis.set_xlim(0, width)
    axis.set_ylim(-lines, 0)
    axis.axis("off")
    return figure


def draw_cache(caches: dict[str, int]) -> Any:
    """Bars of cache bytes per token."""
    figure, axis = plt.subplots(figsize=(7, 2.2))
    colours = ["tab:orange", *["tab:blue"] * (len(caches) - 1)]
    bars = axis.barh(list(caches), list(caches.values()), color=colours)
    axis.bar_label(bars, [f"{value:,}" for value in caches.values()], padding=3)
    axis.invert_yaxis()
    axis.set_xlabel("cache bytes per token in bf16, all layers")
    axis.margins(x=0.15)
    return figure
