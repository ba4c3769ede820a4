"""The letter of a multiple choice that an answer gives."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["letter"]

_OPEN, _CLOSE = r"[\s$*(\[{\"'`\u201c\u2018]*+", r"[\s$*)\]}.:\"'`\u201d\u2019]*+"
_AND = r"(?:,|;|/|&|\||\band\b|\bor\b|\\text\{\s*(?:and|or)\s*\})"
_ASIAN = r"\u3001\u3002\uff0c\uff09\uff1a\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
"""Punctuation and letters of languages without spaces."""
_ONE = re.compile(rf"{_OPEN}([A-Ja-j]){_CLOSE}")
_SEVERAL = re.compile(rf"{_OPEN}[A-J]{_CLOSE}(?:{_AND}{_OPEN}[A-J]\b(?!'s){_CLOSE})+")
"""Several letters at the start, which are no answer: "A or B"."""
_OTHER = re.compile(rf"(?<![A-Za-z])([A-J])\b[\s$*)\].:]*{_AND}[\s$*(\[]*$")
"""A letter before the last one of such a list."""
_FIRST = re.compile(
    rf"{_OPEN}(?:([A-J])(?!'s)(?=[$*)\].:,\"'`]|\s*$|\s+[^a-z\s]|\s+(?:because|since|which|as)\b)|([B-HJ])(?=\s)|([a-j])\)(?!\S))"
)
"""A letter at the start of a result. That of "A triangle" and of "I think" is none."""
_STATED = re.compile(
    r"(?:^|[.!?:,\n]|\b(?i:option|choice|answer|that|think|believe|so|thus|hence|therefore))\s*[(*]*([A-J])[)*]*\s+is\s+(?:the\s+)?(?:correct|right|best|answer)\b"
)
"""A letter that is said to be right: "option B is correct"."""
_MARKED = re.compile(
    rf"(?:^|(?<=[\s(*\[\"'`{_ASIAN}]))([A-J])(?!'s)(?=[).:\]*,\"'`{_ASIAN}]|\s+[-\u2013\u2014]\s|[ \t]*\n|\s*$)",
)
"""A letter before a sign, or at the end of a line: "(B)", "B."."""
_SAID = re.compile(
    r"(?:^|(?<=[\s(*]))([A-J])(?=\s+(?:because|since|rather than|fits|seems)\b|\s+is\s+true\b)|"
    r"(?i:\b(?:option|choice|pick|choose|select)\s+\(?)([A-Ja-j])\b|^\(?([a-j])\)\s|\(([a-j])\)(?=\s+is\b|\.?\s*$)"
)
"""A letter that is chosen in words: "B because ...". Only looked for where no letter is marked."""
_DENIED = re.compile(
    r"(?i)(?:\bnot|n't(?: be)?|\bcannot be|thing but|\bneither|\bnor|\bexcept|\beliminat(?:e|ing)|\bexclud(?:e|ing)|\bthan|"
    r"\brul(?:e|ed|ing) out|\u00b0)\s+(?:option |choice |answer )?[\s(*]*$"
)
_WRONG = re.compile(r"[\s)*\].:]*(?i:is|was)\s+(?i:not|wrong|incorrect|false)\b")
"""Words before and behind a letter that say that it is not the right one."""
_OPTIONS = re.compile(r"(?m)(?:^|(?<=\s))[(*]*([A-J])(?:[).:]+\*{0,2}|\s+[-\u2013\u2014])\s+(?=\S)")
"""An option with its text: "A) 12 apples"."""
_LINE = re.compile(r"(?:[-*\u2022]\s+)?[(*]*([A-J])(?:[).:]+\**|\s+[-\u2013\u2014]\s|\**$)")
"""A line that is an option."""
_DENYING = re.compile(r"(?i)\b(?:not|no|wrong|incorrect|false|too)\b|n't\b")
_RIGHT = re.compile(r"\b(?i:correct|right|true|yes)\b")


def letter(text: str, named: bool) -> str | None:
    """The letter from A to J that ``text`` gives, or None.

    Args:
        text: the part of an answer that holds its result.
        named: the answer says that this part is its result, so a letter at its start counts.

    A text of one letter gives that letter, else the last letter that is named counts. A text that names several letters
    together, or that only lists the options, gives none.
    """
    text = text.strip()
    if _SEVERAL.match(text) or _only_letters(text):
        return None
    if whole := _ONE.fullmatch(text):
        return whole[1].upper()
    if named and (first := _FIRST.match(text)):
        return None if _ends_options(text, first.start(first.lastindex or 0)) else first[first.lastindex or 0].upper()
    if first := _before_the_others(text):
        return first
    stated = {one[1] for one in _STATED.finditer(text)}
    if stated:
        return stated.pop() if len(stated) == 1 else None
    for pattern in (_MARKED, _SAID):
        for found in reversed(list(pattern.finditer(text))):
            chosen, place = found[found.lastindex or 0].upper(), found.start(found.lastindex or 0)
            before = text[max(0, place - 40) : place]
            if _DENIED.search(before) or _WRONG.match(text, place + 1):
                continue
            other = _OTHER.search(before)
            return None if _ends_options(text, place) or (other and other[1] != chosen) else chosen
    return None


def _before_the_others(text: str) -> str | None:
    """The letter of a first paragraph that is one option, if all others are told about behind it: letters before that one,
    or options after words such as "the others". None if the paragraphs are options in order."""
    head, _, rest = text.partition("\n\n")
    label = _ONE.fullmatch(head.strip()) or _LINE.match(head.strip())
    if "\n" in head.strip() or not label or not label[1].isupper() or _DENYING.search(head):
        return None
    others = {one[1] for one in _MARKED.finditer(rest)} | {one[1] for one in _OPTIONS.finditer(rest)}
    told = others and label[1] not in others and not _STATED.search(rest)
    return label[1] if told and (min(others) < label[1] or re.search(r"(?i)\b(?:others?|why)\b", rest)) else None


def _only_letters(text: str) -> bool:
    """Whether ``text`` is nothing but different letters of a choice, such as "B C" or "(A)(B)"."""
    words = re.findall(r"[A-Za-z]+", re.sub(r"\\[a-z]+", " ", text))
    letters = {word for word in words if len(word) == 1 and word in "ABCDEFGHIJ"}
    return "\n" not in text and len(letters) > 1 and all(word in letters or word in ("and", "or", "maybe") for word in words)


def _ends_options(text: str, place: int) -> bool:
    """Whether the letter at ``place`` is only the last of the options that ``text`` repeats: A, B, C in a line, or lines
    that are all options."""
    if _RIGHT.search(text, place):
        return False
    options = [one for one in _OPTIONS.finditer(text) if one.start(1) <= place]
    if len(options) > 2 and options[-1].start(1) == place and _in_order(options):
        return True
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    labels = [_LINE.match(line) for line in lines]
    letters = [label[1] for label in labels if label]
    last = len(lines) > 1 and place >= text.rindex(lines[-1])
    return last and len(letters) == len(lines) and letters[-1] not in letters[:-1]


def _in_order(options: Sequence[re.Match[str]]) -> bool:
    return "".join(one[1] for one in options) == "ABCDEFGHIJ"[: len(options)]
