"""Parameters, FLOPs and cache sizes of a model, by arithmetic on its config: no weights are allocated."""

import dataclasses
from typing import TYPE_CHECKING

from .config import ModelConfig, nearest
from .parts import ATTENTIONS, ROUTERS, AttentionCounts, RouterKind

if TYPE_CHECKING:
    from torch import nn

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8": 1}  # per number in a cache
GQA_HEADS = 8  # key-value heads of Llama 3.1, Qwen2.5 and Mixtral
NOT_COUNTED = "(not counted)"  # a router or attention that counts as 0


def total_parameters(config: ModelConfig) -> int:
    """All weights, and the selection biases, which are buffers but are stored too."""
    return sum(parameters_by_part(config).values())


def built_parameters(model: "nn.Module") -> int:
    """`total_parameters` of a built model, custom parts included: what a checkpoint stores."""
    stored = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() for tensor in stored.values())  # a tied head and embedding are one tensor


def active_parameters(config: ModelConfig) -> int:
    """The weights that one token uses: `total_parameters` with only top_k routed experts per layer."""
    return sum(parameters_by_part(config, active=True).values())


def training_flops_per_token(config: ModelConfig, context: int = 4096) -> int:
    """Floating-point operations of forward and backward, with attention over the context.

    A weight in a matrix product costs 6. A causal query sees (context + 1) / 2 keys on average, each with one
    product for the key and one for the value. Elementwise work and the embedding lookup are not counted.
    """
    lookup = 0 if config.tie_embeddings else config.vocab_size * config.dim
    in_products = active_parameters(config) - lookup - vector_parameters(config)
    return 6 * in_products + 3 * config.num_layers * built_in_attention(config).per_key * (context + 1)


def deepseek_training_flops(
    num_layers: int, dim: int, vocab_size: int, context: int, feed_forwards: float = 1.0
) -> float:
    """Floating-point operations of training on one sequence, as DeepSeekMoE counts them (arXiv 2401.06066).

    Attention counts 4 dim^2 weights per layer and a feed-forward 8 dim^2, whatever the widths. All pairs of
    tokens count, including those hidden by the causal mask. This gives the paper's figures to the last digit.

    Args:
        context: tokens in the sequence.
        feed_forwards: such feed-forwards per token and layer: 1 for a dense model, 2 with
            DeepSeekMoE's 8 experts of a quarter each.
    """
    weights = num_layers * (4 + 8 * feed_forwards) * dim**2 + vocab_size * dim
    pairs = 2 * num_layers * dim * context
    return 6 * context * (weights + pairs)


def feed_forwards(config: ModelConfig) -> float:
    """Active feed-forwards of 8 dim^2 weights per token and layer, to the nearest quarter.

    DeepSeekMoE counts in quarters, although widths are rounded for the hardware (1408 for 1365).
    """
    parts = parameters_by_part(config, active=True)
    met = sum(parts[name] for name in ("dense MLPs", "routed experts", "shared experts"))
    return round(4 * met / (config.num_layers * 8 * config.dim**2)) / 4


def training_cost(
    flops_per_token: float,
    tokens: float,
    pretraining_hours: float,
    all_hours: float,
    dollars_per_hour: float,
    peak_flops: float,
) -> dict[str, float]:
    """Cost of a training, and the share of the GPUs' peak that its pre-training reached.

    Args:
        tokens: pre-training tokens.
        pretraining_hours, all_hours: GPU hours, without and with the later stages.
        peak_flops: peak floating-point operations per second of one GPU.
    """
    flops = flops_per_token * tokens
    reached = flops / (pretraining_hours * 3600)
    return {
        "flops": flops,
        "flops_per_second_and_gpu": reached,
        "utilisation": reached / peak_flops,
        "dollars": all_hours * dollars_per_hour,
    }


def cache_elements_per_token(config: ModelConfig) -> int:
    """Numbers in the caches of all layers per token (V2 table 1)."""
    return config.num_layers * built_in_attention(config).cache


def cache_bytes_per_token(config: ModelConfig, dtype: str = "bf16") -> int:
    """Bytes in the caches of all layers per token, in bf16, fp16, fp32 or fp8.

    In fp8 a latent has one scale per 128 numbers and its rope key stays in bf16, as in FlashMLA (656 bytes
    per layer in V3). Keys and values have one scale per tensor, which is not counted.

    Raises:
        ValueError: unsupported dtype.
    """
    if dtype not in BYTES:
        raise ValueError(f"dtype {dtype!r}{nearest(dtype, list(BYTES))}; there are {', '.join(BYTES)}")
    attention = built_in_attention(config)
    a_layer = attention.cache_fp8 if dtype == "fp8" else BYTES[dtype] * attention.cache
    return config.num_layers * a_layer


