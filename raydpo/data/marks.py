"""Marks the tokens of a completion: which of them the assistant writes, in which turn, and which of them are reasoning."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from raydpo.config.counting import MOST_WEIGHT
from raydpo.data import remarks
from raydpo.data.messages import Malformed, Message, Text
from raydpo.data.places import Place, TokenPlaces
from raydpo.data.preference import Preference
from raydpo.data.remarks import Remark
from raydpo.data.segments import any_of
from raydpo.data.spans import Span, Spans, Written, message_text
from raydpo.data.template import ChatTemplate
from raydpo.data.texts import MARKS, TAGS, leaves, thoughts_of
from raydpo.errors import RaydpoError

__all__ = [
    "ANSWER",
    "ASSISTANT",
    "LAST_TURN",
    "MARK_BITS",
    "MARK_COLUMNS",
    "NOT_MARKED",
    "REASONING",
    "REASONING_NOT_FOUND",
    "TURNS_NOT_FOUND",
    "MarkedPair",
    "Marker",
    "Runs",
    "mark_columns",
]

TURNS_NOT_FOUND = 8
"""Bit of light column ``flags``, in a set with marks: where the assistant's turns begin and end could not be told for
certain."""
REASONING_NOT_FOUND = 16
"""Bit of light column ``flags``, in a set with marks: where the reasoning ends could not be told for certain."""
ASSISTANT = 1
"""Bit of a mark: a token that the assistant writes, in any of its turns. See ``config.counting.PARTS`` for all parts."""
LAST_TURN = 2
"""Bit of a mark: a token of the assistant's last turn."""
ANSWER = 4
"""Bit of a mark: a token that the assistant writes, and not reasoning."""
REASONING = 8
"""Bit of a mark: a token of the reasoning."""
MARK_BITS = 4
"""A mark is ``first token * 2 ** MARK_BITS + parts``."""
MARK_COLUMNS = (
    ("chosen_marks", pa.list_(pa.int32())),
    ("rejected_marks", pa.list_(pa.int32())),
    ("chosen_factors", pa.list_(pa.float32())),
    ("rejected_factors", pa.list_(pa.float32())),
)
"""Further light columns of a set with marks: runs of each completion's tokens before truncation, and the factor of each
run, which is 1 unless a column of spans or a message says otherwise. The first run begins at token 0. A completion of which
nothing is known has no runs."""

_LAST = 200
"""Characters at the end of a rendering among which the last token is looked for."""
_FEW = 3
"""Characters of a text that may stand anywhere by chance."""
_PROBE = "raydpoMarks"
"""Content of a message of which the place is looked for, found in no template."""
_USER: Message = {"role": "user", "content": "x"}
_CHANNEL = ("<|channel|>analysis<|message|>", "<|end|>")
"""How gpt-oss begins and ends a thought. It is part of a turn, which goes on in another channel."""
_CLOSER = dict((*TAGS, _CHANNEL))
_TAG = re.compile(any_of([*_CLOSER, *_CLOSER.values()]))
_EMPTY = "|".join(rf"{re.escape(opener)}\s*{re.escape(closer)}" for opener, closer in TAGS)
_EMPTY_THOUGHT, _ADDED_THOUGHT = re.compile(_EMPTY), re.compile(rf"(?:{_EMPTY})\s*\Z")
_FACTORS = {"true": 1.0, "false": 0.0}


@dataclass(frozen=True, slots=True)
class Runs:
    """Runs of the tokens of one completion, as ``MARK_COLUMNS`` holds them: int32 and float32, [runs]."""

    marks: np.ndarray
    factors: np.ndarray


@dataclass(frozen=True, slots=True)
class MarkedPair:
    """Runs of both completions of a pair, and the bits that they add to its flags."""

    chosen: Runs
    rejected: Runs
    flags: int = 0

    def later(self, tokens: int) -> MarkedPair:
        """The marks of completions that begin so many tokens earlier. Those tokens are of no part."""
        return self if not tokens else MarkedPair(_later(self.chosen, tokens), _later(self.rejected, tokens), self.flags)


