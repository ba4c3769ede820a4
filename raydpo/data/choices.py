"""Two answers in columns of their own, and which of them a record prefers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from raydpo.data.messages import Malformed, Notes

__all__ = ["always_above", "named_pair", "preferred", "two_answers"]

_ANSWERS = {
    "answer", "response", "output", "completion", "conversation", "messages", "summary", "generation", "candidate",
    "reply", "text", "human_ref",
}  # fmt: skip
"""Names of answers, before a number or a letter that tells two of them apart."""
_ENDS = (("0", "1"), ("1", "2"), ("a", "b"))
_NUMBERED = re.compile(r"(.+?)(?:[_\- ]?(\d+|[A-Z])|[_\- ]([a-z]))")
_NAMED = re.compile(rf"(?:(?:model|assistant|option|{'|'.join(sorted(_ANSWERS))})[_\- ]*)?\(?([012ab])\)?")
"""A value that names an answer: ``model_a``, ``output_2``, ``B``."""
_SIGNED = ("overall_preference", "preference_strength")
"""Columns whose sign prefers an answer: the first below 0."""
BELOW = " is below 0"
"""What notes say of a record whose number with a sign prefers the first answer."""
_LABELS = (
    "winner", "preference", "preferred", "preferred_response", "preferred_output", "preferred_answer", "better",
    "better_response", "better_answer", "better_response_id", "safer_response_id", "choice",
)  # fmt: skip
"""Columns that name the better answer, the one that is read first."""
_ALIKE = ("tie", "both", "draw", "equal", "same", "neither")
_SCORES = (("score", 1), ("rating", 1), ("reward", 1), ("rank", -1))
"""Names of columns with one number for each answer, and the sign that makes higher better."""
_PAIRED = {"response", "answer", "output", "completion", "text", "message", "messages", "conversation", "conversations"}
_MOST = 40
_FEWEST = 3
"""Records of which one should be below 0."""


@lru_cache(maxsize=1024)
def named_pair(present: tuple[str, ...]) -> tuple[str, str] | None:
    """Return two columns such as ``chosen_response`` and ``rejected_response``; None if there are none.

    Raises:
        Malformed: if several pairs of columns have such names.
    """
    found = []
    for name in present:
        words = re.split(r"[_\- ]", name.lower())
        if "chosen" in words and len(words) > 1 and set(words) <= _PAIRED | {"chosen"}:
            other = re.sub("chosen", "rejected", name, flags=re.IGNORECASE)
            found += [(name, each) for each in present if each.lower() == other.lower()]
    if len(found) > 1:
        names = ", ".join(repr(name[:_MOST]) for name, _ in found[:3])
        raise Malformed(f"each of {names} may be the chosen answer: name it and the other with the source's 'columns'")
    return found[0] if found else None


@lru_cache(maxsize=1024)
def two_answers(present: tuple[str, ...]) -> tuple[str, str, tuple[str, str]] | None:
    """Return two columns such as ``response_a`` and ``response_b``, and the numbers or letters that tell them apart.

    None if no such columns are there, or more than two.
    """
    ends: dict[str, dict[str, str]] = {}
    for name in present:
        match = _NUMBERED.fullmatch(name)
        if match and match[1].lower() in _ANSWERS:
            ends.setdefault(match[1].lower(), {})[(match[2] or match[3]).lower()] = name
    if len(ends) != 1:
        return None
    (names,) = ends.values()
    pair = next((each for each in _ENDS if set(names) == set(each)), None)
    return None if pair is None else (names[pair[0]], names[pair[1]], pair)


def preferred(
    record: Mapping[str, Any], present: tuple[str, ...], notes: Notes
) -> tuple[tuple[str, str], tuple[str, ...]] | None:
    """Return the columns of the better and of the worse answer, and all columns that were used.

    None if the record has not two answers, or nothing that says which is better. Where several columns say it, the first is
    read and notes name the others.

    Raises:
        Malformed: if that column prefers none of the two.
    """
    answers = two_answers(present)
    deciding = () if answers is None else _deciding(present, answers)
    if answers is None or not deciding:
        return None
    first, second, _ = answers
    read, *others = deciding
    side = _side(record, read, answers)
    name = _shown(read)
    if side == 0:
        raise Malformed(
            f"{name} {_verb(read, 'say')} that {first!r} and {second!r} are alike (a tie), so no answer is preferred"
        )
    notes[f"{name} {_verb(read, 'prefer')} {first!r} or {second!r} ({_how(read, answers)})"] = None
    if read[0] in _SIGNED and side < 0:
        notes[f"{name}{BELOW} there"] = None
    for other in others:
        try:
            against = _side(record, other, answers) != side
        except Malformed:
            continue
        if against:
            notes[
                f"warning: {name} read, though {_shown(other)} {_verb(other, 'say')} otherwise; {_switch(read, other)}"
            ] = None
        elif len(other) == 1 and other[0] in _LABELS:
            notes[f"{name} read, not {_shown(other)}, another preference; {_switch(read, other)}"] = None
    return ((first, second) if side < 0 else (second, first)), (first, second, *(each for one in deciding for each in one))


@lru_cache(maxsize=1024)
def _deciding(present: tuple[str, ...], answers: tuple[str, str, tuple[str, str]]) -> tuple[tuple[str, ...], ...]:
    """The columns that say which of two answers is better, the most direct first: one column, one of each answer, or three
    that mark the winner."""
    first, second, ends = answers
    found: list[tuple[str, ...]] = [(name,) for name in (*_SIGNED, *_LABELS) if name in present]
    if first.lower() == "human_ref_a" and "labels" in present:
        found.append(("labels",))
    marks = ("winner_model_a", "winner_model_b")
    if ends == ("a", "b") and all(name in present for name in marks):
        found.append((*marks, *(name for name in ("winner_tie",) if name in present)))
    lower = {name.lower(): name for name in present}
    for word, _ in _SCORES:
        for one, other in ((f"{word}_{ends[0]}", f"{word}_{ends[1]}"), (f"{first}_{word}", f"{second}_{word}")):
            pair = lower.get(one.lower()), lower.get(other.lower())
            if pair[0] is not None and pair[1] is not None:
                found.append(pair)  # type: ignore[arg-type]
    return tuple(found)


def always_above(counts: Mapping[str, int]) -> list[str]:
    """Return a warning for each column with a sign that is below 0 in no record.

    Args:
        counts: records by how they were understood.
    """
    found = []
    for name in _SIGNED:
        start = f"{name!r} prefers "
        records = sum(count for note, count in counts.items() if note.startswith(start))
        if records >= _FEWEST and not any(note.startswith(f"{name!r}{BELOW}") for note in counts):
            found.append(
                f"warning: {name!r} is below 0 in none of {records:,} records, so the second answer is always chosen; if "
                "its scale has no sign (such as 1 to 7), write the name of the better answer into a column 'winner' instead"
            )
    return found


def _side(record: Mapping[str, Any], names: tuple[str, ...], answers: tuple[str, str, tuple[str, str]]) -> int:
    """-1 if the columns prefer the first answer, 1 if the second, 0 if none.

    Raises:
        Malformed: if they do not say.
    """
    values = [record[name] for name in names]
    if names[0].startswith("winner_model"):
        if any(value not in (0, 1) for value in values) or sum(map(int, values)) > 1:
            raise Malformed(f"{_shown(names)} are not one 1 and else 0")
        return int(values[1]) - int(values[0])
    if len(names) > 1:
        left, right = (_number(value, name) for value, name in zip(values, names, strict=True))
        sign = -1 if "rank" in names[0].lower().split("_") else 1
        return sign * ((right > left) - (right < left))
    (name,), (value,) = names, values
    return _of_text(name, value, answers) if isinstance(value, str) else _of_number(name, value, answers)


def _of_text(name: str, value: str, answers: tuple[str, str, tuple[str, str]]) -> int:
    first, second, ends = answers
    said = value.strip().lower()
    if said.startswith(_ALIKE):
        return 0
    if said in (first.lower(), second.lower()):
        return -1 if said == first.lower() else 1
    named = _NAMED.fullmatch(said)
    if ends == ("a", "b") and said in ("0", "1", "2"):
        raise Malformed(f"{name!r} is {said!r}, which names neither {first!r} nor {second!r}; write the name instead")
    if named is not None and named[1] in ends and name not in (*_SIGNED, "labels"):
        return -1 if named[1] == ends[0] else 1
    raise Malformed(f"{name!r} is text that names neither {first!r} nor {second!r}")


def _of_number(name: str, value: Any, answers: tuple[str, str, tuple[str, str]]) -> int:
    first, second, ends = answers
    number = _number(value, name)
    if name in _SIGNED:
        return (number > 0) - (number < 0)
    if name == "labels":
        if number not in (0, 1):
            raise Malformed(f"{name!r} is neither 0 nor 1")
        return -1 if number == 1 else 1
    if ends == ("a", "b"):
        raise Malformed(f"{name!r} is a number, which names neither {first!r} nor {second!r}; write the name instead")
    low, high = map(int, ends)
    # AlpacaEval writes 1.5 for a tie, and numbers between where its judge gives probabilities. Between 0 and 1 a number may
    # be the probability of either answer.
    if number not in (low, high) and not (low == 1 and 1 < number < 2):
        raise Malformed(f"{name!r} is neither {low} nor {high}, by which {first!r} and {second!r} are numbered")
    middle = (low + high) / 2
    return (number > middle) - (number < middle)


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise Malformed(f"{name!r} is no number")
    return value


def _how(names: tuple[str, ...], answers: tuple[str, str, tuple[str, str]]) -> str:
    """How the columns are read."""
    first, second, ends = answers
    if names[0].startswith("winner_model"):
        return f"{names[0]} is 1: {first}"
    if len(names) > 1:
        return "the lower is better" if "rank" in names[0].lower().split("_") else "the higher is better"
    if names[0] in _SIGNED:
        return f"below 0: {first}"
    if names[0] == "labels":
        return f"1: {first}, 0: {second}"
    return f"{ends[0]}: {first}, {ends[1]}: {second}"


def _switch(read: tuple[str, ...], other: tuple[str, ...]) -> str:
    """How another column is read instead."""
    if len(read) == len(other) == 1:
        return f"to read it instead set columns: {{{read[0]}: {other[0]}}}"
    return f"drop the column{'s' * (len(read) > 1)} that should not be read"


def _shown(names: tuple[str, ...]) -> str:
    return " and ".join(map(repr, names[:2]))


def _verb(names: tuple[str, ...], verb: str) -> str:
    return verb if len(names) > 1 else f"{verb}s"
