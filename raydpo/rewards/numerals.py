"""Forms of numbers and formulas in text, made into those that math-verify reads."""

from __future__ import annotations

import re
from decimal import Decimal

__all__ = [
    "LIST",
    "PLAIN",
    "SEVERAL_UNITS",
    "as_latex",
    "differ",
    "plain",
    "tidy",
    "with_commas",
    "without_emphasis",
    "without_text",
]

_NUMBER = r"-?\s?[$€£¥₹]?\s?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+"
_UNIT = r"\s+(?:[A-Za-z]{2,}|[mgshlLNJWVK]\b)[A-Za-z ./]*(?:\^-?\d|(?<=[a-z])\d)?"
PLAIN = re.compile(rf"(?:{_NUMBER})(?:/\d+)?(?:\s*%|{_UNIT})?")
"""One number, which may have a currency, a percent sign or a unit."""
LIST = re.compile(rf"(?:{_NUMBER})(?:(?:,|;|,?\s++(?:and|or))\s++(?:{_NUMBER}))+")
"""Several numbers: "1, 2 and 3"."""
_WITH_UNIT = r"\d[\d.,]*\s*(?:[A-Za-z]{2,}|[mghsl]\b)\.?"
SEVERAL_UNITS = re.compile(rf"[-+]?{_WITH_UNIT}(?:,?\s*(?:\band\s+)?{_WITH_UNIT})+")
"""A length or a time in several units: "5 feet 10 inches". Any word counts as a unit."""
_MEASURE = (
    r"\d[\d.,]*\s*(?:h|hrs?|hours?|min|minutes?|s|sec|seconds?|days?|weeks?|months?|years?|ft|feet|foot|in|inch(?:es)?|yards?|"
    r"miles?|km|m|cm|mm|kg|g|lbs?|pounds?|oz|ounces?|dollars?|cents?)\b\.?"
)
_MEASURES = re.compile(rf"{_MEASURE}(?:,?\s*(?:\band\s+)?{_MEASURE})+")
"""The same in an answer, where other words may be prose: "3 times 4 is 12 dollars"."""
_BOUND = re.compile(
    r"(?i)(?:not|at (?:least|most)|(?:more|less|fewer|greater) than)\s[^\d,:;.]{0,20}[\d.,]+[^\d]*|\d{1,2}:\d\d[^\d]*"
)
_EITHER = re.compile(rf"\b(?:either|between)\s++({_NUMBER})\s+(?:or|and)\s++({_NUMBER})$")
_TIMES = r"(?:\\times|\\cdot|[*\u00d7\u00b7])"
_POWER = re.compile(
    rf"(?<![\d.,/^])(?<![/^]\s)(?<!\^\{{)(\d+(?:\.\d+)?)\s*(?:{_TIMES}\s*10\s*\^\s*(?:\{{\s*(-?\d+)\s*\}}|(-?\d+))|[eE]([+-]?\d+)\b)"
)
_MIXED = re.compile(r"(?<![\d.,/^*+={}-])(?<![\d.,/^*+={}-]\s)(\d+) (\d+)/(\d+)(?![\d/.])")
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|\\text\{,\}|,\\!|\\[,!; ])(?=\d{3}(?!\d))")
_GROUPED = re.compile(r"(?<![\d,])\d{1,2}(?:,\d{2})+,\d{3}(?![\d,])")
"""A number as it is written in India."""
_FACTORS = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 1000,
    "lakh": 10**5,
    "million": 10**6,
    "crore": 10**7,
    "billion": 10**9,
    "trillion": 10**12,
}
_MULTIPLIED = re.compile(rf"(\d[\d,]*(?:\.\d+)?)(?:\s|~|\\[,; ]|\\text\s?\{{)*+({'|'.join(_FACTORS)})s?\b\}}?")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|textrm|mbox|operatorname)\s*\{([^{}]*)\}")
_UNITS = re.compile(rf"(?:\\[ ,;])?{_TEXT.pattern}(?:\^(?:\{{-?\d\}}|-?\d))?")
_KEPT = re.compile(r"\d|\b(?:or|and|to|not|least|most|less|more|than)\b|^\([A-J]\)$")
"""Text in LaTeX that is no unit."""
_EMPHASIS = re.compile(r"(?<![\w)\]*`])(\*\*|__|`)(?=[^\s*`])([^*`\n]*[^\s*`])\1(?![\w(\[*`])")
_AROUND = re.compile(rf"(?<![\w\\^{{}}*])(?:[(\[]|[*_]++)\s*+((?:{_NUMBER})(?:/\d+)?)\s*+(%?)(?:[)\]]|[*_]++)(?![\w^])")
"""One number or fraction in parentheses, brackets or emphasis."""
_WORKING = re.compile(
    r"(?<=\d)((?:\s[A-Za-z]+){0,3})\s*(?:\(\s*=[^()]*\)|(?<=\s)\([^()=]{0,40}\d[^()=]{0,20}[-+*/\u00d7][^()=]{0,40}\))"
)
"""How a number was found, behind it: "68 (= 23 + 45)"."""
_PLUS = re.compile(r"(^|[:=(]\s*|[a-z]{2,}\s+)\+(?=\.?\d)")
"""The sign of a positive number, where no sum can be meant."""
# Minus sign, dash, multiplication, division and fraction signs, and spaces that do not break.
_SIGNS = {ord(sign): to for sign, to in zip("\u2212\u2013\u00d7\u00f7\u2044\u00a0\u202f", "--*//  ", strict=True)} | {
    ord(sign): to
    for sign, to in (("½", " 1/2"), ("¼", " 1/4"), ("¾", " 3/4"), ("²", "^2"), ("³", "^3"), ("∞", r"\infty "), ("≈", " "))
}
_ROOT = re.compile(r"√\s?(\d+|[a-z]|\([^()]*\))")
_DECIMAL_COMMA = re.compile(r"(?<![\d,.(\[{])(0(?=,\d)|\d+(?=,\d{1,2}(?!\d))),(\d+)(?![\d,)\]}])")
"""A decimal comma: behind 0, or before one or two digits. In brackets it may part coordinates."""
_AMC = re.compile(r"\\boxed\{\s*\(?[A-J]\)?(?:\\[ ,;]|~|\s)+(?=\S)")
"""The letter of a choice before its value, in a box."""
_EQUATIONS = re.compile(r"(\$\s*([^$=]{1,40}?)\s*=[^$]{1,200}\$)\s*(?:,|and|,\s*and)\s*(?=\$(?!\s*\2\s*=)[^$]*=)")
"""Two equations for different things. math-verify would make one set of their values."""
_FUNCTION = re.compile(r"(?<![\\A-Za-z])(sqrt|sin|cos|tan|ln|log|pi)(?![A-Za-z])(?:\(([^()]*)\))?")


