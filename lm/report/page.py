"""Pages for a browser: texts from outside are escaped, and nothing runs but the page's own script."""

import base64
import hashlib
from pathlib import Path
from typing import Any

import jinja2


def render(path: Path, **values: Any) -> str:
    """A template filled in; its `policy` says what a browser may run."""
    loader = jinja2.FileSystemLoader(path.parent)
    pages = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    pages.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    template = pages.get_template(path.name)
    return template.render(policy=policy(template.render(policy="", **values)), **values)


def policy(page: str, *more: str) -> str:
    """A Content-Security-Policy by which the page's own script and style run, and nothing is loaded.

    Args:
        more: what is allowed or forbidden besides, as "connect-src 'self'".
    """
    allowed = ["default-src 'none'", "img-src data:", "base-uri 'none'", "form-action 'none'", *more]
    for tag in ("script", "style"):
        inside = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        allowed.append(f"{tag}-src 'sha256-{digest}'")
    return "; ".join(allowed)
