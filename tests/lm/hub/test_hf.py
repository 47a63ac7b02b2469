"""Import and export of Hugging Face folders: bit for bit, in every dtype, whole or not at all."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lm
from lm import checkpoint, files, fp8
from lm.hub import hf, shards
from lm.hub.families import FAMILIES
from lm.hub.tokenizer import open_tokenizer
from lm.hub.translate import to_ours
from tests.helpers import ROOT, content
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
        assert (tmp_path / "out" / name).read_bytes() == (path / name).read_bytes()


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
    with pytest.warns(UserWarning, match="the exported folder has no tokenizer"):
        hf.to_hf(lm.load(tmp_path / "ours"), tmp_path / "bare", tokenizer_from=tmp_path / "out" / "absent")
    assert {file.name for file in (tmp_path / "bare").iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("shard_bytes", [10**9, 2000])
def test_export_keeps_the_mtp_tensors_bit_for_bit(with_mtp, tmp_path, monkeypatch, shard_bytes):
    path, extra = with_mtp
    held = load_file(path / "model.safetensors")
    write = shards.write
    monkeypatch.setattr(
        shards, "write", lambda into, parts, size, *stem: write(into, parts, min(size, shard_bytes), *stem)
    )
    hf.import_folder(path, tmp_path / "ours")
    hf.to_hf(lm.load(tmp_path / "ours"), tmp_path / "out", tokenizer_from=tmp_path / "ours")
    assert bits(stored(tmp_path / "out")) == bits(held) and extra.keys() <= held.keys()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    with pytest.warns(UserWarning, match="skipped 4 tensors of multi-token prediction"):
        assert off(lm.from_hf(tmp_path / "out"), "deepseek_v3") < 1e-5
    assert hf.import_folder(tmp_path / "out", tmp_path / "again").keys() == extra.keys()


def test_lm_export_keeps_the_mtp_tensors(with_mtp, tmp_path, invoke):
    path, _ = with_mtp
    assert invoke("import", path, tmp_path / "ours")[0] == 0
    assert invoke("export", tmp_path / "ours", tmp_path / "out")[0] == 0
    assert bits(stored(tmp_path / "out")) == bits(stored(path))


@pytest.mark.parametrize("name", ["model.layers.1.eh_proj.weight", "model.norm.weight", "extra"])
def test_mtp_tensors_of_another_model_are_refused_by_name(with_mtp, tmp_path, name):
    path, _ = with_mtp
    hf.import_folder(path, tmp_path / "ours")
    save_file({name: torch.ones(1)}, tmp_path / "ours" / "mtp.safetensors")
    with pytest.raises(ValueError, match=rf"mtp\.safetensors: {name} is not in a layer after the model's 2"):
        hf.to_hf(lm.load(tmp_path / "ours"), tmp_path / "out", tokenizer_from=tmp_path / "ours")
    assert not (tmp_path / "out").exists()


def test_end_of_text_tokens_survive_import_and_export(folder, tmp_path):
    hf.import_folder(folder(eos_token_id=[5, 7]), tmp_path / "ours")
    hf.to_hf(lm.load(tmp_path / "ours"), tmp_path / "out", tokenizer_from=tmp_path / "ours")
    for name in ("ours", "out"):
        assert json.loads((tmp_path / name / "generation_config.json").read_text())["eos_token_id"] == [5, 7]


def test_a_whole_file_is_read_rather_than_an_index(folder):
    """As transformers: the shards may be of another model, and the index damaged."""
    made = folder()
    held = {name: tensor + 1 for name, tensor in load_file(made / "model.safetensors").items()}
    shards.write(made, ((n, t.nbytes, lambda t=t: t) for n, t in held.items()), 4000)
    assert (made / shards.INDEX).is_file()
    assert off(lm.from_hf(made), "deepseek_v3") < 1e-5
    for damaged in ('{"weight_map": {"a": "absent.safetensors"}}', "not JSON"):
        (made / shards.INDEX).write_text(damaged)
        assert off(lm.from_hf(made), "deepseek_v3") < 1e-5


# --- a byte tokenizer for the models that we train


def byte_model(vocab_size):
    config = replace(lm.Config.preset("nano").model, vocab_size=vocab_size, max_length=64)
    return lm.Transformer(config)


TEXTS = [
    *(
        "",
        "to be or not to be",
        "  two  spaces\n\n\ttab\r\n",
        "naïve – “quotes” ă Ā ġ Ġ",
        "日本語 👩‍👩‍👧",
        "\0\3\x7f",
    ),
    *("don't 123 ...!?", "<s></s><|im_end|>", "e\u0301 \u00e9", "\ufeffBOM \u202e", "a" * 3000),
]


@pytest.mark.parametrize("vocab_size", [256, 300, 512])
def test_an_exported_byte_model_has_a_tokenizer_that_transformers_loads(tmp_path, invoke, vocab_size):
    transformers = pytest.importorskip("transformers")
    lm.save(byte_model(vocab_size), tmp_path / "ours")
    assert invoke("export", tmp_path / "ours", tmp_path / "out")[0] == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    again = open_tokenizer(tmp_path / "out", vocab_size)
    assert theirs.is_fast and again.ends == frozenset({3})
    for text in [*TEXTS, "".join(map(chr, range(0x300)))]:
        ids = list(text.encode())
        assert theirs(text)["input_ids"] == ids == again.encode(text)
        assert theirs.decode(ids) == text == again.decode(ids)
    settings = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert settings.eos_token_id == 3


@pytest.mark.parametrize("vocab_size, missing", [(255, None), (513, None), (256, "tokenizers")])
def test_an_export_without_a_tokenizer_is_warned_about(tmp_path, monkeypatch, vocab_size, missing):
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)  # as if it were not installed
    lm.save(byte_model(vocab_size), tmp_path / "ours")
    message = "no tokenizer, so AutoTokenizer cannot load it" + (
        "; pip install tokenizers" if missing else ""
    )
    with pytest.warns(UserWarning, match=message):
        lm.to_hf(lm.load(tmp_path / "ours"), tmp_path / "out", tokenizer_from=tmp_path / "ours")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}


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


LIMIT = """
import resource, sys
from lm import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.long
@pytest.mark.parametrize("limit", [0, 100, 5000, 20_000])
@pytest.mark.parametrize("command", ["import", "export"])
def test_a_file_that_cannot_be_written_whole_is_a_one_line_error(with_mtp, tmp_path, command, limit):
    source, _ = with_mtp
    if command == "export":
        hf.import_folder(source, tmp_path / "ours")
        source = tmp_path / "ours"
    before = content(tmp_path)
    ran = subprocess.run(
        [sys.executable, "-c", LIMIT, str(limit), command, str(source), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert ran.returncode == 1 and ran.stderr.count("\n") == 1, ran.stderr
    assert ran.stderr.startswith(f"lm {command}: ") and "File too large" in ran.stderr
    assert content(tmp_path) == before


# --- the target


def test_a_target_inside_the_source_is_rejected(with_mtp, tmp_path, invoke):
    source, _ = with_mtp
    assert invoke("import", source, tmp_path / "ours")[0] == 0
    (source / "empty").mkdir()
    before = content(tmp_path)
    for command, folder in (("import", source), ("export", tmp_path / "ours")):
        for out in (folder / "out", folder / "a" / "b", folder / "x" / ".." / "y", source / "empty"):
            if out.is_relative_to(folder):
                status, _, said = invoke(command, folder, out)
                assert status == 2 and "is inside" in said and said.count("\n") == 1
    assert content(tmp_path) == before


RACE = """
import multiprocessing, sys, warnings
from pathlib import Path
import lm
from lm.hub import hf
one, two, target, rounds = map(Path, sys.argv[1:])
fork = multiprocessing.get_context("fork")
barrier = fork.Barrier(2)
writers = [
    [lambda out: hf.import_folder(one, out), lambda out: hf.import_folder(two, out)],
    [lambda out, m=hf.from_hf(one): hf.to_hf(m, out), lambda out, m=hf.from_hf(two): hf.to_hf(m, out)],
    [lambda out, m=hf.from_hf(one): lm.save(m, out), lambda out, m=hf.from_hf(two): lm.save(m, out)],
]

def work(me):
    for number in range(int(str(rounds))):
        for kind, pair in enumerate(writers):
            barrier.wait(60)
            try:
                pair[me](target / f"{kind}-{number}")
                (target / f"won-{kind}-{number}-{me}").touch()
            except ValueError as error:
                assert "another process" in str(error) or "not an empty folder" in str(error), error

both = [fork.Process(target=work, args=(me,)) for me in range(2)]
for process in both: process.start()
for process in both: process.join()
sys.exit(max(process.exitcode for process in both))
"""


def test_of_two_writers_into_one_folder_one_wins_whole(tmp_path):
    """import, export and save: never one's weights with the other's config, and never two winners."""
    rounds, target = 30, tmp_path / "target"
    one, two = REFERENCE / "llama", REFERENCE / "qwen3_moe"
    target.mkdir()
    ran = subprocess.run(
        [sys.executable, "-c", RACE, str(one), str(two), str(target), str(rounds)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    for me, source in enumerate((one, two)):
        hf.import_folder(source, tmp_path / f"import-{me}")
        lm.to_hf(lm.from_hf(source), tmp_path / f"export-{me}")
        lm.save(lm.from_hf(source), tmp_path / f"save-{me}")
    for number in range(rounds):
        for kind, name in enumerate(("import", "export", "save")):
            (won,) = target.glob(f"won-{kind}-{number}-*")
            assert content(target / f"{kind}-{number}") == content(tmp_path / f"{name}-{won.name[-1]}")
    assert not list(target.glob(".*"))
