"""Hugging Face checkpoints: transformers' numbers, their files bit for bit, and hostile folders.

The quick tests read tests/lm/hub/reference, tiny checkpoints that transformers wrote; the long ones
ask transformers itself.
"""

import importlib.util
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

import lm
from lm import checkpoint, files, fp8
from lm.config import Config
from lm.hub import hf, shards
from lm.hub.families import FAMILIES
from lm.hub.translate import parts_of, to_ours, to_theirs
from mla.rope import frequencies
from moe import Routing
from tests.helpers import ROOT, content

REFERENCE = Path(__file__).parent / "reference"
long = pytest.mark.long


def loaded_from(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = loaded_from(REFERENCE / "make.py")


def bits(tensors):
    """dtype, shape and bytes of each."""
    return {
        name: (
            tensor.dtype,
            tuple(tensor.shape),
            tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes(),
        )
        for name, tensor in tensors.items()
    }


def stored(folder):
    """All tensors of a folder's safetensors files."""
    return {
        name: tensor for path in folder.glob("model*.safetensors") for name, tensor in load_file(path).items()
    }


def edit(folder, **changes):
    """Change keys of config.json; `...` removes one."""
    path = folder / "config.json"
    raw = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))


@pytest.fixture
def folder(tmp_path):
    """folder(kind, **changes): a copy of a tiny checkpoint, its config.json changed."""

    def copy(kind="deepseek_v3", **changes):
        made = Path(shutil.copytree(REFERENCE / kind, tmp_path / "model", dirs_exist_ok=True))
        edit(made, **changes)
        return made

    return copy


# --- tiny checkpoints of every architecture


def expected(kind):
    return load_file(REFERENCE / kind / "expected.safetensors")


def off(model, kind):
    """The largest difference from transformers' logits, relative to the largest of them."""
    wanted = expected(kind)
    with torch.no_grad():
        logits = model(wanted["tokens"]).logits
    return ((logits - wanted["logits"]).abs().max() / wanted["logits"].abs().max()).item()


def test_there_is_a_tiny_checkpoint_of_every_architecture():
    folders = {path.parent.name for path in REFERENCE.glob("*/config.json")}
    assert folders == set(FAMILIES) == set(make.CASES)
    assert sum(path.stat().st_size for path in REFERENCE.rglob("*")) < 400_000


@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_and_greedy_text_are_those_of_transformers(kind):
    model = lm.from_hf(REFERENCE / kind)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert off(model, kind) < 1e-5
    continued = expected(kind)["continued"]
    assert continued.shape == (2, 20)
    assert torch.equal(lm.generate(model, continued[:, :12], 8, temperature=0), continued)


def weights_with_the_bias(model):
    """V3's best known mistake: the selection bias counts in the weights too."""

    def forward(router, x):
        routing = type(router).forward(router, x)
        weights = (routing.scores + router.bias).gather(-1, routing.experts)
        weights = weights / weights.sum(-1, keepdim=True) * router.routed_scaling_factor
        return Routing(routing.experts, weights, routing.scores, routing.logits)

    for router in model.routers():
        router.forward = types.MethodType(forward, router)


def of_routers(**changes):
    def change(model):
        for router in model.routers():
            vars(router).update(changes)

    return change


def of_rope(**changes):
    def change(model):
        for block in model.blocks:
            vars(block.attention.rope).update(changes)

    return change


def without_mscale(model):
    for block in model.blocks:
        block.attention.scale /= block.attention.rope.softmax_factor


def without_cos_sin_growth(model):
    for block in model.blocks:
        block.attention.rope.cos_sin_factor = 1.0


def closed_groups_at_zero(model):
    """A group that is not kept gets choice scores of 0, which beat negative ones."""

    def forward(router, x):
        routing = type(router).forward(router, x)
        choice = routing.scores + router.bias
        grouped = choice.unflatten(-1, (router.num_groups, -1))
        best = grouped.topk(2).values.sum(-1).topk(router.top_groups).indices
        closed = torch.ones(*grouped.shape[:-1], dtype=torch.bool).scatter(-1, best, False)
        experts = grouped.masked_fill(closed.unsqueeze(-1), 0.0).flatten(-2).topk(router.top_k).indices
        weights = routing.scores.gather(-1, experts)
        weights = weights / weights.sum(-1, keepdim=True) * router.routed_scaling_factor
        return Routing(experts, weights, routing.scores, routing.logits)

    for router in model.routers():
        router.forward = types.MethodType(forward, router)


def ungated(model):
    for block in model.blocks[1:]:
        block.mlp.shared = block.mlp.shared.mlp


def zeroed(*words):
    """Parameters that have these words in their name are 0, or the norm's weights 1."""

    def change(model):
        for name, parameter in model.named_parameters():
            if any(word in name for word in words):
                parameter.data.fill_(1.0 if "norm" in name else 0.0)

    return change


def swapped_gate_and_up(model):
    for block in model.blocks:
        for part in (block.mlp, getattr(block.mlp, "shared", None), getattr(block.mlp, "experts", None)):
            held = getattr(part, "gate_up", None)
            if held is not None:
                data = held.data if isinstance(held, torch.nn.Parameter) else held.weight.data
                data.copy_(torch.cat(data.chunk(2, dim=-2)[::-1], dim=-2))


