"""Import and export of Hugging Face folders: bit for bit, in every dtype, whole or not at all."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lm
from lm import checkpoint, files, fp8
from lm.hub import hf, shards
from lm.hub.families import FAMILIES
from lm.hub.translate import to_ours
from tests.helpers import content
from tests.lm.hub.folders import REFERENCE, TOKENIZER_FILES, bits, edit, off, refused, stored


def cast(folder, dtype, keep=("e_score_correction_bias",)):
    """Convert a folder's weights, except `keep`, to a dtype -> the tensors"""
    path = folder / "model.safetensors"
    tensors = {n: t if n.endswith(keep) else t.to(dtype) for n, t in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    return tensors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", FAMILIES)
def test_import_then_export_is_bit_identical(folder, tmp_path, kind, dtype):
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


def test_a_selection_bias_stays_fp32(folder, tmp_path):
    exact = cast(folder(), torch.bfloat16)
    model = lm.from_hf(tmp_path / "model")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(model.routers()[0].bias, exact[name]) and exact[name].dtype == torch.float32
    assert torch.equal(lm.from_hf(tmp_path / "model", torch.float16).routers()[0].bias, exact[name])
    small = cast(tmp_path / "model", torch.bfloat16, keep=("nothing",))  # as some checkpoints store it
    bias = lm.from_hf(tmp_path / "model").routers()[0].bias
    assert bias.dtype == torch.float32 and torch.equal(bias, small[name].float())


def test_from_hf_converts_to_a_given_dtype(folder):
    exact = load_file(folder("mixtral") / "model.safetensors")
    model = lm.from_hf(folder("mixtral"), torch.bfloat16)
    name = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    assert model.head.weight.dtype == torch.bfloat16
    assert torch.equal(model.blocks[0].mlp.experts.down[3], exact[name].bfloat16())


def test_routers_and_norms_may_differ_in_dtype(folder, tmp_path):
    """As in Kimi and Moonlight; the export keeps their dtypes."""
    tensors = cast(folder(), torch.bfloat16, keep=("e_score_correction_bias", "gate.weight", "norm.weight"))
    model = lm.from_hf(tmp_path / "model")
    assert model.routers()[0].weight.dtype == torch.float32 and model.head.weight.dtype == torch.bfloat16
    lm.to_hf(model, tmp_path / "out")
    assert bits(stored(tmp_path / "out")) == bits(tensors)
    assert torch.isfinite(model(torch.arange(9).unsqueeze(0)).logits).all()


def test_weights_do_not_share_memory_with_the_file(folder):
    model = lm.from_hf(folder())
    before, path = bits(model.state_dict()), folder() / "model.safetensors"
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.write(b"\xff" * size)
    assert bits(model.state_dict()) == before
    os.truncate(path, 0)
    assert bits(model.state_dict()) == before


def test_a_stored_tied_head_must_equal_the_embedding(folder, tmp_path):
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


def test_inverse_frequencies_in_old_files_are_ignored(folder):
    path = folder("llama") / "model.safetensors"
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(3) for i in range(2)}
    save_file({**load_file(path), **extra}, path)
    assert off(lm.from_hf(path.parent), "llama") < 1e-5


# --- multi-token prediction, tokenizer


def test_skipped_mtp_tensors_are_named_in_a_warning(with_mtp):
    path, _ = with_mtp
    message = "skipped 4 tensors of multi-token prediction, such as model.layers.2.eh_proj.weight"
    with pytest.warns(UserWarning, match=message) as caught:
        model = lm.from_hf(path)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert off(model, "deepseek_v3") < 1e-5


def test_an_imported_folder_loads_as_the_same_model(with_mtp, tmp_path):
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
    with pytest.raises(ValueError, match=f"{name}: is a link out of the folder"):
        hf.import_folder(path, tmp_path / "out")
    assert {entry.name for entry in tmp_path.iterdir()} == {"model", "secret"}


def test_export_copies_the_tokenizer(with_mtp, tmp_path):
    path, _ = with_mtp
    hf.import_folder(path, tmp_path / "ours")
    hf.to_hf(lm.load(tmp_path / "ours"), tmp_path / "out", tokenizer_from=tmp_path / "ours")
    names = {"config.json", "model.safetensors", *TOKENIZER_FILES}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    hf.to_hf(lm.load(tmp_path / "ours"), tmp_path / "bare", tokenizer_from=tmp_path / "out" / "absent")
    assert {file.name for file in (tmp_path / "bare").iterdir()} == {"config.json", "model.safetensors"}


