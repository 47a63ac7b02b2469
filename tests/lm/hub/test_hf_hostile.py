"""Damaged and hostile Hugging Face folders: one line that names the file, and nothing run or written."""

import json
import math
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lm
from lm.hub import shards
from lm.hub.families import FAMILIES
from tests.helpers import ROOT, content
from tests.lm.hub.folders import REFERENCE, UNUSUAL, edit, off, refused, within
from tests.lm.hub.reference import make


def test_a_folder_without_a_config_is_rejected(folder, tmp_path):
    made = folder()
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(ValueError, match=f"{path.name}: is not a folder"):
            lm.from_hf(path)
    (made / "config.json").unlink()
    refused(made, "holds no config.json")
    (made / "config.json").mkdir()
    refused(made, "holds no config.json")


CONFIG_TEXTS = {
    "empty": (b"", []),
    "not JSON": (b"vocab_size = 3", []),
    "not UTF-8": (b'{"model_type": "\xff"}', []),
    "a list": (b"[1]", ["list"]),
    "null": (b"null", []),
    "a duplicate key": (b'{"model_type": "llama", "model_type": "qwen2"}', ["duplicate key 'model_type'"]),
    "NaN": (b'{"rms_norm_eps": NaN}', ["NaN"]),
    "1e400": (b'{"rms_norm_eps": 1e400}', ["1e400"]),
    "5,000 digits": (b'{"hidden_size": ' + b"9" * 5000 + b"}", ["digits"]),
    "100,000 brackets": (b"[" * 100_000, []),
    "100,000 objects": (b'{"a":' * 100_000, []),
}


@pytest.mark.parametrize("text, said", CONFIG_TEXTS.values(), ids=CONFIG_TEXTS)
def test_a_broken_config_is_a_one_line_error_that_names_it(folder, text, said):
    made = folder()
    (made / "config.json").write_bytes(text)
    refused(made, *said, names=made / "config.json")


