"""Verdicts of mathematics: whether an answer gives the right value, by math-verify. Run as a process, it serves verdicts.

math-verify limits its time by SIGALRM, which works in a main thread only and does not interrupt every loop. Its limits are
off, and ``mathematics.py`` runs this module as a process that it can end.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import resource
import sys
from decimal import Decimal
from typing import Any

from raydpo.rewards.choices import letter

__all__ = ["GoldError", "final_part", "serve", "verdict"]

MOST_CHARACTERS = 4000
"""Characters of an answer's end that are read. The regular expressions of math-verify take quadratic time."""
MEMORY = 4 << 30
"""Bytes of address space of the process."""
_NUMBER = r"-?[$€£]?\s*(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+"
_PLAIN = rf"(?:{_NUMBER})(?:\s*%|\s+[A-Za-z]{{2,}}[\w ./^]*)?"
_TIMES = r"(?:\\times|\\cdot|[*\u00d7\u00b7])"
_POWER = re.compile(rf"(\d+(?:\.\d+)?)\s*(?:{_TIMES}\s*10\s*\^\s*(?:\{{\s*(-?\d+)\s*\}}|(-?\d+))|[eE]([+-]?\d+)\b)")
_MIXED = re.compile(r"(?<![\d.,/^*+={}-])(?<![\d.,/^*+={}-]\s)(\d+) (\d+)/(\d+)(?![\d/.])")
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,?\\[,!; ])(?=\d{3}(?!\d))")
_BASE = re.compile(r"(?<=\d)_(?:\{(\d+)\}|(\d+))")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|textrm|operatorname)\s*\{([^{}]*)\}")
_ANSWER = re.compile(r"(?i)\banswers?\b[^\n.]{0,100}?(?:\bis\b|\bare\b|[:=])[ \t*]*")
_TAGGED = re.compile(r"(?is)<answer>(.*?)</answer>")
_JOINT = re.compile(r"(?:,|;|\band\b|\bor\b|\\text\{\s*(?:and|or)\s*\}|[\s$\\])*")
_GLUED = re.compile(
    r"</?[A-Za-z][\w-]*>|(?:(?<=[\uff1a\u3001\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af])|(?<=[^\d\s]:)|(?<!\S)[\"'`\u201c\u2018])"
    r"(?=[-$\u20ac\u00a3\u00a5]?\.?\d)"
)
"""What may stand before a number without a space: tags, colons, quotation marks, and letters of languages without spaces.
math-verify reads a number only after a space or an equals sign."""
_MONTHS = (
    "jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|"
    "nov(?:ember)?|dec(?:ember)?"
)
_NO_VALUE = re.compile(
    r"\d+(?:-\d+)+|\d+(?:[./]\d+){2,}|[-+]?[\d.,]+\s*[A-Za-z]+\.?(?:,?\s+(?:and\s+)?[\d.,]+\s*[A-Za-z]+\.?)+|"
    r"[-+$]*[\d.,]+\s*(?i:dozen|hundred|thousand|million|billion|trillion)\b.*|"
    rf"(?i:(?:{_MONTHS})\b\.?,?\s+\d.*|\d+(?:st|nd|rd|th)?,?\s+(?:of\s+)?(?:{_MONTHS})\b.*)"
)
"""Dates, telephone numbers, addresses, several units, and words that multiply. math-verify would read them as arithmetic, or
read one number of them alone."""
_AROUND = re.compile(rf"(?<![\w\\^{{}}])(?<![\d%+*/^-]\s)(?:[(\[]|[*_]+)\s*({_NUMBER})\s*(%?)(?:[)\]]|[*_]+)(?![\w^])")
"""One number in parentheses, brackets or emphasis, which is that number unless it stands behind another one."""
_WORKING = re.compile(r"(?<=\d)\s*\(\s*=[^()]*\)")
"""How a number was found, behind it: "68 (= 23 + 45)"."""
_PLUS = re.compile(r"(^|[:=(]\s*|[a-z]{2,}\s+)\+(?=\.?\d)")
"""The sign of a positive number, where no sum can be meant."""
_SUM = re.compile(r"^answer is (?=[\d\s.,+\-*/()^]+=)")
"""An answer that begins with arithmetic. math-verify reads only its first number behind "answer is"."""
_SEVERAL = re.compile(rf"(?:{_NUMBER})(?:(?:,|,?\s+(?:and|or))\s+(?:{_NUMBER}))+")
"""Several numbers: "1, 2 and 3"."""
_WORDS = {"yes", "no", "true", "false", "even", "odd", "none"}
# Minus sign, dash, multiplication, division and fraction signs, and spaces that do not break.
_SIGNS = str.maketrans("\u2212\u2013\u00d7\u00f7\u2044\u00a0\u202f", "--*//  ")


