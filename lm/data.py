"""A text as a memory-mapped array of tokens, split into windows of context + 1."""

import hashlib
import math
import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .config import DataConfig

CORPUS = Path(__file__).parent / "corpus"
HASHED = 2**32  # tokens; longer texts are hashed in part


class Windows:
    """Fixed-size windows of a text: `train(i)` in random order without end, `[i]` in order.

    Each epoch visits every window once. Its order and offset follow from the seed, so window i is the same
    after a resumed training, and the order takes no memory.
    """

    def __init__(self, tokens: np.ndarray, context: int, seed: int = 0):
        self.tokens = tokens
        self.context = context
        self.seed = seed
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


def open_text(path: Path) -> np.ndarray:
    """The file's bytes as uint8 tokens, memory-mapped.

    Raises:
        ValueError: the file cannot be read or is empty.
    """
    try:
        if path.stat().st_size == 0:
            raise ValueError(f"{path}: the file is empty")
        return np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None


def load(config: DataConfig, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The training and the validation tokens.

    Raises:
        ValueError: a file cannot be read, or has a byte outside the vocabulary.
    """
    if config.path:
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