OPTIONS = [  # an architecture, changes to its config.json, words in the error
    ("deepseek_v3", {"model_type": "gpt2"}, ["model_type 'gpt2'", "deepseek_v3"]),
    ("deepseek_v3", {"model_type": ["deepseek_v3"]}, ["model_type"]),
    ("deepseek_v3", {"model_type": ...}, ["model_type"]),
    ("deepseek_v3", {"hidden_size": "15"}, ["'15'"]),
    ("llama", {"hidden_size": "12", "head_dim": ...}, ["hidden_size", "'12'"]),
    ("llama", {"num_attention_heads": 0, "head_dim": ...}, ["num_attention_heads", "0"]),
    ("deepseek_v3", {"hidden_size": 15.0}, ["15.0"]),
    ("deepseek_v3", {"hidden_size": True}, ["True"]),
    ("deepseek_v3", {"hidden_size": -15}, ["-15"]),
    ("deepseek_v3", {"hidden_size": ...}, ["hidden_size is missing"]),
    ("deepseek_v3", {"q_lora_rank": ...}, ["q_lora_rank is missing"]),
    ("deepseek_v3", {"n_group": ...}, ["n_group is missing"]),
    ("deepseek_v3", {"first_k_dense_replace": ...}, ["first_k_dense_replace is missing"]),
    ("deepseek_v3", {"first_k_dense_replace": "1"}, ["first_k_dense_replace", "'1'"]),
    ("deepseek_v3", {"hidden_act": "gelu"}, ["hidden_act 'gelu'"]),
    ("deepseek_v3", {"attention_dropout": 0.1}, ["attention_dropout 0.1"]),
    ("deepseek_v3", {"scoring_func": "softmax"}, ["scoring_func 'softmax'"]),
    ("deepseek_v3", {"topk_method": "greedy"}, ["topk_method 'greedy'"]),
    ("deepseek_v3", {"moe_layer_freq": 2}, ["moe_layer_freq 2"]),
    ("deepseek_v3", {"head_dim": 6}, ["head_dim 6"]),
    ("deepseek_v3", {"qk_head_dim": 6}, ["qk_head_dim 6"]),
    ("deepseek_v3", {"num_key_value_heads": 1}, ["num_key_value_heads 1"]),
    ("deepseek_v3", {"rope_interleave": "yes"}, ["yes"]),
    ("deepseek_v3", {"num_hidden_layers": 0}, ["num_hidden_layers 0"]),
    ("deepseek_v3", {"num_hidden_layers": -1}, ["num_hidden_layers -1"]),
    ("deepseek_v3", {"num_hidden_layers": 10**6}, ["num_hidden_layers 1000000"]),
    ("deepseek_v3", {"use_magic": True}, ["use_magic True"]),
    ("deepseek_v3", {"use_magic": False}, ["use_magic False"]),
    ("deepseek_v3", {"use_rope": 0}, ["use_rope 0"]),
    ("llama", {"no_rope_layers": []}, ["no_rope_layers []"]),
    ("llama", {"sliding_window": 4}, ["sliding_window 4", "null"]),
    ("qwen2", {"attention_chunk_size": 0}, ["attention_chunk_size 0"]),
    *((kind, {"is_causal": value}, ["is_causal"]) for kind in FAMILIES for value in (False, None, 0, [])),
    ("deepseek_v3", {"index_topk": 2048}, ["index_topk 2048"]),  # V3.2's sparse attention
    (
        "deepseek_v3",
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        ["quantization_config", "gptq"],
    ),
    ("deepseek_v3", {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}, ["64"]),
    ("deepseek_v3", {"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}}, ["e5m2"]),
    ("deepseek_v3", {"quantization_config": {}}, ["quantization_config"]),
    ("deepseek_v3", {"quantization_config": "fp8"}, ["quantization_config"]),
    ("deepseek_v2", {"norm_topk_prob": True}, ["norm_topk_prob True"]),
    ("deepseek_v2", {"topk_method": "noaux_tc"}, ["topk_method 'noaux_tc'"]),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, ["scoring_func 'sigmoid'"]),
    ("deepseek_v2", {"rope_interleave": False}, ["rope_interleave False"]),
    ("llama", {"mlp_bias": True}, ["mlp_bias True"]),
    ("llama", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor 0.5"]),
    ("llama", {"rope_interleave": True}, ["rope_interleave True"]),
    ("llama", {"head_dim": 5}, ["5"]),
    ("llama", {"num_key_value_heads": 3}, ["3"]),
    (
        "llama",
        {"num_key_value_heads": ..., "model_type": "qwen3", "attention_bias": False},
        ["num_key_value_heads is missing"],
    ),
    ("qwen2", {"use_sliding_window": True}, ["use_sliding_window True"]),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "full_attention"]),
    ("qwen2", {"layer_types": "full_attention"}, ["layer_types"]),
    ("mixtral", {"sliding_window": 4096}, ["sliding_window 4096"]),
    ("mixtral", {"router_jitter_noise": 0.1}, ["router_jitter_noise 0.1"]),
    ("qwen3_moe", {"mlp_only_layers": [1]}, ["layer"]),
    ("qwen3_moe", {"mlp_only_layers": 1}, ["mlp_only_layers"]),
    ("qwen3_moe", {"decoder_sparse_step": 0}, ["decoder_sparse_step"]),
    ("glm4_moe_lite", {"mlp_layer_types": ["sparse", "dense"]}, ["layer"]),
    ("glm4_moe_lite", {"mlp_layer_types": ["dense"]}, ["mlp_layer_types"]),
    (
        "qwen2_moe",
        {"shared_expert_intermediate_size": 11},
        ["shared_expert_intermediate_size 11", "multiple"],
    ),
    ("qwen2_moe", {"shared_expert_intermediate_size": 0}, ["shared_expert_intermediate_size 0"]),
]
ROPES = [  # the same, in rope_parameters
    ("deepseek_v3", {"rope_type": "dynamic"}, ["rope_type 'dynamic'"]),
    ("deepseek_v3", {"rope_type": "longrope"}, ["rope_type 'longrope'"]),
    ("deepseek_v3", {"rope_type": ["yarn"]}, ["rope_type"]),
    ("deepseek_v3", {"attention_factor": 2.0}, ["attention_factor"]),
    ("deepseek_v3", {"attention_factor": "2"}, ["attention_factor"]),
    ("deepseek_v3", {"truncate": False}, ["truncate"]),
    ("deepseek_v3", {"mscale": ...}, ["mscale"]),
    ("deepseek_v3", {"mscale_all_dim": ...}, ["mscale_all_dim"]),
    ("deepseek_v3", {"mscale_all_dim": 0.0}, ["mscale_all_dim"]),
    ("deepseek_v3", {"mscale": "1"}, ["mscale"]),
    ("deepseek_v3", {"factor": ...}, ["factor"]),
    ("deepseek_v3", {"factor": 0.5}, ["factor", "0.5"]),
    ("deepseek_v3", {"original_max_position_embeddings": 0}, ["original_context", "0"]),
    ("deepseek_v3", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
    ("deepseek_v3", {"low_freq_factor": 2.0}, ["low_freq_factor"]),
    ("deepseek_v3", {"beta_fast": 0.1}, ["beta_fast=0.1"]),
    ("deepseek_v3", {"rope_theta": 0}, ["theta"]),
    ("deepseek_v3", {"rope_theta": 1.0}, ["theta=1.0"]),
    ("llama", {"high_freq_factor": 1.0}, ["high_freq_factor=1.0"]),
    ("llama", {"factor": None}, ["factor"]),
    ("llama", {"full_attention": {"rope_theta": 5.0}}, ["full_attention"]),
]


@pytest.mark.parametrize("kind, changes, said", OPTIONS, ids=str)
def test_an_unsupported_option_is_named(folder, kind, changes, said):
    made = folder(kind, **changes)
    refused(made, *said, names=made / "config.json")


@pytest.mark.parametrize("kind, changes, said", ROPES, ids=str)
def test_an_unsupported_rope_option_is_named(folder, kind, changes, said):
    rope = {**make.CASES[kind]["rope_parameters"], **changes}
    made = folder(kind, rope_parameters={key: value for key, value in rope.items() if value is not ...})
    refused(made, *said, names=made / "config.json")


def test_harmless_options_are_ignored(folder):
    made = folder(
        use_cache=False, pretraining_tp=2, auto_map={"AutoModel": "evil.Evil"}, is_causal=True, magic=None
    )
    assert off(lm.from_hf(made), "deepseek_v3") < 1e-5


FOUND = {  # options of published folders that transformers does not read
    "Qwen3-Coder": {"use_qk_norm": True, "qkv_bias": False, "shared_expert_intermediate_size": 0},
    "unsloth": {"unsloth_fixed": True, "unsloth_version": "2025.3", "pad_token_id": 3},
    "SmolLM": {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}},
    "Falcon 3": {"activation": "swiglu", "sliding_window": None},
    "vicuna": {"max_sequence_length": 2048, "tokenizer_class": "LlamaTokenizer", "pretraining_tp": 1},
    "transformers 4": {
        "return_dict": True,
        "output_attentions": False,
        "id2label": {"0": "LABEL_0"},
        "top_p": 1.0,
        "chunk_size_feed_forward": 0,
        "pruned_heads": {},
        "is_decoder": False,
        "is_encoder_decoder": False,
        "add_cross_attention": False,
        "prefix": None,
    },
}


