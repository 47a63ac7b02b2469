"""Splits what a reasoning model writes into its thought, between <think> and </think>, and its answer."""

from typing import Literal

from .folder import Tokenizer

OPEN, CLOSE = "<think>", "</think>"
TAIL = 16  # tokens at a prompt's end: enough for the tag, spelled in bytes, and newlines


class Splitter:
    """Splits a text that arrives in pieces; the result does not depend on where one piece ends.

    A thought starts with <think> where the text starts. It ends with </think> or, without one, with the text.
    The tags belong to neither part, nor do the newlines next to them. A tag anywhere else is text.

    Args:
        state: "start"; "opened" if the prompt ends in <think>; "answer" to split nothing.

    Attributes:
        thinks: whether the text has a thought, perhaps an empty one.
    """

    def __init__(self, state: Literal["start", "opened", "thought", "closed", "answer"] = "start"):
        self.state, self.thinks, self.held = state, state == "opened", ""

    def add(self, text: str, last: bool = False) -> tuple[str, str]:
        """The parts of the thought and of the answer that are certain with one more piece.

        Args:
            last: no text follows, so nothing is held back.
        """
        text, self.held, thought = self.held + text, "", ""
        if self.state == "start":
            if text.startswith(OPEN):
                self.state, self.thinks, text = "opened", True, text.removeprefix(OPEN)
            elif OPEN.startswith(text) and not last:
                self.held, text = text, ""
            else:
                self.state = "answer"
        if self.state == "opened":
            text = text.lstrip("\n")
            if text:
                self.state = "thought"
        if self.state == "thought":
            thought, tag, text = text.partition(CLOSE)
            if tag:
                thought, self.state = thought.rstrip("\n"), "closed"
            elif not last:
                certain = without_start(thought).rstrip("\n")
                thought, self.held = certain, thought[len(certain) :]
        if self.state == "closed":
            text = text.lstrip("\n")
            if text:
                self.state = "answer"
        return thought, text


def without_start(text: str) -> str:
    """A text without the first characters of </think> at its end."""
    return text[: len(text) - max(n for n in range(len(CLOSE)) if text.endswith(CLOSE[:n]))]


def splitter_for(tokenizer: Tokenizer, prompt: list[int]) -> Splitter:
    """A splitter for the answer to a conversation.

    R1's and QwQ's chat templates end in <think>, so that the answer starts within the thought.
    """
    by_template = OPEN in (tokenizer.chat_template or "")
    opened = by_template and tokenizer.decode(prompt[-TAIL:]).rstrip("\n").endswith(OPEN)
    return Splitter("opened" if opened else "start")
