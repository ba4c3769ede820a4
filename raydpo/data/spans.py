"""Spans of completions that count: reads the column ``data.spans_column``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

from raydpo.config.counting import MOST_WEIGHT
from raydpo.data.messages import Malformed, Text

__all__ = ["Span", "Spans", "Written", "message_text", "spanned", "spans_of"]

_FIELDS = frozenset(("start", "end", "weight", "unit", "message"))
_FORM = '[start, end], [start, end, weight] or {"start": .., "end": ..}'


class Span(NamedTuple):
    """One span. ``message`` is the number of its message in the completion; None = ``start`` and ``end`` count tokens of the
    completion, not characters of a message."""

    start: int
    end: int
    weight: float
    message: int | None


@dataclass(frozen=True, slots=True)
class Spans:
    """Spans of a pair, in order; None = the whole side counts. ``texts`` are the texts that characters are counted in, of
    each message, or of an answer that is text."""

    chosen: tuple[Span, ...] | None
    rejected: tuple[Span, ...] | None
    texts: tuple[tuple[str, ...], tuple[str, ...]]


def spans_of(value: Any, column: str, chosen: Text, rejected: Text) -> Spans | None:
    """The spans in a value of the column, which may be JSON text; None if it says nothing.

    The value is ``{"chosen": [span, ...], "rejected": [span, ...]}``, or the list alone for a record with one completion.

    Raises:
        Malformed: with what is wrong: its form, or a span that is empty, overlaps another, or lies outside.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError):
            raise Malformed(f"{column!r} is not valid JSON") from None
    if value is None:
        return None
    if isinstance(value, list):
        if chosen and rejected:
            raise Malformed(f'{column!r} is a list beside two completions; write {{"chosen": [...], "rejected": [...]}}')
        value = {"chosen" if chosen else "rejected": value}
    if not isinstance(value, Mapping) or not value.keys() <= {"chosen", "rejected"}:
        raise Malformed(f'{column!r} is no object with lists of spans; expected {{"chosen": [...], "rejected": [...]}}')
    sides = [
        _side(value.get(side), f"{side!r} of {column!r}", said)
        for side, said in (("chosen", chosen), ("rejected", rejected))
    ]
    if sides == [None, None]:
        return None
    texts = tuple((said,) if isinstance(said, str) else tuple(map(message_text, said)) for said in (chosen, rejected))
    return Spans(*sides, texts)  # type: ignore[arg-type]


def spanned(preferences: list[Any], value: Any, column: str) -> list[Any]:
    """The preferences of a record with the spans in ``value``.

    Raises:
        Malformed: as ``spans_of``, and if there are spans and several preferences.
    """
    if value is not None and len(preferences) > 1:
        raise Malformed(f"{column!r} stands beside more completions than those of one pair")
    return [replace(each, spans=spans_of(value, column, each.chosen, each.rejected)) for each in preferences]


def message_text(message: Mapping[str, Any]) -> str:
    """The text of a message in which characters are counted: its content, or the texts of its parts one after another."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    texts = (part.get("text") if isinstance(part, Mapping) else part for part in parts)
    return "".join(text for text in texts if isinstance(text, str))


def _side(value: Any, name: str, said: Text) -> tuple[Span, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list):
        raise Malformed(f"{name} is no list of spans")
    if not said:
        raise Malformed(f"{name} has spans, and the record has no such completion")
    found = sorted((_span(each, name, said) for each in value), key=lambda span: (span.message or 0, span.start))
    if len({span.message is None for span in found}) > 1:
        raise Malformed(f"{name} counts characters in one span and tokens in another; use one unit")
    for before, after in pairwise(found):
        if before.message == after.message and after.start < before.end:
            raise Malformed(f"{name} has spans that overlap")
    return tuple(found)


def _span(value: Any, name: str, said: Text) -> Span:
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) in (2, 3):
        value = dict(zip(("start", "end", "weight"), value, strict=False))
    if not isinstance(value, Mapping) or not value.keys() <= _FIELDS:
        raise Malformed(f"{name} has a span of another form; expected {_FORM}")
    start, end = value.get("start"), value.get("end")
    if not (_is_whole(start) and _is_whole(end)):
        raise Malformed(f"{name} has a span whose start or end is no whole number")
    weight = 1.0 if value.get("weight") is None else value["weight"]
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= MOST_WEIGHT:
        raise Malformed(f"{name} has a span whose weight is no number from 0 to {MOST_WEIGHT:,.0f}")
    unit = "characters" if value.get("unit") is None else value["unit"]
    if unit not in ("characters", "tokens"):
        raise Malformed(f"{name} has a span whose unit is neither 'characters' nor 'tokens'")
    if not 0 <= start < end:
        raise Malformed(f"{name} has a span that is empty or begins below 0")
    if unit == "tokens":
        if value.get("message") is not None:
            raise Malformed(f"{name} has a span in tokens with a message; tokens are counted in the whole completion")
        return Span(start, end, float(weight), None)
    message = value.get("message")
    count = 1 if isinstance(said, str) else len(said)
    if message is None:
        roles = ["assistant"] if isinstance(said, str) else [each["role"] for each in said]
        message = len(roles) - 1 - roles[::-1].index("assistant")
    elif not _is_whole(message) or not 0 <= message < count:
        raise Malformed(f"{name} has a span of a message that is not there; messages of the completion count from 0")
    text = said if isinstance(said, str) else message_text(said[message])
    if end > len(text):
        raise Malformed(f"{name} has a span that ends after the text")
    return Span(start, end, float(weight), message)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class Written:
    """Where a template wrote the characters of a text.

    Args:
        text: the text.
        pieces: start and end of successive pieces of it, and where each begins in the rendering.
        whole: the rendering.
    """

    def __init__(self, text: str, pieces: list[tuple[int, int, int]], whole: str) -> None:
        self._text, self._pieces, self._whole = text, pieces, whole

    @classmethod
    def of(cls, text: str, whole: str, start: int, end: int, cuts: re.Pattern[str]) -> Written | None:
        """Where ``text`` stands between two places of ``whole``; None if that cannot be told, for instance since it stands
        there twice, or is changed.

        Args:
            cuts: what parts the pieces of a text that the template may write with other white space between them.
        """
        tags = [match.span() for match in cuts.finditer(text)]
        gaps = zip([0, *(stop for _, stop in tags)], [*(begin for begin, _ in tags), len(text)], strict=True)
        for bounds in ([(0, len(text))], list(gaps)):
            pieces = []
            for first, last in bounds:
                bare = text[first:last].strip()
                place = whole.find(bare, start, end)
                if place < 0 or (bare and whole.find(bare, place + 1, end) >= 0):
                    break
                if bare:
                    first = text.index(bare, first)
                    pieces.append((first, first + len(bare), place))
            else:
                if pieces and all(one[2] + one[1] - one[0] <= other[2] for one, other in pairwise(pieces)):
                    return cls(text, pieces, whole)
        return None

    def start(self, position: int) -> int:
        """Where a span begins that begins at ``position`` of the text."""
        for first, last, place in self._pieces:
            if position < last:
                while position < first and self._text[first - 1] == self._whole[place - 1]:
                    first, place = first - 1, place - 1
                return place + max(0, position - first)
        first, last, place = self._pieces[-1]
        return place + last - first

    def end(self, position: int) -> int:
        """Where a span ends that ends at ``position`` of the text."""
        for first, last, place in reversed(self._pieces):
            if position > first:
                while position > last and self._whole[place + last - first : place + last - first + 1] == self._text[last]:
                    last += 1
                return place + min(position, last) - first
        return self._pieces[0][2]
