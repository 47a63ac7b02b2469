"""Long tests that ask transformers itself: logits, gradients, our exports, and the memory of reading."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import lm
from lm import files
from lm.config import Config
from lm.hub import shards
from lm.hub.families import FAMILIES
from lm.hub.keys import MUST
from lm.hub.translate import parts_of, to_ours, to_theirs
from mla.rope import frequencies
from tests.helpers import ROOT
from tests.lm.hub.folders import REFERENCE, bits, edit, expected, stored
from tests.lm.hub.reference import make

pytestmark = pytest.mark.long

SMALL = {
    "vocab_size": 97,
    "hidden_size": 42,
    "intermediate_size": 70,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
LATENT = {
    **SMALL,
    "kv_lora_rank": 22,
    "q_lora_rank": 19,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 9,
    "num_key_value_heads": 6,
}
EXPERTS = {
    "n_routed_experts": 12,
    "num_experts_per_tok": 5,
    "moe_intermediate_size": 13,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
LONG_YARN = {
    **make.YARN,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
NO_MSCALE = {key: value for key, value in LONG_YARN.items() if "mscale" not in key}
DEEPSEEK = {**LATENT, **EXPERTS, "first_k_dense_replace": 1}
V2 = {**DEEPSEEK, "routed_scaling_factor": 16.0, "topk_method": "group_limited_greedy"}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 10}
QWEN = {**GROUPED, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 13}
LLAMA3 = {**make.LLAMA3, "rope_theta": 500.0, "original_max_position_embeddings": 32}
ORACLES = {
    "V3": ("deepseek_v3", DEEPSEEK),
    "V3, query not compressed": ("deepseek_v3", {**DEEPSEEK, "q_lora_rank": None}),
    "V3, YaRN, biases": ("deepseek_v3", {**DEEPSEEK, "rope_parameters": LONG_YARN, "attention_bias": True}),
    "V3, RoPE in halves, YaRN": (
        "deepseek_v3",
        {**DEEPSEEK, "rope_interleave": False, "rope_parameters": LONG_YARN},
    ),
    "V3, YaRN that scales cos and sin": ("deepseek_v3", {**DEEPSEEK, "rope_parameters": NO_MSCALE}),
    "V3, two mscales": (
        "deepseek_v3",
        {**DEEPSEEK, "rope_parameters": {**LONG_YARN, "mscale": 1.5, "mscale_all_dim": 0.5}},
    ),
    "V3, weights not normalised, one group, tied": (
        "deepseek_v3",
        {**DEEPSEEK, "norm_topk_prob": False, "n_group": 1, "topk_group": 1, "tie_word_embeddings": True},
    ),
    "V3, experts everywhere, query not compressed, biases": (
        "deepseek_v3",
        {**DEEPSEEK, "first_k_dense_replace": 0, "q_lora_rank": None, "attention_bias": True},
    ),
    "V3, all dense": ("deepseek_v3", {**DEEPSEEK, "first_k_dense_replace": 3}),
    "Kimi K2": (
        "kimi_k2",
        {**DEEPSEEK, "n_group": 1, "topk_group": 1, "rope_parameters": {**LONG_YARN, "beta_fast": 1.0}},
    ),
    "V2": ("deepseek_v2", {**V2, "rope_parameters": {**LONG_YARN, "mscale": 0.707, "mscale_all_dim": 0.707}}),
    "V2, greedy, query not compressed": ("deepseek_v2", {**V2, "topk_method": "greedy", "q_lora_rank": None}),
    "V2, biases, tied": ("deepseek_v2", {**V2, "attention_bias": True, "tie_word_embeddings": True}),
    "GLM": ("glm4_moe_lite", {**LATENT, **EXPERTS}),
    "GLM, biases, RoPE in halves": (
        "glm4_moe_lite",
        {**LATENT, **EXPERTS, "attention_bias": True, "rope_interleave": False, "norm_topk_prob": False},
    ),
    "Youtu": ("youtu", LATENT),
    "Youtu, biases, not tied, query not compressed": (
        "youtu",
        {**LATENT, "attention_bias": True, "tie_word_embeddings": False, "q_lora_rank": None},
    ),
    "Llama": ("llama", {**GROUPED, "rope_parameters": LLAMA3}),
    "Llama, biases, linear": (
        "llama",
        {
            **GROUPED,
            "attention_bias": True,
            "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4},
        },
    ),
    "Llama, YaRN, tied, one key head": (
        "llama",
        {**GROUPED, "rope_parameters": NO_MSCALE, "tie_word_embeddings": True, "num_key_value_heads": 1},
    ),
    "Qwen2": ("qwen2", GROUPED),
    "Qwen2, YaRN, tied": ("qwen2", {**GROUPED, "rope_parameters": NO_MSCALE, "tie_word_embeddings": True}),
    "Qwen3": ("qwen3", GROUPED),
    "Qwen3, biases, YaRN": ("qwen3", {**GROUPED, "attention_bias": True, "rope_parameters": NO_MSCALE}),
    "Mixtral": ("mixtral", {**GROUPED, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "Qwen2-MoE": ("qwen2_moe", {**QWEN, "shared_expert_intermediate_size": 39, "mlp_only_layers": [0]}),
    "Qwen2-MoE, normalised, no biases": (
        "qwen2_moe",
        {**QWEN, "shared_expert_intermediate_size": 13, "norm_topk_prob": True, "qkv_bias": False},
    ),
    "Qwen3-MoE": ("qwen3_moe", {**QWEN, "norm_topk_prob": True}),
    "Qwen3-MoE, not normalised, biases, a dense layer": (
        "qwen3_moe",
        {**QWEN, "norm_topk_prob": False, "attention_bias": True, "mlp_only_layers": [0]},
    ),
}


@pytest.fixture(scope="module", params=ORACLES.values(), ids=ORACLES)
def oracle(request, transformers, tmp_path_factory):
    """An architecture, its options, transformers' fp32 model of it, and the folder of that model."""
    kind, numbers = request.param
    model = make.build(kind, numbers)
    folder = tmp_path_factory.mktemp("oracle")
    make.write(model, kind, folder)
    return kind, numbers, model, folder


