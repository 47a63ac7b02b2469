"""A text as a memory-mapped array of tokens, split into windows of context + 1."""

import hashlib
import importlib.metadata
import math
import random
import stat
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .config import Config, DataConfig, nearest

CORPUS = Path(__file__).parent / "corpus"
HASHED = 2**32  # tokens; longer texts are hashed in part
GENERATORS = "lm.texts"  # entry points: name = package.module:function, which maps a seed to both texts


class Windows:
    """Fixed-size windows of a text: `train(i)` in random order without end, `[i]` in order.

    Each epoch visits every window once. Its order and offset follow from the seed, so window i is the same
    after a resumed training, and the order takes no memory.

    Args:
        document_end: the token that ends a document, for `masks`; None: the text is one document.
        answer_start: the token before an answer, for `masks`; None: everything is to be learned.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        context: int,
        seed: int = 0,
        document_end: int | None = None,
        answer_start: int | None = None,
    ):
        self.tokens = tokens
        self.context = context
        self.seed = seed
        self.document_end = document_end
        self.answer_start = answer_start
        self.count = (len(tokens) - 1) // context
        if self.count < 1:
            raise ValueError(
                f"the text has {len(tokens)} tokens; context={context} needs at least {context + 1}"
            )

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        """Window `index` from the start of the text, (context + 1,) int64; shares one token with the next."""
        return self.cut(index * self.context)

    def train(self, index: int) -> Tensor:
        """Training window `index`, (context + 1,) int64."""
        shifted = self.count - 1 if self.count > 1 else 1  # one window fewer, so that the offset fits
        epoch, turn = divmod(index, shifted)
        rng = random.Random(f"{self.seed} {epoch}")
        room = len(self.tokens) - 1 - shifted * self.context
        offset = rng.randint(0, min(room, self.context - 1))
        # first + turn x stride (mod shifted) visits each window once if stride and shifted are coprime
        first = rng.randrange(shifted)
        stride = next(s for s in iter(lambda: rng.randrange(1, shifted + 1), 0) if math.gcd(s, shifted) == 1)
        return self.cut(offset + (first + turn * stride) % shifted * self.context)

    def cut(self, start: int) -> Tensor:
        return torch.from_numpy(self.tokens[start : start + self.context + 1].astype(np.int64))

    def batch(self, first: int, size: int) -> tuple[Tensor, Tensor]:
        """Training windows first, first + 1, ... -> inputs, targets (shifted by one): (size, context)"""
        windows = torch.stack([self.train(index) for index in range(first, first + size)])
        return windows[:, :-1], windows[:, 1:]

    def question(self) -> list[int]:
        """The text up to its first answer, as a prompt; empty without answers."""
        if self.answer_start is None:
            return []
        begin = self.tokens[: self.context]
        found = np.flatnonzero(begin == self.answer_start)
        return begin[: int(found[0]) + 1].tolist() if len(found) else []

    def masks(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Which inputs each input sees, and which targets the loss counts; None: all

        inputs, targets (batch, time) -> visible (batch, time, time) bool: those of its own document;
        counted (batch, time) bool: those after the first answer_start of their document, its end included
        """
        if self.document_end is None:
            return None, None
        tokens = torch.cat([inputs[:, :1], targets], 1)
        ends = (tokens == self.document_end).long()
        documents = ends.cumsum(-1) - ends  # an end belongs to the document before it
        visible = documents[:, :-1].unsqueeze(2) == documents[:, :-1].unsqueeze(1)
        if self.answer_start is None:
            return visible, None
        starts = (tokens == self.answer_start).long()
        before = starts.cumsum(-1) - starts  # the answer starts before each token, of all documents
        is_first = F.pad(ends[:, :-1], (1, 0), value=1)
        at_first = (before * is_first).cummax(-1).values  # those before its document
        return visible, (before > at_first)[:, 1:]


def open_text(path: Path) -> np.ndarray:
    """The file's bytes as uint8 tokens, memory-mapped.

    Raises:
        ValueError: the file cannot be read, is not a regular file, or is empty.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            what = "Is a directory" if stat.S_ISDIR(found.st_mode) else "not a regular file"
            raise ValueError(f"{path}: cannot be read: {what}")
        if found.st_size == 0:
            raise ValueError(f"{path}: the file is empty")
        return np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None


def open_windows(config: Config) -> tuple[Windows, Windows]:
    """The windows of the training text and of the validation text, with the masks that the config names."""
    train = config.train
    texts = load(config.data, config.model.vocab_size, train.seed)
    return (
        Windows(texts[0], train.context, train.seed, **separators(config)),
        Windows(texts[1], train.context, **separators(config)),
    )


def separators(config: Config) -> dict[str, int]:
    """The arguments of `Windows` for the masks that the config asks for."""
    found = {}
    if config.train.document_mask:
        found["document_end"] = ord(config.data.document_end)
    if config.train.answers_only:
        found["answer_start"] = ord(config.data.answer_start)
    return found


def load(config: DataConfig, vocab_size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The training and the validation tokens; `seed` is for a generated text.

    Raises:
        ValueError: a file cannot be read, has a byte outside the vocabulary, or there is no such generator.
    """
    if config.generator:
        train, validation = generate_text(config.generator, seed)
    elif config.path:
        train = open_text(Path(config.path))
        cut = len(train) if config.validation else max(1, len(train) * 9 // 10)
        train, validation = train[:cut], train[cut:]
    else:
        train, validation = open_text(CORPUS / "train.txt"), open_text(CORPUS / "validation.txt")
    if config.validation:
        validation = open_text(Path(config.validation))
    for name, tokens in (("training", train), ("validation", validation)):
        if vocab_size < 256 and len(tokens):
            highest = max(int(tokens[at : at + 2**20].max()) for at in range(0, len(tokens), 2**20))
            if highest >= vocab_size:
                raise ValueError(
                    f"the {name} text holds token {highest}; vocab_size={vocab_size} must be larger"
                )
    return train, validation


def generate_text(name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The training and the validation text of a generator, as uint8 tokens."""
    found = {entry.name: entry for entry in importlib.metadata.entry_points(group=GENERATORS)}
    if name not in found:
        known = ", ".join(found) or "none; install the package again"
        raise ValueError(
            f"data.generator {name!r}{nearest(name, list(found))}: the installed ones are {known}"
        )
    train, validation = found[name].load()(seed)
    return np.frombuffer(train, np.uint8), np.frombuffer(validation, np.uint8)


def fingerprint(tokens: np.ndarray) -> str:
    """SHA-256 of a text in hexadecimal; of one beyond 4 GiB, its length and 4096 pieces spread over it."""
    size = 2**20
    starts: Iterable[int] = range(0, len(tokens), size)
    if len(tokens) > HASHED:
        starts = (index * (len(tokens) - size) // 4095 for index in range(4096))
    digest = hashlib.sha256(str(len(tokens)).encode())
    for start in starts:
        digest.update(tokens[start : start + size].tobytes())
    return digest.hexdigest()
