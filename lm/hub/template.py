"""Renders chat templates as transformers does: untrusted jinja2 programs, run safely.

A template runs in jinja2's sandbox, in a separate process with limited memory, time and output.
"""

import json
import subprocess
import sys
from typing import Any

SECONDS, BYTES = 10, 512 * 2**20
CHARACTERS, REASON = 4 * 2**20, 200  # the longest prompt and the longest error of a template


def render(template: str, messages: list[dict[str, str]], special: dict[str, str]) -> str:
    """The prompt that a chat template makes from messages, up to the start of the model's answer.

    Args:
        messages: each with role and content.
        special: special tokens as text, by name (such as bos_token).

    Raises:
        ValueError: the template is invalid, rejects the messages, or exceeds its limits.
    """
    variables = {"messages": messages, "tools": None, "documents": None, **special}
    task = json.dumps({"template": template, "variables": variables, "limit": CHARACTERS})
    try:
        # isolated (-I): no code is imported from this folder or by environment variables
        done = subprocess.run(
            [sys.executable, "-I", __file__], input=task.encode(), capture_output=True, timeout=SECONDS
        )
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        answer = {"error": f"it takes more than {SECONDS} seconds"}
    except ValueError:
        answer = {"error": f"it was stopped; the limit is {BYTES // 2**20} MiB"}
    if "error" in answer:
        raise ValueError(f"the chat template cannot be used: {answer['error']}")
    return answer["text"]


def render_here(template: str, variables: dict[str, Any], limit: int) -> str:
    """Render in this process."""
    pieces, length = [], 0
    for piece in make_environment().from_string(template).generate(add_generation_prompt=True, **variables):
        pieces.append(piece)
        length += len(piece)
        if length > limit:
            raise ValueError(f"it writes more than {limit} characters")
    return "".join(pieces)


def make_environment() -> Any:
    """The jinja2 environment that transformers sets up."""
    import datetime

    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, which marks the model's turns for training; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("unchanged"), [], [], body).set_lineno(line)

        def unchanged(self, caller: Any) -> Any:
            return caller()

    class Namespace(jinja2.utils.Namespace):
        """A namespace without names that start with an underscore."""

        def __init__(*args: Any, **attributes: Any):  # `self` may be an attribute's name
            attributes = dict(*args[1:], **attributes)
            for name in attributes:
                check_name(name)
            jinja2.utils.Namespace.__init__(args[0], attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            check_name(name)
            super().__setitem__(name, value)

    def check_name(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"{name!r} must not start with an underscore")

    class Dict:
        """What `dict` may do in a template."""

        def __call__(self, *args: Any, **entries: Any) -> dict[Any, Any]:
            return dict(*args, **entries)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        """Unlike jinja2's own filter, without escapes for HTML."""
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    environment.globals["dict"] = Dict()
    environment.globals["namespace"] = Namespace
    return environment


def main() -> None:
    """Read the task from standard input; write the result to standard output."""
    try:
        import resource  # not on Windows, where only the time and the output are limited

        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    except ImportError:
        pass
    try:
        answer = {"text": render_here(**json.load(sys.stdin))}
    except Exception as error:
        lines = str(error).splitlines() or [""]
        answer = {"error": lines[0][:REASON] or type(error).__name__}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
