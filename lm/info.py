"""What `lm info` shows: a model's counts as numbers, as text and as a picture. Loads no torch."""

import math
from pathlib import Path
from typing import Any

from . import count
from .config import Config, ModelConfig

# Pre-training on 14.8 T tokens of context 4096, context extension and post-training; rented H800 GPUs, whose
# peak in BF16 is 989.5 TFLOP/s without sparsity (V3 table 1; NVIDIA's data sheet)
V3_TRAINING = {
    "tokens": 14.8e12,
    "pretraining_hours": 2.664e6,
    "all_hours": 2.788e6,
    "dollars_per_hour": 2.0,
    "peak_flops": 989.5e12,
}
LARGEST_DENSE = "llama-3.1-405b"
COLOURS = {  # after Okabe and Ito's, which the colour-blind tell apart, light enough for black letters
    "embedding": "#f0e442",
    "attention": "#56b4e9",
    "dense MLPs": "#e69f00",
    "routed experts": "#35b898",
    "shared experts": "#d996bd",
    "routers": "#b0b0b0",
    "norms": "#777777",
    "head": "#e8854a",
}


def find_config(name: str) -> ModelConfig:
    """The model that a preset, a TOML file, a run folder or a Hugging Face folder describes."""
    path = Path(name)
    if (path / "config.toml").exists():
        return Config.load(path / "config.toml").model
    if (path / "config.json").exists():
        from .hf import read_config

        return read_config(path)[1]
    return Config.preset(name).model


def summary(config: ModelConfig, context: int, dtype: str = "bf16") -> dict[str, Any]:
    """All counts of a model.

    Its cache is put beside MHA, GQA and MQA with as many heads of the same width, and Llama 3.1 405B.

    Args:
        context: tokens, for the FLOPs of attention and the size of the cache.
        dtype: of the cache, see `count.cache_bytes_per_token`.

    Raises:
        ValueError: a router or an attention of your own is in it, or the dtype is unknown.
    """
    embedding = config.vocab_size * config.dim
    lookup = 0 if config.tie_embeddings else embedding
    parameters: dict[str, Any] = {}
    for name, active in (("total", False), ("active", True)):
        parts = count.parameters_by_part(config, active)
        number = sum(parts.values())
        parameters |= {
            name: number,
            f"{name}_without_input_embedding": number - lookup,
            f"{name}_without_embedding_and_head": number - lookup - embedding,
            f"{name}_by_part": parts,
        }
    facts = {
        "parameters": parameters,
        "context": context,
        "training_flops_per_token": count.training_flops_per_token(config, context),
        "deepseek_training_flops_per_sequence": count.deepseek_training_flops(
            config.num_layers, config.dim, config.vocab_size, context, count.feed_forwards(config)
        ),
        "cache_dtype": dtype,
        "cache_elements_per_token": count.cache_elements_per_token(config),
        "cache_bytes_per_token": cache_bytes(config, dtype),
    }
    if config == Config.preset("deepseek-v3").model:
        flops = count.training_flops_per_token(config, 4096)
        facts["published_training"] = V3_TRAINING | count.training_cost(flops, **V3_TRAINING)
    return facts