class GoldError(ValueError):
    """The right answer of a prompt cannot be read."""


def verdict(gold: Any, answer: str) -> tuple[bool, str]:
    """Whether ``answer`` gives the value of ``gold``, and the part of the answer that was read.

    Raises:
        GoldError: if ``gold`` cannot be read.
    """
    kind, right = _gold(gold)
    part = final_part(answer[-MOST_CHARACTERS:])
    if kind == "choice":
        return letter(_sentence(part), named=part.startswith(("answer is ", "\\boxed"))) == right, part
    if kind == "words":
        return _plain_words(_sentence(part)) == right, part
    from math_verify import verify

    expected = _parse(right)
    if not expected or isinstance(expected[0], str):
        raise GoldError(
            f"the right answer {str(gold)[:80]!r} is neither a number, nor LaTeX that math-verify reads, nor a word"
        )
    bases = [{one for pair in _BASE.findall(text) for one in pair if one} for text in (right, part)]
    if all(bases) and bases[0] != bases[1]:
        return False, part
    said = _tidy(_GLUED.sub(" ", part))
    if _bare(said) == _bare(right):
        return True, part
    symbolic = not re.fullmatch(_PLAIN, right)
    if not symbolic and _SEVERAL.fullmatch(_body(said)):
        return False, part
    found = _parse(_as_latex(said if symbolic else _number(said), symbolic))
    equal = verify(expected, found, float_rounding=_digits(expected[0]), allow_set_relation_comp=True, timeout_seconds=None)
    return bool(equal), part


def final_part(answer: str) -> str:
    """The part of an answer that holds its result: the last ``\\boxed{}``, else what follows the last ``####``, else what
    follows the last "answer is" or "answer:", else the whole answer. Only the text between the last ``<answer>`` and
    ``</answer>`` is read, where there is one.

    Boxes that only a comma, "and" or "or" separates are one part. So an answer that boxes two guesses has two values.
    """
    tagged = _TAGGED.findall(answer)
    answer = tagged[-1] if tagged else answer
    boxes = _boxes(answer)
    if boxes:
        first = len(boxes) - 1
        while first and _JOINT.fullmatch(answer[boxes[first - 1][1] : boxes[first][0]]):
            first -= 1
        if first == len(boxes) - 1:
            start, end = boxes[-1]
            return f"\\boxed{{{answer[answer.index('{', start) + 1 : end - 1]}}}"
        return " and ".join(f"${answer[start:end]}$" for start, end in boxes[first:])
    if "####" in answer:
        return answer.rpartition("####")[2].strip()
    named = [match.end() for match in _ANSWER.finditer(answer)]
    value = (answer[named[-1] :] if named else answer if tagged else "").strip()
    return f"answer is {value}" if value else answer.strip()


def _boxes(text: str) -> list[tuple[int, int]]:
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


def _gold(gold: Any) -> tuple[str, str]:
    """Kind of a right answer (value, choice, words), and the text to compare or to parse."""
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
    boxes = _boxes(text)
    if boxes:
        start, end = boxes[-1]
        text = text[text.index("{", start) + 1 : end - 1].strip()
    bare = _TEXT.sub(r"\1", text.strip("$ ").strip()).strip()
    if re.fullmatch(r"\(?[A-J]\)?[.:]?", bare):
        return "choice", bare.strip("().:")
    words = _plain_words(bare)
    if re.fullmatch(r"[^\W\d_]+(?:['\u2019 -]+[^\W\d_]+)*[.!]?", bare) and (
        "\\" in text or words in _WORDS or (len(words) > 3 and words != "infinity")
    ):
        return "words", words
    if _NO_VALUE.fullmatch(bare):
        raise GoldError(f"the right answer {bare[:80]!r} would be read as arithmetic, or in part; write it as one number")
    text = _tidy(text)
    if re.fullmatch(_PLAIN, text) or re.search(r"\$.+\$|\\\(|\\\[", text):
        return "value", text
    if text.startswith("{") and text.endswith("}"):
        text = f"\\{text[:-1]}\\}}"
    text = {"infinity": r"\infty", "inf": r"\infty", "pi": r"\pi"}.get(text.lower(), text)
    return "value", f"${text}$"


