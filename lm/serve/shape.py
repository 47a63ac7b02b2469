"""The JSON of completions in the OpenAI API, with thoughts in a field of their own as in DeepSeek's API."""

import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from .protocol import Ask, Chat


class Said(NamedTuple):
    """The text of one sequence, or a new piece of it.

    Attributes:
        thought: None if the sequence has no thought.
        finished: the finish reason.
    """

    thought: str | None
    answer: str
    finished: str | None


class Shape:
    """The JSON of the responses to one request, whole or streamed."""

    def __init__(self, ask: Ask, model: str):
        self.chat = isinstance(ask, Chat)
        self.counted = ask.stream_options.include_usage
        self.kind = "chat.completion" if self.chat else "text_completion"
        self.head = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, texts: Iterable[Said], usage: dict[str, int]) -> dict[str, Any]:
        """The whole response."""
        choices = []
        for index, (thought, answer, finished) in enumerate(texts):
            thinking = {} if thought is None else {"reasoning_content": thought}
            message = {"role": "assistant", "content": answer, **thinking}
            said = {"message": message} if self.chat else {"text": answer}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": finished})
        return {**self.head, "object": self.kind, "choices": choices, "usage": usage}

    def pieces(self, index: int, said: Said, first: bool) -> Iterator[dict[str, Any]]:
        """Streamed pieces for new text of one sequence.

        A piece has a part of the thought or of the answer, never both: the other field is null.
        """
        deltas: list[dict[str, Any]] = []
        if said.thought:
            deltas.append({"content": None, "reasoning_content": said.thought})
        if said.answer or not said.thought:
            thinking = {} if said.thought is None else {"reasoning_content": None}
            deltas.append({"content": said.answer, **thinking})
        for number, delta in enumerate(deltas, 1):
            role = {"role": "assistant"} if first and number == 1 else {}
            text = {"delta": {**role, **delta}} if self.chat else {"text": delta["content"]}
            finished = said.finished if number == len(deltas) else None
            choice = {"index": index, **text, "logprobs": None, "finish_reason": finished}
            yield {**self.streamed(), "choices": [choice], **({"usage": None} if self.counted else {})}

    def last(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last piece, if usage was requested."""
        return {**self.streamed(), "choices": [], "usage": usage}

    def streamed(self) -> dict[str, Any]:
        """The fields that every piece has."""
        return {**self.head, "object": "chat.completion.chunk" if self.chat else self.kind}
