"""Chat templates by the transformers convention: jinja2 programs of strangers, kept in bounds.

A template runs in jinja2's sandbox, in a process of its own that may use little memory and little time.
"""

import json
import subprocess
import sys
from typing import Any

SECONDS, BYTES = 10, 512 * 2**20


def render(template: str, messages: list[dict[str, str]], special: dict[str, str]) -> str:
    """The text that a chat template makes of messages, up to where the model's answer begins.

    Args:
        messages: each with role and content.
        special: texts of the special tokens by name, such as bos_token.

    Raises:
        ValueError: the template is wrong, refuses the messages, or leaves its bounds.
    """
    task = json.dumps({"template": template, "variables": {"messages": messages, **special}})
    try:
        # isolated (-I): neither this folder nor the environment adds code to what runs
        done = subprocess.run(
            [sys.executable, "-I", __file__], input=task.encode(), capture_output=True, timeout=SECONDS
        )
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        answer = {"error": f"it runs for more than {SECONDS} seconds"}
    except ValueError:
        answer = {"error": f"it was stopped; it may use {BYTES // 2**20} MiB"}
    if "error" in answer:
        raise ValueError(f"the chat template cannot be used: {answer['error']}")
    return answer["text"]


def render_here(template: str, variables: dict[str, Any]) -> str:
    """What the process does; the environment is the one that transformers gives to templates."""
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
    """Read a task from standard input, answer on standard output."""
    try:
        import resource  # not on Windows: there the time alone is limited

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
