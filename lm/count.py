"""Parameters, FLOPs and cache sizes of a model, by arithmetic: no weight is made."""

from typing import NamedTuple

from .config import ModelConfig, nearest

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8": 1}  # of one number in a cache
GATES = {  # matrices of num_experts x dim in a router
    "sigmoid": 1,
    "softmax": 1,
    "noisy": 2,
    "switch": 1,
    "gshard": 1,
    "expert_choice": 1,
    "hash": 0,
    "mixtral": 1,
    "random": 0,
}
FP8_BLOCK = 128  # numbers of a latent in fp8 that share a scale in fp32


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
        "routers": layers * (gates(config) * moe.num_experts * config.dim + selection_biases(config)),
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


def selection_biases(config: ModelConfig) -> int:
    """One router's selection bias."""
    return config.moe.num_experts if config.moe.router == "sigmoid" else 0


def gates(config: ModelConfig) -> int:
    """One router's matrices, if the router can be counted."""
    if config.moe.router not in GATES:
        raise ValueError(
            f"model.moe.router {config.moe.router!r}: only built-in routers can be counted by arithmetic"
        )
    return GATES[config.moe.router]


def norm_parameters(config: ModelConfig) -> int:
    """The norms' weights: two a block and the final one, and those inside the attention."""
    return (2 * config.num_layers + 1) * config.dim + config.num_layers * built_in_attention(config).norms


class Attention(NamedTuple):
    """The counts of one layer's attention."""

    weights: int  # of its matrices
    biases: int
    norms: int
    per_key: int  # multiplications a query does with one key and its value, all heads
    cache: int  # numbers a token
    cache_fp8: int  # bytes a token
    value_dim: int  # of a head


def built_in_attention(config: ModelConfig) -> Attention:
    """What is particular to a kind of attention, if the kind can be counted."""
    dim, a = config.dim, config.attention
    out_bias = dim if a.out_bias else 0
    if a.kind == "mla":
        key, compressed = a.qk_nope_head_dim + a.qk_rope_head_dim, a.kv_lora_rank + a.qk_rope_head_dim
        query = a.q_lora_rank * (dim + a.num_heads * key) if a.q_lora_rank else dim * a.num_heads * key
        expansion = a.kv_lora_rank * a.num_heads * (a.qk_nope_head_dim + a.v_head_dim)
        return Attention(
            weights=query + dim * compressed + expansion + a.num_heads * a.v_head_dim * dim,
            biases=(a.q_lora_rank + compressed if a.qkv_bias else 0) + out_bias,
            norms=a.q_lora_rank + a.kv_lora_rank,
            per_key=a.num_heads * (key + a.v_head_dim),
            cache=compressed,
            cache_fp8=a.kv_lora_rank + 4 * -(-a.kv_lora_rank // FP8_BLOCK) + 2 * a.qk_rope_head_dim,
            value_dim=a.v_head_dim,
        )
    if a.kind == "gqa":
        cache = 2 * a.num_kv_heads * a.head_dim
        query = a.num_heads * a.head_dim
        return Attention(
            weights=dim * (2 * query + cache),
            biases=(query + cache if a.qkv_bias else 0) + out_bias,
            norms=2 * a.head_dim if a.qk_norm else 0,
            per_key=2 * query,
            cache=cache,
            cache_fp8=cache,
            value_dim=a.head_dim,
        )
    raise ValueError(f"model.attention.kind {a.kind!r}: only built-in attention can be counted by arithmetic")
