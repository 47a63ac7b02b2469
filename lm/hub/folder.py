"""Any model's folder, whoever wrote it: a run, a model that `lm.save` wrote, or one from Hugging Face."""

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


class Opened(NamedTuple):
    """A model, and what it is spoken to with."""

    model: Transformer
    config: Config
    tokenizer: Tokenizer


def kind_of(folder: Path) -> str:
    """RUN, SAVED or HUB.

    Raises:
        ValueError: it is none of these.
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
        hint = "; lm generate, chat, serve, eval, info and explore open it" if found != RUN else ""
        raise ValueError(f"{folder}: is {found}; {' or '.join(kinds)} is needed{hint}")


def read_config(folder: Path, trust_code: bool = False) -> Config:
    """A folder's configuration; of one from Hugging Face, the model's part.

    Raises:
        ValueError: it is missing, damaged, not supported, or names code without `trust_code`.
    """
    if kind_of(folder) == HUB:
        return Config(model=hf.read_config(folder)[1])
    return checkpoint.read_config(folder, trust_code)


def load(folder: Path | str, trust_code: bool = False) -> Transformer:
    """The model of any folder; of a run, its newest whole checkpoint.

    Args:
        trust_code: the folder may name a router or attention outside this project, which is then imported.

    Raises:
        ValueError: something in it is missing, damaged, not supported or does not fit; names the file.
    """
    folder = Path(folder)
    return hf.from_hf(folder) if kind_of(folder) == HUB else checkpoint.load(folder, trust_code)


def open_folder(folder: Path, trust_code: bool = False, device: str = "auto") -> Opened:
    """A folder's model on a device, its configuration and its tokenizer.

    A model in bf16 or fp16 becomes fp32 where the machine would emulate it, a hundred times slower.

    Raises:
        ValueError: as `load`; or the device is not here.
    """
    place = machine.pick_device(device)
    model, config = load(folder, trust_code), read_config(folder, trust_code)
    tokenizer = open_tokenizer(folder, config.model.vocab_size)
    if model.embedding.weight.dtype.itemsize == 2 and machine.pick_dtype("auto", place) == torch.float32:
        model = model.float()
    return Opened(model.to(place), config, tokenizer)
