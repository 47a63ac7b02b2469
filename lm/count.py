"""Parameters, FLOPs and cache sizes of a model, by arithmetic: no weight is made. Numbers, not bytes."""

from typing import Any

from .config import ModelConfig


def total_parameters(config: ModelConfig) -> int:
    """Every weight, and the selection biases, which are buffers but stored all the same."""
    return sum(parameters_by_part(config).values())


def active_parameters(config: ModelConfig) -> int:
    """The weights that one token meets: as `total_parameters`, but of routed experts only top_k a layer."""
    idle = config.moe.num_experts - config.moe.top_k
    return total_parameters(config) - num_moe_layers(config) * idle * expert_parameters(config)


def training_flops_per_token(config: ModelConfig, context: int = 4096) -> int:
    """Floating-point operations of forward and backward, with attention over the context.

    A weight met by a product costs 6. A causal query sees (context + 1) / 2 keys on average; each is one
    product with the key, one with the value. Elementwise work and the lookup in the embedding are left out.
    """
    attention = config.attention
    per_key = attention.num_heads * (
        attention.qk_nope_head_dim + attention.qk_rope_head_dim + attention.v_head_dim
        if attention.kind == "mla"
        else 2 * attention.head_dim
    )
    lookup = 0 if config.tie_embeddings else config.vocab_size * config.dim
    norms = sum(norm_parameters(config).values())
    biases = num_moe_layers(config) * bias_parameters(config)
    in_products = active_parameters(config) - lookup - norms - biases
    return 6 * in_products + 3 * config.num_layers * per_key * (context + 1)


def cache_elements_per_token(config: ModelConfig) -> int:
    """Numbers that the caches of all layers hold for one token (V2 table 1)."""
    attention = config.attention
    if built_in_attention(config) == "mla":
        return config.num_layers * (attention.kv_lora_rank + attention.qk_rope_head_dim)
    return config.num_layers * 2 * attention.num_kv_heads * attention.head_dim


def parameters_by_part(config: ModelConfig) -> dict[str, int]:
    """Parameters of embedding, attention, dense MLPs, routed and shared experts, routers, norms and head."""
    moe, layers = config.moe, num_moe_layers(config)
    return {
        "embedding": config.vocab_size * config.dim,
        "attention": config.num_layers * attention_parameters(config),
        "dense MLPs": config.num_dense_layers * 3 * config.dim * config.hidden_dim,
        "routed experts": layers * moe.num_experts * expert_parameters(config),
        "shared experts": layers * moe.num_shared_experts * expert_parameters(config),
        "routers": layers * (moe.num_experts * config.dim + bias_parameters(config)),
        "norms": sum(norm_parameters(config).values()),
        "head": 0 if config.tie_embeddings else config.vocab_size * config.dim,
    }


def num_moe_layers(config: ModelConfig) -> int:
    """How many layers have experts."""
    return config.num_layers - config.num_dense_layers


def expert_parameters(config: ModelConfig) -> int:
    """One expert: gate, up, down."""
    return 3 * config.dim * config.moe.hidden_dim


def bias_parameters(config: ModelConfig) -> int:
    """One router's selection bias."""
    if config.moe.router not in ("sigmoid", "softmax"):
        raise ValueError(
            f"model.moe.router {config.moe.router!r}: only built-in routers can be counted by arithmetic"
        )
    return config.moe.num_experts if config.moe.router == "sigmoid" else 0


def attention_parameters(config: ModelConfig) -> int:
    """One layer's attention, without norms."""
    dim, attention = config.dim, config.attention
    heads = attention.num_heads
    if built_in_attention(config) == "gqa":
        return 2 * dim * (heads + attention.num_kv_heads) * attention.head_dim
    key, value = attention.qk_nope_head_dim + attention.qk_rope_head_dim, attention.v_head_dim
    rank, q_rank = attention.kv_lora_rank, attention.q_lora_rank
    query = q_rank * (dim + heads * key) if q_rank else dim * heads * key
    down = dim * (rank + attention.qk_rope_head_dim)
    up = rank * heads * (attention.qk_nope_head_dim + value)
    return query + down + up + heads * value * dim


def norm_parameters(config: ModelConfig) -> dict[str, int]:
    """The norms' weights: two a block and the final one, and those of the latents."""
    latents = 0
    if built_in_attention(config) == "mla":
        latents = config.num_layers * (config.attention.q_lora_rank + config.attention.kv_lora_rank)
    return {"blocks": (2 * config.num_layers + 1) * config.dim, "latents": latents}


def built_in_attention(config: ModelConfig) -> str:
    """The attention's kind, if it can be counted."""
    kind = config.attention.kind
    if kind not in ("mla", "gqa"):
        raise ValueError(
            f"model.attention.kind {kind!r}: only built-in attention can be counted by arithmetic"
        )
    return kind


def summary(config: ModelConfig, context: int) -> dict[str, Any]:
    """All counts of a model, and its cache beside MHA, GQA and MQA with as many heads of the same width."""
    attention, cache = config.attention, cache_elements_per_token(config)
    heads = attention.num_heads
    width = attention.v_head_dim if attention.kind == "mla" else attention.head_dim
    total, active = total_parameters(config), active_parameters(config)
    embedding = config.vocab_size * config.dim
    return {
        "parameters": {
            "total": total,
            "active": active,
            "active_without_input_embedding": active - (0 if config.tie_embeddings else embedding),
            "by_part": parameters_by_part(config),
        },
        "training_flops_per_token": training_flops_per_token(config, context),
        "context": context,
        "cache_elements_per_token": {
            "this model": cache,
            **{
                name: config.num_layers * 2 * groups * width
                for name, groups in (("MHA", heads), ("GQA, 4 heads a group", max(1, heads // 4)), ("MQA", 1))
            },
        },
    }


def as_text(facts: dict[str, Any]) -> str:
    """`summary` for a person."""
    parameters, caches = facts["parameters"], facts["cache_elements_per_token"]
    lines = [
        f"parameters       {parameters['total']:>20,}",
        f"  active a token {parameters['active']:>20,}",
        f"  without lookup {parameters['active_without_input_embedding']:>20,}",
        *(f"  {name:15}{number:>20,}" for name, number in parameters["by_part"].items()),
        f"training FLOPs a token at {facts['context']:,} of context: {facts['training_flops_per_token']:,}",
        f"cache at {facts['context']:,} tokens of context, in bf16:",
    ]
    for name, numbers in caches.items():
        size = 2 * numbers * facts["context"] / 2**20
        lines.append(f"  {name:22}{numbers:>10,} numbers a token {size:>12,.2f} MiB")
    return "\n".join(lines)