@pytest.mark.parametrize("changes", FOUND.values(), ids=FOUND)
@pytest.mark.parametrize("kind", FAMILIES)
def test_options_that_transformers_does_not_read_are_ignored(folder, kind, changes):
    own = {name.theirs for name in FAMILIES[kind].names} | {"shared_expert_intermediate_size"}
    if kind == "qwen2_moe":
        changes = {key: value for key, value in changes.items() if key not in own}
    assert off(lm.from_hf(folder(kind, **changes)), kind) < 1e-5


@pytest.mark.parametrize("ignored", [{"attn_factor": 1.0}, {"attn_factor": 0.5, "finetuned": True}], ids=str)
@pytest.mark.parametrize("kind", ["deepseek_v3", "deepseek_v2", "llama", "qwen2", "qwen3"])
def test_rope_options_that_transformers_does_not_read_are_ignored(folder, kind, ignored):
    made = folder(kind, rope_parameters={**make.CASES[kind]["rope_parameters"], **ignored})
    assert off(lm.from_hf(made), kind) < 1e-5


SIZES = {  # changes to a config with 30 kB of weights
    "dim 10^9": {"hidden_size": 10**9},
    "dim 2^31 - 1, vocabulary 2^31 - 1": {"hidden_size": 2**31 - 1, "vocab_size": 2**31 - 1},
    "dim 2^31 - 1, hidden 2^31 - 1": {"hidden_size": 2**31 - 1, "intermediate_size": 2**31 - 1},
    "dim 10^18": {"hidden_size": 10**18},
    "a different dim": {"hidden_size": 16},
    "vocabulary 10^9": {"vocab_size": 10**9},
    "10^9 experts": {"n_routed_experts": 10**9},
    "1,000 experts": {"n_routed_experts": 1000},
    "four more experts": {"n_routed_experts": 16},
    "one expert fewer": {"n_routed_experts": 11, "topk_group": 1, "n_group": 1},
    "10^9 heads": {"num_attention_heads": 10**9, "num_key_value_heads": 10**9},
    "2^31 - 1 heads of 2^31 - 1": {
        "num_attention_heads": 2**31 - 1,
        "num_key_value_heads": 2**31 - 1,
        "qk_nope_head_dim": 2**31 - 1,
        "qk_head_dim": ...,
    },
    "1,000 layers": {"num_hidden_layers": 1000},
    "one more layer": {"num_hidden_layers": 3},
    "no shared expert": {"n_shared_experts": 0},
    "10^9 shared experts": {"n_shared_experts": 10**9},
    "hidden 10^9": {"intermediate_size": 10**9},
    "latent 10^9": {"kv_lora_rank": 10**9},
    "query not compressed": {"q_lora_rank": None},
    "no biases": {"attention_bias": False},
    "all dense": {"first_k_dense_replace": 2},
    "odd rope": {"qk_rope_head_dim": 5, "head_dim": ..., "qk_head_dim": ...},
    "groups of one": {"n_group": 12, "topk_group": 4},
    "a different architecture": {"model_type": "youtu"},
}