def rope_first(model):
    """Query heads as [rope, nope], as some write them."""
    for block in model.blocks:
        attention = block.attention
        nope = attention.qk_nope_head_dim
        weight = (attention.q if attention.q_lora_rank is None else attention.q_b).weight
        heads = weight.data.unflatten(0, (attention.num_heads, -1))
        weight.data.copy_(torch.cat((heads[:, nope:], heads[:, :nope]), dim=1).flatten(0, 1))


def latent_eps(model):
    for block in model.blocks:
        block.attention.kv_norm.eps = 0.1


WRONG = {  # one mistake each
    "V3: the bias counts in the weights": ("deepseek_v3", weights_with_the_bias),
    "Kimi: the bias counts in the weights": ("kimi_k2", weights_with_the_bias),
    "V3: no bias": ("deepseek_v3", lambda model: [router.bias.zero_() for router in model.routers()]),
    "V3: groups by their best one": ("deepseek_v3", of_routers(group_best=1)),
    "V3: closed groups at zero": ("deepseek_v3", closed_groups_at_zero),
    "V3: no groups": ("deepseek_v3", of_routers(num_groups=1, top_groups=1)),
    "V3: weights not normalised": ("deepseek_v3", of_routers(normalize=False)),
    "V3: no routed scale": ("deepseek_v3", of_routers(routed_scaling_factor=1.0)),
    "V3: no shared expert": ("deepseek_v3", zeroed("shared")),
    "V3: rope in halves": ("deepseek_v3", of_rope(interleaved=False)),
    "V3: no mscale": ("deepseek_v3", without_mscale),
    "V3: no YaRN": ("deepseek_v3", of_rope(scaling=None)),
    "V3: no biases in attention": ("deepseek_v3", zeroed("q_a.bias", "kv_a.bias", "out.bias")),
    "V3: rope before nope": ("deepseek_v3", rope_first),
    "V3: another eps in the latent's norm": ("deepseek_v3", latent_eps),
    "V3: no norm's weight on the latent": ("deepseek_v3", zeroed("kv_norm")),
    "V3: up before gate": ("deepseek_v3", swapped_gate_and_up),
    "V2: normalised weights": ("deepseek_v2", of_routers(normalize=True)),
    "V2: groups by their two best": ("deepseek_v2", of_routers(group_best=2)),
    "V2: no mscale": ("deepseek_v2", without_mscale),
    "V2: rope in halves": ("deepseek_v2", of_rope(interleaved=False)),
    "GLM: rope in halves": ("glm4_moe_lite", of_rope(interleaved=False)),
    "Youtu: rope in halves": ("youtu", of_rope(interleaved=False)),
    "Llama: rope interleaved": ("llama", of_rope(interleaved=True)),
    "Llama: no scaling": ("llama", of_rope(scaling=None)),
    "Llama: no biases": ("llama", zeroed("bias")),
    "Qwen2: no biases": ("qwen2", zeroed("bias")),
    "Qwen2: cos and sin do not grow": ("qwen2", without_cos_sin_growth),
    "Qwen3: no norms of query and key": ("qwen3", zeroed("q_norm", "k_norm")),
    "Qwen3: no linear scaling": ("qwen3", of_rope(scaling=None)),
    "Mixtral: up before gate": ("mixtral", swapped_gate_and_up),
    "Mixtral: weights not normalised": ("mixtral", of_routers(normalize=False)),
    "Qwen2-MoE: no gate on the shared expert": ("qwen2_moe", ungated),
    "Qwen2-MoE: normalised weights": ("qwen2_moe", of_routers(normalize=True)),
    "Qwen3-MoE: weights not normalised": ("qwen3_moe", of_routers(normalize=False)),
}


@pytest.mark.parametrize("kind, mistake", WRONG.values(), ids=WRONG)
def test_a_mistake_is_seen(kind, mistake):
    model = lm.from_hf(REFERENCE / kind)
    mistake(model)
    assert off(model, kind) > 1e-3


# --- dtypes, shards, tokenizer, multi-token prediction


