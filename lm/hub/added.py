"""The tokens that a model folder's other files add to its tokenizer.json, as transformers adds them."""

import os
from pathlib import Path
from typing import Any

from ..files import read_json

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def add_tokens(tokenizer: Any, folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Add the tokens of a folder's files to a `tokenizers.Tokenizer` -> the named special tokens as text

    Turns off truncation and padding saved in tokenizer.json: they belong to the batches of training.

    Args:
        settings: the contents of tokenizer_config.json.

    Raises:
        ValueError: a file is damaged; names it.
    """
    padding = tokenizer.padding
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = settings.get("split_special_tokens") is True
    settings, legacy = dict(settings), {}
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    if "added_tokens_decoder" not in settings:  # older folders have two more files
        for name, token in read_optional(folder / "special_tokens_map.json").items():
            if name == "additional_special_tokens":
                extra = extra or token
            elif name == "extra_special_tokens" and isinstance(token, list) and isinstance(extra, list):
                extra = [*extra, *token]
            else:
                settings[name] = {**token, "special": True} if isinstance(token, dict) else token
        legacy = read_optional(folder / "added_tokens.json")
    if padding is not None:
        settings.setdefault("pad_token", padding["pad_token"])
    named = {name: token for name, token in settings.items() if name.endswith("_token") and text_of(token)}
    named = {name: named[name] for name in (*NAMED, *named) if name in named}  # in transformers' order
    if isinstance(extra, dict):
        named, extra = {**named, **extra}, []
    try:
        listed = settings.get("added_tokens_decoder", {})
        wanted = {int(index): make(token) for index, token in listed.items()}
        special = {text_of(token) for token in [*named.values(), *extra]}
        for content, index in legacy.items():
            flags = {"special": content in special, "normalized": content not in special}
            wanted[int(index)] = make({"content": content, **flags})
        add(tokenizer, [wanted[index] for index in sorted(wanted)], list(named.values()), extra)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: the added tokens are damaged: {error}") from None
    return {name: text for name, token in named.items() if (text := text_of(token)) is not None}


def add(tokenizer: Any, wanted: list[Any], named: list[Any], extra: list[Any]) -> None:
    """Add the tokens that a tokenizer lacks, or has with other flags; the named ones become special."""
    present = tokenizer.get_added_tokens_decoder().values()
    same = {repr(token) for token in present}
    new = [token for token in wanted if repr(token) not in same]
    texts = {token.content for token in [*present, *new]}
    for token in (make(token) for token in [*named, *extra]):
        if token.content not in texts:
            texts.add(token.content)
            new.append(token)
    names = {text_of(token) for token in named}
    for token in new:
        token.special = token.special or token.content in names
    tokenizer.add_tokens(new)


def make(token: Any) -> Any:
    """An AddedToken from its text, or from an object with `content` and flags."""
    from tokenizers import AddedToken

    text = text_of(token)
    if text is None:
        raise ValueError(f"{token!r:.80} is not a token")
    flags = {"special": True} if isinstance(token, str) else {f: token[f] for f in FLAGS if f in token}
    return AddedToken(text, **flags)


def text_of(token: Any) -> str | None:
    """The text of a token, given as such or as an object with `content`."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def read_optional(path: Path) -> dict[str, Any]:
    """A JSON object, empty if the file does not exist."""
    return read_json(path) if os.path.lexists(path) else {}