def tidy(text: str) -> str:
    """``text`` without scientific notation, separators of thousands, words that multiply, mixed fractions, and signs of
    Unicode."""
    text = re.sub(r"\\(?:text)?color\s*\{[a-z]+\}", "", text)
    text = re.sub(r"\s*[.,]+\s*(?=\$(?!\d)(?![^$\n]*\$)|\\\]|\\\))", "", text)  # a period inside of dollars
    text = _ROOT.sub(lambda m: rf"\sqrt{{{m[1].strip('()')}}}", text.translate(_SIGNS))
    text = _POWER.sub(_decimal, _GROUPED.sub(lambda m: m[0].replace(",", ""), _THOUSANDS.sub("", text)))
    text = _MULTIPLIED.sub(lambda m: _times(m[1], _FACTORS[m[2]]), text)
    return _MIXED.sub(lambda m: f"{int(m[1]) * int(m[3]) + int(m[2])}/{m[3]}" if int(m[3]) else m[0], text)


def _times(number: str, factor: int) -> str:
    return format((Decimal(number.replace(",", "")) * factor).normalize(), "f")


def _decimal(match: re.Match[str]) -> str:
    exponent = int(match[2] or match[3] or match[4])
    return format(Decimal(match[1]).scaleb(exponent), "f") if abs(exponent) <= 40 else match[0]


def without_emphasis(text: str) -> str:
    """``text`` without Markdown's signs of bold text and code."""
    return _EMPHASIS.sub(r"\2", text)


def without_text(text: str) -> str:
    """``text`` with the content of ``\\text{...}`` in its place."""
    return _TEXT.sub(r"\1", text)


def plain(text: str) -> str:
    """``text`` without what keeps math-verify from reading a single number in it. For right answers that match ``PLAIN``."""
    text = _UNITS.sub(lambda m: m[1] if _KEPT.search(m[1]) else "", re.sub(r"\bUS(?=\\?\$)", "", text))
    text = re.sub(r'[~"\u201c\u201d]', " ", text.replace(r"\$", ""))
    text = _DECIMAL_COMMA.sub(r"\1.\2", text)
    text = re.sub(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])", lambda m: m[0].replace(",", ""), text)
    text = re.sub(r"(\d+(?:\.\d+)?)k\b", lambda m: _times(m[1], 1000), text)
    text = _AMC.sub(r"\\boxed{", _EQUATIONS.sub(r"\1. ", text))
    bare = _AROUND.sub(r" \1\2 ", text)
    if not re.search(r"\d", _AROUND.sub("", text)):  # else it may be a reference, as in: 42 by equation (3)
        text = bare
    text = _PLUS.sub(r"\1", _WORKING.sub(r"\1", text))
    return text if re.search(r"\$|\\\(|\\\[|\\boxed", text) else text.replace(r"\%", "%")


def differ(text: str) -> bool:
    """Whether ``text`` is nothing but several numbers that are not the same, several units, a time or a bound, or ends with
    "either 1 or 2"."""
    text = re.sub(r"\\(?=[ ,;])", "", text).strip(" .")
    if _MEASURES.fullmatch(text) or _BOUND.fullmatch(text):
        return True
    text = re.sub(r"[()\[\]*_+]", "", text).strip(" .")
    if either := _EITHER.search(text):
        return either[1].strip() != either[2].strip()
    return bool(LIST.fullmatch(text)) and len({one.strip() for one in re.split(r"(?:[,;]|\band\b|\bor\b)\s", text)}) > 1


def with_commas(text: str) -> str:
    """Several numbers with commas only, in place of "and" and "or"."""
    return re.sub(r",?\s+(?:and|or)\s+", ", ", text)


def as_latex(text: str) -> str:
    """A formula in plain text as LaTeX: ``**``, names of functions, ``sqrt()``. Text with a backslash stays as it is."""
    if "\\" in text:
        return text
    text = re.sub(r"\^(-\d+|\d{2,})", r"^{\1}", text.replace("**", "^"))
    return _FUNCTION.sub(_function, text)


def _function(match: re.Match[str]) -> str:
    name, inside = match[1], match[2]
    if inside is None:
        return rf"\{name} "
    return rf"\sqrt{{{inside}}}" if name == "sqrt" else rf"\{name}({inside})"
