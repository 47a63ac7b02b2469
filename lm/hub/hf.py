"""Reads and writes Hugging Face folders: DeepSeek, Moonlight, Kimi, GLM, Youtu, Llama, Qwen and Mixtral.

families.py has the names; translate.py converts configs and weights.
"""

import functools
import itertools
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint, files, fp8
from ..config import ModelConfig
from ..files import Stored
from ..model import Transformer
from ..tokenizer import ByteTokenizer
from . import shards
from .tokenizer import keep_ends, stated_ends
from .translate import parts_of, to_ours, to_theirs

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
LARGEST = 256 * 2**20  # bytes of one of them


def from_hf(folder: Path | str, dtype: torch.dtype | None = None) -> Transformer:
    """The model in a Hugging Face folder; reads config.json and safetensors (block-FP8 too), nothing else.

    Tensors are read one at a time, so peak memory is little more than the model's own size.

    Args:
        dtype: of all weights except selection biases; None: as stored, with FP8 as bf16.

    Raises:
        ValueError: a file is missing or damaged, an option is not supported, or tensors are missing,
            unexpected, or of the wrong shape or dtype; names the file.
    """
    model, aside = read_folder(Path(folder), dtype)
    if aside:
        warnings.warn(
            f"{folder}: skipped {len(aside)} tensors of multi-token prediction, such as {min(aside)}",
            stacklevel=2,
        )
    return model


def import_folder(folder: Path, out: Path, dtype: torch.dtype | None = None) -> dict[str, Stored]:
    """Convert a Hugging Face folder, with its tokenizer and chat template, to a saved model.

    -> the tensors of multi-token prediction, which are copied unchanged to mtp.safetensors
    """
    files.check_new(out, folder)
    model, aside = read_folder(folder, dtype)

    def write(into: Path) -> None:
        checkpoint.write_model(model, into)
        copy_tokenizer(folder, into)
        if aside:
            shards.write(into, unchanged(aside), 5 * 10**9, "mtp")
        if not (into / "tokenizer.json").exists():
            warnings.warn(f"{folder}: holds no tokenizer.json, so {out} has none", stacklevel=2)

    files.commit(out, write)
    return aside


def to_hf(
    model: Transformer,
    folder: Path | str,
    shard_bytes: int = 5 * 10**9,
    tokenizer_from: Path | None = None,
) -> None:
    """Write config.json and safetensors that transformers reads, with the original checkpoints' names.

    Args:
        shard_bytes: the largest size of one file.
        tokenizer_from: the model's folder, whose tokenizer, chat template and tensors of multi-token
            prediction (mtp.safetensors) are copied, if it has them.

    Raises:
        ValueError: the folder is not empty, or no supported architecture is this model; names the option.
    """
    folder = Path(folder)
    files.check_new(folder, tokenizer_from)
    tensors = checkpoint.model_tensors(model)
    dtypes = [tensor.dtype for name, tensor in tensors.items() if not keeps_dtype(name)]
    config = {**to_theirs(model.config), "torch_dtype": str(dtypes[0]).removeprefix("torch.")}
    aside = {} if tokenizer_from is None else kept_aside(tokenizer_from, model.config)
    if aside:
        config["num_nextn_predict_layers"] = len({name.split(".")[2] for name in aside})

    def write(into: Path) -> None:
        files.write_json(into / "config.json", config)
        parts = (
            (name, view.nbytes, view.clone)  # a clone has only its own rows in memory
            for ours, tensor in tensors.items()
            for name, view in parts_of(ours, tensor, config["model_type"])
        )
        shards.write(into, itertools.chain(parts, unchanged(aside)), shard_bytes)
        if tokenizer_from is not None:
            copy_tokenizer(tokenizer_from, into)
            if not (into / "tokenizer.json").exists():
                write_byte_tokenizer(into, model.config.vocab_size)

    files.commit(folder, write)


def unchanged(stored: dict[str, Stored]) -> Iterator[tuple[str, int, Callable[[], Tensor]]]:
    """Stored tensors as `shards.write` takes them."""
    for name, place in stored.items():
        yield name, place.nbytes, functools.partial(files.read_tensor, name, place)


def kept_aside(folder: Path, config: ModelConfig) -> dict[str, Stored]:
    """The tensors of multi-token prediction that `import_folder` wrote beside a model."""
    if not any((folder / f"mtp.safetensors{end}").is_file() for end in ("", ".index.json")):
        return {}
    stored = shards.survey(folder, stem="mtp")
    for name, place in stored.items():
        if not is_aside(name, config):
            raise ValueError(f"{place.file}: {name} is not in a layer after the model's {config.num_layers}")
    return stored


