"""The same model in transformers, and other rivals to compare with."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from lm.config import AttentionConfig, ModelConfig, build
from lm.model import Transformer
from moe import MoE


def deepseek_v3(ours: Transformer, experts: str = "grouped_mm", attention: str = "sdpa") -> torch.nn.Module:
    """transformers' DeepseekV3ForCausalLM with the sizes, weights and dtype of `ours`.

    Args:
        experts: transformers' experts_implementation, "eager" (a loop) or "grouped_mm".
        attention: transformers' attn_implementation.
    """
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    c = ours.config
    config = DeepseekV3Config(
        vocab_size=c.vocab_size,
        hidden_size=c.dim,
        intermediate_size=c.hidden_dim,
        moe_intermediate_size=c.moe.hidden_dim,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.attention.num_heads,
        num_key_value_heads=c.attention.num_heads,
        n_shared_experts=c.moe.num_shared_experts,
        n_routed_experts=c.moe.num_experts,
        routed_scaling_factor=c.moe.routed_scaling_factor,
        kv_lora_rank=c.attention.kv_lora_rank,
        q_lora_rank=c.attention.q_lora_rank or None,
        qk_rope_head_dim=c.attention.qk_rope_head_dim,
        v_head_dim=c.attention.v_head_dim,
        qk_nope_head_dim=c.attention.qk_nope_head_dim,
        n_group=c.moe.num_groups,
        topk_group=c.moe.top_groups,
        num_experts_per_tok=c.moe.top_k,
        first_k_dense_replace=c.num_dense_layers,
        norm_topk_prob=c.moe.normalize,
        max_position_embeddings=131072,
        rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope.theta},
        rope_interleave=c.rope.interleaved,
        num_mtp_layers=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    config._attn_implementation = attention
    config._experts_implementation = experts
    theirs = DeepseekV3ForCausalLM(config)
    theirs.to(next(ours.parameters()).dtype)
    with torch.no_grad():
        state = theirs.state_dict()
        for name, tensor in renamed(ours).items():
            state.pop(name).copy_(tensor)
    if state.keys() - {"lm_head.weight"}:
        raise ValueError(f"not copied: {sorted(state)}")
    return theirs


def renamed(ours: Transformer) -> dict[str, Tensor]:
    """Our weights by transformers' names."""
    found: dict[str, Tensor] = {
        "model.embed_tokens.weight": ours.embedding.weight,
        "model.norm.weight": ours.norm.weight,
        "lm_head.weight": ours.head.weight,
    }
    attention_names = {
        "q": "q_proj",
        "q_a": "q_a_proj",
        "q_norm": "q_a_layernorm",
        "q_b": "q_b_proj",
        "kv_a": "kv_a_proj_with_mqa",
        "kv_norm": "kv_a_layernorm",
        "kv_b": "kv_b_proj",
        "out": "o_proj",
    }
    for layer, block in enumerate(ours.blocks):
        prefix = f"model.layers.{layer}"
        found[f"{prefix}.input_layernorm.weight"] = block.attention_norm.weight
        found[f"{prefix}.post_attention_layernorm.weight"] = block.mlp_norm.weight
        for name, theirs in attention_names.items():
            if hasattr(block.attention, name):
                found[f"{prefix}.self_attn.{theirs}.weight"] = getattr(block.attention, name).weight
        dense = {f"{prefix}.mlp": block.mlp}
        if isinstance(block.mlp, MoE):
            found[f"{prefix}.mlp.gate.weight"] = block.mlp.router.weight
            found[f"{prefix}.mlp.gate.e_score_correction_bias"] = block.mlp.router.bias
            found[f"{prefix}.mlp.experts.gate_up_proj"] = block.mlp.experts.gate_up
            found[f"{prefix}.mlp.experts.down_proj"] = block.mlp.experts.down
            dense = {f"{prefix}.mlp.shared_experts": block.mlp.shared}
        for name, mlp in dense.items():
            found[f"{name}.gate_proj.weight"], found[f"{name}.up_proj.weight"] = mlp.gate_up.weight.chunk(2)
            found[f"{name}.down_proj.weight"] = mlp.down.weight
    return found


def speed_model() -> ModelConfig:
    """The model of the speed benchmarks: DeepSeek-V3's shape with 18.1 M parameters."""
    return build(
        ModelConfig,
        {
            "vocab_size": 256,
            "dim": 256,
            "num_layers": 6,
            "num_dense_layers": 1,
            "hidden_dim": 704,
            "attention": {
                "num_heads": 8,
                "q_lora_rank": 128,
                "kv_lora_rank": 64,
                "qk_nope_head_dim": 32,
                "qk_rope_head_dim": 16,
                "v_head_dim": 32,
            },
            "moe": {
                "num_experts": 32,
                "top_k": 4,
                "hidden_dim": 128,
                "num_shared_experts": 1,
                "num_groups": 4,
                "top_groups": 2,
            },
        },
    )


def with_attention(config: ModelConfig, heads: int) -> Transformer:
    """The model with grouped-query attention of `heads` key-value heads; num_heads is MHA, 1 is MQA."""
    c = config.attention
    head_dim = c.qk_nope_head_dim + c.qk_rope_head_dim
    gqa = AttentionConfig(kind="gqa", num_heads=c.num_heads, num_kv_heads=heads, head_dim=head_dim)
    model = Transformer(dataclasses.replace(config, attention=gqa))
    model.initialize(torch.Generator().manual_seed(0))
    return model


def loop_over_experts(layer: MoE, x: Tensor) -> Tensor:
    """A MoE layer as a loop over the experts: find each one's tokens, run them, add up the results."""
    routing, experts = layer.router(x), layer.experts
    y = torch.zeros_like(x)
    for i in range(experts.num_experts):
        token, slot = torch.where(routing.experts == i)
        gate, up = F.linear(x[token], experts.gate_up[i]).chunk(2, dim=-1)
        out = F.linear(F.silu(gate) * up, experts.down[i]) * routing.weights[token, slot].unsqueeze(-1)
        y = y.index_add(0, token, out.to(y.dtype))
    return y if layer.shared is None else y + layer.shared(x)