def text(shape=(2, 150), vocab=97, seed=2):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def relative(found, wanted):
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def test_fp32_logits_and_cached_greedy_text_equal_transformers(oracle):
    _, _, theirs, folder = oracle
    ours, tokens = lm.from_hf(folder), text()
    with torch.no_grad():
        found, wanted = ours(tokens).logits, theirs(tokens).logits
    assert relative(found, wanted) < 1e-5
    prompts = tokens[:, :40]
    assert torch.equal(lm.generate(ours, prompts, 30, temperature=0), make.continued(theirs, prompts, 30))


def test_the_random_weights_reach_every_expert(oracle):
    """Every expert is chosen, some of them with a negative selection score."""
    ours = lm.from_hf(oracle[3])
    with torch.no_grad():
        routings = ours(text()).routings
    for router, routing in zip(ours.routers(), routings):
        if router.bias is not None:
            choice = routing.scores + router.bias
            assert 0.1 < (choice < 0).float().mean() < 0.9
            assert (choice.gather(-1, routing.experts) < 0).any()
        counts = torch.bincount(routing.experts.flatten(), minlength=routing.scores.shape[-1])
        assert (counts > 0).all()


class Wide(TorchFunctionMode):
    """A mode in which casts from float64 to fp32 do nothing.

    transformers computes norms, routers and softmax in fp32, whatever the model's dtype. In this mode its own
    code runs in float64. The angles of RoPE stay fp32, as ours do. V2 rotates with torch.polar, which rounds
    differently from cos and sin in fp32, so it is replaced.
    """

    def __torch_function__(self, function, kinds, arguments=(), options=None):
        options = dict(options or {})
        if function is torch.polar:
            return torch.complex(arguments[0] * arguments[1].cos(), arguments[0] * arguments[1].sin())
        if any(isinstance(a, torch.Tensor) and a.dtype == torch.float64 for a in arguments):
            if function is torch.Tensor.float:
                return arguments[0]
            arguments = tuple(torch.float64 if a is torch.float32 else a for a in arguments)
            options = {key: torch.float64 if a is torch.float32 else a for key, a in options.items()}
        return function(*arguments, **options)