@pytest.mark.parametrize("changes", SIZES.values(), ids=SIZES)
def test_a_config_that_does_not_match_the_weights_is_rejected(folder, changes):
    refused(folder("deepseek_v3", **changes))


QWEN_SIZES = {
    "10^9 layers": {"num_hidden_layers": 10**9},
    "10^9 experts": {"num_experts": 10**9},
    "10^9 layers without types": {"num_hidden_layers": 10**9, "layer_types": None},
    "heads of 10^9": {"head_dim": 10**9},
}


@pytest.mark.parametrize("changes", QWEN_SIZES.values(), ids=QWEN_SIZES)
def test_a_qwen_config_that_does_not_match_the_weights_is_rejected(folder, changes):
    refused(folder("qwen3_moe", **changes))


GATE = "model.layers.1.mlp.experts.4.gate_proj.weight"  # (3, 15)
TENSORS = {  # changes to the tensors, words in the error
    "one missing": ({GATE: None}, ["lacks 1 of 71 tensors", GATE]),
    "all missing": (lambda held: dict.fromkeys(held), ["2 layers of 12 experts", "0 tensors"]),
    "an unexpected tensor": ({"model.extra": torch.ones(2)}, ["unexpected tensors (1)", "model.extra"]),
    "an expert too many": ({GATE.replace(".4.", ".12."): torch.ones(3, 15)}, ["unexpected", ".experts.12."]),
    "an unexpected bias": ({"lm_head.bias": torch.ones(29)}, ["unexpected", "lm_head.bias"]),
    "a different name": (lambda held: {GATE: None, "x": held[GATE]}, [GATE]),
    "a scale without FP8": ({f"{GATE}_scale_inv": torch.ones(1, 1)}, ["unexpected", f"{GATE}_scale_inv"]),
    "transposed": ({GATE: torch.ones(15, 3)}, [GATE, "(15, 3)", "(3, 15)"]),
    "flat": ({GATE: torch.ones(45)}, [GATE, "(45,)", "(3, 15)"]),
    "(1,) for ()": ({"model.norm.weight": torch.ones(1, 15)}, ["model.norm.weight", "(1, 15)", "(15,)"]),
    "int8": ({GATE: torch.ones(3, 15, dtype=torch.int8)}, [GATE, "I8", "BF16"]),
    "int64": ({GATE: torch.ones(3, 15, dtype=torch.int64)}, [GATE, "I64"]),
    "one part in bf16": (
        {GATE: torch.ones(3, 15, dtype=torch.bfloat16)},
        ["one matrix", GATE, "bfloat16", "float32"],
    ),
    "a matrix in bf16": (
        {"model.layers.0.self_attn.o_proj.weight": torch.ones(15, 9, dtype=torch.bfloat16)},
        ["several dtypes", "bfloat16", "float32"],
    ),
    "a NaN": (
        lambda held: {GATE: torch.where(held[GATE] == held[GATE].max(), math.nan, held[GATE])},
        [GATE, "NaN"],
    ),
    "an infinity": ({GATE: torch.full((3, 15), -math.inf)}, [GATE, "infinite"]),
    "a NaN bias": (
        {"model.layers.1.mlp.gate.e_score_correction_bias": torch.full((12,), math.nan)},
        ["e_score_correction_bias", "NaN"],
    ),
}