def test_without_mtp_no_mtp_file_is_written(tmp_path):
    assert hf.import_folder(REFERENCE / "llama", tmp_path / "out") == {}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.toml", "model.safetensors"}
    assert off(lm.load(tmp_path / "out"), "llama") < 1e-5


def test_our_own_model_survives_export_and_import(tiny, make_model, tmp_path):
    variants = [{}, {"model": {"tie_embeddings": True}}, {"model": {"num_dense_layers": 3}}]
    for number, changes in enumerate(variants):
        model = make_model(tiny(**changes).model, torch.float32)
        lm.to_hf(model, tmp_path / str(number))
        again = lm.from_hf(tmp_path / str(number))
        tokens = torch.arange(24).reshape(2, 12)
        assert torch.equal(again(tokens).logits, model(tokens).logits)


# --- FP8


def quantized(folder):
    """Convert a bf16 folder to DeepSeek's block FP8 -> its weights dequantized by definition, in bf16"""
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


RAGGED = {  # larger than a block, and not a multiple of it
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
    """A V3 in bf16 whose matrices have several blocks, the last ones partial."""
    folder = tmp_path / "model"
    lm.to_hf(make_model(tiny(**RAGGED).model, torch.bfloat16), folder)
    return folder


@pytest.mark.parametrize("kind", ["deepseek_v3", "kimi_k2"])
def test_fp8_weights_are_dequantized_bit_for_bit(bf16_folder, tmp_path, kind):
    before = load_file(bf16_folder / "model.safetensors")
    meant = quantized(bf16_folder)
    edit(bf16_folder, model_type=kind)
    changed = [name for name in meant if not torch.equal(meant[name], before[name])]
    assert len(changed) == 2 * 5 + 3 + 4 * 3 + 3  # 2 attentions, a dense MLP, 4 experts, a shared expert
    model = lm.from_hf(bf16_folder)
    lm.to_hf(model, tmp_path / "out")
    assert bits(stored(tmp_path / "out")) == bits(meant)
    hf.import_folder(bf16_folder, tmp_path / "ours")
    assert bits(lm.load(tmp_path / "ours").state_dict()) == bits(model.state_dict())


def test_fp8_can_be_read_as_fp32(bf16_folder):
    quantized(bf16_folder)
    held = load_file(bf16_folder / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    model = lm.from_hf(bf16_folder, torch.float32)
    want = fp8.dequantize(held[name], held[f"{name}_scale_inv"], torch.float32)
    assert torch.equal(model.blocks[0].attention.out.weight, want)


def test_fp8_with_missing_or_wrong_scales_is_rejected(bf16_folder):
    quantized(bf16_folder)
    path = bf16_folder / "model.safetensors"
    whole, name = load_file(path), "model.layers.1.mlp.experts.2.up_proj.weight"
    scales = f"{name}_scale_inv"
    for change, said in [
        ({scales: None}, [f"{name} is FP8, but {scales} is missing"]),
        ({scales: torch.ones(1, 2)}, [scales, "(1, 2)", "(2, 2)"]),
        ({scales: torch.ones(4)}, [scales, "(4,)", "(2, 2)"]),
        ({scales: torch.full((2, 2), math.nan)}, [name, "NaN"]),
        ({scales: torch.full((2, 2), math.inf)}, [name, "infinite"]),
        ({"model.embed_tokens.weight_scale_inv": torch.ones(1, 1)}, ["tensors (1)", "embed_tokens"]),
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


# --- export


def test_export_to_a_non_empty_folder_is_rejected(tmp_path):
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


FOREIGN = [  # changes to our config, the options that the error may name
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
def test_a_model_that_fits_no_architecture_is_rejected_by_option(tiny, tmp_path, changes, option):
    model = lm.Transformer(tiny(**changes).model)
    with pytest.raises(ValueError, match=option):
        lm.to_hf(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def failing(*arguments, **options):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "owner, function, number",
    [(shards, "save_file", 0), (shards, "save_file", 2), (files, "write_json", 0), (shards, "write_json", 0),
     (files, "sync", 0), (files, "sync", 3), (Path, "rename", 0), (Path, "mkdir", 0)],
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
