"""Checks of instructions about the form of an answer, with the names and arguments of IFEval (arXiv 2311.07911).

Where IFEval guesses, these checks do not: a missing argument is an error and no random number, a keyword is a text and no
regular expression, NaN is no JSON, and no check detects a language. So ``change_case:english_capital`` and
``change_case:english_lowercase`` look at the letters only, and ``language:response_language`` does not exist.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["CHECKS", "InstructionError", "arguments_of", "follows"]


class InstructionError(ValueError):
    """An instruction is unknown, or its arguments are missing, unknown or of the wrong type."""


CHECKS: dict[str, tuple[Callable[..., bool], dict[str, str]]] = {}
"""The check of each instruction, and its arguments with their kinds: count, text, texts, letter or relation."""
RELATIONS = {"less than": lambda found, number: found < number, "at least": lambda found, number: found >= number}
"""Relations of a number that is found to the number of an instruction."""
_ABBREVIATED = re.compile(
    r"mrs?|ms|dr|prof|st|[js]r|gen|col|maj|lt|gov|sen|rep|inc|ltd|cos?|corp|vs|ave|ft|u\.s|u\.k|u\.n|u\.s\.a|ph\.d|d\.c|[ap]\.m"
    r"|jan|feb|aug|sept?|oct|nov|dec|[a-z]"
)
_STARTERS = re.compile(
    "A|Although|Both|But|Despite|Even|He|However|I|If|In|Indeed|Instead|It|Many|Meanwhile|Moreover|Most|Nor|Since|So|Some|The"
    "|There|These|They|This|Though|Thus|Under|When|While|Yet"
)
"""Words that begin a sentence even after an abbreviation or an ellipsis."""
_OPENING, _CLOSING = "\"'\u201c\u2018([*", "\"'\u201d\u2019)]}*"
"""Signs before and after the words of a sentence."""
_PART = re.compile(
    r"--+|\.{2,}|\w+(?=n't\b)|n't\b|['\u2019](?:s|S|m|M|d|D|ll|LL|re|RE|ve|VE)(?!\w)"
    r"|(?:[A-Za-z]\.)+(?=[\s,;:!?]|$)|(?:\w|[-/._&+~\\=|](?=\S)|(?<=\w)['\u2019*](?!(?:s|S|m|M|d|D|ll|LL|re|RE|ve|VE)(?!\w))(?=\w)"
    r"|(?<=\d)[,:](?=\d))+"
)


def follows(identifier: str, arguments: Mapping[str, Any], answer: str) -> bool:
    """Whether an answer follows an instruction. An empty answer follows none, as in IFEval.

    Raises:
        InstructionError: if the instruction is unknown or its arguments are wrong.
    """
    made = arguments_of(identifier, arguments)
    return bool(answer.strip()) and CHECKS[identifier][0](answer, **made)


def arguments_of(identifier: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an instruction, of their types. Arguments that are null are left out, as IFEval's data has them.

    Raises:
        InstructionError: naming the instruction, the argument and what was expected.
    """
    if not isinstance(identifier, str) or identifier not in CHECKS:
        near = difflib.get_close_matches(str(identifier), CHECKS, 1)
        fix = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(CHECKS)}"
        raise InstructionError(f"the instruction {identifier!r} is unknown; {fix}")
    kinds = CHECKS[identifier][1]
    given = {name: value for name, value in arguments.items() if value is not None}
    for name in given:
        if name not in kinds:
            raise InstructionError(f"{identifier} has no argument {name!r}; it takes {', '.join(kinds) or 'none'}")
    for name in kinds:
        if name not in given:
            raise InstructionError(f"{identifier} lacks its argument {name!r}")
    return {name: _typed(f"{identifier}: {name}", kind, given[name]) for name, kind in kinds.items()}


def _typed(name: str, kind: str, value: Any) -> Any:
    if kind == "count":
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if whole and not isinstance(value, bool) and value >= 0:
            return int(value)
        raise InstructionError(f"{name} is {value!r}, expected a number of 0 or more")
    if kind == "relation":
        if isinstance(value, str) and value in RELATIONS:
            return RELATIONS[value]
        raise InstructionError(f"{name} is {value!r}, expected {' or '.join(map(repr, RELATIONS))}")
    if kind == "texts":
        if isinstance(value, (list, tuple)) and value and all(isinstance(one, str) and one.strip() for one in value):
            return list(value)
        raise InstructionError(f"{name} is {value!r}, expected a list of texts")
    if not isinstance(value, str) or not value.strip() or (kind == "letter" and len(value.strip()) != 1):
        raise InstructionError(f"{name} is {value!r}, expected {'one letter' if kind == 'letter' else 'a text'}")
    return value.strip()


def _check(identifier: str, **kinds: str) -> Callable[[Callable[..., bool]], Callable[..., bool]]:
    def add(function: Callable[..., bool]) -> Callable[..., bool]:
        CHECKS[identifier] = (function, kinds)
        return function

    return add


# -- length ---------------------------------------------------------------------------------------------------------------


@_check("length_constraints:number_words", num_words="count", relation="relation")
def _words(answer: str, num_words: int, relation: Callable[[int, int], bool]) -> bool:
    return relation(len(re.findall(r"\w+", answer)), num_words)


@_check("length_constraints:number_sentences", num_sentences="count", relation="relation")
def _sentences(answer: str, num_sentences: int, relation: Callable[[int, int], bool]) -> bool:
    return relation(_count_sentences(answer), num_sentences)


