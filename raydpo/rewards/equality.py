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
from typing import Any

from raydpo.rewards.choices import letter
from raydpo.rewards.golds import GoldError, boxes_of, inside, plain_words, read_gold
from raydpo.rewards.numerals import LIST, PLAIN, as_latex, differ, plain, tidy, with_commas, without_emphasis, without_text

__all__ = ["final_part", "serve", "verdict"]

MOST_CHARACTERS = 4000
"""Characters of an answer's end that are read. The regular expressions of math-verify take quadratic time."""
MEMORY = 4 << 30
"""Bytes of address space of the process."""
_NAMED = "answer is "
"""How the part of an answer begins that it names as its result. math-verify then reads its first value, else the last."""
_BASE = re.compile(r"(?<=\d)_(?:\{(\d+)\}|(\d+))")
_ANSWER = re.compile(
    r"(?i)(?:(?<!by.step )\b(?:answer|(?:correct|right|best|most \w+)\s(?:option|choice))\b(?:\s(?:option|choice|letter))?"
    r"(?:\s(?:to|for|of)\b[^\n.,:]{0,80}?)?[\s*(\"']*?(?:\bis\b|[:=])|\banswers\b[^\n.,:]{0,80}?(?:\bare\b|[:=])|"
    r"\bans\b[.:]?)(?:[\s:=*>]|\b(?:option|choice)\b)*"
)
"""How an answer names its result. "To find the answer, let's look at all options:" does not."""
_TAGGED = re.compile(r"(?is)<answer>(.*?)</answer>")
_RETRACTED = re.compile(r"(?i)\b(?:wait|actually|correction|scratch that|re-?check)\b")
"""How a result is taken back. What comes behind it counts."""
_JOINT = re.compile(r"(?:,|;|/|\band\b|\bor\b|\\text\{\s*(?:and|or)\s*\}|[\s$\\])*")
_GLUED = re.compile(
    r"</?[A-Za-z][\w-]*>|(?:(?<=[\uff1a\u3001\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af])|(?<=[^\d\s]:)|(?<!\S)[\"'`\u201c\u2018])"
    r"(?=[-$\u20ac\u00a3\u00a5]?\.?\d)"
)
"""What may stand before a number without a space: tags, colons, quotation marks, and letters of languages without spaces.
math-verify reads a number only after a space or an equals sign."""
_LEADS = re.compile(
    r"(?:(?:about|approximately|roughly|exactly|simply|just|only|therefore|thus|a|an|the|total|sum|of|equal|to|number|now|[a-z])"
    r"[\s:=\u2248~]+)*+[\s*_(\[$\u20ac\u00a3\u00a5\u20b9\\-]*+\+?\.?(?:[\d\\]|[A-Za-z]?$)(?!(?s:\d*[.)]\s.*\n\s*2[.)]\s))"
)
"""How a result begins with its value. Prose, or the first step of a list, names its value at its end."""
_VALUE = re.compile(r"[-+*$\u20ac\u00a3(\s]*(?:[\d\\.]|[A-Ja-j]\b)")
"""How a line begins that is a value."""
_CLAUSE = re.compile(r"\n|(?<=\S)(?:[,;]|\.(?!\d)|\$?\.?\s\()\s*(?=[A-Za-z(\d])(?<![,]\d)")
"""What ends the value of a named result: "8, since 8 + 5 = 13"."""
_ALL_OPTIONS = re.compile(rf"{_NAMED}[(*]*A[).:](?s:.*)\n[(*\s]*B[).:]")
_VERDICTS = {"yes", "no", "true", "false"}
_SUM = re.compile(r"[\d\s.,+\-*/()^]+=")
"""Arithmetic, of which the result comes last."""


def verdict(gold: Any, answer: str) -> tuple[bool, str]:
    """Whether ``answer`` gives the value of ``gold``, and the part of the answer that was read.

    Raises:
        GoldError: if ``gold`` cannot be read.
    """
    kind, right = read_gold(gold)
    part = final_part(answer if kind == "choice" else without_emphasis(answer))
    if kind == "choice":
        named = part.startswith((_NAMED, "\\boxed", "$\\boxed"))
        if _ALL_OPTIONS.match(part):  # the heading "Answer:" and no result
            return letter(part.removeprefix(_NAMED), named=False) == right, part
        return {letter(one, named) for one in _sentences(part)} == {right}, part
    if kind == "words":
        clause = r"[,.;\n]" if right in _VERDICTS else r"\Z"  # "Yes, because ..." is yes
        return {plain_words(re.split(clause, one)[0]) for one in _sentences(part)} == {right}, part
    if re.fullmatch(r"\$[A-Za-z]{2,3}\$", right) and {plain_words(one) for one in _sentences(part)} == {plain_words(right)}:
        return True, part  # a short word, or a product of variables
    from math_verify import verify

    expected = _parse(right)
    if not expected or isinstance(expected[0], str):
        raise GoldError(
            f"the right answer {str(gold)[:80]!r} is neither a number, nor LaTeX that math-verify reads, nor a word"
        )
    bases = [{one for pair in _BASE.findall(text) for one in pair if one} for text in (right, part)]
    if all(bases) and bases[0] != bases[1]:
        return False, part
    said = tidy(_GLUED.sub(" ", part))
    if _bare(said) == _bare(right):
        return True, part
    symbolic = not PLAIN.fullmatch(right)
    if not symbolic:
        if differ(without_text(_body(_content(said)))):
            return False, part
        said = plain(_unboxed(said))
        body = _body(said)
        if not said.startswith(_NAMED):
            said = re.sub(r"(?i)\banswers?\b", "result", said)  # math-verify would look behind it
        else:
            first = _CLAUSE.split(body, maxsplit=1)[0]
            said = f"{_NAMED}{first}" if _LEADS.match(body) and not _SUM.match(first) else body
    found = _parse(_formula(said, symbolic))
    equal = verify(expected, found, float_rounding=_digits(expected[0]), allow_set_relation_comp=True, timeout_seconds=None)
    return bool(equal), part