def cast(folder, dtype, keep=("e_score_correction_bias",)):
    """The folder's weights in another dtype."""
    path = folder / "model.safetensors"
    tensors = {n: t if n.endswith(keep) else t.to(dtype) for n, t in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    return tensors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_imported_is_exported_bit_for_bit(folder, tmp_path, kind, dtype):
    tensors = cast(folder(kind), dtype)
    model = lm.from_hf(tmp_path / "model")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    for name, shard_bytes in (("one", 10**9), ("many", 2000)):
        lm.to_hf(model, tmp_path / name, shard_bytes)
        assert bits(stored(tmp_path / name)) == bits(tensors)
        again = lm.from_hf(tmp_path / name)
        assert again.config == model.config and bits(again.state_dict()) == bits(model.state_dict())
    assert (tmp_path / "one" / "model.safetensors").is_file() and (tmp_path / "many" / shards.INDEX).is_file()
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert json.loads((tmp_path / "one" / "config.json").read_text())["torch_dtype"] == str(dtype)[6:]


def test_a_selection_bias_is_never_narrowed(folder, tmp_path):
    exact = cast(folder(), torch.bfloat16)
    model = lm.from_hf(tmp_path / "model")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(model.routers()[0].bias, exact[name]) and exact[name].dtype == torch.float32
    assert torch.equal(lm.from_hf(tmp_path / "model", torch.float16).routers()[0].bias, exact[name])
    small = cast(tmp_path / "model", torch.bfloat16, keep=("nothing",))  # as some have stored it
    bias = lm.from_hf(tmp_path / "model").routers()[0].bias
    assert bias.dtype == torch.float32 and torch.equal(bias, small[name].float())


def test_a_dtype_may_be_asked_for(folder):
    exact = load_file(folder("mixtral") / "model.safetensors")
    model = lm.from_hf(folder("mixtral"), torch.bfloat16)
    name = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    assert model.head.weight.dtype == torch.bfloat16
    assert torch.equal(model.blocks[0].mlp.experts.down[3], exact[name].bfloat16())


def test_routers_and_norms_may_have_a_dtype_of_their_own(folder, tmp_path):
    """As Kimi's and Moonlight's gates have; they are exported as they came."""
    tensors = cast(folder(), torch.bfloat16, keep=("e_score_correction_bias", "gate.weight", "norm.weight"))
    model = lm.from_hf(tmp_path / "model")
    assert model.routers()[0].weight.dtype == torch.float32 and model.head.weight.dtype == torch.bfloat16
    lm.to_hf(model, tmp_path / "out")
    assert bits(stored(tmp_path / "out")) == bits(tensors)
    assert torch.isfinite(model(torch.arange(9).unsqueeze(0)).logits).all()


def test_weights_are_memory_of_their_own(folder):
    model = lm.from_hf(folder())
    before, path = bits(model.state_dict()), folder() / "model.safetensors"
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.write(b"\xff" * size)
    assert bits(model.state_dict()) == before
    os.truncate(path, 0)
    assert bits(model.state_dict()) == before


def test_a_tied_head_may_be_stored_too_if_it_is_the_embedding(folder, tmp_path):
    path = folder("qwen2") / "model.safetensors"
    tensors = load_file(path)
    assert "lm_head.weight" not in tensors
    head = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head}, path, {"format": "pt"})
    model = lm.from_hf(tmp_path / "model")
    assert model.head.weight is model.embedding.weight and off(model, "qwen2") < 1e-5
    lm.to_hf(model, tmp_path / "out")
    assert bits(stored(tmp_path / "out")) == bits(tensors)
    head[3, 3] += 1
    save_file({**tensors, "lm_head.weight": head}, path, {"format": "pt"})
    refused(tmp_path / "model", "tie_word_embeddings", "lm_head.weight")
    for other in (head[:5].clone(), head.to(torch.float8_e4m3fn)):
        save_file({**tensors, "lm_head.weight": other}, path, {"format": "pt"})
        refused(tmp_path / "model", "lm_head.weight")


def test_inverse_frequencies_of_old_files_are_passed_over(folder):
    path = folder("llama") / "model.safetensors"
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(3) for i in range(2)}
    save_file({**load_file(path), **extra}, path)
    assert off(lm.from_hf(path.parent), "llama") < 1e-5


TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"),
    "chat_template.jinja",
)


@pytest.fixture
def with_mtp(folder):
    """V3's folder with a further layer of multi-token prediction, and a tokenizer."""
    path = folder() / "model.safetensors"
    extra = {
        f"model.layers.2.{name}": torch.randn(3, 4) for name in ("eh_proj.weight", "shared_head.head.weight")
    }
    extra["model.layers.2.self_attn.q_a_proj.weight"] = torch.randn(5).to(torch.float8_e4m3fn)
    extra["model.layers.2.self_attn.q_a_proj.weight_scale_inv"] = torch.randn(1)
    save_file({**load_file(path), **extra}, path)
    for name in TOKENIZER_FILES:
        (path.parent / name).write_text(f"this is {name}")
    (path.parent / "modeling_evil.py").write_text("raise SystemExit")
    return path.parent, extra


def test_multi_token_prediction_is_named_in_a_warning(with_mtp):
    path, _ = with_mtp
    with pytest.warns(
        UserWarning, match="4 tensors of multi-token prediction .* model.layers.2.eh_proj.weight"
    ) as told:
        model = lm.from_hf(path)
    assert len(told) == 1 and told[0].filename == __file__
    assert off(model, "deepseek_v3") < 1e-5


def test_an_imported_folder_is_loaded_as_the_same_model(with_mtp, tmp_path):
    path, extra = with_mtp
    aside = hf.import_folder(path, tmp_path / "out")
    assert aside.keys() == extra.keys()
    assert bits(load_file(tmp_path / "out" / "mtp.safetensors")) == bits(extra)
    model = lm.load(tmp_path / "out")
    assert off(model, "deepseek_v3") < 1e-5
    assert model.config == to_ours(json.loads((path / "config.json").read_text()))
    names = {"config.toml", "model.safetensors", "mtp.safetensors", *TOKENIZER_FILES}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    for name in TOKENIZER_FILES:
        assert (tmp_path / "out" / name).read_text() == f"this is {name}"


@pytest.mark.parametrize("name", ["config.json", *TOKENIZER_FILES])
def test_links_out_of_the_folder_are_not_copied(with_mtp, tmp_path, name):
    path, _ = with_mtp
    (tmp_path / "secret").write_bytes((path / name).read_bytes())
    (path / name).unlink()
    (path / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=f"{name}: is a link that leads out of the folder"):
        hf.import_folder(path, tmp_path / "out")
    assert {entry.name for entry in tmp_path.iterdir()} == {"model", "secret"}