def _later(runs: Runs, tokens: int) -> Runs:
    if not len(runs.marks):
        return runs
    same = runs.marks[0] == 0 and runs.factors[0] == 1  # as the tokens before
    marks, factors = runs.marks[same:] + (tokens << MARK_BITS), runs.factors[same:]
    return Runs(np.insert(marks, 0, 0).astype(np.int32), np.insert(factors, 0, 1).astype(np.float32))


NO_RUNS = Runs(np.empty(0, np.int32), np.empty(0, np.float32))
NOT_MARKED = MarkedPair(NO_RUNS, NO_RUNS)
"""A pair that was not tokenised."""


def mark_columns(marks: Sequence[MarkedPair]) -> list[pa.Array]:
    """The columns ``MARK_COLUMNS`` of pairs."""
    values = [
        [getattr(getattr(each, side), kind) for each in marks] or [getattr(NO_RUNS, kind)]
        for kind in ("marks", "factors")
        for side in ("chosen", "rejected")
    ]
    ends = [np.cumsum([0, *map(len, each[: len(marks)])], dtype=np.int32) for each in values]
    return [
        pa.ListArray.from_arrays(pa.array(stops), pa.array(np.concatenate(each)))
        for stops, each in zip(ends, values, strict=True)
    ]


class _Turn(NamedTuple):
    """One turn of the assistant within a rendering, from the first character that the model writes to the end of the token
    that ends it. ``place`` is the number of its message in the completion."""

    start: int
    end: int
    place: int