def cache_bytes(config: ModelConfig, dtype: str) -> dict[str, int]:
    """Bytes a token in all layers: this model's cache and its rivals'."""
    attention = config.attention
    a_head = config.num_layers * 2 * count.built_in_attention(config).value_dim
    heads = {
        "MHA": attention.num_heads,
        "GQA, 4 heads a group": max(1, attention.num_heads // 4),
        "MQA": 1,
    }
    return {
        "this model": count.cache_bytes_per_token(config, dtype),
        **{name: a_head * number * count.BYTES[dtype] for name, number in heads.items()},
        LARGEST_DENSE: count.cache_bytes_per_token(Config.preset(LARGEST_DENSE).model, dtype),
    }


def as_text(facts: dict[str, Any]) -> str:
    """`summary` for a person."""
    parameters, context = facts["parameters"], facts["context"]
    rows = {"parameters": "", "without input embedding": "_without_input_embedding"}
    rows["without embedding and head"] = "_without_embedding_and_head"
    lines = [f"{'':28}{'total':>22}{'active a token':>22}"]
    for name, key in rows.items():
        lines.append(f"{name:28}{parameters['total' + key]:>22,}{parameters['active' + key]:>22,}")
    for name, number in parameters["total_by_part"].items():
        lines.append(f"  {name:26}{number:>22,}{parameters['active_by_part'][name]:>22,}")
    flops, theirs = facts["training_flops_per_token"], facts["deepseek_training_flops_per_sequence"]
    lines += [
        f"training, FLOPs a token at {context:,} of context: {flops:,}",
        f"  a sequence: {short(flops * context)}; by DeepSeekMoE's formula {short(theirs)}",
    ]
    if "published_training" in facts:
        lines += training_lines(facts["published_training"])
    lines.append(f"cache in {facts['cache_dtype']}, bytes a token and at {context:,} of context:")
    ours = facts["cache_bytes_per_token"]["this model"]
    for name, size in facts["cache_bytes_per_token"].items():
        lines.append(f"  {name:26}{size:>14,}{size * context / 2**20:>16,.2f} MiB{size / ours:>9.2f} x")
    return "\n".join(lines)


def short(number: float, letters: str = "kMGTP") -> str:
    """Four digits, and the thousands as a letter: 74.42 T"""
    thousands = min(len(letters), int(math.log10(max(number, 1))) // 3)
    return f"{number / 1000**thousands:.4g} {letters[thousands - 1] if thousands else ''}".rstrip()


def training_lines(training: dict[str, float]) -> list[str]:
    """DeepSeek-V3's training in words."""
    return [
        f"DeepSeek-V3's training: {training['flops']:.3g} FLOPs for {training['tokens'] / 1e12:.1f} T tokens "
        f"in {training['pretraining_hours'] / 1e6:.3f} M GPU hours,",
        f"  {training['flops_per_second_and_gpu'] / 1e12:.0f} TFLOP/s a GPU, "
        f"{training['utilisation']:.0%} of the peak in BF16",
        f"  {training['all_hours'] / 1e6:.3f} M GPU hours with all that followed, at "
        f"{training['dollars_per_hour']:.0f} dollars each: {training['dollars'] / 1e6:.3f} M dollars",
    ]


def draw(parameters: dict[str, Any], title: str, path: Path) -> None:
    """Write a PNG of two treemaps: all parameters, and those that a token meets, areas by part.

    Args:
        parameters: that part of `summary`.

    Raises:
        ValueError: the path does not end in .png, or cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"plot={path}: a picture is written as PNG, so its name must end in .png")
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(11, 5.8))
    figure.suptitle(title, parse_math=False)
    axes = figure.subplots(1, 2)
    for axis, (key, words) in zip(axes, (("total", "in all"), ("active", "that a token meets"))):
        parts = parameters[f"{key}_by_part"]
        draw_treemap(axis, parts)
        axis.set_title(f"{parameters[key]:,} {words}", fontsize=11)
        patches = [
            Patch(color=COLOURS[name], label=f"{name} {short(number, 'kMBT')}")
            for name, number in parts.items()
            if number
        ]
        below = axis.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3, fontsize=9)
        below.set_frame_on(False)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.87, bottom=0.17, wspace=0.03)
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise ValueError(f"plot={path}: cannot be written: {error.strerror}") from None


def draw_treemap(axis: Any, parts: dict[str, int]) -> None:
    """A rectangle a part on matplotlib axes, the largest first; named inside where there is room."""
    from matplotlib.patches import Rectangle

    width, height = 1.6, 1.4
    total = sum(parts.values())
    seen = [name for name, number in parts.items() if number > 1e-6 * total]  # others are less than a pixel
    seen.sort(key=lambda name: -parts[name])
    drawn = sum(parts[name] for name in seen)
    areas = [parts[name] / drawn * width * height for name in seen]
    for name, (x, y, w, h) in zip(seen, squarify(areas, 0.0, 0.0, width, height)):
        axis.add_patch(Rectangle((x, y), w, h, facecolor=COLOURS[name], edgecolor="white"))
        if w > 0.28 and h > 0.16:
            words = f"{name}\n{short(parts[name], 'kMBT')}\n{parts[name] / total:.1%}"
            axis.text(x + w / 2, y + h / 2, words, ha="center", va="center", fontsize=9)
    axis.set_xlim(0, width)
    axis.set_ylim(height, 0)
    axis.axis("off")


def squarify(
    areas: list[float], x: float, y: float, width: float, height: float
) -> list[tuple[float, float, float, float]]:
    """Rectangles (x, y, width, height) of these falling areas, near to squares, that fill the given one.

    Rows are laid along the shorter side, each as long as that makes its worst rectangle more square
    (Bruls, Huizing and van Wijk, Squarified Treemaps, 2000).
    """
    boxes: list[tuple[float, float, float, float]] = []
    while areas:
        side, taken = min(width, height), 1
        while taken < len(areas) and worst(areas[: taken + 1], side) <= worst(areas[:taken], side):
            taken += 1
        row, areas = areas[:taken], areas[taken:]
        depth, along = sum(row) / side, 0.0
        for area in row:
            length = area / depth
            boxes.append((x, y + along, depth, length) if width >= height else (x + along, y, length, depth))
            along += length
        if width >= height:
            x, width = x + depth, width - depth
        else:
            y, height = y + depth, height - depth
    return boxes


def worst(row: list[float], side: float) -> float:
    """The largest ratio of long to short side in a row of areas along a side."""
    depth = sum(row) / side
    return max(max(area / depth**2, depth**2 / area) for area in row)