def checkpoint_names(tensors, kind):
    """Tensors by transformers' names -> by the names in its files, with experts, gate and up separate"""
    mlp, gate, up, down = "mlp", "gate_proj", "up_proj", "down_proj"
    if kind == "mixtral":
        mlp, gate, up, down = "block_sparse_moe", "w1", "w3", "w2"
    found = {}
    for name, tensor in tensors.items():
        stem = name.rpartition(".")[0].replace(".mlp.", f".{mlp}.")
        if name.endswith("experts.gate_up_proj"):
            for number, matrix in enumerate(tensor):
                half = len(matrix) // 2
                found[f"{stem}.{number}.{gate}.weight"] = matrix[:half]
                found[f"{stem}.{number}.{up}.weight"] = matrix[half:]
        elif name.endswith("experts.down_proj"):
            found |= {f"{stem}.{number}.{down}.weight": matrix for number, matrix in enumerate(tensor)}
        else:
            found[name.replace(".mlp.", f".{mlp}.")] = tensor
    return found


def test_float64_logits_and_gradients_equal_transformers(oracle, tmp_path):
    kind, numbers, _, _ = oracle
    theirs = make.build(kind, numbers, dtype=torch.float64)
    make.write(theirs, kind, tmp_path / "wide")
    ours, tokens = lm.from_hf(tmp_path / "wide"), text((2, 60))
    rope, rotary = ours.blocks[0].attention.rope, theirs.model.rotary_emb
    turn = frequencies(rope.dim, rope.theta, rope.scaling, tokens.device)
    torch.testing.assert_close(turn, rotary.inv_freq.float(), rtol=2e-7, atol=0)  # YaRN: up to the last bit
    rotary.inv_freq = turn.clone()
    targets = text((2, 60), seed=3).flatten()
    found = ours(tokens).logits
    F.cross_entropy(found.flatten(0, 1), targets).backward()
    with Wide():
        wanted = theirs(tokens).logits
        F.cross_entropy(wanted.flatten(0, 1), targets).backward()
    assert found.dtype == wanted.dtype == torch.float64
    assert relative(found, wanted) < 1e-12
    of_theirs = checkpoint_names({name: p.grad for name, p in theirs.named_parameters()}, kind)
    of_ours = {
        name: part
        for ours_name, p in ours.named_parameters()
        for name, part in parts_of(ours_name, p.grad, kind)
    }
    assert of_ours.keys() == of_theirs.keys()
    for name, gradient in of_ours.items():
        assert of_theirs[name].abs().max() > 0, name
        assert relative(gradient, of_theirs[name]) < 1e-12, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_transformers_reads_our_export_bit_for_bit(oracle, transformers, tmp_path, dtype):
    kind, _, theirs, folder = oracle

    def read(folder, dtype):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            output_loading_info=True,
            attn_implementation="eager",
            experts_implementation="eager",
        )
        assert not any(info.values()), info
        return model.eval()

    if dtype != torch.float32:
        name = "deepseek_v3" if kind == "kimi_k2" else kind
        edit(folder, model_type=name)
        theirs = read(folder, dtype)  # keeps routers, or their biases, in fp32
        folder = tmp_path / "theirs"
        make.write(theirs, kind, folder)
    ours = lm.from_hf(folder)
    assert ours.head.weight.dtype == dtype
    for name, shard_bytes in (("one", 10**9), ("many", 20_000)):
        out = tmp_path / name
        lm.to_hf(ours, out, shard_bytes)
        assert (out / shards.INDEX).exists() == (name == "many")
        assert bits(stored(out)) == bits(stored(folder))
        again = read(out, "auto")
        assert bits(again.state_dict()) == bits(theirs.state_dict())
        if dtype == torch.float32:
            with torch.no_grad():  # config.json means the same, too
                assert torch.equal(again(text((2, 20))).logits, theirs(text((2, 20))).logits)


