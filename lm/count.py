"""Parameters, FLOPs and cache sizes of a model, by arithmetic: no weight is made."""

from .config import ModelConfig, nearest
from .parts import ATTENTIONS, ROUTERS, AttentionCounts, RouterKind

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8": 1}  # of one number in a cache


def total_parameters(config: ModelConfig) -> int:
    """Every weight, and the selection biases, which are buffers but stored all the same."""
    return sum(parameters_by_part(config).values())


def active_parameters(config: ModelConfig) -> int:
    """The weights that one token meets: as `total_parameters`, but of routed experts only top_k a layer."""
    return sum(parameters_by_part(config, active=True).values())


def training_flops_per_token(config: ModelConfig, context: int = 4096) -> int:
    """Floating-point operations of forward and backward, with attention over the context.

    A weight met by a product costs 6. A causal query sees (context + 1) / 2 keys on average; each is one
    product with the key, one with the value. Elementwise work and the lookup in the embedding are left out.
    """
    lookup = 0 if config.tie_embeddings else config.vocab_size * config.dim
    in_products = active_parameters(config) - lookup - vector_parameters(config)
    return 6 * in_products + 3 * config.num_layers * built_in_attention(config).per_key * (context + 1)


def deepseek_training_flops(
    num_layers: int, dim: int, vocab_size: int, context: int, feed_forwards: float = 1.0
) -> float:
    """Floating-point operations of training on one sequence, as DeepSeekMoE counts them (arXiv 2401.06066).

    Attention has 4 dim^2 weights a layer and a feed-forward 8 dim^2, whatever the widths; all pairs of tokens
    are counted, also those that the causal mask hides. The paper's figures come out to the last digit.

    Args:
        context: tokens of the sequence.
        feed_forwards: how many such feed-forwards a token meets in a layer: 1 when dense, 2 with
            DeepSeekMoE's 8 experts of a quarter each.
    """
    weights = num_layers * (4 + 8 * feed_forwards) * dim**2 + vocab_size * dim
    pairs = 2 * num_layers * dim * context
    return 6 * context * (weights + pairs)


def feed_forwards(config: ModelConfig) -> float:
    """The same unit for a model: 8 dim^2 weights of feed-forward a token and layer, to the nearest quarter.

    DeepSeekMoE counts in quarters, though widths are rounded to what the hardware likes (1408 for 1365).
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
    """What a training took, and how much of the GPUs' peak its pre-training used.

    Args:
        tokens: of pre-training.
        pretraining_hours, all_hours: GPU hours, without and with all that came after pre-training.
        peak_flops: floating-point operations a second of one GPU.
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
    """Numbers that the caches of all layers hold for one token (V2 table 1)."""
    return config.num_layers * built_in_attention(config).cache


def cache_bytes_per_token(config: ModelConfig, dtype: str = "bf16") -> int:
    """Bytes of all layers' caches for one token, in bf16, fp16, fp32 or fp8.

    In fp8 a latent has a scale for each 128 numbers and its rope key stays in bf16, as FlashMLA lays it out
    (656 bytes a layer in V3); keys and values have one scale a tensor, which is not counted.

    Raises:
        ValueError: dtype is another.
    """
    if dtype not in BYTES:
        raise ValueError(f"dtype {dtype!r}{nearest(dtype, list(BYTES))}; there are {', '.join(BYTES)}")
    attention = built_in_attention(config)
    a_layer = attention.cache_fp8 if dtype == "fp8" else BYTES[dtype] * attention.cache
    return config.num_layers * a_layer


def parameters_by_part(config: ModelConfig, active: bool = False) -> dict[str, int]:
    """Parameters of each part of the model; active: those that one token meets."""
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
    """Those that no matrix product meets: norms and biases."""
    biases = config.num_layers * built_in_attention(config).biases
    return norm_parameters(config) + biases + num_moe_layers(config) * selection_biases(config)


def num_moe_layers(config: ModelConfig) -> int:
    """How many layers have experts."""
    return config.num_layers - config.num_dense_layers


def expert_parameters(config: ModelConfig) -> int:
    """One expert: gate, up, down."""
    return 3 * config.dim * config.moe.hidden_dim


def built_in_router(config: ModelConfig) -> RouterKind:
    """What is counted of a router, if its kind can be."""
    if config.moe.router not in ROUTERS:
        raise ValueError(
            f"model.moe.router {config.moe.router!r}: only built-in routers can be counted by arithmetic"
        )
    return ROUTERS[config.moe.router]


def router_parameters(config: ModelConfig) -> int:
    """One router: its matrices and its selection bias."""
    gates = built_in_router(config).gates * config.moe.num_experts * config.dim
    return gates + selection_biases(config)


def selection_biases(config: ModelConfig) -> int:
    """One router's selection bias."""
    return config.moe.num_experts if built_in_router(config).has_bias else 0


def norm_parameters(config: ModelConfig) -> int:
    """The norms' weights: two a block and the final one, and those inside the attention."""
    return (2 * config.num_layers + 1) * config.dim + config.num_layers * built_in_attention(config).norms


def built_in_attention(config: ModelConfig) -> AttentionCounts:
    """The counts of one layer's attention, if its kind can be counted."""
    kind = ATTENTIONS.get(config.attention.kind)
    if kind is None:
        said = "only built-in attention can be counted by arithmetic"
        raise ValueError(f"model.attention.kind {config.attention.kind!r}: {said}")
    return kind.count(config.dim, config.attention)
