"""Renders chat templates as transformers does: untrusted jinja2 programs, run safely.

A template runs in jinja2's sandbox, in a separate process with limited memory and time.
"""

import json
import subprocess
import sys
from typing import Any

SECONDS, BYTES = 10, 512 * 2**20


def render(template: str, messages: list[dict[str, str]], special: dict[str, str]) -> str:
    """The prompt that a chat template makes from messages, up to the start of the model's answer.

    Args:
        messages: each with role and content.
        special: special tokens as text, by name (such as bos_token).

    Raises:
        ValueError: the template is invalid, rejects the messages, or exceeds its limits.
    """
    task = json.dumps({"template": template, "variables": {"messages": messages, **special}})
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


def render_here(template: str, variables: dict[str, Any]) -> str:
    """Render in this process, with the jinja2 environment that transformers sets up."""
    import datetime

    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
    return environment.from_string(template).render(add_generation_prompt=True, **variables)


def main() -> None:
    """Read the task from standard input; write the result to standard output."""
    try:
        import resource  # not on Windows, where only the time is limited

        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    except ImportError:
        pass
    try:
        answer = {"text": render_here(**json.load(sys.stdin))}
    except Exception as error:
        answer = {"error": str(error).splitlines()[0] if str(error) else type(error).__name__}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