def test_a_tokenizer_is_exported_along(with_mtp, tmp_path):
    path, _ = with_mtp
    hf.import_folder(path, tmp_path / "ours")
    hf.to_hf(lm.load(tmp_path / "ours"), tmp_path / "out", tokenizer_from=tmp_path / "ours")
    names = {"config.json", "model.safetensors", *TOKENIZER_FILES}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    hf.to_hf(lm.load(tmp_path / "ours"), tmp_path / "bare", tokenizer_from=tmp_path / "out" / "absent")
    assert {file.name for file in (tmp_path / "bare").iterdir()} == {"config.json", "model.safetensors"}


def test_without_multi_token_prediction_there_is_no_such_file(tmp_path):
    assert hf.import_folder(REFERENCE / "llama", tmp_path / "out") == {}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.toml", "model.safetensors"}
    assert off(lm.load(tmp_path / "out"), "llama") < 1e-5


def test_a_model_of_our_own_is_exported_after_training_steps(tiny, make_model, tmp_path):
    for number, changes in enumerate(
        [{}, {"model": {"tie_embeddings": True}}, {"model": {"num_dense_layers": 3}}]
    ):
        model = make_model(tiny(**changes).model, torch.float32)
        lm.to_hf(model, tmp_path / str(number))
        again = lm.from_hf(tmp_path / str(number))
        tokens = torch.arange(24).reshape(2, 12)
        assert torch.equal(again(tokens).logits, model(tokens).logits)


# --- FP8


def quantised(folder):
    """Make a bf16 folder an FP8 one as DeepSeek's are -> what its weights are by definition, in bf16"""
    path, made, meant = folder / "model.safetensors", {}, {}
    for name, tensor in load_file(path).items():
        meant[name] = tensor
        if tensor.ndim == 2 and not name.startswith(("model.embed", "lm_head")) and ".gate." not in name:
            made[name], made[f"{name}_scale_inv"] = fp8.quantize(tensor)
            meant[name] = torch.empty_like(tensor)
            for i in range(0, tensor.shape[0], 128):
                for j in range(0, tensor.shape[1], 128):
                    block = made[name][i : i + 128, j : j + 128].float()
                    scale = made[f"{name}_scale_inv"][i // 128, j // 128]
                    meant[name][i : i + 128, j : j + 128] = (block * scale).bfloat16()
        else:
            made[name] = tensor
    save_file(made, path, {"format": "pt"})
    edit(folder, quantization_config={
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]
    })  # fmt: skip
    return meant


RAGGED = {  # larger than a block, and no multiple of it
    "model": {"vocab_size": 61, "dim": 136, "hidden_dim": 141, "num_layers": 2},
    "attention": {
        "num_heads": 5,
        "q_lora_rank": 131,
        "kv_lora_rank": 130,
        "qk_nope_head_dim": 21,
        "v_head_dim": 27,
    },
    "moe": {"num_experts": 4, "hidden_dim": 129, "num_groups": 1, "top_groups": 1},
}


@pytest.fixture
def bf16_folder(tiny, make_model, tmp_path):
    """A V3 in bf16 whose matrices are several blocks, the last ones ragged."""
    folder = tmp_path / "model"
    lm.to_hf(make_model(tiny(**RAGGED).model, torch.bfloat16), folder)
    return folder


@pytest.mark.parametrize("kind", ["deepseek_v3", "kimi_k2"])
def test_an_fp8_folder_is_read_as_its_dequantised_weights_bit_for_bit(bf16_folder, tmp_path, kind):
    before = load_file(bf16_folder / "model.safetensors")
    meant = quantised(bf16_folder)
    edit(bf16_folder, model_type=kind)
    changed = [name for name in meant if not torch.equal(meant[name], before[name])]
    assert len(changed) == 2 * 5 + 3 + 4 * 3 + 3  # attention twice, a dense MLP, the experts, the shared one
    model = lm.from_hf(bf16_folder)
    lm.to_hf(model, tmp_path / "out")
    assert bits(stored(tmp_path / "out")) == bits(meant)
    hf.import_folder(bf16_folder, tmp_path / "ours")
    assert bits(lm.load(tmp_path / "ours").state_dict()) == bits(model.state_dict())