READ = [  # keys that transformers may read, beside those of a family's tables
    *("is_causal", "is_decoder", "is_encoder_decoder", "attention_chunk_size", "per_layer_config"),
    *(
        "kv_sharing_modes",
        "use_qk_norm",
        "qk_layernorm",
        "sliding_window",
        "layer_types",
        "num_local_experts",
    ),
    *(
        "mlp_layer_types",
        "mlp_only_layers",
        "decoder_sparse_step",
        "first_k_dense_replace",
        "rope_interleave",
    ),
    *("head_dim", "qkv_bias", "pretraining_tp", "chunk_size_feed_forward", "max_window_layers", "use_rope"),
]


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_changed_key_is_refused_or_means_what_it_means_to_transformers(transformers, folder, kind):
    """Every key with every simple value: where both load the folder, the logits agree."""
    family, both = FAMILIES[kind], 0
    keys = [*(name.theirs for name in family.names), *MUST, *family.must, *READ]
    for key in dict.fromkeys(keys):
        for value in (None, False, 0, True, ...):
            made = folder(kind)
            edit(made, **{key: value})
            try:
                ours = lm.from_hf(made)
                edit(made, model_type="deepseek_v3" if kind == "kimi_k2" else kind)
                theirs = transformers.AutoModelForCausalLM.from_pretrained(
                    made, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
                )
                with torch.no_grad():
                    wanted = theirs.eval()(expected(kind)["tokens"], use_cache=False).logits
            except Exception:  # transformers raises everything, from TypeError to its own validation errors
                continue
            with torch.no_grad():
                assert relative(ours(expected(kind)["tokens"]).logits, wanted) < 1e-4, (key, value)
            both += 1
    assert both > 20