class Marker:
    """Finds the assistant's turns in the rendering of a completion, and the reasoning within them.

    A turn begins where the rendering of the messages before it ends, asked for an answer, and ends with the token after
    which the rendering of the messages up to it ends: each must be a prefix of the whole rendering. Templates may render
    messages otherwise when others follow. Then the whole conversation is rendered with a probe in place of the turn's
    content: what stands before and after the probe must be beginning and end of the real rendering. Where neither holds,
    the turns are not found.
    """

    def __init__(self, tokenizer: Any, template: ChatTemplate) -> None:
        self._template, self._tokenizer = template, tokenizer
        self._places = TokenPlaces(tokenizer)
        added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
        self._token = re.compile(any_of(token for token in added if token.strip()) or "(?!)")
        eos = re.escape(tokenizer.eos_token) if tokenizer.eos_token else "(?!)"
        self._up_to_eos = re.compile(rf"(?:{self._token.pattern})*?{eos}")
        self._added = frozenset(added)
        special = [token for token in tokenizer.all_special_tokens if token.strip()]
        self._last_token = re.compile(rf"({any_of(special) or '(?!)'})\s*\Z")
        self._tails: dict[bool, str | None] = {}

    def mark(
        self, preference: Preference, texts: tuple[str, ...], pair: Sequence[np.ndarray], found: list[Remark]
    ) -> MarkedPair:
        """The runs of a pair. Notes in ``found`` what could not be placed.

        Args:
            texts: prompt, and prompt with each answer, rendered or plain, with the EOS that ends them.
            pair: ids of prompt, chosen and rejected. The missing side of a completion alone has none.

        Raises:
            Malformed: if a message has a weight that is no number of at least 0.
        """
        sides, flags, wholes = [], 0, iter(texts[1:])
        for side, ids in zip(("chosen", "rejected"), pair[1:], strict=True):
            runs, missing = NO_RUNS, 0
            if len(ids):
                runs, missing = self._runs(preference, side, texts[0], next(wholes), ids)
            for flag, kind in ((TURNS_NOT_FOUND, remarks.NO_TURNS), (REASONING_NOT_FOUND, remarks.NO_REASONING)):
                if missing & flag:
                    found.append(Remark(kind, side if preference.alone is None else "completion"))
            sides.append(runs)
            flags |= missing
        return MarkedPair(*sides, flags)

    def _runs(self, preference: Preference, side: str, prompt: str, whole: str, ids: np.ndarray) -> tuple[Runs, int]:
        said: Text = getattr(preference, side)
        messages = [] if isinstance(said, str) else said
        factors = [_factor(message, side) for message in messages] or [1.0]
        spans = None if preference.spans is None else getattr(preference.spans, side)
        talk = _Talk(self._template, preference, messages) if messages else None
        turns = [_Turn(len(prompt), len(whole), 0)] if talk is None else self._turns(talk, prompt, whole)
        place = self._places.of(whole, ids, special=talk is None)
        bounds = [(place(turn.start), place(turn.end)) for turn in turns or ()]
        parts, weights, missing = np.zeros(len(ids), np.int32), np.ones(len(ids), np.float32), 0
        if not turns or any(bound is None for pair in bounds for bound in pair):
            if any(factor != 1 for factor in factors):
                raise Malformed(
                    f"{side} has messages with weights, and where its turns begin and end cannot be told for certain"
                )
            if spans is None:
                return NO_RUNS, TURNS_NOT_FOUND
            turns, missing = [], TURNS_NOT_FOUND
        last = 0
        for turn, (start, end) in zip(turns, bounds, strict=False):
            bits = ASSISTANT | (LAST_TURN if turn is turns[-1] else 0)
            parts[start:end] = bits
            weights[last:start] = _between(factors, turns, turn)
            weights[start:end] = factors[turn.place]
            last = end
            thoughts = self._thoughts(whole, turn, messages[turn.place] if messages else {"content": said})
            if thoughts is None:
                missing |= REASONING_NOT_FOUND
                continue
            parts[start:end] |= ANSWER
            for begin, stop, bit in thoughts:
                first, after = place(begin), place(stop)
                if first is None or after is None:
                    missing |= REASONING_NOT_FOUND
                else:
                    parts[first:after] = bits | bit
        if turns:
            weights[last:] = _between(factors, turns, None)
        if missing & REASONING_NOT_FOUND:
            parts &= ASSISTANT | LAST_TURN
        if spans is not None:
            regions = self._regions(preference, side, talk, turns, prompt, whole)
            counted = np.zeros(len(ids), np.float32)
            for span in spans:
                counted[_tokens(span, side, regions, place, len(ids))] = span.weight
            weights *= counted
        changes = np.flatnonzero((parts[1:] != parts[:-1]) | (weights[1:] != weights[:-1])) + 1
        firsts = np.concatenate([[0], changes])
        return Runs((firsts << MARK_BITS | parts[firsts]).astype(np.int32), weights[firsts]), missing

    def _regions(
        self, preference: Preference, side: str, talk: _Talk | None, turns: Sequence[_Turn], prompt: str, whole: str
    ) -> dict[int, Written]:
        """Where the texts of those messages stand in which spans are, as far as that can be told."""
        spans: Spans = preference.spans  # type: ignore[assignment]
        texts = spans.texts[("chosen", "rejected").index(side)]
        found: dict[int, Written | None] = {}
        for message in {span.message for span in getattr(spans, side)} - {None}:
            text = texts[message]
            if talk is None:
                said = getattr(preference, side)
                cut = len(text) - len(said)  # an answer that repeated its prompt has lost it, see ``Repeats``
                found[message] = Written.of(text, whole, len(prompt), len(whole), _TAG)
                if text.endswith(said):
                    found[message] = Written(text, [(cut, len(text), len(prompt))], whole)
                continue
            start = max((turn.end for turn in turns if turn.place < message), default=len(prompt))
            end = min((turn.start for turn in turns if turn.place > message), default=len(whole))
            start, end = next(((turn.start, turn.end) for turn in turns if turn.place == message), (start, end))
            written = Written.of(text, whole, start, end, _TAG)
            around = talk.around(message, keep=True) if written is None else None
            if around and whole.startswith(around[0]) and whole.endswith(around[1]):
                start, end = max(start, len(around[0])), min(end, len(whole) - len(around[1]))
                written = Written.of(text, whole, start, end, _TAG)
            found[message] = written
        return {message: written for message, written in found.items() if written is not None}

    # -- turns --------------------------------------------------------------------------------------------------------------

    def _turns(self, talk: _Talk, prompt: str, whole: str) -> list[_Turn] | None:
        found: list[_Turn] = []
        places = [place for place, message in enumerate(talk.messages) if message["role"] == "assistant"]
        parts = talk.generated(whole) or [(0, len(whole))] * len(places)
        for place, (first, last) in zip(places, parts, strict=True):
            start = self._start(talk, place, prompt, whole)
            if first and start is None:
                start = first + (len(self._asks) if whole.startswith(self._asks, first) else 0)
            elif first and start <= last:  # type: ignore[operator]
                start = max(first, start)  # type: ignore[type-var]
            end = None if start is None else self._end(talk, place, start, whole)
            if first and end is None:
                end = self._end_of_part(whole, last)
            if start is None or end is None or start < (found[-1].end if found else 0) or end <= start:
                return None
            found.append(_Turn(start, end, place))
        return found if _apart(talk.messages, found, whole) else None

    def _end_of_part(self, whole: str, last: int) -> int:
        """Where a turn ends whose ``{% generation %}`` ends at ``last``: with the token that ends that, or follows it."""
        end = self._last_token.search(whole, max(0, last - _LAST), last)
        return end.end(1) if end else last + self._length(whole[last : last + _LAST])

    def _start(self, talk: _Talk, place: int, prompt: str, whole: str) -> int | None:
        """Where the model begins to write in the turn of message ``place``."""
        asked = prompt if not place else talk.rendered(place, generate=True)
        if asked is None or not whole.startswith(asked):
            asked = None
        elif self._asks or (self._header is not None and not self._header.strip()):
            return len(asked)
        elif self._header and whole.startswith(self._header, len(asked)):
            return len(asked) + len(self._header)
        around = talk.around(place)
        head = _ADDED_THOUGHT.sub("", around[0]) if around else ""
        if not self._asks or not whole.startswith(head):
            head = head.rstrip(" ")  # Mistral's writes it before an answer and not before a call
        return len(head) if head and whole.startswith(head) else None

    def _end(self, talk: _Talk, place: int, start: int, whole: str) -> int | None:
        """Where the turn of message ``place`` ends."""
        upto = whole if place == len(talk.messages) - 1 else talk.rendered(place + 1)
        usual = self._tail(talk.tools is not None)
        known = upto is not None and whole.startswith(upto)
        if usual is not None:
            length = self._length(usual) or len(usual.rstrip())
            if known and upto.endswith(usual) and len(upto) - len(usual) >= start:  # type: ignore[union-attr]
                return len(upto) - len(usual) + length  # type: ignore[arg-type]
            tail = (talk.around(place) or ("", ""))[1]
            if tail and whole.endswith(tail) and len(whole) - len(tail) >= start:
                length = self._length_before(tail, usual)
                if length is not None:
                    return len(whole) - len(tail) + length
        # A call may end with another token than an answer.
        end = None if upto is None else self._last_token.search(upto, max(start if known else 0, len(upto) - _LAST))
        if end is None or known:
            return None if end is None else end.end(1)
        head = (talk.around(place + 1, keep=True) or ("", ""))[0]
        last = whole.rfind(end[1], start, len(head)) if head and whole.startswith(head) else -1
        return None if last < 0 else last + len(end[1])

    def _length(self, tail: str) -> int:
        """Characters of what ends a turn, at the beginning of what a template writes after its content; 0 if no token ends
        it. Where several tokens follow one another and EOS is among them, as in Cohere's, the turn ends with EOS."""
        start = len(tail) - len(tail.lstrip())
        end = self._up_to_eos.match(tail, start) or self._token.match(tail, start)
        return end.end() if end else 0

    def _length_before(self, tail: str, usual: str) -> int | None:
        """Characters of what ends a turn before other messages; None if that cannot be told.

        It is what ends a conversation, or a token that another follows, which begins the next message. Where a token begins
        the next message at once, nothing ends the turn.
        """
        if tail.startswith(usual.rstrip()) and usual.strip():
            return self._length(usual) or len(usual.rstrip())
        length = self._length(tail)
        if not self._length(usual):
            return None if usual.strip() else 0
        return (length if self._length(tail[length : length + _LAST]) else 0) if length else None

    def _tail(self, tools: bool) -> str | None:
        """What the template writes after the last content of a conversation."""
        if tools not in self._tails:
            talk = _Talk(self._template, Preference([_USER], "", "", tools=[] if tools else None), [_answer(_PROBE)])
            around = talk.around(0)
            self._tails[tools] = around[1] if around else None
        return self._tails[tools]

    @cached_property
    def _asks(self) -> str:
        """What the template writes where the assistant is to answer."""
        talk = _Talk(self._template, Preference([_USER], "", ""), [])
        asked, bare = talk.rendered(0, generate=True), talk.rendered(0)
        return _PROBE if asked is None or bare is None else asked.removeprefix(bare)

    @cached_property
    def _header(self) -> str | None:
        """What the template writes between a question, asked for an answer, and the answer; None if that cannot be told."""
        talk = _Talk(self._template, Preference([_USER], "", ""), [_answer(_PROBE)])
        asked, around = talk.rendered(0, generate=True), talk.around(0)
        return around[0].removeprefix(asked) if asked and around and around[0].startswith(asked) else None

    # -- reasoning ----------------------------------------------------------------------------------------------------------

    def _thoughts(self, whole: str, turn: _Turn, message: Message) -> list[tuple[int, int, int]] | None:
        """Start, end and bit of each thought of a turn; None if they cannot be told for certain.

        The bit is ``REASONING``, or 0 of an empty thought that the template adds.
        """
        before = whole[max(0, turn.start - _LAST) : turn.start].rstrip()
        opener = next((one for one in _CLOSER if before.endswith(one)), None)
        begin = inside = turn.start
        found: list[tuple[int, int, int]] = []
        for tag in _TAG.finditer(whole, turn.start, turn.end):
            if opener is None:
                if tag[0] == _CHANNEL[1]:  # which ends other parts, too
                    continue
                if tag[0] not in _CLOSER or not self._may_open(whole, turn.start, tag):
                    return None
                opener, begin, inside = tag[0], tag.start(), tag.end()
                if not whole[turn.start : begin].strip():
                    begin = turn.start
            elif tag[0] == _CLOSER[opener]:
                stop = tag.end()
                while stop < turn.end and whole[stop].isspace():
                    stop += 1
                added = not whole[inside : tag.start()].strip() and not _has_empty_thought(message)
                found.append((begin, stop, 0 if added else REASONING))
                opener = None
            elif tag[0] == opener:
                return None
        if opener is not None:
            return None
        for thought in thoughts_of(message) if len(message) > 2 or type(message.get("content")) is list else ():
            place = whole.find(thought, turn.start, turn.end)
            if place >= 0 and not any(start <= place < end for start, end, _ in found):
                return None
        return found

    def _may_open(self, whole: str, start: int, tag: re.Match[str]) -> bool:
        """Whether a tag begins a thought, and is not just named within a sentence: it is a token, or begins a line, or
        follows a token."""
        before = whole[max(start, whole.rfind("\n", start, tag.start())) : tag.start()].rstrip()
        return tag[0] in self._added or not before or any(each.end() == len(before) for each in self._token.finditer(before))


