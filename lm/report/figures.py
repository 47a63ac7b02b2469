"""The report's pictures, drawn by matplotlib."""

import math
from typing import Any

import matplotlib
import torch

from .measure import hue

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the choice of backend


def draw_loss(rows: list[dict[str, Any]], baseline: dict[str, Any] | None) -> Any:
    """Loss against tokens and against seconds, the best n-gram model as a line."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    evaluated = [row for row in rows if "val_loss" in row]
    losses = [row["loss"] for row in rows]
    held_out = [row["val_loss"] for row in evaluated]
    for axis, key, label in zip(axes, ("tokens", "seconds"), ("tokens", "seconds of training")):
        axis.plot([row[key] for row in rows], losses, alpha=0.5, label="training batch")
        axis.plot([row[key] for row in evaluated], held_out, "o-", label="held-out text")
        if baseline:
            name = f"best n-gram ({baseline['best_order']} bytes of context): {baseline['best']:.3f}"
            axis.axhline(baseline["best"], color="black", linestyle="--", linewidth=1, label=name)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("loss, nats a token")
    axes[0].legend()
    axes[0].set_ylim(*limits(losses, held_out, baseline["best"] if baseline else None))
    return figure


def limits(losses: list[float], held_out: list[float], baseline: float | None) -> tuple[float, float]:
    """From below all losses to above the last of them, the held-out ones and the baseline.

    A long run's first losses are left out above, once the later half of the rows lies below twice the lowest:
    they would leave no room for what a reader compares.
    """
    low = min([*losses, *held_out, *([] if baseline is None else [baseline])])
    later = [*losses[len(losses) // 2 :], *held_out, *([] if baseline is None else [baseline])]
    high = max(later) if max(later) < 2 * low else max([*losses, *later])
    margin = 0.05 * (high - low) or 0.05 * max(low, 1)
    return low - margin, high + margin


def draw_balance(rows: list[dict[str, Any]]) -> Any:
    """MaxVio of each layer over the steps."""
    figure, axis = plt.subplots(figsize=(7, 3.5))
    for layer, values in enumerate(zip(*(row["max_violations"] for row in rows))):
        axis.plot([row["step"] for row in rows], values, label=f"MoE layer {layer + 1}")
    axis.set_xlabel("step")
    axis.set_ylabel("MaxVio (0: even load)")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def draw_load(load: torch.Tensor) -> Any:
    """Heat map, layer x expert; 1 is an even share."""
    layers, experts = load.shape
    figure, axis = plt.subplots(figsize=(min(14, 2 + 0.5 * experts), 1.2 + 0.5 * layers))
    relative = (load * experts).numpy()
    highest = max(2.0, float(relative.max()))
    picture = axis.imshow(relative, cmap="viridis", vmin=0, vmax=highest, aspect="auto")
    if experts <= 32:
        for layer in range(layers):
            for expert in range(experts):
                value = relative[layer, expert]
                colour = "white" if value < 1.2 else "black"
                axis.text(expert, layer, f"{value:.1f}", ha="center", va="center", color=colour, fontsize=8)
        axis.set_xticks(range(experts))
    axis.set_yticks(range(layers), [str(layer + 1) for layer in range(layers)])
    axis.set_xlabel("expert")
    axis.set_ylabel("MoE layer")
    figure.colorbar(picture, label="load, 1 = even share")
    return figure


def draw_passage(passage: list[list[dict[str, Any]]]) -> Any:
    """The first MoE layer's passage, each token on its expert's colour with the expert's number below it."""
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
    """Bars of bytes a token."""
    figure, axis = plt.subplots(figsize=(7, 2.2))
    colours = ["tab:orange", *["tab:blue"] * (len(caches) - 1)]
    bars = axis.barh(list(caches), list(caches.values()), color=colours)
    axis.bar_label(bars, [f"{value:,}" for value in caches.values()], padding=3)
    axis.invert_yaxis()
    axis.set_xlabel("bytes of cache a token, all layers")
    axis.margins(x=0.15)
    return figure