FAR = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 32.0, "original_max_position_embeddings": 4096}
FAR_MSCALE = {**FAR, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
WIDE_ROPE = {**DEEPSEEK, "qk_rope_head_dim": 16, "max_position_embeddings": 131072}
FAR_ORACLES = {
    "V3": ("deepseek_v3", {**WIDE_ROPE, "rope_parameters": FAR_MSCALE}),
    "V3, halves": ("deepseek_v3", {**WIDE_ROPE, "rope_parameters": FAR_MSCALE, "rope_interleave": False}),
    "Kimi K2": (
        "kimi_k2",
        {**WIDE_ROPE, "rope_parameters": {**FAR_MSCALE, "beta_fast": 1.0, "rope_theta": 50000.0}},
    ),
    "V2": (
        "deepseek_v2",
        {**WIDE_ROPE, "rope_parameters": {**FAR_MSCALE, "mscale": 0.707, "mscale_all_dim": 0.707}},
    ),
    "Llama": (
        "llama",
        {**GROUPED, "head_dim": 32, "rope_parameters": FAR, "max_position_embeddings": 131072},
    ),
    "Qwen2": (
        "qwen2",
        {**GROUPED, "head_dim": 32, "rope_parameters": FAR, "max_position_embeddings": 131072},
    ),
    "Llama 3": (
        "llama",
        {
            **GROUPED,
            "head_dim": 32,
            "max_position_embeddings": 131072,
            "rope_parameters": {
                **LLAMA3,
                "factor": 16.0,
                "rope_theta": 500000.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
}


@pytest.mark.parametrize("kind, numbers", FAR_ORACLES.values(), ids=FAR_ORACLES)
def test_logits_equal_transformers_up_to_position_131072(transformers, tmp_path, kind, numbers):
    theirs = make.build(kind, numbers)
    make.write(theirs, kind, tmp_path / "x")
    ours, tokens = lm.from_hf(tmp_path / "x"), text((2, 60))
    drawn = torch.randint(131072, (2, 60), generator=torch.Generator().manual_seed(4))
    drawn[:, :4], drawn[:, 4:7] = torch.arange(4), torch.tensor([131070, 131071, 131072])
    positions = drawn.sort(dim=-1).values
    seen = torch.ones_like(tokens)  # else transformers takes the gaps for several packed texts
    with torch.no_grad():
        wanted = theirs(tokens, position_ids=positions, attention_mask=seen).logits
        found = ours(tokens, positions=positions).logits
        near = ours(tokens).logits
    assert relative(found, wanted) < 1e-5
    assert relative(near, wanted) > 1e-2  # the positions matter


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_tiny_checkpoints_are_what_transformers_writes_today(transformers, tmp_path, kind):
    theirs = make.build(kind, make.CASES[kind])
    make.write(theirs, kind, tmp_path / kind)
    assert bits(stored(tmp_path / kind)) == bits(stored(REFERENCE / kind))
    assert to_ours(files.read_json(tmp_path / kind / "config.json")) == to_ours(
        files.read_json(REFERENCE / kind / "config.json")
    )
    wanted = expected(kind)
    with torch.no_grad():
        assert relative(theirs(wanted["tokens"]).logits, wanted["logits"]) < 1e-5
    assert torch.equal(make.continued(theirs, wanted["tokens"], 8), wanted["continued"])


MEMORY = """
import sys
from pathlib import Path
import torch
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
before = peak()
import lm, lm.hub.hf
if sys.argv[2:]:
    lm.hub.hf.import_folder(Path(sys.argv[1]), Path(sys.argv[2]))
else:
    model = lm.from_hf(sys.argv[1])
print(peak() - before)
"""


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory):
    """A folder with 2 GB of bf16 in shards, and its size in bytes; removed afterwards."""
    folder = tmp_path_factory.mktemp("large")
    if not Path("/proc/self/status").exists() or shutil.disk_usage(folder).free < 6 * 10**9:
        pytest.skip("needs /proc for the peak memory, and 6 GB of free disk")
    sizes = {"vocab_size": 5000, "dim": 1024, "num_layers": 11, "hidden_dim": 4096}
    attention = {"num_heads": 8, "q_lora_rank": 256, "kv_lora_rank": 256, "qk_nope_head_dim": 64}
    moe = {"num_experts": 32, "hidden_dim": 1000, "num_groups": 4, "top_groups": 2}
    config = Config.from_dict({"model": {**sizes, "attention": attention, "moe": moe}}).model
    with torch.device("meta"):
        model = lm.Transformer(config).bfloat16()
    files.write_json(folder / "config.json", to_theirs(config))
    parts = [
        (name, view.nbytes, lambda view=view: torch.full(view.shape, 0.01, dtype=view.dtype))
        for ours, tensor in model.state_dict().items()
        for name, view in parts_of(ours, tensor, "deepseek_v3")
    ]
    shards.write(folder, parts, 300 * 10**6)
    yield folder, sum(size for _, size, _ in parts)
    shutil.rmtree(folder)


@pytest.mark.parametrize("imported", [False, True], ids=["from_hf", "import_folder"])
def test_reading_needs_little_more_memory_than_the_model(large_folder, tmp_path, imported):
    folder, size = large_folder
    assert size > 2 * 10**9 and len(list(folder.glob("*.safetensors"))) > 6
    out = [str(tmp_path / "out")] if imported else []
    ran = subprocess.run(
        [sys.executable, "-c", MEMORY, str(folder), *out],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert ran.returncode == 0, ran.stderr
    share = int(ran.stdout) / size
    assert 1 < share < 1.3, share
