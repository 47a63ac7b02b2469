"""One page that shows what a run learnt, and what its experts do: report.html and its pictures."""

import base64
import json
import math
from pathlib import Path
from typing import Any

import matplotlib
import torch
from einops import rearrange

from mla import GroupedQueryAttention
from moe import balance

from . import checkpoint, count, data, page
from .config import Config
from .model import Transformer
from .runs import read_metrics
from .tokenizer import ByteTokenizer

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the choice of backend

PASSAGE = 384  # tokens shown coloured by their expert
LOAD_TOKENS = 16384  # tokens that the load is counted on


def write(run: Path, trust_code: bool = False) -> Path:
    """Write report.html, self-contained, and its pictures as PNG beside it -> the page's path.

    Raises:
        ValueError: the folder is not a run with a whole checkpoint.
    """
    config = checkpoint.read_config(run, trust_code)
    newest = checkpoint.newest_checkpoint(run)
    state = checkpoint.read_state(newest)
    model = checkpoint.load_model(config.model, newest / "model.safetensors")
    rows = read_metrics(run)
    if not rows:
        raise ValueError(f"{run / 'metrics.jsonl'}: holds no row yet")
    validation = data.Windows(data.load(config.data, config.model.vocab_size)[1], config.train.context)
    baseline = read_baseline(config)
    caches = cache_bytes(model, config)
    pictures = {"loss": draw_loss(rows, baseline), "cache": draw_cache(caches)}
    passage: list[list[dict[str, Any]]] = []
    if model.routers():
        load = expert_load(model, validation)
        passage = passage_experts(model, validation)
        pictures |= {"balance": draw_balance(rows), "load": draw_load(load), "experts": draw_passage(passage)}
    images = {}
    for name, figure in pictures.items():
        figure.savefig(run / f"{name}.png", dpi=110, bbox_inches="tight")
        plt.close(figure)
        images[name] = base64.b64encode((run / f"{name}.png").read_bytes()).decode()
    samples = run / "samples.txt"
    text = page.render(
        Path(__file__).parent / "report.html",
        name=run.resolve().name,
        config=config,
        state=state,
        last=rows[-1],
        evaluated=[row for row in rows if "val_loss" in row][-1:],
        baseline=baseline,
        images=images,
        passage=passage,
        caches=caches,
        counts=counts(config, model),
        samples=samples.read_text(encoding="utf-8", errors="replace") if samples.exists() else "",
        hue=hue,
    )
    checkpoint.write_file(run / "report.html", text)
    return run / "report.html"


def read_baseline(config: Config) -> dict[str, Any] | None:
    """The n-gram models' losses, where the run is on the text that they were made for."""
    path = data.CORPUS / "baselines.json"
    return json.loads(path.read_text()) if not config.data.path and not config.data.validation else None


def counts(config: Config, model: Transformer) -> dict[str, int | None]:
    """Parameters: in all, counted from the model; active, by arithmetic (None for parts of your own)."""
    total = sum(tensor.numel() for tensor in checkpoint.model_tensors(model).values())
    try:
        return {"total": total, "active": count.active_parameters(config.model)}
    except ValueError:
        return {"total": total, "active": None}


def cache_bytes(model: Transformer, config: Config) -> dict[str, int]:
    """Bytes that a token takes in all layers' caches, measured on live ones: this model, MHA, GQA and MQA."""
    length = 64
    ours = sum(cache.nbytes for cache in model.new_caches(1, length)) // length
    attention = config.model.attention
    heads = attention.num_heads
    width = attention.head_dim if attention.kind == "gqa" else attention.v_head_dim
    dtype = next(model.parameters()).dtype
    found = {f"this model ({attention.kind})": ours}
    groups = {"MHA": heads, "GQA": max(1, heads // 4) if heads % 4 == 0 else 1, "MQA": 1}
    for name, kv_heads in groups.items():
        rival = GroupedQueryAttention(config.model.dim, heads, kv_heads, width + width % 2)
        found[name] = rival.new_cache(1, length, dtype).nbytes // length * config.model.num_layers
    return found


@torch.no_grad()
def expert_load(model: Transformer, text: data.Windows) -> torch.Tensor:
    """Share of the held-out text's slots that each expert took -> (layers, experts), 1 / experts when even"""
    windows = range(0, len(text), max(1, len(text) * text.context // LOAD_TOKENS))
    tokens = torch.stack([text[index][:-1] for index in windows])
    loads = [balance.tokens_per_expert(routing).double() for routing in model(tokens).routings]
    return torch.stack([load / load.sum() for load in loads])


def passage(text: data.Windows, length: int) -> torch.Tensor:
    """A held-out passage from where a speech begins, at most so many tokens -> (time,) int64"""
    some = bytes(text.tokens[:4000])
    start = max(0, some.find(b"\n\n", 2000) + 2 if len(some) > 2000 + PASSAGE else 0)
    return torch.from_numpy(text.tokens[start : start + length].astype("int64"))


@torch.no_grad()
def passage_experts(model: Transformer, text: data.Windows) -> list[list[dict[str, Any]]]:
    """For each MoE layer: the tokens of a held-out passage as shown, each with its expert of most weight."""
    tokens = passage(text, PASSAGE)
    shown = [show(token) for token in tokens.tolist()]
    layers = []
    for routing in model(tokens.unsqueeze(0)).routings:
        strongest = routing.weights.argmax(-1, keepdim=True)
        experts = rearrange(routing.experts.gather(-1, strongest), "1 time 1 -> time").tolist()
        layers.append([{"text": text, "expert": expert} for text, expert in zip(shown, experts)])
    return layers


def show(token: int) -> str:
    """A byte as something that can be seen."""
    if token == ByteTokenizer.end_of_text:
        return "∎"
    return {10: "↵", 32: "␣"}.get(token, chr(token) if 33 <= token < 127 else f"{token:02x}")


def hue(expert: int) -> int:
    """Degrees on the colour wheel; neighbours in number are far apart in colour."""
    return round(expert * 137.508) % 360


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
    low = min([*losses, *held_out, baseline["best"] if baseline else 9])
    axes[0].set_ylim(low * 0.95, min(max(losses), low * 2))
    return figure


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
