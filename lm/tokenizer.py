"""Text to token ids and back: bytes. A model's own tokenizer is read by hub/tokenizer.py."""

from collections.abc import Callable, Iterable

import numpy as np


class ByteTokenizer:
    """Every byte is a token; ASCII's own end-of-text character, byte 3, ends a document.

    Any file works as it is, text or not, and no vocabulary has to be learnt or stored.
    """

    vocab_size = 256
    end_of_text = 3
    ends = frozenset({end_of_text})
    chat_template = None

    def encode(self, text: str | bytes) -> list[int]:
        """UTF-8 bytes; bytes that came from the command line as surrogates are themselves again."""
        return list(text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text)

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """The bytes that the tokens are; of a vocabulary larger than theirs, 255, which is in no text."""
        return bytes(min(token, 255) for token in tokens)

    def decode(self, tokens: Iterable[int]) -> str:
        """As text, with U+FFFD where the bytes are not UTF-8."""
        return self.decode_bytes(tokens).decode("utf-8", "replace")

    def encode_array(self, text: np.ndarray) -> np.ndarray:
        """The tokens of a file's bytes; they are its tokens."""
        return text

    def writer(self) -> Callable[[int], bytes]:
        """A function token -> what it adds to the text."""
        return lambda token: self.decode_bytes([token])