def test_fp8_may_be_read_in_fp32(bf16_folder):
    quantised(bf16_folder)
    held = load_file(bf16_folder / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    model = lm.from_hf(bf16_folder, torch.float32)
    want = fp8.dequantize(held[name], held[f"{name}_scale_inv"], torch.float32)
    assert torch.equal(model.blocks[0].attention.out.weight, want)


def test_fp8_that_lacks_its_scales_or_has_others_is_refused(bf16_folder):
    quantised(bf16_folder)
    path = bf16_folder / "model.safetensors"
    whole, name = load_file(path), "model.layers.1.mlp.experts.2.up_proj.weight"
    scales = f"{name}_scale_inv"
    for change, said in [
        ({scales: None}, [f"{name} is FP8, but {scales} is nowhere"]),
        ({scales: torch.ones(1, 2)}, [scales, "(1, 2)", "(2, 2)"]),
        ({scales: torch.ones(4)}, [scales, "(4,)", "(2, 2)"]),
        ({scales: torch.full((2, 2), math.nan)}, [name, "NaN"]),
        ({scales: torch.full((2, 2), math.inf)}, [name, "infinite"]),
        ({"model.embed_tokens.weight_scale_inv": torch.ones(1, 1)}, ["1 tensors too many", "embed_tokens"]),
        (
            {"model.norm.weight": whole["model.norm.weight"].to(torch.float8_e4m3fn)},
            ["model.norm.weight", "FP8"],
        ),
        (
            {
                "model.norm.weight": whole["model.norm.weight"].to(torch.float8_e4m3fn),
                "model.norm.weight_scale_inv": torch.ones(1, 2),
            },
            ["model.norm.weight", "(136,)"],
        ),
    ]:
        tensors = {n: t for n, t in {**whole, **change}.items() if t is not None}
        save_file(tensors, path)
        refused(bf16_folder, *said)


# --- hostile folders


def refused(folder, *said, names=None):
    """from_hf(folder) is one ValueError line, import_folder too, and neither writes anything -> the line"""
    before = content(folder.parent)
    with pytest.raises(ValueError) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lm.from_hf(folder)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    assert str(names or folder) in message
    assert all(word in message for word in said), message
    out = folder.parent / "never"
    with pytest.raises(ValueError):
        hf.import_folder(folder, out)
    assert content(folder.parent) == before
    return message


def test_folders_that_are_none(folder, tmp_path):
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
    "a key twice": (b'{"model_type": "llama", "model_type": "qwen2"}', ["'model_type'", "twice"]),
    "NaN": (b'{"rms_norm_eps": NaN}', ["NaN"]),
    "1e400": (b'{"rms_norm_eps": 1e400}', ["1e400"]),
    "5,000 digits": (b'{"hidden_size": ' + b"9" * 5000 + b"}", ["digits"]),
    "100,000 brackets": (b"[" * 100_000, []),
    "100,000 objects": (b'{"a":' * 100_000, []),
}


@pytest.mark.parametrize("text, said", CONFIG_TEXTS.values(), ids=CONFIG_TEXTS)
def test_a_broken_config_is_one_line_that_names_it(folder, text, said):
    made = folder()
    (made / "config.json").write_bytes(text)
    refused(made, *said, names=made / "config.json")


