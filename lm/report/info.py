"""`lm info`: a model's counts as numbers, as text and as a figure. Does not import torch."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from .. import count
from ..config import Config, ModelConfig
from ..console import visible
from ..parts import ATTENTIONS

# Pre-training on 14.8 T tokens at context length 4096, context extension and post-training, on rented H800
# GPUs, whose dense BF16 peak is 989.5 TFLOP/s (V3 table 1; NVIDIA's data sheet)
V3_TRAINING = {
    "tokens": 14.8e12,
    "pretraining_hours": 2.664e6,
    "all_hours": 2.788e6,
    "dollars_per_hour": 2.0,
    "peak_flops": 989.5e12,
}
LARGEST_DENSE = "llama-3.1-405b"
COLOURS = {  # adapted from Okabe and Ito's colour-blind safe palette; light enough for black text
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
    """The model config of a preset, a TOML file, a run folder or a Hugging Face folder."""
    path = Path(name)
    if path.suffix == ".toml" or not path.exists():
        return Config.preset(name).model
    if (path / "config.toml").exists():  # as hub.folder.read_config does, but without importing torch
        return Config.load(path / "config.toml").model
    from ..hub.folder import read_config

    return read_config(path).model


def summary(config: ModelConfig, context: int, dtype: str = "bf16") -> dict[str, Any]:
    """All counts of a model; a custom router or attention counts as 0 and is listed in "not_counted".

    Args:
        context: context length in tokens, for attention FLOPs and cache size.
        dtype: of the cache, see `count.cache_bytes_per_token`.

    Raises:
        ValueError: the dtype is unknown.
    """
    not_counted = config.own_parts()
    original, config = config, count.without_custom_parts(config)
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
    facts: dict[str, Any] = {"parameters": parameters, "context": context, "not_counted": not_counted}
    if "model.attention.kind" not in not_counted:
        facts["training_flops_per_token"] = count.training_flops_per_token(config, context)
        facts["cache_elements_per_token"] = count.cache_elements_per_token(config)
    facts |= {
        "deepseek_training_flops_per_sequence": count.deepseek_training_flops(
            config.num_layers, config.dim, config.vocab_size, context, count.feed_forwards(config)
        ),
        "cache_dtype": dtype,
        "cache_bytes_per_token": cache_bytes(original, dtype),
        "v3_cache_bytes_per_token_and_layer": v3_cache_bytes(dtype),
    }
    if config == Config.preset("deepseek-v3").model:
        flops = count.training_flops_per_token(config, 4096)
        facts["published_training"] = V3_TRAINING | count.training_cost(flops, **V3_TRAINING)
    return facts


def cache_bytes(config: ModelConfig, dtype: str, ours: int | None = None) -> dict[str, int]:
    """Cache bytes per token over all layers: this model, MHA, GQA and MQA of its heads, Llama 3.1 405B.

    ours: the size of a custom attention's cache, which cannot be counted; None leaves this model out.
    """
    largest = count.cache_bytes_per_token(Config.preset(LARGEST_DENSE).model, dtype)
    if config.attention.kind in ATTENTIONS:
        ours = count.cache_bytes_per_token(config, dtype)
    found = {} if ours is None else {"this model": ours}
    return {**found, **count.rival_cache_bytes(config, dtype), LARGEST_DENSE: largest}


def v3_cache_bytes(dtype: str) -> dict[str, int]:
    """Cache bytes per token in one layer with DeepSeek-V3's heads: MLA, MHA, GQA and MQA."""
    v3 = dataclasses.replace(Config.preset("deepseek-v3").model, num_layers=1, num_dense_layers=1)
    return {"MLA": count.cache_bytes_per_token(v3, dtype), **count.rival_cache_bytes(v3, dtype)}


