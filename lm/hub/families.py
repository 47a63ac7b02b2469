"""What each Hugging Face architecture calls our options and weights, and how its models differ.

A new architecture is a new entry in FAMILIES. docs/names.md is made from these tables.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ..config import ModelConfig

Table = dict[str, Any]


class Name(NamedTuple):
    """An option or a weight: our name, the papers' symbol, their name."""

    ours: str
    symbol: str  # in V2 and V3; "" if the papers have none
    theirs: str  # for a weight of ours that stacks several of theirs: their names in row order


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
    Name("moe.num_experts", "", "num_experts"),
    Name("moe.top_k", "", "num_experts_per_tok"),
    Name("moe.hidden_dim", "", "moe_intermediate_size"),
    Name("moe.normalize", "", "norm_topk_prob"),
]
MIXTRAL_MOE = [
    Name("moe.num_experts", "", "num_local_experts"),
    Name("moe.top_k", "", "num_experts_per_tok"),
    Name("moe.hidden_dim", "", "intermediate_size"),
]
SYNONYMS = {"num_experts": "num_local_experts"}  # key -> its name in newer files
ROPE = {  # scaling -> our fields and their keys
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
BLOCK = [  # in blocks.N and model.layers.N; a name without .weight or .bias stands for both
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
# attention.q_norm.weight: MLA norms the latent of the query, GQA each head's query
Q_NORM = {"mla": "self_attn.q_a_layernorm.weight", "gqa": "self_attn.q_norm.weight"}
MIXTRAL = {"mlp.": "block_sparse_moe.", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@dataclass(frozen=True)
class Family:
    """An architecture: its options, and all that sets it apart from the others. raw: its config.json."""

    architecture: str
    names: list[Name]  # its options
    ours: Table  # our options that are the same in all its models
    must: Table = field(default_factory=dict)  # key -> its one supported value, or a tuple of them
    default: Table = field(default_factory=dict)  # missing key -> what it means, or raw -> that
    interleaved: bool | None = False  # layout of RoPE; None: rope_interleave, by default True
    read_moe: Callable[[Table], Table] = lambda raw: {}  # raw -> [model.moe] options not in `names`
    extra_keys: Callable[[ModelConfig], Table] = lambda config: {}  # config -> keys not in `names`
    matches: Callable[[ModelConfig], bool] = lambda config: False  # whether it is written as this family
    mlp_words: dict[str, str] = field(default_factory=dict)  # word in BLOCK -> word in its MLP weights

    @property
    def is_mla(self) -> bool:
        """Whether its models have multi-head latent attention."""
        return self.ours["attention.kind"] == "mla"

    @property
    def has_experts(self) -> bool:
        """Whether its models have MoE layers."""
        return any(name.ours == "moe.num_experts" for name in self.names)


def whole_number(raw: Table, key: str, least: int, most: int = 2**31 - 1) -> int:
    """raw[key], or ValueError unless it is a whole number in least..most."""
    value = raw.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{key} {value!r:.80} is not a whole number in {least}..{most}")
    return value


def num_heads(raw: Table) -> Any:
    """The default of num_key_value_heads."""
    return raw.get("num_attention_heads")


def head_dim(raw: Table) -> int:
    """The default of head_dim."""
    return whole_number(raw, "hidden_size", 1) // whole_number(raw, "num_attention_heads", 1)


def is_mla(config: ModelConfig) -> bool:
    """Whether a model has multi-head latent attention."""
    return config.attention.kind == "mla"


def has_experts(config: ModelConfig) -> bool:
    """Whether a model has an MoE layer."""
    return config.num_dense_layers < config.num_layers


def gqa_experts(config: ModelConfig) -> bool:
    """Whether a model has grouped-query attention and an MoE layer."""
    return not is_mla(config) and has_experts(config)


def read_v2_moe(raw: Table) -> Table:
    """topk_method greedy, the default, ignores n_group."""
    greedy = (raw.get("topk_method") or "greedy") == "greedy"
    return {"num_groups": 1, "top_groups": 1} if greedy else {}


def read_qwen2_moe(raw: Table) -> Table:
    """One wide shared expert counts as several of the routed experts' width."""
    key = "shared_expert_intermediate_size"
    width, one = whole_number({key: 5632, **raw}, key, 1), whole_number(raw, "moe_intermediate_size", 1)
    if width % one:
        raise ValueError(f"{key} {width} is not a multiple of moe_intermediate_size {one}")
    return {"num_shared_experts": width // one}


def qwen_dense_layers(config: ModelConfig) -> Table:
    """Qwen lists its dense layers."""
    return {"mlp_only_layers": list(range(config.num_dense_layers))}


MLA_SIGMOID = {"attention.kind": "mla", "moe.router": "sigmoid"}
GQA_SOFTMAX = {"attention.kind": "gqa", "moe.router": "softmax"}
FULL = {"sliding_window": None}  # transformers' cache obeys it, even where the mask does not
V3_MUST = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", **FULL}
ONE_GROUP = {"n_group": 1, "topk_group": 1}
V3 = Family(
    "DeepseekV3ForCausalLM",
    [*MODEL, *MLA, FIRST_DENSE, *MOE],
    MLA_SIGMOID,
    must=V3_MUST,
    default={"norm_topk_prob": True},
    interleaved=None,
    extra_keys=lambda config: {"num_nextn_predict_layers": 0},
)
FAMILIES = {  # a config of ours is written as the last one that `matches` it
    "deepseek_v3": replace(V3, matches=is_mla),
    "kimi_k2": V3,
    "glm4_moe_lite": Family(
        "Glm4MoeLiteForCausalLM",
        [*MODEL, *MLA, *MOE],
        MLA_SIGMOID,
        must=V3_MUST,
        default={"norm_topk_prob": True, "rms_norm_eps": 1e-5, "first_k_dense_replace": 1, **ONE_GROUP},
        interleaved=None,
    ),
    "youtu": Family(
        "YoutuForCausalLM",
        [*MODEL, *MLA],
        MLA_SIGMOID,
        must=FULL,
        default={"tie_word_embeddings": True},
        interleaved=None,
    ),
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        [*MODEL, *MLA, FIRST_DENSE, *MOE],
        {"attention.kind": "mla", "moe.router": "softmax"},
        # norm_topk_prob: the authors' code and transformers differ where it is true
        must={
            "scoring_func": "softmax",
            "norm_topk_prob": False,
            "topk_method": ("greedy", "group_limited_greedy"),
            **FULL,
        },
        default={
            "first_k_dense_replace": 0,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
            **ONE_GROUP,
        },
        interleaved=True,
        read_moe=read_v2_moe,
        extra_keys=lambda config: {
            "topk_method": "greedy" if config.moe.num_groups == 1 else "group_limited_greedy"
        },
        matches=lambda config: is_mla(config) and has_experts(config) and config.moe.router == "softmax",
    ),
    "llama": Family(
        "LlamaForCausalLM",
        [*MODEL, *GQA, *BIASES],
        GQA_SOFTMAX,
        must=FULL,
        default={"num_key_value_heads": num_heads},
        matches=lambda config: not is_mla(config),
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        [*MODEL, *GQA],
        {**GQA_SOFTMAX, "attention.qkv_bias": True},
        matches=lambda config: (
            not is_mla(config) and config.attention.qkv_bias and not config.attention.out_bias
        ),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        [*MODEL, *GQA, *BIASES],
        {**GQA_SOFTMAX, "attention.qk_norm": True},
        default={"head_dim": 128},
        matches=lambda config: not is_mla(config) and config.attention.qk_norm,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        [*MODEL, *GQA, *MIXTRAL_MOE],
        {**GQA_SOFTMAX, "moe.normalize": True, "moe.num_shared_experts": 0, "num_dense_layers": 0},
        must=FULL,
        default={"rope_theta": 1e6, "rms_norm_eps": 1e-5},
        matches=gqa_experts,
        mlp_words=MIXTRAL,
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        [*MODEL, *GQA, *QWEN_MOE, Name("attention.qkv_bias", "", "qkv_bias")],
        {**GQA_SOFTMAX, "moe.shared_gate": True},
        default={"qkv_bias": True, "norm_topk_prob": False},
        read_moe=read_qwen2_moe,
        extra_keys=lambda config: {
            **qwen_dense_layers(config),
            "shared_expert_intermediate_size": config.moe.num_shared_experts * config.moe.hidden_dim,
        },
        matches=lambda config: gqa_experts(config) and config.moe.shared_gate,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        [*MODEL, *GQA, *QWEN_MOE, *BIASES],
        {**GQA_SOFTMAX, "attention.qk_norm": True, "moe.num_shared_experts": 0},
        default={"norm_topk_prob": False},
        extra_keys=qwen_dense_layers,
        matches=lambda config: gqa_experts(config) and config.attention.qk_norm,
    ),
}
DEFAULT: Table = {  # what a missing key means in families that do not define it
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "attention_bias": False,
    "head_dim": head_dim,
}
# what null means; a missing key may mean something else. For a bool, null is false.
NULL: Table = {
    "q_lora_rank": 0,
    "n_shared_experts": 0,
    "num_key_value_heads": num_heads,
    **ONE_GROUP,
    **dict.fromkeys(("norm_topk_prob", "tie_word_embeddings", "qkv_bias"), False),
}