def is_aside(name: str, config: ModelConfig) -> bool:
    """Whether a tensor belongs to a layer after the model's last one: to multi-token prediction."""
    layer = re.match(r"model\.layers\.(\d{1,6})\.", name)
    return layer is not None and int(layer[1]) >= config.num_layers


def copy_tokenizer(folder: Path, into: Path) -> None:
    """Copy a folder's tokenizer, chat template and end-of-text tokens, as far as it has them."""
    for name in TOKENIZER_FILES:
        path = folder / name
        if os.path.lexists(path):
            shards.check_link(path)
            if not path.is_file():
                raise ValueError(f"{path}: is not a regular file")
            if path.stat().st_size > LARGEST:
                raise ValueError(f"{path}: larger than {LARGEST} bytes")
            shutil.copyfile(path, into / name)
    keep_ends(folder, into)


def write_byte_tokenizer(into: Path, vocab_size: int) -> None:
    """Write our byte tokenizer as files that AutoTokenizer loads; warn if the model cannot use bytes."""
    unwritten = "the exported folder has no tokenizer, so AutoTokenizer cannot load it"
    if not ByteTokenizer.vocab_size <= vocab_size <= 2 * ByteTokenizer.vocab_size:
        return warnings.warn(unwritten, stacklevel=2)
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    except ImportError:
        return warnings.warn(f"{unwritten}; pip install tokenizers, then export again", stacklevel=2)
    # GPT-2's characters for bytes: printable ones stand for themselves, the others follow from U+0100
    itself = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in itself]
    characters = {**{chr(b): b for b in itself}, **{chr(256 + n): b for n, b in enumerate(others)}}
    tokenizer = Tokenizer(models.BPE(characters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(into / "tokenizer.json"))
    if not (into / "tokenizer_config.json").exists():
        # without an eos_token: the character that stands for byte 3 may occur in a text
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        files.write_json(into / "tokenizer_config.json", settings)
    if not stated_ends(into):
        path = into / "generation_config.json"
        found = files.read_json(path) if path.exists() else {}
        files.write_json(path, {**found, "eos_token_id": ByteTokenizer.end_of_text})


def read_config(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    """-> the contents of a folder's config.json, and our config of them"""
    path = folder / "config.json"
    if not path.is_file():
        reason = "holds no config.json" if folder.is_dir() else "is not a folder"
        ours = "; it has a config.toml: open it with lm.load" if (folder / "config.toml").is_file() else ""
        raise ValueError(f"{folder}: {reason}{ours}")
    shards.check_link(path)
    raw = files.read_json(path)
    try:
        check_quantization(raw.get("quantization_config"))
        return raw, to_ours(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def check_quantization(found: Any) -> None:
    """Raise ValueError for any quantization except DeepSeek's block FP8."""
    if found is None:
        return
    wanted = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [fp8.BLOCK, fp8.BLOCK]}
    for key, right in wanted.items():
        if not isinstance(found, dict) or found.get(key, right) != right or "quant_method" not in found:
            raise ValueError(f"quantization_config {found!r:.120} is not supported; {wanted} is")


def read_folder(folder: Path, dtype: torch.dtype | None) -> tuple[Transformer, dict[str, Stored]]:
    """-> the model, and the tensors of multi-token prediction, which it does not use"""
    raw, config = read_config(folder)
    # upper bound on the number of tensors: every layer and expert with FP8 scales, and the MTP layers
    most = (config.num_layers + 4) * (40 + 6 * config.moe.num_experts)
    stored = shards.survey(folder, most)
    if config.num_layers * 9 > len(stored) or config.moe.num_experts > max(len(stored), 1024):
        size = f"{config.num_layers} layers of {config.moe.num_experts} experts"
        raise ValueError(f"{folder}: config.json describes {size}; the files hold {len(stored)} tensors")
    try:
        with torch.device("meta"):
            model = Transformer(config)
    except (ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{folder / 'config.json'}: not a valid model: {reason}") from None
    plan = {
        ours: {name: tuple(view.shape) for name, view in parts_of(ours, tensor, raw["model_type"])}
        for ours, tensor in checkpoint.model_tensors(model).items()
    }
    aside = match(folder, plan, stored, config)
    dtypes = {ours: dtype_of(folder, parts, stored, dtype) for ours, parts in plan.items()}
    matrices = {kind: ours for ours, kind in dtypes.items() if not keeps_dtype(ours)}
    if len(matrices) > 1:
        found = ", ".join(f"{name} {kind}" for kind, name in matrices.items())
        raise ValueError(f"{folder}: the weights have several dtypes ({found}); expected one")
    model.to(next(iter(matrices))).to_empty(device="cpu")
    if config.tie_embeddings:
        model.head.weight = model.embedding.weight  # to_empty untied them
    for ours, tensor in named_tensors(model).items():
        if tensor.dtype != dtypes[ours]:
            tensor.data = tensor.data.to(dtypes[ours])
        for name, view in parts_of(ours, tensor.detach(), raw["model_type"]):
            view.copy_(read_weight(name, stored, view.dtype))
    if config.tie_embeddings and "lm_head.weight" in stored:
        head = read_weight("lm_head.weight", stored, model.head.weight.dtype)
        if not torch.equal(head, model.embedding.weight):
            raise ValueError(f"{folder}: tie_word_embeddings, but lm_head.weight is not the embedding")
    return model.eval(), aside


def match(
    folder: Path, plan: dict[str, dict[str, tuple[int, ...]]], stored: dict[str, Stored], config: ModelConfig
) -> dict[str, Stored]:
    """Raise ValueError unless the files hold exactly the model's tensors, MTP's aside -> those of MTP"""
    wanted = {name: shape for parts in plan.values() for name, shape in parts.items()}
    missing = [name for name in wanted if name not in stored]
    if missing:
        count = f"{len(missing)} of {len(wanted)} tensors"
        raise ValueError(f"{folder}: lacks {count}, such as {', '.join(missing[:3])}")
    for name, shape in wanted.items():
        if stored[name].shape != shape:
            found = stored[name].shape
            raise ValueError(f"{stored[name].file}: {name} has shape {found}; by config.json it is {shape}")
    scales = {f"{name}_scale_inv" for name in wanted if stored[name].dtype == torch.float8_e4m3fn}
    left = {n: s for n, s in stored.items() if n not in wanted and n not in scales}
    if config.tie_embeddings:
        left.pop("lm_head.weight", None)
    aside = {n: s for n, s in left.items() if is_aside(n, config)}
    extra = [n for n in left if n not in aside and not n.endswith("rotary_emb.inv_freq")]
    if extra:
        raise ValueError(f"{folder}: unexpected tensors ({len(extra)}), such as {', '.join(extra[:3])}")
    return aside


def dtype_of(
    folder: Path, parts: dict[str, tuple[int, ...]], stored: dict[str, Stored], dtype: torch.dtype | None
) -> torch.dtype:
    """The dtype for one of our tensors: `dtype`, else that of its stored parts, with bf16 for FP8."""
    found = {stored[name].dtype: name for name in parts}
    if len(found) > 1:
        several = ", ".join(f"{name} {kind}" for kind, name in found.items())
        raise ValueError(f"{folder}: {several}: parts of one matrix must have one dtype")
    kind, name = next(iter(found.items()))
    kind = torch.bfloat16 if kind == torch.float8_e4m3fn else kind
    bias = name.endswith("e_score_correction_bias")
    if bias and kind.itemsize < 4:
        return torch.float32  # in half precision the updates of training would be rounded away
    return kind if dtype is None or bias else dtype


def keeps_dtype(ours: str) -> bool:
    """Whether a tensor may differ in dtype from the matrices: routers and norms compute in fp32."""
    return "router." in ours or "norm" in ours


def read_weight(name: str, stored: dict[str, Stored], dtype: torch.dtype) -> Tensor:
    """One tensor from the files, dequantized if it is FP8."""
    tensor, place = files.read_tensor(name, stored[name]), stored[name]
    if tensor.dtype == torch.float8_e4m3fn:
        scales = f"{name}_scale_inv"
        if scales not in stored:
            raise ValueError(f"{place.file}: {name} is FP8, but {scales} is missing")
        try:
            tensor = fp8.dequantize(tensor, files.read_tensor(scales, stored[scales]), dtype)
        except ValueError as error:
            raise ValueError(f"{stored[scales].file}: {scales}: {error}") from None
    if not tensor.isfinite().all():
        raise ValueError(f"{place.file}: {name} contains NaN or infinite values")
    return tensor


def named_tensors(model: Transformer) -> dict[str, Tensor]:
    """`checkpoint.model_tensors`, but with the parameters themselves."""
    found: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: found[name] for name in checkpoint.model_tensors(model)}
