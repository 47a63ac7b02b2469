"""A model folder's tokenizer: tokenizer.json, end-of-text tokens and chat template."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..files import read_json
from ..tokenizer import ByteTokenizer


class FileTokenizer:
    """The tokenizer.json of a model folder, with its end-of-text tokens and chat template.

    Attributes:
        ends: the tokens that end a completion.
        special: special tokens as text, by name (such as bos_token), for the chat template.

    Raises:
        ValueError: a file is damaged, or has more tokens than the model; names the file.
    """

    def __init__(self, folder: Path, vocab_size: int):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ValueError(f"{folder}: its tokenizer.json needs `pip install tokenizers`") from None
        path = folder / "tokenizer.json"
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path}: not a tokenizer: {error}") from None
        highest = max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
        if highest >= vocab_size:
            raise ValueError(f"{path}: has token {highest}; the model knows 0..{vocab_size - 1}")
        self.vocab_size = vocab_size
        settings = read_optional(folder / "tokenizer_config.json")
        texts = {key: as_text(value) for key, value in settings.items() if key.endswith("_token")}
        self.special = {key: text for key, text in texts.items() if text is not None}
        self.ends = self.find_ends(folder)
        self.chat_template = find_template(folder, settings)

    def find_ends(self, folder: Path) -> frozenset[int]:
        """End-of-text tokens: from generation_config.json, else config.json, else the eos_token."""
        for name in ("generation_config.json", "config.json"):
            found = read_optional(folder / name).get("eos_token_id")
            ids = found if isinstance(found, list) else [found]
            if found is not None and all(isinstance(token, int) for token in ids):
                return frozenset(ids)
        named = self.tokenizer.token_to_id(self.special.get("eos_token", ""))
        return frozenset() if named is None else frozenset({named})

    def encode(self, text: str | bytes, special: bool = True) -> list[int]:
        """Token ids; special: with the tokens that the tokenizer puts around a text, such as a first one."""
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        return self.tokenizer.encode(text, add_special_tokens=special).ids

    def encode_array(self, text: np.ndarray) -> np.ndarray:
        """The token ids of a text's bytes, all in memory."""
        return np.array(self.encode(text.tobytes()))

    def decode(self, tokens: Iterable[int]) -> str:
        """The text, without special tokens."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)

    def writer(self) -> Callable[[int], bytes]:
        """A function: token -> the bytes it adds to the text, none until a character is complete."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: (stream.step(self.tokenizer, token) or "").encode("utf-8")


def open_tokenizer(folder: Path, vocab_size: int) -> ByteTokenizer | FileTokenizer:
    """The tokenizer of a model folder, by default bytes.

    Raises:
        ValueError: there is no tokenizer.json, and the vocabulary is too large for bytes.
    """
    if (folder / "tokenizer.json").is_file():
        return FileTokenizer(folder, vocab_size)
    if vocab_size > 2 * ByteTokenizer.vocab_size:
        raise ValueError(f"{folder}: holds no tokenizer.json, and {vocab_size} tokens cannot be bytes")
    return ByteTokenizer()


def read_optional(path: Path) -> dict[str, Any]:
    """A JSON object, empty if the file does not exist."""
    return read_json(path) if path.is_file() else {}


def as_text(token: Any) -> str | None:
    """The text of a special token, given as such or as an object with `content`."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def find_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """The chat template: chat_template.jinja, else the (default) one in the tokenizer's settings."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: cannot be read: {error}") from None
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None