def _tidy(text: str) -> str:
    """``text`` with numbers in a form that math-verify reads: no scientific notation, thin spaces or mixed fractions."""
    text = _THOUSANDS.sub("", text.translate(_SIGNS))
    text = _POWER.sub(_decimal, text)
    return _MIXED.sub(lambda m: f"{int(m[1]) * int(m[3]) + int(m[2])}/{m[3]}" if int(m[3]) else m[0], text)


def _decimal(match: re.Match[str]) -> str:
    exponent = int(match[2] or match[3] or match[4])
    return format(Decimal(match[1]).scaleb(exponent), "f") if abs(exponent) <= 40 else match[0]


def _bare(text: str) -> str:
    """``text`` to be compared as it stands: without its box, dollars, and spaces that part no numbers."""
    text = text.removeprefix("answer is ").strip()
    boxes = _boxes(text)
    if len(boxes) == 1 and boxes[0] == (0, len(text)):
        text = text[text.index("{") + 1 : -1]
    return re.sub(r"\\(?=[{}])|(?<!\d)\s+|\s+(?!\d)", "", text.replace("$", "")).rstrip(".")


def _number(text: str) -> str:
    """``text`` without signs around its numbers that keep math-verify from reading them."""
    text = _SUM.sub("", _PLUS.sub(r"\1", _WORKING.sub("", text)))
    text = _AROUND.sub(r" \1\2 ", text)
    return text if re.search(r"\$|\\\(|\\\[|\\boxed", text) else text.replace(r"\%", "%")


def _body(part: str) -> str:
    return part.removeprefix("answer is ").rstrip(" .")


def _as_latex(part: str, symbolic: bool) -> str:
    """``part`` between dollars, if it is LaTeX without them and without prose. The same holds for other signs of mathematics
    if the right answer is ``symbolic``, and no number."""
    body = _body(part)
    if symbolic and _SEVERAL.fullmatch(body):
        body = re.sub(r",?\s+(?:and|or)\s+", ", ", body)
    prose = re.search(r"(?<![\\A-Za-z])[A-Za-z]{3,}", _TEXT.sub("", body))
    if symbolic and "\\" not in body and re.fullmatch(r"\{.*\}", body):
        body = f"\\{body[:-1]}\\}}"
    if (symbolic or re.search(r"\\[A-Za-z]|\^\{", body)) and not re.search(r"\$|\\\(|\\\[|\\boxed|\n", body) and not prose:
        return f"${body}$"
    return part


def _parse(text: str) -> list[Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    # A box counts before the sentences "the answer is", which may name a value on the way.
    return parse(text, [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()], parsing_timeout=None)


def _digits(value: Any) -> int:
    """Decimals to which values are compared: six, of values below 1 six significant ones. With six decimals 0.0000001
    and 0.0000002 would both be 0."""
    with contextlib.suppress(Exception):
        size = abs(float(value))
        if 0 < size < 1:
            return min(6 + int(-math.log10(size)), 300)
    return 6


def _sentence(part: str) -> str:
    body = part.removeprefix("answer is ")
    boxes = _boxes(body)
    if boxes:
        body = body[body.index("{", boxes[0][0]) + 1 : boxes[0][1] - 1]
    elif body != part:
        body = re.split(r"[.\n]", body, maxsplit=1)[0]
    return _TEXT.sub(r"\1", body)


def _plain_words(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s'\u2019-]", " ", text.replace("$", " ")).casefold().split())


def serve() -> None:
    """Answer requests on the standard input, one JSON object a line: ``{"gold", "answer"}`` gives ``{"equal", "read"}``, or
    ``{"gold_error"}``. The first line that is written says that the process is ready."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    logging.disable(logging.CRITICAL)  # math-verify warns that its time limits are off
    # What a library prints must not mix with the replies.
    replies, sys.stdout = sys.stdout, sys.stderr
    with contextlib.suppress(GoldError):
        verdict("1", "$1$")  # imports
    print("{}", file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            equal, read = verdict(request["gold"], request["answer"])
            reply: dict[str, Any] = {"equal": equal, "read": read[:200]}
        except GoldError as error:
            reply = {"gold_error": str(error)}
        except Exception as error:  # sympy raises many types; such an answer has no verdict
            reply = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    serve()
