"""The models and the prompt that several tests of inference share."""

import random

PREFIX = random.Random(7).choices(range(256), k=200)
WIDE = {"q_lora_rank": 32, "kv_lora_rank": 32}
WIDE |= {"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
KINDS = {
    "mla": {"model": {"dim": 48, "hidden_dim": 32}, "attention": WIDE, "moe": {"hidden_dim": 16}},
    "gqa": {
        "model": {"dim": 32, "hidden_dim": 32, "tie_embeddings": True},
        "attention": {"kind": "gqa", "num_heads": 6, "num_kv_heads": 2, "head_dim": 16},
        "moe": {"router": "softmax", "num_experts": 16, "top_k": 3, "hidden_dim": 16, "top_groups": 4},
    },
}  # widths in multiples of 16, as in real models: with odd widths a CPU's rounding depends on the row
