"""The supported part of the OpenAI API: requests and errors."""

import sys
from collections.abc import Collection
from typing import Annotated, Any, Literal

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

# Parameters of this API and other servers that are not supported: accepted only with these neutral values.
NEUTRAL: dict[str, list[Any]] = {
    "add_generation_prompt": [True],
    "best_of": [1],
    "continue_final_message": [False],
    "continuous_usage_stats": [False],
    "echo": [False],
    "frequency_penalty": [0],
    "function_call": ["none", "auto"],
    "functions": [[]],
    "ignore_eos": [False],
    "include_stop_str_in_output": [False],
    "length_penalty": [1],
    "logit_bias": [{}],
    "logprobs": [False],
    "min_tokens": [0],
    "mirostat": [0],
    "modalities": [["text"]],
    "presence_penalty": [0],
    "reasoning_effort": ["none"],
    "repetition_penalty": [1],
    "response_format": [{"type": "text"}],
    "skip_special_tokens": [True],
    "stop_token_ids": [[]],
    "suffix": [""],
    "tool_choice": ["none", "auto"],
    "tools": [[]],
    "top_logprobs": [0],
    "typical_p": [1],
    "use_beam_search": [False],
    "verbosity": ["medium"],
}
# Parameters that never change the completion: accepted with any value, and ignored.
IGNORED = {
    "cache_prompt",
    "keep_alive",
    "metadata",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "request_id",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
# Fields of earlier messages that clients send back, and the sender's name.
IGNORED_IN_MESSAGES = {"annotations", "cache_control", "id", "name", "reasoning", "reasoning_content"}


class Problem(Exception):
    """An error response.

    Args:
        param: the invalid field.
        code: a machine-readable kind, such as context_length_exceeded.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole response."""
        return JSONResponse(self.body(), self.status, self.headers)


class ErrorDetails(BaseModel):
    """The fields of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorShape(BaseModel):
    """The body of every error response."""

    error: ErrorDetails


def in_words(expected: str) -> WrapValidator:
    """One error message for a union, where pydantic has one for each member."""

    def check(value: Any, handler: Any) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("value", "expected {expected}", {"expected": expected}) from None

    return WrapValidator(check)


def without_nulls(fields: Any) -> Any:
    """Drop null fields, which so get their defaults."""
    return {k: v for k, v in fields.items() if v is not None} if isinstance(fields, dict) else fields


WithoutNulls = BeforeValidator(without_nulls)


def check_unsupported(fields: dict[str, Any] | None, ignored: Collection[str], path: str = "") -> None:
    """Raise Problem for a field that is neither ignored nor neutral: null, empty or as in NEUTRAL."""
    for name, value in (fields or {}).items():
        if name in ignored or value in (None, "", [], {}):
            continue
        # True == 1 in Python, but not in JSON
        if not any(
            value == n and isinstance(value, bool) == isinstance(n, bool) for n in NEUTRAL.get(name, [])
        ):
            name = shorten(path + name)
            raise Problem(400, f"{name}: not supported; leave it out", name, "unsupported_parameter")


class TextPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(strict=True)
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(strict=True, extra="allow")
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | list[TextPart], in_words("a string, or a list of parts of type text")]

    @model_validator(mode="before")
    @classmethod
    def silent_assistant(cls, fields: Any) -> Any:
        """An assistant's message without content, as OpenAI's own are when they call tools, is empty."""
        if isinstance(fields, dict) and fields.get("role") == "assistant" and fields.get("content") is None:
            return {**fields, "content": ""}
        return fields

    def plain(self) -> dict[str, str]:
        """role and content as plain strings, for chat templates, which know no role `developer`."""
        parts = self.content if isinstance(self.content, list) else []
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(BaseModel):
    """Options for streaming."""

    model_config = ConfigDict(strict=True, extra="allow")
    include_usage: bool = False


Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Prompt = Annotated[
    Annotated[str, Field(min_length=1)]
    | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=64)]
    | Ids
    | Annotated[list[Ids], Field(min_length=1, max_length=64)],
    in_words("a non-empty string or token list, or a list of up to 64 of them"),
]


def above_0(top_p: float) -> float:
    """top_p, or for 0 a number so small that only the most likely token is kept."""
    return top_p or sys.float_info.min


class Ask(BaseModel):
    """The parameters of both endpoints; null means the default.

    top_k and min_p are not in OpenAI's API.
    """

    model_config = ConfigDict(strict=True, extra="allow")
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: Annotated[float, AfterValidator(above_0)] = Field(1.0, ge=0, le=1)
    top_k: int | None = Field(None, ge=1)
    min_p: float = Field(0.0, ge=0, le=1)
    n: int = Field(1, ge=1, le=8)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[
        Stop | Annotated[list[Stop], Field(max_length=4)],
        in_words("a string or up to 4 strings, each of 1 to 256 characters"),
    ] = Field(default_factory=list)
    stream: bool = False
    stream_options: Annotated[StreamOptions, WithoutNulls] = StreamOptions()

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, fields: Any) -> Any:
        """Null fields get their defaults."""
        return without_nulls(fields)

    def check(self, model: str, longest: int) -> None:
        """Raise Problem for a wrong model, more tokens than `longest`, or an unsupported parameter."""
        if self.model not in (None, model):
            raise unknown_model(self.model, model)
        for name in ("max_tokens", "max_completion_tokens"):
            asked = getattr(self, name)
            if asked is not None and asked > longest:
                raise Problem(400, f"{name}: {asked} is more than {longest}", name)
        check_unsupported(self.model_extra, IGNORED)
        check_unsupported(self.stream_options.model_extra, {"include_obfuscation"}, "stream_options.")

    def max_new_tokens(self, default: int) -> int:
        """The largest number of tokens to generate."""
        return self.max_completion_tokens or self.max_tokens or default

    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop


class Completion(Ask):
    """A request to /v1/completions."""

    prompt: Prompt

    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a string or token ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class Chat(Ask):
    """A request to /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)

    def check(self, model: str, longest: int) -> None:
        """As in `Ask.check`; also raise Problem for an unsupported field of a message."""
        super().check(model, longest)
        for index, message in enumerate(self.messages):
            check_unsupported(message.model_extra, IGNORED_IN_MESSAGES, f"messages[{index}].")


def problem_of(error: RequestValidationError) -> Problem:
    """The first error in a body, with the field's name."""
    first = error.errors()[0]
    kind, (_, *path) = first["type"], first["loc"]
    if kind == "json_invalid":
        return Problem(400, f"the body is not JSON: {first['ctx']['error']}")
    if not path:
        return Problem(400, "the body must be a JSON object, sent as Content-Type: application/json")
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    message = first["msg"][:1].lower() + first["msg"][1:]
    got = "" if kind == "missing" else f", got {shorten(ascii(first['input']))}"
    return Problem(400, f"{name}: {message}{got}", name)


def unknown_model(asked: str, model: str) -> Problem:
    """The error for a model that is not served here."""
    return Problem(404, f"model {shorten(ascii(asked))}: must be {model}", "model", "model_not_found")


def reason(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error) or type(error).__name__).splitlines()[0]


def shorten(text: str, length: int = 60) -> str:
    """Text cut to at most `length` characters."""
    return text if len(text) <= length else text[: length - 3] + "..."
