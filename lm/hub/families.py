"""One thing under three names: ours, the papers' and that of Hugging Face checkpoints (docs/names.md).

Options of a config, weights of a model, and what each architecture has of them.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Name(NamedTuple):
    """One thing under three names."""

    ours: str
    symbol: str  # in V2 and V3; "" where they give it none
    theirs: str  # of a weight: several names where ours is theirs stacked, rows below rows


MODEL = [
    Name("vocab_size", "", "vocab_size"),
    Name("dim", "d", "hidden_size"),
    Name("num_layers", "l", "num_hidden_layers"),
    Name("hidden_dim", "", "intermediate_size"),
    Name("norm_eps", "", "rms_norm_eps"),
    Name("tie_embeddings", "", "tie_word_embeddings"),
    Name("init_std", "", "initializer_range"),
    Name("max_length", "", "max_position_embeddings"),
    Name("attention.num_heads", "n_h", "num_attention_heads"),
]
BIASES = [
    Name("attention.qkv_bias", "", "attention_bias"),
    Name("attention.out_bias", "", "attention_bias"),
]
MLA = [
    Name("attention.q_lora_rank", "d'_c", "q_lora_rank"),
    Name("attention.kv_lora_rank", "d_c", "kv_lora_rank"),
    Name("attention.qk_nope_head_dim", "d_h", "qk_nope_head_dim"),
    Name("attention.qk_rope_head_dim", "d^R_h", "qk_rope_head_dim"),
    Name("attention.v_head_dim", "d_h", "v_head_dim"),
    *BIASES,
]
GQA = [
    Name("attention.num_kv_heads", "n_g", "num_key_value_heads"),
    Name("attention.head_dim", "d_h", "head_dim"),
]
MOE = [
    Name("moe.num_experts", "N_r", "n_routed_experts"),
    Name("moe.top_k", "K_r", "num_experts_per_tok"),
    Name("moe.hidden_dim", "", "moe_intermediate_size"),
    Name("moe.num_shared_experts", "N_s", "n_shared_experts"),
    Name("moe.num_groups", "D", "n_group"),
    Name("moe.top_groups", "M", "topk_group"),
    Name("moe.normalize", "", "norm_topk_prob"),
    Name("moe.routed_scaling_factor", "", "routed_scaling_factor"),
]
FIRST_DENSE = Name("num_dense_layers", "", "first_k_dense_replace")
QWEN_MOE = [
    Name("moe.num_experts", "", "num_experts"),  # num_local_experts in newer files
    Name("moe.top_k", "", "num_experts_per_tok"),
    Name("moe.hidden_dim", "", "moe_intermediate_size"),
    Name("moe.normalize", "", "norm_topk_prob"),
]
MIXTRAL_MOE = [
    Name("moe.num_experts", "", "num_local_experts"),
    Name("moe.top_k", "", "num_experts_per_tok"),
    Name("moe.hidden_dim", "", "intermediate_size"),
]
ROPE = {  # our fields and theirs, of each scaling
    "none": {},
    "linear": {"factor": "factor"},
    "yarn": {
        "factor": "factor",
        "original_context": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
    },
    "llama3": {
        "factor": "factor",
        "original_context": "original_max_position_embeddings",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
}

WHOLE = [  # weights outside the blocks
    Name("embedding.weight", "", "model.embed_tokens.weight"),
    Name("norm.weight", "", "model.norm.weight"),
    Name("head.weight", "", "lm_head.weight"),
]
BLOCK = [  # of blocks.N and model.layers.N; .weight or .bias follow where none is written
    Name("attention_norm.weight", "", "input_layernorm.weight"),
    Name("mlp_norm.weight", "", "post_attention_layernorm.weight"),
    Name("attention.q", "W^Q", "self_attn.q_proj"),
    Name("attention.q_a", "W^DQ", "self_attn.q_a_proj"),
    Name("attention.q_b", "[W^UQ; W^QR]", "self_attn.q_b_proj"),
    Name("attention.kv_a", "[W^DKV; W^KR]", "self_attn.kv_a_proj_with_mqa"),
    Name("attention.kv_norm.weight", "", "self_attn.kv_a_layernorm.weight"),
    Name("attention.kv_b", "[W^UK; W^UV]", "self_attn.kv_b_proj"),
    Name("attention.k", "W^K", "self_attn.k_proj"),
    Name("attention.v", "W^V", "self_attn.v_proj"),
    Name("attention.k_norm.weight", "", "self_attn.k_norm.weight"),
    Name("attention.out", "W^O", "self_attn.o_proj"),
    Name("mlp.gate_up", "", "mlp.gate_proj mlp.up_proj"),
    Name("mlp.down", "", "mlp.down_proj"),
    Name("mlp.router.weight", "e_i", "mlp.gate.weight"),
    Name("mlp.router.bias", "b_i", "mlp.gate.e_score_correction_bias"),
    Name("mlp.experts.gate_up", "", "mlp.experts.{e}.gate_proj.weight mlp.experts.{e}.up_proj.weight"),
    Name("mlp.experts.down", "", "mlp.experts.{e}.down_proj.weight"),
    Name("mlp.shared.gate_up", "", "mlp.shared_experts.gate_proj mlp.shared_experts.up_proj"),
    Name("mlp.shared.down", "", "mlp.shared_experts.down_proj"),
    Name("mlp.shared.mlp.gate_up", "", "mlp.shared_expert.gate_proj mlp.shared_expert.up_proj"),
    Name("mlp.shared.mlp.down", "", "mlp.shared_expert.down_proj"),
    Name("mlp.shared.gate.weight", "", "mlp.shared_expert_gate.weight"),
]
# attention.q_norm.weight is of the latent or of a head
Q_NORM = {"mla": "self_attn.q_a_layernorm.weight", "gqa": "self_attn.q_norm.weight"}
MIXTRAL = {"mlp.": "block_sparse_moe.", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@dataclass(frozen=True)
class Family:
    """An architecture: which names it has, and what is the same in all its models."""

    architecture: str
    names: list[Name]
    ours: dict[str, Any]  # what our config says of every one
    must: dict[str, Any] = field(default_factory=dict)  # what theirs says of every one, if anything
    default: dict[str, Any] = field(default_factory=dict)  # what theirs means where it is silent


SIGMOID = {"attention.kind": "mla", "moe.router": "sigmoid"}
SOFTMAX = {"attention.kind": "gqa", "moe.router": "softmax"}
V3_MUST = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
ONE_GROUP = {"n_group": 1, "topk_group": 1}
V3_DEFAULT = {"rope_interleave": True, "norm_topk_prob": True}
DEEPSEEK_V3 = Family("DeepseekV3ForCausalLM", [*MODEL, *MLA, FIRST_DENSE, *MOE], SIGMOID, V3_MUST, V3_DEFAULT)
FAMILIES = {
    "deepseek_v3": DEEPSEEK_V3,
    "kimi_k2": DEEPSEEK_V3,
    "glm4_moe_lite": Family(
        "Glm4MoeLiteForCausalLM",
        [*MODEL, *MLA, *MOE],
        SIGMOID,
        V3_MUST,
        {**V3_DEFAULT, "rms_norm_eps": 1e-5, **ONE_GROUP},
    ),
    "youtu": Family(
        "YoutuForCausalLM",
        [*MODEL, *MLA],
        SIGMOID,
        {},
        {"rope_interleave": True, "tie_word_embeddings": True},
    ),
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        [*MODEL, *MLA, FIRST_DENSE, *MOE],
        {"attention.kind": "mla", "moe.router": "softmax"},
        # the authors' code and transformers differ over it: refused, not guessed
        {"scoring_func": "softmax", "norm_topk_prob": False, "topk_method": "group-limited"},
        {"first_k_dense_replace": 0, "norm_topk_prob": False, "routed_scaling_factor": 1.0, **ONE_GROUP},
    ),
    "llama": Family(
        "LlamaForCausalLM", [*MODEL, *GQA, *BIASES], SOFTMAX, {}, {"num_key_value_heads": None}
    ),
    "qwen2": Family("Qwen2ForCausalLM", [*MODEL, *GQA], {**SOFTMAX, "attention.qkv_bias": True}),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        [*MODEL, *GQA, *BIASES],
        {**SOFTMAX, "attention.qk_norm": True},
        {},
        {"head_dim": 128},
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        [*MODEL, *GQA, *MIXTRAL_MOE],
        {**SOFTMAX, "moe.normalize": True, "moe.num_shared_experts": 0, "num_dense_layers": 0},
        {"sliding_window": None},
        {"rope_theta": 1e6, "rms_norm_eps": 1e-5},
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        [*MODEL, *GQA, *QWEN_MOE, Name("attention.qkv_bias", "", "qkv_bias")],
        {**SOFTMAX, "moe.shared_gate": True},
        {},
        {"qkv_bias": True, "norm_topk_prob": False},
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        [*MODEL, *GQA, *QWEN_MOE, *BIASES],
        {**SOFTMAX, "attention.qk_norm": True, "moe.num_shared_experts": 0},
        {},
        {"norm_topk_prob": False},
    ),
}
DEFAULT = {  # what every family means where it is silent
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "attention_bias": False,
}
NULL = {"q_lora_rank": 0, "n_shared_experts": 0, **ONE_GROUP}  # what null means; silence may be otherwise
MUST = {  # what nothing here can do otherwise
    "hidden_act": "silu",
    "attention_dropout": 0,
    "mlp_bias": False,
    "use_sliding_window": False,
    "moe_layer_freq": 1,
    "router_jitter_noise": 0,
    "partial_rotary_factor": 1,
}
HARMLESS = {  # no word on the function that the model computes
    *("architectures", "auto_map", "model_type", "_name_or_path", "transformers_version"),
    *("torch_dtype", "dtype", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache"),
    *("output_router_logits", "router_aux_loss_coef", "aux_loss_alpha", "seq_aux", "ep_size"),
    *("pretraining_tp", "num_nextn_predict_layers", "num_mtp_layers", "embedding_initializer_range"),
    *("sliding_window", "max_window_layers"),  # where use_sliding_window is false
    *("quantization_config", "rope_theta", "rope_scaling", "rope_parameters", "rope_interleave"),
    *("first_k_dense_replace", "mlp_layer_types", "mlp_only_layers", "decoder_sparse_step", "layer_types"),
    *("shared_expert_intermediate_size", "topk_method", "head_dim", "qk_head_dim", "num_key_value_heads"),
    "num_local_experts",
}
