"""Renders a template as one self-contained HTML file. Its content security policy allows its own scripts only, by hash."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Sequence
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

__all__ = ["render"]


def render(template: str, *, scripts: Sequence[str] = (), **values: Any) -> str:
    """Render ``template`` with ``values``; every value is escaped.

    Args:
        template: path below the package, such as ``reports/run.html``; it extends ``pages/layout.html``.
        scripts: paths below the package of the scripts that are copied into the page; no others can run.
    """
    texts = [_text(name) for name in scripts]
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    values |= {"style": Markup(_text("pages/style.css")), "scripts": list(map(Markup, texts)), "allowed": Markup(allowed)}
    return _environment().get_template(template).render(values)


@functools.cache
def _environment() -> jinja2.Environment:
    loader, undefined = jinja2.FunctionLoader(_text), jinja2.StrictUndefined
    return jinja2.Environment(loader=loader, undefined=undefined, autoescape=True, trim_blocks=True, lstrip_blocks=True)


def _text(name: str) -> str:
    return resources.files("raydpo").joinpath(name).read_text(encoding="utf-8")
