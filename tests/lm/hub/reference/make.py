"""Makes the tiny checkpoints in this folder with transformers: `python tests/lm/hub/reference/make.py`.

Each has config.json and model.safetensors as transformers writes them, and expected.safetensors: tokens
(2, 12), their logits (2, 12, vocab) from transformers, and its greedy continuation of them (2, 20).
"""

import json
import shutil
from pathlib import Path

import torch

HERE = Path(__file__).parent
SIZES = {
    "vocab_size": 29,
    "hidden_size": 15,
    "intermediate_size": 18,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
LATENT = {
    "kv_lora_rank": 7,
    "q_lora_rank": 6,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 4,
    "v_head_dim": 3,
    "num_key_value_heads": 3,
}
EXPERTS = {
    "n_routed_experts": 12,
    "num_experts_per_tok": 5,
    "moe_intermediate_size": 3,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
}
GROUPED = {"hidden_size": 12, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
QWEN = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 5}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 40.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
PLAIN = {"rope_type": "default", "rope_theta": 100.0}
CASES = {
    "deepseek_v3": {**SIZES, **LATENT, **EXPERTS, "rope_parameters": YARN, "attention_bias": True},
    "kimi_k2": {**SIZES, **LATENT, **EXPERTS, "n_group": 1, "topk_group": 1, "rope_parameters": YARN},
    "deepseek_v2": {
        **SIZES,
        **LATENT,
        **EXPERTS,
        "kv_lora_rank": 8,  # transformers rotates complex numbers: the sizes must be even
        "qk_nope_head_dim": 6,
        "topk_method": "group_limited_greedy",
        "num_experts_per_tok": 3,
        "topk_group": 1,
        "q_lora_rank": None,
        "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "glm4_moe_lite": {
        **SIZES,
        **LATENT,
        **{key: value for key, value in EXPERTS.items() if key != "first_k_dense_replace"},
        "rope_parameters": PLAIN,
    },
    "youtu": {**SIZES, **LATENT, "rope_parameters": PLAIN},
    "llama": {**SIZES, **GROUPED, "attention_bias": True, "rope_parameters": LLAMA3},
    "qwen2": {
        **SIZES,
        **GROUPED,
        "tie_word_embeddings": True,
        "rope_parameters": {k: v for k, v in YARN.items() if "mscale" not in k},
    },
    "qwen3": {
        **SIZES,
        **GROUPED,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0},
    },
    "mixtral": {
        **SIZES,
        **GROUPED,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "rope_parameters": PLAIN,
    },
    "qwen2_moe": {
        **SIZES,
        **GROUPED,
        **QWEN,
        "shared_expert_intermediate_size": 10,
        "mlp_only_layers": [0],
        "rope_parameters": PLAIN,
    },
    "qwen3_moe": {**SIZES, **GROUPED, **QWEN, "norm_topk_prob": True, "rope_parameters": PLAIN},
}


def build(kind, numbers, seed=0, dtype=torch.float32):
    """A transformers model with random weights, large enough that no symmetry hides a mistake."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = "deepseek_v3" if kind == "kimi_k2" else kind  # the same architecture
    config = AutoConfig.for_model(kind, **numbers, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    config._attn_implementation = config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    drawn = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, tensor in sorted(drawn.items()):
            if name.endswith("e_score_correction_bias"):
                tensor.uniform_(-1.0, -0.3, generator=generator)  # many selection scores are negative
            elif name.endswith("bias"):
                tensor.normal_(0.0, 0.5, generator=generator)
            elif "norm" in name:
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.ndim > 1:
                std = 1.0 if "embed" in name else tensor.shape[-1] ** -0.5
                std *= 1.5 if name.endswith("gate.weight") else 1.0  # so that tokens use many experts
                tensor.normal_(0.0, std, generator=generator)
    model.tie_weights()
    return model.to(dtype)


def write(model, kind, folder):
    """Write a folder as transformers does."""
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if kind == "kimi_k2":  # as published: with the keys of transformers 4 and its own code
        rope = config.pop("rope_parameters")
        config |= {"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"]}
        config |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": config.pop("dtype")}
        config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
        config |= {
            "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
            "scoring_func": "sigmoid",
        }
        config |= {"topk_method": "noaux_tc", "aux_loss_alpha": 0.001, "seq_aux": True, "ep_size": 1}
    path.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def continued(model, tokens, count):
    """The greedy continuation of transformers: tokens (batch, time) -> (batch, time + count)"""
    return model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=count
    )


def main():
    """Rewrite all folders."""
    import transformers
    from safetensors.torch import save_file

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for kind, numbers in CASES.items():
        folder = HERE / kind
        shutil.rmtree(folder, ignore_errors=True)
        model = build(kind, numbers)
        write(model, kind, folder)
        tokens = torch.randint(29, (2, 12), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            found = {
                "tokens": tokens,
                "logits": model(tokens).logits,
                "continued": continued(model, tokens, 8),
            }
        save_file(found, folder / "expected.safetensors")
        print(kind, sum(path.stat().st_size for path in folder.iterdir()), "bytes")


if __name__ == "__main__":
    main()