@pytest.mark.parametrize("changes, said", TENSORS.values(), ids=TENSORS)
def test_tensors_that_do_not_match_are_named(folder, changes, said):
    made = folder()
    held = load_file(made / "model.safetensors")
    changes = changes(held) if callable(changes) else changes
    held = {name: tensor for name, tensor in {**held, **changes}.items() if tensor is not None}
    save_file(held, made / "model.safetensors")
    refused(made, *said)


def truncated(path):
    os.truncate(path, path.stat().st_size - 1)


def with_header(length, text=b"{}"):
    return lambda path: path.write_bytes(struct.pack("<Q", length) + text)


FILES = {
    "cut": truncated,
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "7 bytes": lambda path: os.truncate(path, 7),
    "length 2^63": with_header(2**63),
    "length 100,000,001": with_header(100_000_001),
    "a list": with_header(3, b"[1]"),
    "100,000 brackets": with_header(100_000, b"[" * 100_000),
    "a pickle": lambda path: path.write_bytes(b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR."),
}


@pytest.mark.parametrize("damage", FILES.values(), ids=FILES)
def test_a_damaged_file_is_a_one_line_error_that_names_it(folder, damage):
    made = folder()
    damage(made / "model.safetensors")
    refused(made, "not a safetensors file", names=made / "model.safetensors")


def test_a_header_too_long_for_the_model_is_not_read(folder):
    made = folder()
    path = made / "model.safetensors"
    empty = ",".join(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(300_000))
    with_header(len(empty) + 2, f"{{{empty}}}".encode())(path)
    refused(made, "a header of", "larger than needed", names=path)


def in_shards(made):
    """Split the folder's weights into shards with an index -> the index's map"""
    held = load_file(made / "model.safetensors")
    (made / "model.safetensors").unlink()
    parts = ((name, tensor.nbytes, lambda tensor=tensor: tensor) for name, tensor in held.items())
    shards.write(made, parts, 4000)
    return json.loads((made / shards.INDEX).read_text())["weight_map"]


@pytest.mark.parametrize("make", UNUSUAL.values(), ids=UNUSUAL)
@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", shards.INDEX, "a shard", "tokenizer.json", "chat_template.jinja"],
)
def test_a_file_that_is_not_regular_is_a_one_line_error(folder, invoke, name, make):
    made, out = folder(), folder().parent / "out"
    if name in (shards.INDEX, "a shard"):
        placed = in_shards(made)
        name = min(placed.values()) if name == "a shard" else name
    (made / name).unlink(missing_ok=True)
    make(made / name)
    with within(5):
        status, _, said = invoke("import", made, out)
    assert status == 2 and said.count("\n") == 1 and str(made) in said
    assert [path.name for path in made.parent.iterdir()] == ["model"]


def test_shards_are_read_as_one_file(folder):
    made = folder()
    assert len(set(in_shards(made).values())) > 3
    assert off(lm.from_hf(made), "deepseek_v3") < 1e-5


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x", "a/b.safetensors", "absent.safetensors"])
def test_an_index_that_leaves_the_folder_is_rejected(folder, name):
    made = folder()
    placed = in_shards(made)
    for path in (made.parent / "x.safetensors", made / "a" / "b.safetensors"):
        path.parent.mkdir(exist_ok=True)
        shutil.copy(made / placed[GATE], path)
    (made / shards.INDEX).write_text(json.dumps({"weight_map": {**placed, GATE: name}}))
    refused(made, name)


