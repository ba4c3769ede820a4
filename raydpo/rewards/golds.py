"""Right answers of prompts for the reward ``math``: numbers, formulas, letters of a multiple choice, or words."""

from __future__ import annotations

import json
import math
import re
from decimal import Decimal
from typing import Any

from raydpo.rewards.numerals import LIST, PLAIN, SEVERAL_UNITS, as_latex, tidy, with_commas, without_emphasis, without_text

__all__ = ["GoldError", "boxes_of", "inside", "plain_words", "read_gold"]

_CHOICE = re.compile(r"(?:(?i:option|choice)\s+)?\(?([A-J])(?:\)?[.:]?|[):]+\s*\S.*|\.\s+[\d$\\].*)")
_ANSWER = re.compile(r"(?i)^\s*(?:the\s+)?(?:correct\s+|final\s+)?answer(?:\s+is\b|\s*:)")
_MONTHS = (
    "jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|"
    "nov(?:ember)?|dec(?:ember)?"
)
_NO_VALUE = re.compile(
    rf"\d+(?:-\d+)+(?:\s+[A-Za-z].*)?|[$€£]?\d+-[$€£]\d+|\d+(?:[./]\d+){{2,}}|"
    rf"{SEVERAL_UNITS.pattern}|.*\d\s(?:hundred|thousand|million|billion)\s+(?:and\s+)?\d.*|"
    rf"[\d.]+(?:\s*[x*]\s*[\d.]+)+\s+[A-Za-z].*|"
    rf"(?i:(?:{_MONTHS})\b\.?,?\s+\d.*|\d+(?:st|nd|rd|th)?,?\s+(?:of\s+)?(?:{_MONTHS})\b.*)"
)
"""Dates, telephone numbers, addresses, ranges and several units. math-verify would read them as arithmetic, or would read
one number of them alone."""
_WORDS = {"yes", "no", "true", "false", "even", "odd", "none"}


class GoldError(ValueError):
    """The right answer of a prompt cannot be read."""


def read_gold(gold: Any) -> tuple[str, str]:
    """Kind of a right answer (value, choice, words), and the text to compare or to parse.

    Raises:
        GoldError: if it cannot be read.
    """
    if isinstance(gold, float):
        if not math.isfinite(gold):
            raise GoldError(f"the right answer is {gold}")
        gold = format(Decimal(repr(gold)), "f")
    if isinstance(gold, bool) or not isinstance(gold, (str, int)):
        gold = json.dumps(gold) if isinstance(gold, bool) else gold
        if not isinstance(gold, str):
            raise GoldError(f"the right answer is a {type(gold).__name__}, expected a text or a number")
    text = str(gold).strip()
    if "####" in text:
        text = text.rpartition("####")[2].strip()
    if not text:
        raise GoldError("the right answer is empty")
    boxes = boxes_of(text)
    if boxes:
        text = inside(text, boxes[-1]).strip()
    text = _ANSWER.sub("", without_emphasis(text)).strip().lstrip("~\u2248").strip()
    bare = without_text(text.strip("$ ").strip()).strip()
    if choice := _CHOICE.fullmatch(bare):
        return "choice", choice[1]
    if re.fullmatch(r"[A-J]\.\s+[A-Za-z].*", bare):
        raise GoldError(f"the right answer {bare[:80]!r} may be an option or a name; write {bare[0]!r} for the option")
    words = plain_words(bare)
    if re.fullmatch(r"[^\W\d_]+\.?(?:(?:['\u2019-]|\s+)[^\W\d_]+)*[.!]?", bare) and (
        "\\" in text or words in _WORDS or (len(words) > 3 and words != "infinity")
    ):
        if " or " in words:
            raise GoldError(f"the right answer {bare[:80]!r} has more than one value; write one")
        return "words", words
    if _NO_VALUE.fullmatch(bare):
        raise GoldError(f"the right answer {bare[:80]!r} would be read as arithmetic, or in part; write it as one number")
    return "value", _value(tidy(text).strip())


def _value(text: str) -> str:
    """The text of a value, as math-verify parses it."""
    if re.fullmatch(r"\d{1,3}(?: \d{3})+", text):
        return text.replace(" ", "")
    if re.fullmatch(r"-?0,\d+", text):  # a decimal comma; "3,5" may be two numbers
        return text.replace(",", ".")
    simple = re.sub(r"\^\{?\\circ\}?", " degrees", without_text(text)).replace(r"\%", "%").replace(r"\$", "$")
    if PLAIN.fullmatch(simple) and not LIST.fullmatch(simple):
        return simple
    if LIST.fullmatch(text):
        return f"${with_commas(text)}$"
    if re.search(r"\$.+\$|\\\(|\\\[", text):
        return text
    if "\\" not in text and re.search(r"\d", text) and re.search(r"(?:^|\s)[A-Za-z]{3,}(?:\s|$)", text):
        raise GoldError(f"the right answer {text[:80]!r} has words beside its value; write the value alone")
    if text.startswith("{") and text.endswith("}"):
        text = f"\\{text[:-1]}\\}}"
    text = {"infinity": r"\infty", "inf": r"\infty", "pi": r"\pi"}.get(text.lower(), as_latex(text))
    return f"${text}$"


def boxes_of(text: str) -> list[tuple[int, int]]:
    """Start and end of each complete ``\\boxed{...}`` and ``\\fbox{...}``."""
    found = []
    for match in re.finditer(r"\\f?boxed?\s*\{", text):
        if found and match.start() < found[-1][1]:
            continue
        depth = 0
        for place in range(match.end() - 1, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0) if text[place - 1] != "\\" else 0
            if depth == 0:
                found.append((match.start(), place + 1))
                break
    return found


def inside(text: str, box: tuple[int, int]) -> str:
    """What is in a box of ``boxes_of``."""
    return text[text.index("{", box[0]) + 1 : box[1] - 1]


def plain_words(text: str) -> str:
    """The words of ``text`` in lower case, without signs around them, and without an article before them."""
    words = " ".join(re.sub(r"[^\w\s'\u2019-]", " ", text.replace("$", " ")).casefold().split())
    return re.sub(r"^(?:an?|the) (?=.)", "", words)