class _Talk:
    """A completion after its prompt, of which parts are rendered."""

    def __init__(self, template: ChatTemplate, preference: Preference, messages: list[Message]) -> None:
        self._template = template
        self.tools, self._arguments = template.fitted_tools(preference.tools, set()), preference.template_kwargs
        self._prompt, self.messages = list(preference.prompt), messages
        self._fitted = template.fits(self._prompt) and template.fits(messages)  # type: ignore[arg-type]
        self._around: dict[tuple[int, bool], tuple[str, str] | None] = {}

    def rendered(self, count: int, generate: bool = False) -> str | None:
        """The rendering with the first messages of the completion; None if the template refuses it."""
        return self._render(self.messages[:count], generate)

    def around(self, place: int, keep: bool = False) -> tuple[str, str] | None:
        """What stands before and after the content of message ``place``; None if it is not found.

        Args:
            keep: whether the message keeps its role and other fields. Otherwise it is the assistant's, and text alone.
        """
        if (place, keep) not in self._around:
            probe = {**self.messages[place], "content": _PROBE} if keep else _answer(_PROBE)
            parts = (self._render([*self.messages[:place], probe, *self.messages[place + 1 :]], False) or "").split(_PROBE)
            self._around[place, keep] = (parts[0], parts[1]) if len(parts) == 2 else None
        return self._around[place, keep]

    def generated(self, whole: str) -> list[tuple[int, int]]:
        """The parts of ``whole``, one for each of the completion's turns, that the template itself marks as the assistant's;
        none if it does not."""
        said = [message["role"] == "assistant" for message in (*self._prompt, *self.messages)]
        try:
            found = self._template.generated(self._said(self.messages), self.tools, **self._arguments)
        except Exception:  # templates raise what their authors wrote, and transformers refuses some of these blocks
            return []
        if found is None or found[0] != whole or len(found[1]) != sum(said):
            return []
        return found[1][sum(said[: len(self._prompt)]) :]

    def _render(self, messages: list[Message], generate: bool) -> str | None:
        try:
            return self._template.render(self._said(messages), self.tools, generate=generate, **self._arguments)
        except RaydpoError:
            raise
        except Exception:  # templates raise what their authors wrote
            return None

    def _said(self, messages: list[Message]) -> list[Message]:
        said = [*self._prompt, *messages]
        return said if self._fitted and self._template.fits(messages) else self._template.fitted(said, set())  # type: ignore[arg-type]


