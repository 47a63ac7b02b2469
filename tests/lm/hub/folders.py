"""What the tests of lm/hub share: the tiny checkpoints, and ways to change, damage and compare folders."""

import contextlib
import json
import os
import signal
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file

import lm
from lm.hub import hf
from tests import helpers
from tests.helpers import content
from tests.lm.hub.reference import make

REFERENCE = Path(make.__file__).parent
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"),
    "added_tokens.json",
    "chat_template.jinja",
)


def sparse(path):
    with open(path, "wb") as file:
        file.truncate(10**12)


UNUSUAL = {  # ways to make something that is not a file to read
    "pipe": os.mkfifo,
    "endless device": lambda path: os.symlink("/dev/zero", path),
    "empty device": lambda path: os.symlink("/dev/null", path),
    "link loop": lambda path: os.symlink(path, path),
    "dangling link": lambda path: os.symlink(path.with_name("absent"), path),
    "folder": os.mkdir,
    "1 TB": sparse,
}


@contextlib.contextmanager
def within(seconds):
    """TimeoutError, even inside a call that waits, after some seconds."""

    def late(*_):
        raise TimeoutError(f"more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def bits(tensors):
    """The dtype, shape and bytes of each tensor."""
    return {
        name: (
            tensor.dtype,
            tuple(tensor.shape),
            tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes(),
        )
        for name, tensor in tensors.items()
    }


def stored(folder):
    """All tensors in a folder's safetensors files."""
    return {
        name: tensor for path in folder.glob("model*.safetensors") for name, tensor in load_file(path).items()
    }


def edit(folder, **changes):
    """Change keys of config.json; `...` removes one."""
    path = folder / "config.json"
    raw = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))


def expected(kind):
    """Tokens, with the logits and the greedy text of transformers."""
    return load_file(REFERENCE / kind / "expected.safetensors")


def off(model, kind):
    """The largest difference from transformers' logits, relative to the largest logit."""
    wanted = expected(kind)
    with torch.no_grad():
        logits = model(wanted["tokens"]).logits
    return ((logits - wanted["logits"]).abs().max() / wanted["logits"].abs().max()).item()


def refused(folder, *said, names=None):
    """from_hf(folder) is a one-line ValueError that names the folder; import_folder too; neither writes."""
    before = content(folder.parent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        helpers.refused(lambda: lm.from_hf(folder), names or folder, *said)
        helpers.refused(lambda: hf.import_folder(folder, folder.parent / "never"))
    assert content(folder.parent) == before
