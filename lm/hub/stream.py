"""Decodes tokens one at a time, so that the pieces add up to the text of all tokens."""

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

UNKNOWN = "\ufffd"  # stands for invalid UTF-8
BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")  # a token of byte fallback


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Turn what the `tokenizers` library raises, plain Exceptions and Rust panics, into ValueError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ not in ("Exception", "PanicException"):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"tokenizer.json fails: {reason:.200}") from None


class Decoding:
    """A tokenizer's decoding, without special tokens, and how far a token can change the text before it.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        added = tokenizer.get_added_tokens_decoder().values()
        special = {token.content for token in added if token.special}
        self.ids = {token for text, token in vocabulary.items() if text not in special}  # those with a text
        state = {} if tokenizer.decoder is None else json.loads(tokenizer.decoder.__getstate__())
        parts = state.get("decoders", [state] if state else [])
        kinds = {part["type"] for part in parts}
        self.byte_level = "ByteLevel" in kinds
        fallback = vocabulary.items() if "ByteFallback" in kinds else ()
        self.bytes = {token for text, token in fallback if BYTE.fullmatch(text)}
        self.context = self.find_context() if is_local(parts) else None

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special tokens."""
        with one_line():
            return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def find_context(self) -> int | None:
        """A token that stands for all previous text: only whether there is any matters."""
        for token in sorted(self.ids - self.bytes):
            text = self.text([token])
            if text.isascii() and text.isalnum():
                return token
        return None


def is_local(parts: list[dict[str, Any]]) -> bool:
    """Whether a decoder needs no other token, except whether there is one before, and a character's bytes."""
    fused = False  # to one string
    for part in parts:
        kind = part["type"]
        if kind == "Strip":
            local = part["stop"] == 0
        elif kind == "Replace":
            local = not fused or len(part["pattern"].get("String", "any regular expression")) == 1
        else:
            local = kind == "Fuse" or (
                kind in ("ByteLevel", "ByteFallback", "Metaspace", "WordPiece") and not fused
            )
        if not local:
            return False
        fused = fused or kind in ("Fuse", "ByteLevel")
    return True


class Writer:
    """Converts tokens to text one at a time, as UTF-8; the text continues that of `before`, the prompt.

    Holds back what a later token may change: the first bytes of a character; a run of byte tokens, which one
    wrong byte turns into U+FFFD; everything, if the decoder has parts that look at other tokens.
    """

    def __init__(self, decoding: Decoding, before: Sequence[int]):
        self.decoding = decoding
        self.tokens = [token for token in before if token in decoding.ids]
        if decoding.context is not None:
            start = len(self.tokens)
            while start > 0 and self.tokens[start - 1] in decoding.bytes:
                start -= 1
            if decoding.byte_level:
                start = max(0, min(start, len(self.tokens) - 4))  # a character has at most 4 bytes
            if decoding.text(self.tokens[:start]):
                self.tokens = [decoding.context, *self.tokens[start:]]
        self.said = decoding.text(self.tokens)

    def __call__(self, token: int) -> bytes:
        """The text that one more token completes."""
        decoding = self.decoding
        if token not in decoding.ids:
            return b""
        self.tokens.append(token)
        if decoding.context is None or token in decoding.bytes:
            return b""
        text = decoding.text(self.tokens)
        if decoding.byte_level and text.endswith(UNKNOWN):
            piece = self.say(text.removesuffix(UNKNOWN))
            if len(self.tokens) > 16:
                self.shorten(text)
            return piece
        piece = self.say(text)
        if text:
            self.tokens = [decoding.context]
            self.said = decoding.text(self.tokens)
        return piece

    def end(self) -> bytes:
        """The text that was held back, after the last token."""
        return self.say(self.decoding.text(self.tokens))

    def say(self, text: str) -> bytes:
        """The part of a text that was not said before."""
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.said, text)))
        if same < len(text):
            self.said = text
        return text[same:].encode("utf-8")

    def shorten(self, text: str) -> None:
        """Forget tokens before a character's start, so that a long run of invalid bytes takes linear time."""
        for cut in range(len(self.tokens) - 4, len(self.tokens) - 8, -1):
            head = self.decoding.text(self.tokens[:cut])
            if head + self.decoding.text(self.tokens[cut:]) == text:
                self.tokens, self.said = self.tokens[cut:], self.said[len(head) :]
                return