def _apart(messages: Sequence[Message], turns: Sequence[_Turn], whole: str) -> bool:
    """Whether no text of another message, such as a tool's result, stands within a turn and not between turns."""
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            continue
        said = message_text(message).strip()
        # A result may be an object, which templates write in many ways.
        texts = [said] if said else [leaf for leaf in leaves(message.get("content"), []) if len(leaf) > _FEW]
        before = [turn for turn in turns if turn.place < place][-1:]
        after = [turn for turn in turns if turn.place > place][:1]
        between = whole[before[0].end if before else 0 : after[0].start if after else len(whole)]
        for text in texts:
            if text not in between and any(text in whole[turn.start : turn.end] for turn in (*before, *after)):
                return False
    return True


def _answer(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _has_empty_thought(message: Message) -> bool:
    """Whether the text of a message itself holds a thought without words."""
    return _EMPTY_THOUGHT.search(message_text(message)) is not None


# -- factors ---------------------------------------------------------------------------------------------------------------


def _factor(message: Message, side: str) -> float:
    """What a message says that it counts."""
    factor = 1.0
    for name in message.keys() & MARKS if len(message) > 2 else ():
        value = message[name]
        said = _FACTORS.get(value.strip().lower(), value) if isinstance(value, str) else value
        try:
            number = float(said)
        except (TypeError, ValueError, OverflowError):
            number = -1.0
        if not 0 <= number <= MOST_WEIGHT:
            raise Malformed(
                f"{side} has a message whose {name!r} is no number from 0 to {MOST_WEIGHT:,.0f} and no truth value"
            )
        factor *= number
    return factor


def _tokens(span: Span, side: str, regions: Mapping[int, Written], place: Place, count: int) -> slice:
    """The tokens of a span."""
    if span.message is None:
        if span.end > count:
            raise Malformed(f"spans of {side} end after its last token")
        return slice(span.start, span.end)
    written = regions.get(span.message)
    start, end = (None, None) if written is None else (place(written.start(span.start)), place(written.end(span.end)))
    if start is None or end is None:
        raise Malformed(
            f"spans of {side} cannot be placed for certain, since the chat template changes the text or writes it twice; "
            "give them in tokens"
        )
    return slice(start, end)


def _between(factors: Sequence[float], turns: Sequence[_Turn], turn: _Turn | None) -> float:
    """The factor of what stands before ``turn``, or after the last turn: that of the messages there if they agree, else 1;
    and without any, that of the turn before."""
    stop = len(factors) if turn is None else turn.place
    start = max((each.place + 1 for each in turns if each.place < stop), default=0)
    said = set(factors[start:stop]) or {factors[start - 1] if start else 1.0}
    return said.pop() if len(said) == 1 else 1.0
