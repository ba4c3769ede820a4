"""What a chat template says when it refuses a conversation, without the words of that conversation.

Such a reason is counted: it must be the same for all records with the same fault, and hold nothing private.
"""

from __future__ import annotations

import builtins
import re
from functools import lru_cache

from raydpo.errors import one_line

__all__ = ["refusal"]

MOST = 120
_CODE = re.compile(r"\{[{%].*?[%}]\}", re.DOTALL)
_LITERAL = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"", re.DOTALL)
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`")
_SHORTEST = 4
_KINDS = {name for name in dir(builtins) if name[0].islower()} | {"NoneType", "Undefined", "function", "builtin_function"}


def refusal(error: Exception, template: object) -> str:
    """What ``error``, raised while ``template`` was rendered, says in words of the template or of Python, and its type.

    Args:
        template: the Jinja text, or several by name.
    """
    text = one_line(error)
    source = template if isinstance(template, str) else str(template)
    if type(error).__name__ == "TemplateError":  # raise_exception: a text that the template puts together
        told = _known_parts(text, source)
    else:
        told = re.sub(r"(?<=\s)\d+\b", "N", _QUOTED.sub(lambda quoted: _if_known(quoted[0], source), text))
    told = told if len(told) <= MOST else f"{told[: MOST - 4].rsplit(' ', 1)[0]} ..."
    return f"{told} ({type(error).__name__})" if told.strip(". ") else type(error).__name__


def _known_parts(text: str, source: str) -> str:
    """The parts of ``text`` that are texts in the template, with dots for what comes from the record."""
    parts, place, gap = [], 0, False
    while place < len(text):
        found = next((literal for literal in _literals(source) if text.startswith(literal, place)), None)
        if found is None:
            gap, place = True, place + 1
            continue
        parts += ["..."] * gap + [found]
        gap, place = False, place + len(found)
    return " ".join(" ".join([*parts, *["..."] * gap]).split())


@lru_cache(maxsize=8)
def _literals(source: str) -> list[str]:
    """The texts in quotation marks in a template, the longest first."""
    pieces = (piece for code in _CODE.findall(source) for piece in _LITERAL.findall(code))
    found = {" ".join(re.sub(r"\\(.)", r"\1", one or other).split()) for one, other in pieces}
    return sorted((text for text in found if len(text) >= _SHORTEST), key=len, reverse=True)


def _if_known(quoted: str, source: str) -> str:
    """A quoted piece of a message if it is a name in the template or a type of Python, else dots in its place."""
    inner = quoted[1:-1]
    return quoted if inner in source or inner.removesuffix(" object") in _KINDS else f"{quoted[0]}...{quoted[0]}"