def final_part(answer: str) -> str:
    """The part of an answer that holds its result: the last ``\\boxed{}``, else the line behind the last ``####``, else what
    follows the last "answer is" or "answer:" and is not taken back, else the whole answer. Text in
    ``<think>`` is not read. Only the text between the last ``<answer>`` and ``</answer>`` is read, where there is one.

    Boxes that only a comma, "and" or "or" separates are one part. So an answer that boxes two guesses has two values.
    """
    answer = answer.rpartition("</think>")[2].partition("<think>")[0][-MOST_CHARACTERS:]
    tagged = _TAGGED.findall(answer)
    answer = tagged[-1] if tagged else answer
    boxes = boxes_of(answer)
    if boxes:
        first = len(boxes) - 1
        while first and _JOINT.fullmatch(answer[boxes[first - 1][1] : boxes[first][0]]):
            first -= 1
        if first == len(boxes) - 1:
            return f"\\boxed{{{inside(answer, boxes[-1])}}}"
        return " and ".join(f"${answer[start:end]}$" for start, end in boxes[first:])
    if "####" in answer:
        value = answer.rpartition("####")[2].strip()
        return value.partition("\n")[0].strip() if _VALUE.match(value) else value  # else it is a heading
    named = [match.end() for match in _ANSWER.finditer(answer)]
    value = (answer[named[-1] :] if named else answer if tagged else "").strip()
    if retracted := list(_RETRACTED.finditer(value)):
        rest = value[retracted[-1].end() :].strip(" ,.")
        other = re.search(r"\d|\b[A-J]\b", rest) and not re.search(r"(?i)\b(?:correct|right|same|indeed)\b", rest)
        return rest if other else f"{_NAMED}{value}"
    return f"{_NAMED}{value}" if value else answer.strip()


def _bare(text: str) -> str:
    """``text`` to be compared as it stands: without its box, dollars, and spaces that part no numbers."""
    text = _content(text.removeprefix(_NAMED).strip())
    return re.sub(r"\\(?=[{}])|(?<!\d)\s+|\s+(?!\d)", "", text.replace("$", "")).rstrip(".")


def _content(part: str) -> str:
    """What is in the box that ``part`` is; ``part`` if it is none."""
    boxes = boxes_of(part)
    return inside(part, boxes[0]) if boxes == [(0, len(part))] else part


def _unboxed(part: str) -> str:
    """``part`` without its box if what is in it is text, which math-verify reads as a product of letters. If its first
    paragraph is a number and the others are prose, that number."""
    if (content := _content(part)) != part:
        content = without_text(content)
        words, numbers = re.findall(r"[A-Za-z]{2,}", content), re.findall(r"\d[\d,.]*", content)
        variables = re.search(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])", content)
        text = words and len(numbers) == 1 and not variables and not re.search(r"[\\^_{]", content)
        return content if text and not {"not", "least", "most", "than", "or"} & {one.lower() for one in words} else part
    first, _, rest = part.partition("\n\n")
    return first if re.fullmatch(r"-?\$?\d[\d,.]*%?", first.strip()) and re.search(r"[A-Za-z]{3,}", rest) else part


def _body(part: str) -> str:
    return part.removeprefix(_NAMED).rstrip(" .")


def _formula(part: str, symbolic: bool) -> str:
    """``part`` between dollars, if it is LaTeX without them and without prose. The same holds for other signs of mathematics
    if the right answer is ``symbolic``, and no number."""
    body = _body(part)
    if symbolic and not re.search(r"\\[(\[]|\$|\\boxed", body):  # "The area is 16 * pi."
        body = re.split(r"\b(?:is|are|equals?)\b|:\s", body)[-1].strip()
    if symbolic and LIST.fullmatch(values := re.sub(r"\b[a-z]\s*=\s*", "", body)):
        body = values
    if symbolic and LIST.fullmatch(body):
        body = with_commas(body)
    body = as_latex(body) if symbolic else body
    prose = re.search(r"(?<![\\A-Za-z])[A-Za-z]{3,}", without_text(body))
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


def _sentences(part: str) -> list[str]:
    """What ``part`` says as text: of each of its boxes, of the first sentence of a named result, or all of it."""
    boxes = boxes_of(part)
    if boxes:
        return [without_text(inside(part, box)) for box in boxes]
    body = part.removeprefix(_NAMED)
    body = re.sub(r"\\[()\[\]]", " ", body)
    return [
        without_text(body if not part.startswith(_NAMED) else re.split(r"\n|(?<!\b[A-Z][a-z])\.(?!\S)", body, maxsplit=1)[0])
    ]


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
