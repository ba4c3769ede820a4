"""The letter of a multiple choice that an answer gives."""

from __future__ import annotations

import re

__all__ = ["letter"]

_MARKS = r"[\s$*)\].:]*"
_AND = r"(?:,|;|/|&|\band\b|\bor\b|\\text\{\s*(?:and|or)\s*\})"
_ONE = re.compile(r"[\s$*(\[{]*([A-Ja-j])[\s$*)\]}.:]*")
_SEVERAL = re.compile(rf"[\s$*(\[]*[A-J]{_MARKS}(?:{_AND}[\s$*(\[]*[A-J]\b{_MARKS})+")
"""Several letters at the start, which are no answer: "A or B"."""
_OTHER = re.compile(rf"(?<![A-Za-z])([A-J])\b{_MARKS}{_AND}[\s$*(\[]*$")
"""A letter before the last one of such a list."""
_FIRST = re.compile(r"[\s$*(\[]*([A-J])[\s$*)\].:,]")
_LAST = re.compile(
    r"(?s).*(?:^|[\s(*\[])(?<!\bnot )(?<!\bthan )([A-J])"
    r"(?=[).:\]*,]|[ \t]*\n|\s*$|\s+(?:because|since|rather)\b|\s+is\s+(?:the\s+)?(?:correct|right|true|best|answer)\b)"
)
_OPTIONS = re.compile(r"(?m)(?:^|(?<=\s))[(*]*([A-J])[).:]+\*{0,2}\s+(?=\S)")
"""An option with its text: "A) 12 apples"."""
_LINES = re.compile(r"(?m)^[(*]*([A-J])(?:[).:]|\*{0,2}$)")
"""A letter at the start of a line, as an option or alone."""


def letter(text: str, named: bool) -> str | None:
    """The letter from A to J that ``text`` gives, or None.

    Args:
        text: the part of an answer that holds its result.
        named: the answer says that this part is its result, so a letter at its start counts.

    A text of one letter gives that letter, else the last letter that is named counts. A text that names several letters
    together, or that only lists the options, gives none.
    """
    text = text.strip()
    if _SEVERAL.match(text):
        return None
    whole = _ONE.fullmatch(text)
    if whole:
        return whole[1].upper()
    found = (_FIRST.match(text + " ") if named else None) or _LAST.search(text)
    if found is None or _ends_options(text, found.start(1)):
        return None
    other = _OTHER.search(text[: found.start(1)])
    return None if other and other[1] != found[1] else found[1]


def _ends_options(text: str, place: int) -> bool:
    """Whether the letter at ``place`` is only the last of the options A, B, C, ... that ``text`` repeats."""
    for pattern, fewest in ((_OPTIONS, 3), (_LINES, 2)):
        options = list(pattern.finditer(text))
        if len(options) >= fewest and options[-1].start(1) == place:
            return "".join(one[1] for one in options) == "ABCDEFGHIJ"[: len(options)]
    return False
