"""Opens a model folder of any kind: a run, a model that `lm.save` wrote, or a Hugging Face folder."""

from pathlib import Path
from typing import NamedTuple

import torch

from .. import checkpoint, machine
from ..config import Config
from ..model import Transformer
from ..tokenizer import ByteTokenizer
from . import hf
from .tokenizer import FileTokenizer, open_tokenizer

Tokenizer = ByteTokenizer | FileTokenizer
RUN, SAVED, HUB = "a run", "a saved model", "a Hugging Face folder"
OPENERS = "lm chat, eval, explore, generate, info, serve"  # for any kind of folder
ONLY = {RUN: ", export and report", SAVED: " and export", HUB: " and import"}  # for this kind alone


class Opened(NamedTuple):
    """A model with its configuration and tokenizer."""

    model: Transformer
    config: Config
    tokenizer: Tokenizer


def kind_of(folder: Path) -> str:
    """RUN, SAVED or HUB.

    Raises:
        ValueError: the folder is of no known kind.
    """
    if (folder / "config.toml").is_file():
        return SAVED if (folder / "model.safetensors").exists() else RUN
    if (folder / "config.json").is_file():
        return HUB
    reason = "holds no config.toml and no config.json" if folder.is_dir() else "is not a folder"
    raise ValueError(f"{folder}: {reason}; expected {RUN}, {SAVED} or {HUB}")


def need(folder: Path, *kinds: str) -> None:
    """Raise ValueError unless a folder is of one of these kinds."""
    found = kind_of(folder)
    if found not in kinds:
        expected = " or ".join(kinds)
        raise ValueError(f"{folder}: is {found}, expected {expected}; open it with {OPENERS}{ONLY[found]}")


def read_config(folder: Path, trust_code: bool = False) -> Config:
    """A folder's configuration; only `model` is read from a Hugging Face folder, the rest is the default.

    Raises:
        ValueError: it is missing, damaged or unsupported, or names code and `trust_code` is False.
    """
    if kind_of(folder) == HUB:
        return Config(model=hf.read_config(folder)[1])
    return checkpoint.read_config(folder, trust_code)


def load(folder: Path | str, trust_code: bool = False) -> Transformer:
    """The model in a folder of any kind; for a run, its newest whole checkpoint.

    Args:
        trust_code: import the custom router or attention that the folder names.

    Raises:
        ValueError: something in the folder is missing, damaged, unsupported or inconsistent; names the file.
    """
    folder = Path(folder)
    return hf.from_hf(folder) if kind_of(folder) == HUB else checkpoint.load(folder, trust_code)


def open_folder(folder: Path, trust_code: bool = False, device: str = "auto") -> Opened:
    """A folder's model on a device, with its configuration and tokenizer.

    A bf16 or fp16 model is converted to fp32 where the machine would emulate it, a hundred times slower.

    Raises:
        ValueError: as for `load`, or the device is not available.
    """
    place = machine.pick_device(device)
    model, config = load(folder, trust_code), read_config(folder, trust_code)
    tokenizer = open_tokenizer(folder, config.model.vocab_size)
    trial = torch.zeros(1, 2, dtype=torch.int64)
    with torch.inference_mode():
        place = machine.or_cpu(device, place, lambda place: model.to(place)(trial.to(place)))
    if model.embedding.weight.dtype.itemsize == 2 and machine.pick_dtype("auto", place) == torch.float32:
        model = model.float()
    return Opened(model.to(place), config, tokenizer)