def _count_sentences(text: str) -> int:
    """Number of sentences. One ends with ., ! or ? before a space. Abbreviations, initials and ellipses end a sentence only
    before one of ``_STARTERS``; a number and a dot, only if no lower-case letter follows."""
    parts = text.split()
    count = int(bool(parts))
    for part, after in itertools.pairwise(parts):
        body = part.rstrip(_CLOSING)
        word = body.rstrip(".!?")
        sign, word = body[len(word) :], word.lstrip(_OPENING).lower()
        following = re.match(r"\w*", after.lstrip(_OPENING))[0]  # type: ignore[index]
        if sign.endswith("..") or (sign == "." and _ABBREVIATED.fullmatch(word)):
            count += bool(_STARTERS.fullmatch(following))
        elif sign:
            count += not (sign == "." and word.isdigit() and following[:1].islower())
    return count


@_check("length_constraints:number_paragraphs", num_paragraphs="count")
def _paragraphs(answer: str, num_paragraphs: int) -> bool:
    parts = [part.strip() for part in answer.split("***")]
    return all(parts[1:-1]) and sum(map(bool, parts)) == num_paragraphs


@_check("length_constraints:nth_paragraph_first_word", num_paragraphs="count", nth_paragraph="count", first_word="text")
def _first_word(answer: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = [part.strip() for part in answer.split("\n\n")]
    full = sum(map(bool, parts))
    if full != num_paragraphs or not 0 < nth_paragraph <= full or not parts[nth_paragraph - 1]:
        return False
    word = parts[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


# -- letters and signs ----------------------------------------------------------------------------------------------------


@_check("change_case:english_lowercase")
def _lowercase(answer: str) -> bool:
    return answer.islower()


@_check("change_case:english_capital")
def _capital(answer: str) -> bool:
    return answer.isupper()


@_check("change_case:capital_word_frequency", capital_frequency="count", capital_relation="relation")
def _capital_words(answer: str, capital_frequency: int, capital_relation: Callable[[int, int], bool]) -> bool:
    return capital_relation(sum(part.isupper() for part in _PART.findall(answer)), capital_frequency)


@_check("punctuation:no_comma")
def _no_comma(answer: str) -> bool:
    return "," not in answer


@_check("startend:quotation")
def _quotation(answer: str) -> bool:
    text = answer.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


@_check("startend:end_checker", end_phrase="text")
def _end(answer: str, end_phrase: str) -> bool:
    return answer.strip().strip('"').lower().endswith(end_phrase.lower())


# -- words ----------------------------------------------------------------------------------------------------------------


@_check("keywords:existence", keywords="texts")
def _existence(answer: str, keywords: list[str]) -> bool:
    return all(word.lower() in answer.lower() for word in keywords)


@_check("keywords:frequency", keyword="text", frequency="count", relation="relation")
def _frequency(answer: str, keyword: str, frequency: int, relation: Callable[[int, int], bool]) -> bool:
    return relation(answer.lower().count(keyword.lower()), frequency)


@_check("keywords:forbidden_words", forbidden_words="texts")
def _forbidden(answer: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer, re.IGNORECASE) for word in forbidden_words)


@_check("keywords:letter_frequency", letter="letter", let_frequency="count", let_relation="relation")
def _letter(answer: str, letter: str, let_frequency: int, let_relation: Callable[[int, int], bool]) -> bool:
    return let_relation(answer.lower().count(letter.lower()), let_frequency)


# -- format ---------------------------------------------------------------------------------------------------------------


@_check("detectable_format:json_format")
def _json(answer: str) -> bool:
    text = re.sub(r"^```(?:json|Json|JSON)?", "", answer.strip())
    try:
        json.loads(text.removesuffix("```").strip(), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return False
    return True


def _no_constant(name: str) -> Any:
    raise ValueError(name)


@_check("detectable_format:title")
def _title(answer: str) -> bool:
    return any(title.strip("<>").strip() for title in re.findall(r"<<[^\n]+>>", answer))


@_check("detectable_format:number_bullet_lists", num_bullets="count")
def _bullets(answer: str, num_bullets: int) -> bool:
    lines = [line.strip() for line in answer.split("\n")]
    return sum(bool(re.match(r"-|\*(?!\*)", line)) for line in lines) == num_bullets


@_check("detectable_format:number_highlighted_sections", num_highlights="count")
def _highlights(answer: str, num_highlights: int) -> bool:
    single, double = re.findall(r"\*([^\n*]*)\*", answer), re.findall(r"\*\*([^\n*]*)\*\*", answer)
    return sum(bool(text.strip()) for text in single + double) >= num_highlights


@_check("detectable_format:multiple_sections", section_spliter="text", num_sections="count")
def _sections(answer: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(re.escape(section_spliter) + r"\s?\d+", answer)) >= num_sections


@_check("detectable_format:constrained_response")
def _constrained(answer: str) -> bool:
    return any(f"My answer is {one}." in answer for one in ("yes", "no", "maybe"))


# -- content --------------------------------------------------------------------------------------------------------------


@_check("detectable_content:number_placeholders", num_placeholders="count")
def _placeholders(answer: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[[^\n\]]*\]", answer)) >= num_placeholders


@_check("detectable_content:postscript", postscript_marker="text")
def _postscript(answer: str, postscript_marker: str) -> bool:
    known = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
    return bool(re.search(known.get(postscript_marker, re.escape(postscript_marker)), answer, re.IGNORECASE))


@_check("combination:two_responses")
def _two(answer: str) -> bool:
    parts = [part.strip() for part in answer.split("******")]
    full = [part for part in parts if part]
    return all(parts[1:-1]) and len(full) == 2 and full[0] != full[1]


@_check("combination:repeat_prompt", prompt_to_repeat="text")
def _repeat(answer: str, prompt_to_repeat: str) -> bool:
    return answer.strip().lower().startswith(prompt_to_repeat.lower())