def as_text(facts: dict[str, Any]) -> str:
    """`summary` as a table."""
    parameters, context = facts["parameters"], facts["context"]
    rows = {"parameters": "", "without input embedding": "_without_input_embedding"}
    rows["without embedding and head"] = "_without_embedding_and_head"
    lines = [f"{'':28}{'total':>22}{'active per token':>22}"]
    for name, key in rows.items():
        lines.append(f"{name:28}{parameters['total' + key]:>22,}{parameters['active' + key]:>22,}")
    for name, number in parameters["total_by_part"].items():
        lines.append(f"  {name:26}{number:>22,}{parameters['active_by_part'][name]:>22,}")
    for key, path in facts["not_counted"].items():
        lines.append(f"not counted: {key} {visible(path)} is your own code, which lm info does not run")
    theirs = short(facts["deepseek_training_flops_per_sequence"])
    if "training_flops_per_token" in facts:
        flops = facts["training_flops_per_token"]
        lines += [
            f"training FLOPs per token at context length {context:,}: {flops:,}",
            f"  per sequence: {short(flops * context)}; with DeepSeekMoE's formula {theirs}",
        ]
    else:
        lines.append(
            f"training FLOPs per sequence of {context:,} tokens with DeepSeekMoE's formula: {theirs}"
        )
    if "published_training" in facts:
        lines += training_lines(facts["published_training"])
    dtype, caches = facts["cache_dtype"], facts["cache_bytes_per_token"]
    lines.append(f"cache in {dtype}: bytes per token, and size at context length {context:,}")
    ours = caches.get("this model")
    for name, size in caches.items():
        ratio = f"{size / ours:>9.2f} x" if ours else ""
        lines.append(f"  {name:26}{size:>14,}{size * context / 2**20:>16,.2f} MiB{ratio}")
    lines.append(f"with DeepSeek-V3's 128 heads of 128, cache in {dtype}: bytes per token and layer")
    at_scale = facts["v3_cache_bytes_per_token_and_layer"]
    for name, size in at_scale.items():
        lines.append(f"  {name:26}{size:>14,}{'':20}{size / at_scale['MLA']:>9.2f} x")
    return "\n".join(lines)


def short(number: float, letters: str = "kMGTP") -> str:
    """Four significant digits with an SI letter: 74.42 T"""
    thousands = min(len(letters), int(math.log10(max(number, 1))) // 3)
    return f"{number / 1000**thousands:.4g} {letters[thousands - 1] if thousands else ''}".rstrip()


def training_lines(training: dict[str, float]) -> list[str]:
    """The published figures of DeepSeek-V3's training."""
    return [
        f"DeepSeek-V3's pre-training: {training['flops']:.3g} FLOPs for "
        f"{training['tokens'] / 1e12:.1f} T tokens in {training['pretraining_hours'] / 1e6:.3f} M GPU hours,",
        f"  {training['flops_per_second_and_gpu'] / 1e12:.0f} TFLOP/s per GPU, "
        f"{training['utilisation']:.0%} of the BF16 peak",
        f"  with context extension and post-training {training['all_hours'] / 1e6:.3f} M GPU hours, "
        f"{training['dollars'] / 1e6:.3f} M dollars at {training['dollars_per_hour']:.0f} dollars per hour",
    ]


def draw(parameters: dict[str, Any], title: str, path: Path) -> None:
    """Write a PNG with two stacked bars: total and active parameters, each divided into its parts.

    Args:
        parameters: the entry of that name in `summary`.

    Raises:
        ValueError: the path does not end in .png, or cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"plot={path}: the file name must end in .png")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2))
    figure.suptitle(visible(title), parse_math=False)
    axis = figure.subplots()
    bars = {"total": "total", "active per token": "active"}
    left = dict.fromkeys(bars, 0.0)
    for name, colour in COLOURS.items():
        parts = {bar: parameters[f"{key}_by_part"][name] for bar, key in bars.items()}
        if not any(parts.values()):
            continue
        widths = [parts[bar] / parameters[key] for bar, key in bars.items()]
        total, active = (short(number, "kMBT") for number in parts.values())
        label = f"{name}: {total}" + (f" ({active} active)" if active != total else "")
        drawn = axis.barh(list(bars), widths, left=list(left.values()), color=colour, label=label)
        axis.bar_label(drawn, [f"{w:.0%}" if w > 0.03 else "" for w in widths], label_type="center")
        left = {bar: at + width for (bar, at), width in zip(left.items(), widths)}
    axis.set_yticks([0, 1], [f"{bar}\n{parameters[key]:,}" for bar, key in bars.items()])
    axis.tick_params(length=0)
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.xaxis.set_visible(False)
    axis.spines[:].set_visible(False)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=4, fontsize=9, frameon=False)
    try:
        figure.savefig(path, dpi=110, bbox_inches="tight")
    except OSError as error:
        raise ValueError(f"plot={path}: cannot be written: {error.strerror}") from None
