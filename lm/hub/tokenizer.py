"""A model folder's tokenizer: tokenizer.json, end-of-text tokens and chat template."""

import contextlib
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..files import read_text, write_json
from ..tokenizer import ByteTokenizer
from . import added, template
from .added import read_optional
from .stream import Decoding, Writer, one_line

LONGEST = 256 * 2**20  # bytes of a tokenizer.json
LONGEST_TEMPLATE = 2**20
UNREAD = (
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "tiktoken.model",
    "spiece.model",
)  # of slow tokenizers


class FileTokenizer:
    """The tokenizer of a model folder, with its end-of-text tokens and chat template.

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
            needed = "pip install -c constraints.txt -e '.[lm,hf]'"
            raise ValueError(f"{folder}: its tokenizer.json needs the extra hf: {needed}") from None
        path = folder / "tokenizer.json"
        text = read_file(path, LONGEST)
        try:
            with silenced(), one_line():
                self.tokenizer = Tokenizer.from_str(text)
                with contextlib.suppress(Exception):  # such as a letter that it lacks, but not a panic
                    self.tokenizer.decode(self.tokenizer.encode("Go é 日本\n").ids)
        except ValueError as error:
            raise ValueError(f"{path}: not a tokenizer: {error}") from None
        highest = max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
        if highest >= vocab_size:
            raise ValueError(f"{path}: has token {highest}; the model knows 0..{vocab_size - 1}")
        self.vocab_size = vocab_size
        settings = read_optional(folder / "tokenizer_config.json")
        self.special = added.add_tokens(self.tokenizer, folder, settings)
        self.decoding = Decoding(self.tokenizer)
        named = self.tokenizer.token_to_id(self.special.get("eos_token", ""))
        self.ends = stated_ends(folder) or (frozenset() if named is None else frozenset({named}))
        self.chat_template = find_template(folder, settings)

    def encode(self, text: str | bytes, special: bool = True) -> list[int]:
        """Token ids; special: with the tokens that the tokenizer puts around a text, such as a first one.

        Raises:
            ValueError: the text has a token that the model lacks, such as one added for padding.
        """
        with one_line():
            ids: list[int] = self.tokenizer.encode(as_unicode(text), add_special_tokens=special).ids
        highest = max(ids, default=0)
        if highest >= self.vocab_size:
            name = self.tokenizer.id_to_token(highest)
            raise ValueError(f"{name!a} is token {highest}; the model knows 0..{self.vocab_size - 1}")
        return ids

    def control_spans(self, text: str, by_model: bool) -> list[tuple[int, int]]:
        """Where a text has special tokens or, unless the model wrote it, others of the chat template."""
        written = "" if by_model else self.chat_template or ""
        tokens = self.tokenizer.get_added_tokens_decoder()
        spans = []
        with one_line():
            found = self.tokenizer.encode(text, add_special_tokens=False)
        for id, (start, stop) in zip(found.ids, found.offsets):
            token = tokens.get(id)
            if token is None or start == stop:
                continue
            control = token.special or (token.content in written and not token.content.isspace())
            # else it stands for an unknown word
            if control and (token.normalized or text[start:stop].strip() == token.content):
                spans.append((start, stop))
        return spans

    def encode_inside(self, text: str, plain: bool) -> list[int]:
        """Token ids of a text within another; plain: without added tokens, of which the text is one."""
        encode = self.encode_plain if plain else partial(self.encode, special=False)
        newline = self.encode("\n", special=False)
        with one_line():
            ids = encode("\n" + text)  # SentencePiece would put a space before the first token
            return ids[len(newline) :] if ids[: len(newline)] == newline else encode(text)

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of an added token's text as text, even if the vocabulary has it as a word."""
        tokenizer, ids = self.tokenizer, []
        unwanted = tokenizer.token_to_id(text.strip())
        if tokenizer.normalizer is not None:
            text = tokenizer.normalizer.normalize_str(text)
        words = [text]
        if tokenizer.pre_tokenizer is not None:
            words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        while words:
            word = words.pop(0)
            found = [token.id for token in tokenizer.model.tokenize(word)]
            if unwanted in found and len(word) > 1:
                words[:0] = [word[:1], word[1:]]
            else:
                ids += found
        return ids

    def encode_array(self, text: np.ndarray) -> np.ndarray:
        """The token ids of a text's bytes, all in memory."""
        return np.array(self.encode(text.tobytes()))

    def decode(self, tokens: Iterable[int]) -> str:
        """The text, without special tokens."""
        return self.decoding.text(list(tokens))

    def writer(self, before: Sequence[int] = ()) -> Writer:
        """Converts tokens to text one at a time, after the prompt `before`."""
        return Writer(self.decoding, before)


def open_tokenizer(folder: Path, vocab_size: int) -> ByteTokenizer | FileTokenizer:
    """The tokenizer of a model folder, by default bytes; warns if that is a guess.

    Raises:
        ValueError: there is no tokenizer.json, and the vocabulary is too large for bytes.
    """
    if os.path.lexists(folder / "tokenizer.json"):
        return FileTokenizer(folder, vocab_size)
    unread = [name for name in UNREAD if (folder / name).exists()]
    cure = "; save it with transformers' AutoTokenizer, which writes tokenizer.json"
    lacks = f"{folder}: holds no tokenizer.json" + (f" but {unread[0]}{cure}" if unread else "")
    if vocab_size > 2 * ByteTokenizer.vocab_size:
        raise ValueError(f"{lacks}; a model of {vocab_size} tokens does not read bytes")
    if not (folder / "config.toml").exists():  # a Hugging Face folder: ours are of bytes unless imported
        warnings.warn(f"{lacks}; text is read as bytes", stacklevel=2)
    tokenizer = ByteTokenizer()
    tokenizer.ends = stated_ends(folder) or tokenizer.ends
    return tokenizer


