"""HTML pages: inserted text is escaped, and the browser runs only the page's own script.

Control characters, which HTML does not allow, are escaped.
"""

import base64
import hashlib
from pathlib import Path
from typing import Any

import jinja2

from ..console import visible


def render(path: Path, **values: Any) -> str:
    """Render a template; its variable `policy` is the page's Content-Security-Policy."""
    loader = jinja2.FileSystemLoader(path.parent)
    pages = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, finalize=shown
    )
    pages.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    template = pages.get_template(path.name)
    return template.render(policy=policy(template.render(policy="", **values)), **values)


def shown(value: Any) -> Any:
    """A text with visible control characters, except tabs and line breaks; any other value unchanged."""
    return visible(value, keep="\t\n") if type(value) is str else value


def policy(page: str, *more: str) -> str:
    """A Content-Security-Policy that allows only the page's own script and style and loads nothing.

    Args:
        more: additional directives, such as "connect-src 'self'".
    """
    allowed = ["default-src 'none'", "img-src data:", "base-uri 'none'", "form-action 'none'", *more]
    for tag in ("script", "style"):
        inside = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        allowed.append(f"{tag}-src 'sha256-{digest}'")
    return "; ".join(allowed)