def rival_cache_bytes(config: ModelConfig, dtype: str = "bf16") -> dict[str, int]:
    """`cache_bytes_per_token` with MHA, GQA and MQA, with the same number of heads and the same value width.

    GQA has 8 key-value heads, or the next smaller divisor of the number of heads. It is left out if there is
    none between MHA and MQA, as with 3 heads, or if the model has this attention itself.
    """
    attention = config.attention
    heads, built_in = attention.num_heads, attention.kind in ATTENTIONS
    width = built_in_attention(config).value_dim if built_in else attention.v_head_dim
    groups = [n for n in range(2, min(heads, GQA_HEADS + 1)) if heads % n == 0][-1:]
    kv_heads = {"MHA": heads, **{f"GQA, {n} key-value heads": n for n in groups}, "MQA": 1}
    own = attention.num_kv_heads if attention.kind == "gqa" else None
    a_head = config.num_layers * 2 * width * BYTES[dtype]
    return {name: a_head * n for name, n in kv_heads.items() if n != own or n in (1, heads)}


def without_custom_parts(config: ModelConfig) -> ModelConfig:
    """The config with its custom router and attention counting as 0."""
    router = config.moe.router if config.moe.router in ROUTERS else NOT_COUNTED
    kind = config.attention.kind if config.attention.kind in ATTENTIONS else NOT_COUNTED
    return dataclasses.replace(
        config,
        moe=dataclasses.replace(config.moe, router=router),
        attention=dataclasses.replace(config.attention, kind=kind),
    )


def parameters_by_part(config: ModelConfig, active: bool = False) -> dict[str, int]:
    """Parameters of each part of the model; active: only those that one token uses."""
    moe, layers, attention = config.moe, num_moe_layers(config), built_in_attention(config)
    experts = moe.top_k if active else moe.num_experts
    gate = config.dim if moe.shared_gate else 0
    return {
        "embedding": config.vocab_size * config.dim,
        "attention": config.num_layers * (attention.weights + attention.biases),
        "dense MLPs": config.num_dense_layers * 3 * config.dim * config.hidden_dim,
        "routed experts": layers * experts * expert_parameters(config),
        "shared experts": layers * (moe.num_shared_experts * expert_parameters(config) + gate),
        "routers": layers * router_parameters(config),
        "norms": norm_parameters(config),
        "head": 0 if config.tie_embeddings else config.vocab_size * config.dim,
    }


def vector_parameters(config: ModelConfig) -> int:
    """Parameters outside matrix products: norms and biases."""
    biases = config.num_layers * built_in_attention(config).biases
    return norm_parameters(config) + biases + num_moe_layers(config) * selection_biases(config)


def num_moe_layers(config: ModelConfig) -> int:
    """Number of layers with experts."""
    return config.num_layers - config.num_dense_layers


def expert_parameters(config: ModelConfig) -> int:
    """Parameters of one expert: gate, up, down."""
    return 3 * config.dim * config.moe.hidden_dim


def built_in_router(config: ModelConfig) -> RouterKind:
    """The table entry of a built-in router.

    Raises:
        ValueError: a custom router.
    """
    if config.moe.router == NOT_COUNTED:
        return RouterKind("", gates=0)
    if config.moe.router not in ROUTERS:
        raise ValueError(
            f"model.moe.router {config.moe.router!r}: only built-in routers can be counted by arithmetic"
        )
    return ROUTERS[config.moe.router]


def router_parameters(config: ModelConfig) -> int:
    """Parameters of one router: its matrices and its selection bias."""
    gates = built_in_router(config).gates * config.moe.num_experts * config.dim
    return gates + selection_biases(config)


def selection_biases(config: ModelConfig) -> int:
    """Numbers in one router's selection bias."""
    return config.moe.num_experts if built_in_router(config).has_bias else 0


def norm_parameters(config: ModelConfig) -> int:
    """Weights of the norms: two per block, the final one, and those inside attention."""
    return (2 * config.num_layers + 1) * config.dim + config.num_layers * built_in_attention(config).norms


def built_in_attention(config: ModelConfig) -> AttentionCounts:
    """The counts of one layer's attention.

    Raises:
        ValueError: a custom attention.
    """
    if config.attention.kind == NOT_COUNTED:
        return AttentionCounts(0, 0, 0, 0, 0, 0, 0)
    kind = ATTENTIONS.get(config.attention.kind)
    if kind is None:
        said = "only built-in attention can be counted by arithmetic"
        raise ValueError(f"model.attention.kind {config.attention.kind!r}: {said}")
    return kind.count(config.dim, config.attention)