def stated_ends(folder: Path) -> frozenset[int]:
    """The end-of-text ids that a folder's generation_config.json states, else its config.json; may be empty.

    Without any, the tokenizer's eos_token ends a text.
    """
    for name in ("generation_config.json", "config.json"):
        found = read_optional(folder / name).get("eos_token_id")
        ids = found if isinstance(found, list) else [found]
        if ids and all(type(token) is int for token in ids):
            return frozenset(ids)
    return frozenset()


def keep_ends(folder: Path, into: Path) -> None:
    """Make `into`, a converted copy of a folder, state the same end-of-text ids (generation_config.json)."""
    ends = stated_ends(folder)
    if ends and stated_ends(into) != ends:
        path = into / "generation_config.json"
        write_json(path, {**read_optional(path), "eos_token_id": sorted(ends)})


def as_unicode(text: str | bytes) -> str:
    """A text with U+FFFD for invalid UTF-8, which a command line and standard input give as surrogates."""
    if isinstance(text, str):
        text = text.encode("utf-8", "surrogateescape")
    return text.decode("utf-8", "replace")


def find_template(folder: Path, settings: dict[str, Any]) -> str | None:
    """The chat template: chat_template.jinja, else the (default) one in the tokenizer's settings."""
    path = folder / "chat_template.jinja"
    if os.path.lexists(path):
        return read_file(path, LONGEST_TEMPLATE)
    found = settings.get("chat_template")
    if isinstance(found, list):
        found = {str(item.get("name")): item.get("template") for item in found if isinstance(item, dict)}
    if isinstance(found, dict):
        found = found.get("default")
    if isinstance(found, str) and re.search("[\ud800-\udfff]", found):
        raise ValueError(f"{folder / 'tokenizer_config.json'}: chat_template holds a lone surrogate")
    return found if isinstance(found, str) else None


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Drop what is written to standard error's descriptor, such as the report of a Rust panic."""
    try:
        kept = os.dup(2)
    except OSError:  # closed
        yield
        return
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def read_file(path: Path, longest: int) -> str:
    """The text of an untrusted file.

    Raises:
        ValueError: it cannot be read, is longer than `longest` bytes or not UTF-8; names the file.
    """
    try:
        return read_text(path, longest)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def encode_chat(tokenizer: ByteTokenizer | FileTokenizer, messages: list[dict[str, str]]) -> list[int]:
    """The token ids of a conversation, by the chat template or, without one, one line per message.

    Special tokens come from the template alone: in a message, `<|im_end|>` is text.

    Args:
        messages: each with role and content.

    Raises:
        ValueError: the template cannot be used, or rejects the messages.
    """
    plain = Plain(tokenizer, "".join([tokenizer.chat_template or "", *(m["content"] for m in messages)]))
    messages = [{**m, "content": plain.mark(m["content"], m["role"] == "assistant")} for m in messages]
    if tokenizer.chat_template is None:
        return plain.encode("".join(message["content"] + "\n" for message in messages), special=True)
    text = template.render(tokenizer.chat_template, messages, tokenizer.special)
    return plain.encode(text, special=False)  # the template adds special tokens itself


class Plain:
    """Encodes special tokens in users' texts as text.

    In a text, each is put between two characters that no text has, and the first also stands after its first
    letter. A chat template may cut the text anywhere, and yet cannot make a token of it.

    Args:
        texts: the template and the users' texts.
    """

    def __init__(self, tokenizer: ByteTokenizer | FileTokenizer, texts: str):
        self.tokenizer = tokenizer
        private = map(chr, range(0xE000, 0xF8FF))
        self.start, self.stop = islice((character for character in private if character not in texts), 2)
        self.marked: set[str] = set()

    def mark(self, text: str, by_model: bool = False) -> str:
        """Mark a text's special tokens and, unless the model wrote it, the template's tokens (`<think>`)."""
        if not isinstance(self.tokenizer, FileTokenizer):
            return text
        text, marked, last = as_unicode(text), "", 0
        for start, stop in self.tokenizer.control_spans(text, by_model):
            inside = text[start : start + 1] + self.start + text[start + 1 : stop]
            self.marked.add(inside)
            marked += text[last:start] + self.start + inside + self.stop
            last = stop
        return marked + text[last:]

    def encode(self, text: str, special: bool) -> list[int]:
        """Token ids of a text with marks; special: as in FileTokenizer.encode."""
        longest_first = sorted(self.marked, key=len, reverse=True)
        inside = "|".join(map(re.escape, longest_first)) or "(?!)"
        pieces = re.split(f"{self.start}({inside}){self.stop}|[{self.start}{self.stop}]", text)
        ids = self.tokenizer.encode(pieces[0], special)
        for i, piece in enumerate(pieces[1:], 1):
            if piece and isinstance(self.tokenizer, FileTokenizer):
                ids += self.tokenizer.encode_inside(piece.replace(self.start, ""), plain=i % 2 == 1)
        return ids