def test_an_index_that_does_not_match_the_files_is_rejected(folder):
    made = folder()
    placed = in_shards(made)
    other = next(file for file in placed.values() if file != placed[GATE])
    for changes, said in [({GATE: other}, GATE), ({"extra": other}, "extra"), ({GATE: None}, GATE)]:
        changed = {name: file for name, file in {**placed, **changes}.items() if file}
        (made / shards.INDEX).write_text(json.dumps({"weight_map": changed}))
        refused(made, said)
    (made / shards.INDEX).write_text("[" * 100_000)
    refused(made, names=made / shards.INDEX)


def test_links_are_followed_only_within_the_hugging_face_cache(folder, tmp_path):
    made = folder()
    hub = tmp_path / "hub" / "models--x"
    (hub / "blobs").mkdir(parents=True)
    (hub / "snapshots").mkdir()
    made = Path(shutil.move(made, hub / "snapshots" / "0a1b"))
    for number, path in enumerate(list(made.iterdir())):
        path.rename(hub / "blobs" / str(number))
        path.symlink_to(f"../../blobs/{number}")
    assert off(lm.from_hf(made), "deepseek_v3") < 1e-5
    (made / "model.safetensors").unlink()
    (made / "model.safetensors").symlink_to(REFERENCE / "deepseek_v3" / "model.safetensors")
    refused(made, "is a link out of the folder", names=made / "model.safetensors")


def test_pickles_are_rejected(folder):
    made = folder()
    (made / "model.safetensors").rename(made / "pytorch_model.bin")
    refused(made, "pickle files are never read; convert it to safetensors", names=made / "pytorch_model.bin")
    (made / "pytorch_model.bin").unlink()
    refused(made, "holds no model.safetensors")


AUDIT = """
import json, resource, sys, time, warnings
from pathlib import Path
import torch, lm, lm.hub.hf
warnings.simplefilter("ignore")
lm.hub.hf.from_hf(sys.argv[1])
seen = []
def hook(event, arguments):
    if event.split(".")[0] in ("exec", "compile", "import", "pickle", "subprocess", "socket"):
        seen.append((event, str(arguments)[:200]))
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if event in ("os.system", "os.mkdir", "os.rename") or writes:
        seen.append((event, str(arguments)[:200]))
sys.addaudithook(hook)
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
refused, slow, before = 0, [], peak()
for folder in sys.argv[2:]:
    began = time.process_time()
    for read in (lm.hub.hf.from_hf, lambda path: lm.hub.hf.import_folder(path, Path(folder + ".never"))):
        try:
            read(Path(folder))
        except ValueError:
            refused += 1
    if time.process_time() - began > 10:
        slow.append(folder)
print(json.dumps([refused, slow, seen, peak() - before]))
"""


def test_hostile_folders_use_no_memory_and_run_and_write_nothing(tmp_path):
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc for the peak memory")
    folders = []

    def copy(kind, **changes):
        folders.append(Path(shutil.copytree(REFERENCE / kind, tmp_path / str(len(folders)))))
        (folders[-1] / "evil.py").write_text("raise SystemExit('run')")
        edit(folders[-1], auto_map={"AutoModelForCausalLM": "evil.Evil"}, **changes)
        return folders[-1]

    for text, _ in CONFIG_TEXTS.values():
        (copy("deepseek_v3") / "config.json").write_bytes(text)
    for kind, changes, _ in OPTIONS:
        copy(kind, **changes)
    for changes in SIZES.values():
        copy("deepseek_v3", **changes)
    for changes in QWEN_SIZES.values():
        copy("qwen3_moe", **changes)
    for damage in FILES.values():
        damage(copy("deepseek_v3") / "model.safetensors")
    before = content(tmp_path)
    ran = subprocess.run(
        [sys.executable, "-c", AUDIT, str(REFERENCE / "deepseek_v3"), *map(str, folders)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    number, slow, seen, grown = json.loads(ran.stdout.splitlines()[-1])
    assert number == 2 * len(folders)
    assert slow == []
    lazy_imports = ("('torch", "('numpy")
    assert [entry for entry in seen if not entry[1].startswith(lazy_imports)] == []
    assert grown < 64 * 1024, f"{grown} kB more memory"
    assert content(tmp_path) == before