YARN = make.YARN
OPTIONS = [  # an architecture, changes to config.json, words of the line
    ("deepseek_v3", {"model_type": "gpt2"}, ["model_type 'gpt2'", "deepseek_v3"]),
    ("deepseek_v3", {"model_type": ["deepseek_v3"]}, ["model_type"]),
    ("deepseek_v3", {"model_type": ...}, ["model_type"]),
    ("deepseek_v3", {"hidden_size": "15"}, ["'15'"]),
    ("llama", {"hidden_size": "12", "head_dim": ...}, ["hidden_size", "'12'"]),
    ("llama", {"num_attention_heads": 0, "head_dim": ...}, ["num_attention_heads", "0"]),
    ("deepseek_v3", {"hidden_size": 15.0}, ["15.0"]),
    ("deepseek_v3", {"hidden_size": True}, ["True"]),
    ("deepseek_v3", {"hidden_size": -15}, ["-15"]),
    ("deepseek_v3", {"hidden_size": ...}, ["lacks hidden_size"]),
    ("deepseek_v3", {"q_lora_rank": ...}, ["lacks q_lora_rank"]),
    ("deepseek_v3", {"n_group": ...}, ["lacks n_group"]),
    ("deepseek_v3", {"first_k_dense_replace": ...}, ["lacks first_k_dense_replace"]),
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
        ["lacks num_key_value_heads"],
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
ROPES = [
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
def test_an_option_that_is_not_supported_is_named(folder, kind, changes, said):
    made = folder(kind, **changes)
    refused(made, *said, names=made / "config.json")


@pytest.mark.parametrize("kind, changes, said", ROPES, ids=str)
def test_a_rope_that_is_not_supported_is_named(folder, kind, changes, said):
    rope = {**make.CASES[kind]["rope_parameters"], **changes}
    made = folder(kind, rope_parameters={key: value for key, value in rope.items() if value is not ...})
    refused(made, *said, names=made / "config.json")


def test_what_no_option_is_of_the_function_is_passed_over(folder):
    made = folder(
        use_cache=False, pretraining_tp=2, auto_map={"AutoModel": "evil.Evil"}, use_magic=False, magic=None
    )
    assert off(lm.from_hf(made), "deepseek_v3") < 1e-5


SIZES = {  # what a config asks for, beside 30 kB of weights
    "dim 10^9": {"hidden_size": 10**9},
    "dim 2^31 - 1 and as many tokens": {"hidden_size": 2**31 - 1, "vocab_size": 2**31 - 1},
    "dim 2^31 - 1 and as wide": {"hidden_size": 2**31 - 1, "intermediate_size": 2**31 - 1},
    "dim 10^18": {"hidden_size": 10**18},
    "another dim": {"hidden_size": 16},
    "vocabulary 10^9": {"vocab_size": 10**9},
    "10^9 experts": {"n_routed_experts": 10**9},
    "1,000 experts": {"n_routed_experts": 1000},
    "four experts more": {"n_routed_experts": 16},
    "one expert less": {"n_routed_experts": 11, "topk_group": 1, "n_group": 1},
    "10^9 heads": {"num_attention_heads": 10**9, "num_key_value_heads": 10**9},
    "2^31 - 1 heads of 2^31 - 1": {
        "num_attention_heads": 2**31 - 1,
        "num_key_value_heads": 2**31 - 1,
        "qk_nope_head_dim": 2**31 - 1,
        "qk_head_dim": ...,
    },
    "1,000 layers": {"num_hidden_layers": 1000},
    "a layer more": {"num_hidden_layers": 3},
    "no shared expert": {"n_shared_experts": 0},
    "10^9 shared experts": {"n_shared_experts": 10**9},
    "hidden 10^9": {"intermediate_size": 10**9},
    "latent 10^9": {"kv_lora_rank": 10**9},
    "query not compressed": {"q_lora_rank": None},
    "no biases": {"attention_bias": False},
    "all dense": {"first_k_dense_replace": 2},
    "odd rope": {"qk_rope_head_dim": 5, "head_dim": ..., "qk_head_dim": ...},
    "groups of one": {"n_group": 12, "topk_group": 4},
    "another architecture": {"model_type": "youtu"},
}


@pytest.mark.parametrize("changes", SIZES.values(), ids=SIZES)
def test_a_config_that_asks_for_other_weights_is_refused(folder, changes):
    refused(folder("deepseek_v3", **changes))


QWEN_SIZES = {
    "10^9 layers": {"num_hidden_layers": 10**9},
    "10^9 experts": {"num_experts": 10**9},
    "10^9 layers of a type": {"num_hidden_layers": 10**9, "layer_types": None},
    "heads of 10^9": {"head_dim": 10**9},
}


@pytest.mark.parametrize("changes", QWEN_SIZES.values(), ids=QWEN_SIZES)
def test_a_qwen_that_asks_for_other_weights_is_refused(folder, changes):
    refused(folder("qwen3_moe", **changes))


GATE = "model.layers.1.mlp.experts.4.gate_proj.weight"  # (3, 15)
TENSORS = {  # changes to the tensors, words of the line
    "one missing": ({GATE: None}, ["1 tensors are missing", GATE]),
    "all missing": (lambda held: dict.fromkeys(held), ["2 layers of 12 experts", "0 tensors"]),
    "one too many": ({"model.extra": torch.ones(2)}, ["1 tensors too many", "model.extra"]),
    "an expert too many": ({GATE.replace(".4.", ".12."): torch.ones(3, 15)}, ["too many", ".experts.12."]),
    "a bias too many": ({"lm_head.bias": torch.ones(29)}, ["too many", "lm_head.bias"]),
    "another name": (lambda held: {GATE: None, "x": held[GATE]}, [GATE]),
    "a scale without FP8": ({f"{GATE}_scale_inv": torch.ones(1, 1)}, ["too many", f"{GATE}_scale_inv"]),
    "transposed": ({GATE: torch.ones(15, 3)}, [GATE, "(15, 3)", "(3, 15)"]),
    "flat": ({GATE: torch.ones(45)}, [GATE, "(45,)", "(3, 15)"]),
    "(1,) for ()": ({"model.norm.weight": torch.ones(1, 15)}, ["model.norm.weight", "(1, 15)", "(15,)"]),
    "int8": ({GATE: torch.ones(3, 15, dtype=torch.int8)}, [GATE, "I8", "BF16"]),
    "int64": ({GATE: torch.ones(3, 15, dtype=torch.int64)}, [GATE, "I64"]),
    "one in bf16": (
        {GATE: torch.ones(3, 15, dtype=torch.bfloat16)},
        ["one matrix", GATE, "bfloat16", "float32"],
    ),
    "a layer's part in bf16": (
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
def test_tensors_that_do_not_fit_are_named(folder, changes, said):
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
def test_a_damaged_file_is_one_line_that_names_it(folder, damage):
    made = folder()
    damage(made / "model.safetensors")
    refused(made, "not a safetensors file", names=made / "model.safetensors")


def test_a_header_longer_than_this_model_can_need_is_not_read(folder):
    made = folder()
    path = made / "model.safetensors"
    empty = ",".join(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(300_000))
    with_header(len(empty) + 2, f"{{{empty}}}".encode())(path)
    refused(made, "a header of", "larger than needed", names=path)


def in_shards(made):
    """The folder's weights in shards with an index -> the index's map"""
    held = load_file(made / "model.safetensors")
    (made / "model.safetensors").unlink()
    parts = ((name, tensor.nbytes, lambda tensor=tensor: tensor) for name, tensor in held.items())
    shards.write(made, parts, 4000)
    return json.loads((made / shards.INDEX).read_text())["weight_map"]


def test_shards_are_read_as_one_file(folder):
    made = folder()
    assert len(set(in_shards(made).values())) > 3
    assert off(lm.from_hf(made), "deepseek_v3") < 1e-5


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x", "a/b.safetensors", "absent.safetensors"])
def test_an_index_that_leads_elsewhere_is_refused(folder, name):
    made = folder()
    placed = in_shards(made)
    for path in (made.parent / "x.safetensors", made / "a" / "b.safetensors"):
        path.parent.mkdir(exist_ok=True)
        shutil.copy(made / placed[GATE], path)
    (made / shards.INDEX).write_text(json.dumps({"weight_map": {**placed, GATE: name}}))
    refused(made, name)


def test_an_index_that_does_not_fit_is_refused(folder):
    made = folder()
    placed = in_shards(made)
    other = next(file for file in placed.values() if file != placed[GATE])
    for changes, said in [({GATE: other}, GATE), ({"extra": other}, "extra"), ({GATE: None}, GATE)]:
        changed = {name: file for name, file in {**placed, **changes}.items() if file}
        (made / shards.INDEX).write_text(json.dumps({"weight_map": changed}))
        refused(made, said)
    (made / shards.INDEX).write_text("[" * 100_000)
    refused(made, names=made / shards.INDEX)


def test_a_hub_snapshot_is_followed_and_other_links_are_not(folder, tmp_path):
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
    refused(made, "leads out of the folder", names=made / "model.safetensors")


def test_only_pickles(folder):
    made = folder()
    (made / "model.safetensors").rename(made / "pytorch_model.bin")
    refused(made, "pickle is never read: convert to safetensors", names=made / "pytorch_model.bin")
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


def test_hostile_folders_take_no_memory_and_run_and_write_nothing(tmp_path):
    if not Path("/proc/self/status").exists():
        pytest.skip("the largest memory is read from /proc")
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
    assert [
        entry for entry in seen if not entry[1].startswith(("('torch", "('numpy"))
    ] == []  # their lazy imports
    assert grown < 64 * 1024, f"{grown} kB more memory"
    assert content(tmp_path) == before


# --- export


def test_export_into_a_folder_that_holds_something_is_refused(tmp_path):
    model = lm.from_hf(REFERENCE / "llama")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    before = content(tmp_path)
    for name in ("full", "file"):
        with pytest.raises(ValueError, match=f"{name}: is not an empty folder"):
            lm.to_hf(model, tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}: is not an empty folder"):
            hf.import_folder(REFERENCE / "llama", tmp_path / name)
    assert content(tmp_path) == before
    lm.to_hf(model, tmp_path / "empty")
    assert off(lm.from_hf(tmp_path / "empty"), "llama") < 1e-5


FOREIGN = [
    ({"moe": {"router": "moe:SigmoidRouter"}}, "moe.router 'moe:SigmoidRouter'"),
    (
        {"attention": {"kind": "mla:MultiheadLatentAttention"}},
        "attention.kind 'mla:MultiheadLatentAttention'",
    ),
    (
        {"moe": {"router": "softmax", "normalize": False}, "rope": {"interleaved": False}},
        "rope.interleaved False",
    ),
    ({"moe": {"router": "softmax", "normalize": True}}, "norm_topk_prob|moe.normalize"),
    ({"attention": {"qkv_bias": True}}, "attention.qkv_bias True|attention.out_bias False"),
    ({"attention": {"kind": "gqa"}, "rope": {"interleaved": False}}, "moe.router|num_dense_layers"),
    ({"attention": {"kind": "gqa"}, "model": {"num_dense_layers": 3}}, "rope.interleaved True"),
    (
        {
            "attention": {"kind": "gqa", "qk_norm": True, "qkv_bias": True},
            "model": {"num_dense_layers": 3},
            "rope": {"interleaved": False},
        },
        "attention.qkv_bias True|attention.out_bias False",
    ),
]


@pytest.mark.parametrize("changes, option", FOREIGN, ids=str)
def test_a_model_that_none_of_theirs_is_is_refused_by_its_option(tiny, tmp_path, changes, option):
    model = lm.Transformer(tiny(**changes).model)
    with pytest.raises(ValueError, match=option):
        lm.to_hf(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def failing(*arguments, **options):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "owner, function, number",
    [(shards, "save_file", 0), (shards, "save_file", 2), (shards, "write_json", 0), (shards, "write_json", 1),
     (checkpoint, "sync", 0), (checkpoint, "sync", 3), (Path, "rename", 0), (Path, "mkdir", 0)],
)  # fmt: skip
def test_a_full_disk_while_exporting_leaves_nothing(tmp_path, monkeypatch, owner, function, number):
    model = lm.from_hf(REFERENCE / "deepseek_v3")
    working, calls = getattr(owner, function), []

    def full(*arguments, **options):
        calls.append(1)
        return (failing if len(calls) > number else working)(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(owner, function, full)
        with pytest.raises(OSError, match="No space left"):
            lm.to_hf(model, tmp_path / "out", shard_bytes=5000)
    assert len(calls) == number + 1
    assert list(tmp_path.iterdir()) == []
    lm.to_hf(model, tmp_path / "out", shard_bytes=5000)
    assert off(lm.from_hf(tmp_path / "out"), "deepseek_v3") < 1e-5


@pytest.mark.parametrize(
    "owner, function", [(checkpoint, "save_file"), (shards, "save_file"), (shutil, "copyfile")]
)
def test_a_full_disk_while_importing_leaves_nothing(with_mtp, tmp_path, monkeypatch, owner, function):
    monkeypatch.setattr(owner, function, failing)
    with pytest.raises(OSError, match="No space left"):
        hf.import_folder(with_mtp[0], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# --- long: transformers itself

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
    **YARN,
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
    "V3, rope in halves, YaRN": (
        "deepseek_v3",
        {**DEEPSEEK, "rope_interleave": False, "rope_parameters": LONG_YARN},
    ),
    "V3, YaRN that grows cos and sin": ("deepseek_v3", {**DEEPSEEK, "rope_parameters": NO_MSCALE}),
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
    "GLM, biases, rope in halves": (
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
    "Llama, YaRN, tied, one key for all": (
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


@pytest.fixture(scope="module")
def transformers():
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@pytest.fixture(scope="module", params=ORACLES.values(), ids=ORACLES)
def oracle(request, transformers, tmp_path_factory):
    """An architecture, transformers' model of it in fp32, and the folder that it wrote."""
    kind, numbers = request.param
    model = make.build(kind, numbers)
    folder = tmp_path_factory.mktemp("oracle")
    make.write(model, kind, folder)
    return kind, numbers, model, folder


def text(shape=(2, 150), vocab=97, seed=2):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def relative(found, wanted):
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@long
def test_fp32_logits_and_cached_greedy_text_are_those_of_transformers(oracle):
    _, _, theirs, folder = oracle
    ours, tokens = lm.from_hf(folder), text()
    with torch.no_grad():
        found, wanted = ours(tokens).logits, theirs(tokens).logits
    assert relative(found, wanted) < 1e-5
    prompts = tokens[:, :40]
    assert torch.equal(lm.generate(ours, prompts, 30, temperature=0), make.continued(theirs, prompts, 30))


@long
def test_the_drawn_weights_try_what_they_should(oracle):
    """Every expert is chosen, and some while their choice score, with the bias, is negative."""
    ours = lm.from_hf(oracle[3])
    with torch.no_grad():
        routings = ours(text()).routings
    for router, routing in zip(ours.routers(), routings):
        if router.bias is not None:
            choice = routing.scores + router.bias
            assert 0.1 < (choice < 0).float().mean() < 0.9
            assert (choice.gather(-1, routing.experts) < 0).any()  # they are chosen, too
        counts = torch.bincount(routing.experts.flatten(), minlength=routing.scores.shape[-1])
        assert (counts > 0).all()


class Wide(TorchFunctionMode):
    """While this is entered, a cast of a float64 tensor to fp32 leaves it float64, and softmax stays there.

    transformers computes norms, routers and softmax in fp32 whatever the model is in; so its own code, and no
    copy of it, runs in float64. The angles of the rotary embedding stay fp32, as ours do; V2 turns by
    torch.polar, which in fp32 rounds otherwise than cos and sin.
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
    """transformers' names -> those of its files: experts one by one, gate and up apart."""
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


@long
def test_float64_logits_and_gradients_are_those_of_transformers(oracle, tmp_path):
    kind, numbers, _, _ = oracle
    theirs = make.build(kind, numbers, dtype=torch.float64)
    make.write(theirs, kind, tmp_path / "wide")
    ours, tokens = lm.from_hf(tmp_path / "wide"), text((2, 60))
    rope, rotary = ours.blocks[0].attention.rope, theirs.model.rotary_emb
    turn = frequencies(rope.dim, rope.theta, rope.scaling, tokens.device)
    torch.testing.assert_close(
        turn, rotary.inv_freq.float(), rtol=2e-7, atol=0
    )  # YaRN's: but for the last bit
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


@long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_transformers_wrote_it_reads_again_bit_for_bit(oracle, transformers, tmp_path, dtype):
    kind, _, theirs, folder = oracle

    def read(folder, dtype):
        model, told = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            output_loading_info=True,
            attn_implementation="eager",
            experts_implementation="eager",
        )
        assert not any(told.values()), told
        return model.eval()

    if dtype != torch.float32:
        name = "deepseek_v3" if kind == "kimi_k2" else kind
        edit(folder, model_type=name)
        theirs = read(folder, dtype)  # which keeps routers, or their biases, in fp32
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
            with torch.no_grad():  # and its config.json means the same to them
                assert torch.equal(again(text((2, 20))).logits, theirs(text((2, 20))).logits)


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


@long
@pytest.mark.parametrize("kind, numbers", FAR_ORACLES.values(), ids=FAR_ORACLES)
def test_logits_are_those_of_transformers_up_to_position_131072(transformers, tmp_path, kind, numbers):
    theirs = make.build(kind, numbers)
    make.write(theirs, kind, tmp_path / "x")
    ours, tokens = lm.from_hf(tmp_path / "x"), text((2, 60))
    drawn = torch.randint(131072, (2, 60), generator=torch.Generator().manual_seed(4))
    drawn[:, :4], drawn[:, 4:7] = torch.arange(4), torch.tensor([131070, 131071, 131072])
    positions = drawn.sort(dim=-1).values
    seen = torch.ones_like(tokens)  # said, or transformers takes the leaps for several texts
    with torch.no_grad():
        wanted = theirs(tokens, position_ids=positions, attention_mask=seen).logits
        found = ours(tokens, positions=positions).logits
        near = ours(tokens).logits
    assert relative(found, wanted) < 1e-5
    assert relative(near, wanted) > 1e-2  # the positions matter


@long
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_tiny_checkpoints_are_what_transformers_says_today(transformers, tmp_path, kind):
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
    """2 GB of bf16 in shards, and how many bytes they are; removed afterwards."""
    folder = tmp_path_factory.mktemp("large")
    if not Path("/proc/self/status").exists() or shutil.disk_usage(folder).free < 6 * 10**9:
        pytest.skip("the largest memory is read from /proc, and 4 GB of disk are taken")
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


@long
@pytest.mark.parametrize("imported", [False, True], ids=["from_hf", "import_folder"])
def test_reading_takes_the_models_memory_and_little_more(large_folder, tmp_path, imported):
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
