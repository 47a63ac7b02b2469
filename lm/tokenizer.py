"""The byte tokenizer. hub/tokenizer.py reads the tokenizer of a Hugging Face folder."""

from collections.abc import Iterable, Sequence

import numpy as np


class ByteTokenizer:
    """Every byte is a token; byte 3, ASCII's end of text, ends a document.

    Any file works as it is, text or not, and there is no vocabulary to learn or store.
    """

    vocab_size = 256
    end_of_text = 3
    ends = frozenset({end_of_text})
    chat_template = None

    def encode(self, text: str | bytes, special: bool = True) -> list[int]:
        """UTF-8 bytes; surrogates, which stand for raw bytes on the command line, become those bytes.

        `special` is for other tokenizers; this one adds no token around a text.
        """
        return list(text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text)

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """Tokens as bytes; tokens above 255, of a larger vocabulary, become 255, which no UTF-8 text has."""
        return bytes(min(token, 255) for token in tokens)

    def decode(self, tokens: Iterable[int]) -> str:
        """Tokens as text, with U+FFFD for invalid UTF-8."""
        return self.decode_bytes(tokens).decode("utf-8", "replace")

    def encode_array(self, text: np.ndarray) -> np.ndarray:
        """A file's bytes as tokens, unchanged."""
        return text

    def writer(self, before: Sequence[int] = ()) -> "ByteWriter":
        """Converts tokens to bytes one at a time; `before`, the prompt, makes no difference."""
        return ByteWriter()


class ByteWriter:
    """Converts byte tokens to bytes one at a time."""

    def __call__(self, token: int) -> bytes:
        """The byte of one more token."""
        return ByteTokenizer().decode_bytes([token])

    def end(self) -> bytes:
        """The bytes held back: none."""
        return b""
