"""Pairs of a source as token ids in full, with the few numbers of each by which a run selects and cuts them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from raydpo.data.keys import completion_key
from raydpo.data.lists import NO_RANK, most_agreed, whole_lists
from raydpo.data.marks import MARK_COLUMNS, NOT_MARKED, MarkedPair, mark_columns
from raydpo.data.messages import Malformed
from raydpo.data.preference import Preference, normalise
from raydpo.data.ragged import digests
from raydpo.data.records import Record
from raydpo.data.remarks import SPELLED, Remark
from raydpo.data.repeats import Repeats, repeating
from raydpo.data.scores import Compared, compared
from raydpo.data.shapes import common_prefix
from raydpo.data.spans import spanned
from raydpo.data.split import prompt_digest, question_digest
from raydpo.data.tally import SourceReport
from raydpo.data.tokenise import TokenisedPair, Tokeniser

__all__ = [
    "DESIRABLE",
    "FIRST_RECORDS",
    "HEAD_TOKENS",
    "LIGHT_SCHEMA",
    "PAIR_MARGIN",
    "PAIR_WEIGHT",
    "RANK_COLUMNS",
    "SEVERAL_TURNS",
    "TOKEN_SCHEMA",
    "UNDESIRABLE",
    "RowMaker",
    "Rows",
    "TokenSource",
    "head_of",
    "heads_of",
    "light_schema",
    "most_characters_of",
    "preferences_of",
    "renumbered",
]

_IDS, _KEY = pa.list_(pa.int32()), pa.binary(16)
FIRST_RECORDS = 1000
"""Records by which ``RowMaker.decide`` decides what holds for the whole source."""
HEAD_TOKENS = 24
"""Tokens of a prompt in column ``head``. Sorting by them brings nearly all prompts that share much next to each other."""
PAIR_WEIGHT = "pair_weight"
"""Additional light column, float64, if ``data.weight_column`` is set."""
PAIR_MARGIN = "pair_margin"
"""Additional light column, float64, if ``data.margin_column`` is set."""

TOKEN_SCHEMA = pa.schema([("prompt_ids", _IDS), ("chosen_ids", _IDS), ("rejected_ids", _IDS)])
"""Token ids of pairs before truncation."""
LIGHT_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),  # number of the record, from 1, counted through all files of the source
        ("number", pa.int32()),  # n of pair id source:row#n; 0 for the first pair of a record
        ("file", pa.int32()),  # index into Rows.labels
        ("line", pa.int64()),  # the record's place is label:line
        ("source", pa.int32()),  # index into Rows.sources of the source that it counts as; -1 = the source itself
        ("prompt_tokens", pa.int32()),
        ("chosen_tokens", pa.int32()),
        ("rejected_tokens", pa.int32()),  # before truncation; all three are 0 if the text was too long to be tokenised
        ("agree", pa.int32()),  # tokens that chosen and rejected, or two of a list, have in common at their start
        ("highest", pa.int32()),  # highest token id of the three, -1 without tokens
        ("chosen_key", _KEY),
        ("rejected_key", _KEY),  # keys.completion_key of the completions before truncation
        ("prompt_digest", _KEY),
        ("question_digest", _KEY),  # split.prompt_digest and split.question_digest
        ("prompt_hash", pa.uint64()),
        ("chosen_hash", pa.uint64()),
        ("rejected_hash", pa.uint64()),  # ragged.digests of the ids before truncation
        ("characters", pa.int64()),  # of the pair's text
        ("flags", pa.uint8()),  # SEVERAL_TURNS, DESIRABLE, ...
        ("head", pa.binary(64)),  # the prompt's first tokens after those that all prompts share; see ``head_of``
    ]
)
"""What is known of each pair without its tokens, in the order of records."""


@dataclass(frozen=True)
class Rows:
    """Pairs of successive records of one source.

    Attributes:
        light: columns of ``light_schema``.
        tokens: columns of ``TOKEN_SCHEMA`` of the same pairs.
        labels: files of the records, as messages name them.
        sources: names that ``light["source"]`` refers to.
        account: the part of the source's report that depends on no setting but those of reading: everything but kept,
            truncated, dropped, duplicates and several_turns. Its name and path are empty.
    """

    light: pa.Table
    tokens: pa.Table
    labels: tuple[str, ...]
    sources: tuple[str, ...]
    account: SourceReport


class TokenSource(Protocol):
    """Where processes on any machine read the tokens of pairs. It can be pickled, and is then small, but for data in
    memory."""

    def rows(self, sets: np.ndarray, places: np.ndarray) -> Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Token ids of pairs before truncation: (prompt, chosen, rejected) of each, int32 arrays that must not be changed.

        Args:
            sets: number of the set of each pair, as in column ``set`` of ``select.PLACE_SCHEMA``.
            places: its place in that set, as in column ``place``, int64 [pairs].
        """
        ...


MOST_CHARACTERS, CHARACTERS_A_TOKEN = 1_000_000, 100
"""A pair is dropped before it is tokenised if it has more characters than the first and than the second for each token of
``max_length``. Tokenising 10 MB takes a byte-level tokenizer a minute, and of such a text hardly 1 % would be used."""
SEVERAL_TURNS = 1
"""Bit of column ``flags``: a completion continues beyond the assistant's turn."""
DESIRABLE = 2
"""Bit of column ``flags``: the row is one completion with a good label, in place of chosen. ``rejected`` has no tokens, and
zeros as its key and hash."""
UNDESIRABLE = 4
"""Bit of column ``flags``: the row is one completion with a bad label, in place of rejected, as ``DESIRABLE``."""
RANK_COLUMNS = (("chosen_rank", pa.int32()), ("rejected_rank", pa.int32()))
"""Further light columns of a set of ranked lists: place of each completion in its list from 0, equal for ties."""
NULLS_ABSENT = (
    "warning: null fields inside {!r} read as absent, since Parquet and Arrow give each entry the fields of all others; if "
    "a null is meant, write that column as JSON text"
)
AS_TEXT = "Human/Assistant transcripts read as text, since the tokenizer has no chat template"
_FEWEST_WITH_MORE = 3
"""Fewest columns of a record that can hold more than its pair."""
_A_VALUE, _BITS = 3, 21
"""Tokens in a 64-bit value of column ``head``, and bits of each."""
_SIDES = ("chosen", "rejected")
_NO_IDS, _NO_KEY = np.empty(0, np.int32), bytes(16)


def most_characters_of(max_length: int) -> int:
    """Limit of characters for a set that serves ``max_length`` and many others: the least 1,000,000 * 4^n that is enough."""
    limit = MOST_CHARACTERS
    while limit < CHARACTERS_A_TOKEN * max_length:
        limit *= 4
    return limit


def head_of(prompt: Sequence[int] | np.ndarray, head: int) -> bytes:
    """Value of column ``head``: ``HEAD_TOKENS`` tokens of a prompt from the ``head``-th on, as bytes that sort as they do.

    Three tokens are a big-endian uint64 of 21 bits each: the token + 1, or 0 where the prompt has ended.
    """
    flat = np.asarray(prompt, np.int32)
    return heads_of(flat, np.array([0, len(flat)]), head).tobytes()


def heads_of(flat: np.ndarray, offsets: np.ndarray, head: int) -> np.ndarray:
    """``head_of`` of prompts whose ids lie one after another, big-endian uint64 [prompts, HEAD_TOKENS / 3]."""
    places = offsets[:-1, None] + np.arange(head, head + HEAD_TOKENS)
    inside = places < offsets[1:, None]
    tokens = np.zeros(places.shape, np.uint64)
    tokens[inside] = np.minimum(flat[places[inside]].astype(np.uint64) + np.uint64(1), np.uint64(2**_BITS - 1))
    one, two, three = (tokens[:, first::_A_VALUE] for first in range(_A_VALUE))
    return (one << np.uint64(2 * _BITS) | two << np.uint64(_BITS) | three).astype(">u8")


class _Entry(NamedTuple):
    """A pair before it is tokenised.

    Attributes:
        record: position of its record among those at hand.
        number: n of its id source:row#n.
        preference: what the record says.
        read: what is tokenised, where the tokenizer has no chat template.
        scores: what scores beside it say, of a record that is one pair.
        giant: its text is too long to be tokenised.
    """

    record: int
    number: int
    preference: Preference
    read: Preference
    scores: Compared | None
    characters: int
    giant: bool


class Found(NamedTuple):
    """A pair with its tokens (None of giants), what is odd about it, and its marks."""

    entry: _Entry
    tokens: TokenisedPair | None
    remarks: Sequence[Remark]
    marks: MarkedPair = NOT_MARKED


@dataclass
class _Read:
    """Records as far as they depend on nothing but the tokenizer.

    Attributes:
        faults: position of a record, and what is wrong with it.
    """

    account: SourceReport
    entries: list[_Entry]
    faults: list[tuple[int, str]]


@dataclass
class _Encoded:
    """Records as far as they depend on ``take_off``, not on ``head``: tokens (None of giants) and marks of sound pairs."""

    account: SourceReport
    pairs: list[tuple[_Entry, TokenisedPair | None]]
    marks: list[MarkedPair]


class RowMaker:
    """Makes ``Rows`` of records of one source. What it makes depends on the records and its arguments only. So blocks of
    records can be made in any process, and give the same rows whatever their size.

    Args:
        numbers: our additional columns, ``PAIR_WEIGHT`` and ``PAIR_MARGIN``, and the columns of records that they come from.
        special_tokens: as ``data.special_tokens``.
        most_characters: pairs with a longer text are not tokenised.
        take_off: whether prompts are taken off answers that repeat them, see ``Repeats``.
        head: tokens at the beginning of prompts that column ``head`` leaves out. ``decide`` finds both.
        marks: whether rows have ``MARK_COLUMNS``.
        spans: the column of records with spans that count; needs ``marks``.
        lists: whether several ranked completions of a record become one list, with columns ``RANK_COLUMNS``.
    """

    def __init__(
        self,
        tokeniser: Tokeniser,
        *,
        numbers: Mapping[str, str],
        special_tokens: str,
        most_characters: int,
        take_off: bool | None = None,
        head: int | None = None,
        marks: bool = False,
        spans: str | None = None,
        lists: bool = False,
    ) -> None:
        self.tokeniser, self.marks, self.spans, self.lists = tokeniser, marks, spans, lists
        self.numbers, self.special_tokens, self.most_characters = dict(numbers), special_tokens, most_characters
        self.take_off, self.head = take_off, head
        self._first: tuple[Sequence[Record], bool, _Encoded] | None = None

    def decide(self, records: Sequence[Record]) -> tuple[bool, int]:
        """Find what holds for the whole source by its first ``FIRST_RECORDS`` records.

        Returns:
            ``take_off``, false if no record says; and ``head``: tokens that the prompts of these records have in common,
            0 if there is only one prompt.
        """
        records = records if len(records) <= FIRST_RECORDS else records[:FIRST_RECORDS]
        read = self._read(records)
        counting, taken = repeating([each.read for each in read.entries if not each.giant])
        take_off = bool(counting) and taken == counting
        encoded = self._encoded(records, read, take_off)
        self._first = records, take_off, encoded
        prompts = [ids.prompt for _, ids in encoded.pairs if ids is not None]
        # What the first and the last in sorted order have in common, all between them have, too.
        ordered = [np.asarray(one, ">u4").tobytes() for one in prompts]
        ends = {min(ordered, default=b""), max(ordered, default=b"")}
        return take_off, common_prefix(*(np.frombuffer(each, ">u4") for each in ends)) if len(ends) > 1 else 0

    def decided(self, take_off: bool, head: int) -> RowMaker:
        """This one with what ``decide`` found. If ``make`` is then called with the records that ``decide`` had, it does not
        tokenise them again."""
        other = copy.copy(self)
        other.take_off, other.head = take_off, head
        return other

    def make(self, records: Sequence[Record]) -> Rows:
        """Tokenise records that follow each other.

        Raises:
            ModelError: if the tokenizer lacks the chat template or EOS token that the data need.
        """
        if self.take_off is None or self.head is None:
            raise ValueError("take_off and head are not known; see decide")
        (known, taken, encoded), self._first = self._first or (None, None, None), None
        if known is not records or taken != self.take_off:
            encoded = self._encoded(records, self._read(records), self.take_off)
        return self._rows(records, encoded)

    def _read(self, records: Sequence[Record]) -> _Read:
        account = SourceReport("", "", records=len(records))
        entries: list[_Entry] = []
        faults: list[tuple[int, str]] = []
        options = self.tokeniser.template.options - set(self.numbers.values())
        template = bool(self.tokeniser.tokenizer.chat_template)
        for index, record in enumerate(records):
            found: list[Preference] = []
            try:
                found = preferences_of(record, account, self.numbers, self.spans, lists=self.lists)
            except Malformed as error:
                faults.append((index, str(error)))
            _note_options(record, options, account)
            scores = None
            if len(found) == 1 and record.value is not None and (len(record.value) > 3 or "prompt" not in record.value):
                scores = compared(record.value)
            for number, preference in enumerate(found):
                giant = (characters := preference.characters) > self.most_characters
                read = preference
                if not (template or giant or preference.texts is None):
                    prompt, chosen, rejected = preference.texts
                    read = replace(preference, prompt=prompt, chosen=chosen, rejected=rejected)
                    account.understood[AS_TEXT] += 1
                entries.append(_Entry(index, number, preference, read, scores, characters, giant))
        return _Read(account, entries, faults)

    def _encoded(self, records: Sequence[Record], found: _Read, take_off: bool) -> _Encoded:
        """Tokenise what was read, and complete its account."""
        account, entries, faults, merged_before = found.account, found.entries, found.faults, self.tokeniser.merged
        read = [each.read for each in entries if not each.giant]
        early = [each.read for each in entries if not each.giant and records[each.record].row <= FIRST_RECORDS]
        account.repeats = Repeats(take_off if repeating(read)[0] else None, first=repeating(early))
        noted: list[MarkedPair | None] = []
        taken = account.repeats.taken_off(read)
        tokenised = iter(self.tokeniser.encode_noted(taken, noted) if self.marks else self.tokeniser.encode_noted(taken))
        marked = iter(noted)
        pairs: list[tuple[_Entry, TokenisedPair | None]] = []
        marks: list[MarkedPair] = []
        kept: list[Found] = []
        for entry in entries:
            if entry.giant:
                kept.append(Found(entry, None, ()))
                continue
            ids, remarks = next(tokenised)
            runs = next(marked, None)
            reason = self._refused(entry.preference, ids, remarks)
            if reason is not None:
                faults.append((entry.record, reason))
            else:
                kept.append(Found(entry, ids, remarks, runs or NOT_MARKED))  # type: ignore[arg-type]
        for entry, ids, remarks, runs in whole_lists(kept, faults) if self.lists else kept:
            where = records[entry.record].where
            account.pairs += not self.lists or entry.number == 0
            if ids is not None:
                account.remarks.add(remarks, where)
                account.scores.add(entry.scores, where)
            pairs.append((entry, ids))
            marks.append(runs)
        for index, reason in sorted(faults, key=lambda fault: fault[0]):
            account.malformed.add(reason, records[index].where)
        account.malformed_records = len({index for index, _ in faults})
        account.merged = self.tokeniser.merged - merged_before
        return _Encoded(account, pairs, marks)

    def _refused(self, preference: Preference, ids: TokenisedPair | Malformed, remarks: Sequence[Remark]) -> str | None:
        """Why a tokenised pair is malformed."""
        if self.special_tokens == "refuse" and any(remark.kind == SPELLED for remark in remarks):
            return "its text spells a special token"
        if isinstance(ids, Malformed):
            empty = preference.prompt == "" and str(ids) == "prompt has no tokens"
            return "prompt is empty" if empty else str(ids)
        return None

    def _agree(self, pairs: Sequence[tuple[_Entry, TokenisedPair | None]]) -> np.ndarray:
        """Column ``agree``."""
        if not self.lists:
            return np.array([0 if ids is None else common_prefix(ids.chosen, ids.rejected) for _, ids in pairs], np.int32)
        found: list[int] = []
        for _, rows in groupby(pairs, key=lambda each: each[0].record):
            tokens = [ids for _, ids in rows]
            found += [0 if None in tokens else most_agreed(tokens)] * len(tokens)
        return np.array(found, np.int32)

    def _rows(self, records: Sequence[Record], encoded: _Encoded) -> Rows:
        pairs = encoded.pairs
        sides = [[_NO_IDS if ids is None else ids[side] for _, ids in pairs] for side in range(3)]
        flats = [np.concatenate([_NO_IDS, *side]) for side in sides]
        offsets = [np.cumsum([0, *map(len, side)], dtype=np.int64) for side in sides]
        lists = [
            pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(flat))
            for ends, flat in zip(offsets, flats, strict=True)
        ]
        labels: dict[str, int] = {}
        sources: dict[str, int] = {}
        places = [_place(records[entry.record].where) for entry, _ in pairs]
        counted = [records[entry.record].source for entry, _ in pairs]
        lengths = [np.diff(ends).astype(np.int32) for ends in offsets]
        highest = np.full(len(pairs), -1, np.int32)
        for flat, ends, counts in zip(flats, offsets, lengths, strict=True):
            if len(filled := np.flatnonzero(counts)):
                highest[filled] = np.maximum(highest[filled], np.maximum.reduceat(flat, ends[filled]))
        keys = [
            [completion_key(ids.prompt, ids[side]) if ids is not None and len(ids[side]) else _NO_KEY for _, ids in pairs]
            for side in (1, 2)
        ]
        prompts = [
            [_NO_KEY if ids is None else digest(entry.preference.prompt) for entry, ids in pairs]
            for digest in (prompt_digest, question_digest)
        ]
        flags = np.fromiter((_flags(entry.preference) for entry, _ in pairs), np.uint8, len(pairs))
        if self.marks:
            flags |= np.fromiter((each.flags for each in encoded.marks), np.uint8, len(pairs))
        columns = [
            np.fromiter((records[entry.record].row for entry, _ in pairs), np.int64, len(pairs)),
            np.fromiter((entry.number for entry, _ in pairs), np.int32, len(pairs)),
            np.fromiter((labels.setdefault(label, len(labels)) for label, _ in places), np.int32, len(pairs)),
            np.fromiter((line for _, line in places), np.int64, len(pairs)),
            np.fromiter(
                (-1 if name is None else sources.setdefault(name, len(sources)) for name in counted), np.int32, len(pairs)
            ),
            *lengths,
            self._agree(pairs),
            highest,
            *(_fixed(b"".join(values), 16) for values in (*keys, *prompts)),
            *(np.where(lengths[0] > 0, digests(values), np.uint64(0)) for values in lists),
            np.fromiter((entry.characters for entry, _ in pairs), np.int64, len(pairs)),
            flags,
            _fixed(heads_of(flats[0], offsets[0], self.head or 0).tobytes(), 64),
            *(
                np.fromiter((entry.preference.numbers[number] for entry, _ in pairs), np.float64, len(pairs))
                for number in range(len(self.numbers))
            ),
        ]
        columns = [
            *map(pa.array, columns),
            *(mark_columns(encoded.marks) if self.marks else ()),
            *(_rank_columns(pairs) if self.lists else ()),
        ]
        schema = light_schema(self.numbers, marks=self.marks, lists=self.lists)
        light = pa.Table.from_arrays(columns, schema=schema)
        tokens = pa.Table.from_arrays(lists, schema=TOKEN_SCHEMA)
        return Rows(light, tokens, tuple(labels), tuple(sources), encoded.account)


def _flags(preference: Preference) -> int:
    """Value of column ``flags``."""
    labelled = preference.alone is not None and preference.ranks[1] is not None  # not the last of an odd list
    label = 0 if not labelled else DESIRABLE if preference.alone == "chosen" else UNDESIRABLE
    return label | preference.several_turns * SEVERAL_TURNS


def light_schema(numbers: Iterable[str], *, marks: bool, lists: bool) -> pa.Schema:
    """``LIGHT_SCHEMA`` with the further columns of a set.

    Args:
        numbers: names of additional columns of numbers.
        marks: whether it is a set with marks.
        lists: whether it is a set of ranked lists.
    """
    more = (*(MARK_COLUMNS if marks else ()), *(RANK_COLUMNS if lists else ()))
    return pa.schema([*LIGHT_SCHEMA, *((name, pa.float64()) for name in numbers), *more])


def preferences_of(
    record: Record,
    account: SourceReport,
    numbers: Mapping[str, str],
    spans: str | None = None,
    *,
    lists: bool = False,
) -> list[Preference]:
    """The preferences in a record. Adds to ``account`` how it was understood.

    Args:
        numbers, spans, lists: as of ``RowMaker``.

    Raises:
        Malformed: if there are none, or one of them is wrong.
    """
    if record.note is not None:
        account.files.append(record.note)
    if record.value is None:
        raise Malformed(record.problem or "unreadable")
    found = normalise(record.value, tuple(numbers.values()), () if spans is None else (spans,), lists=lists)
    if spans is not None:
        found = spanned(found, record.value.get(spans), spans)
    if PAIR_WEIGHT in numbers and found[0].numbers[0] < 0:
        raise Malformed(f"{numbers[PAIR_WEIGHT]!r} is below 0")
    if record.absent:
        account.understood.update(map(NULLS_ABSENT.format, record.absent))
    if found[0].notes:
        account.understood.update(found[0].notes)
    if found[0].unused:
        account.unused.update(found[0].unused)
    for name, value in zip(numbers, found[0].numbers, strict=True):
        if (note := _odd_number(name, value)) is not None:
            account.understood[note.format(numbers[name])] += 1
    return found


def renumbered(table: pa.Table, column: str, names: Sequence[str], known: dict[str, int]) -> pa.Table:
    """Light rows whose column ``file`` or ``source`` holds indices into ``known``, to which new names are added, instead of
    ``names``; -1 stays."""
    numbers = [known.setdefault(name, len(known)) for name in names]
    if numbers == list(range(len(numbers))):
        return table
    values = np.array([*numbers, -1], np.int32)[table[column].to_numpy()]
    return table.set_column(table.column_names.index(column), table.schema.field(column), pa.array(values))


def _odd_number(name: str, value: float) -> str | None:
    """A note about a weight or margin that is allowed, but may not be meant; the column's name goes into its braces."""
    if name == PAIR_WEIGHT and value == 0:
        return "{!r} (data.weight_column) is 0, so nothing is learned from these"
    if name == PAIR_MARGIN and value < 0:
        return (
            "warning: {!r} (data.margin_column) is below 0, so the loss lets the rejected answer be better by that much; "
            "swap the answers of these, or leave them out"
        )
    return None


def _note_options(record: Record, options: frozenset[str], account: SourceReport) -> None:
    """Note columns that are called as a variable of the chat template is, and not given to it."""
    if record.value is None or len(record.value) < _FEWEST_WITH_MORE:
        return
    for name in sorted(record.value.keys() & options):
        if isinstance(value := record.value[name], (bool, int, float, str)) and len(str(value).split()) == 1:
            account.understood[
                f"warning: {name!r} is not given to the chat template, which reads a variable of this name: write it "
                "into a column chat_template_kwargs, or drop the column"
            ] += 1


def _place(where: str) -> tuple[str, int]:
    """File and line of ``file:line``; line -1 if it is not of this form."""
    label, _, line = where.rpartition(":")
    return (label, int(line)) if line.isdecimal() else (where, -1)


def _rank_columns(pairs: Sequence[tuple[_Entry, TokenisedPair | None]]) -> list[pa.Array]:
    """The columns ``RANK_COLUMNS``."""
    ranks = [
        [NO_RANK if each.alone not in (None, side) else rank for side, rank in zip(_SIDES, each.ranks, strict=True)]
        for each in (entry.preference for entry, _ in pairs)
    ]
    return [pa.array([both[side] for both in ranks], pa.int32()) for side in range(2)]


def _fixed(content: bytes, width: int) -> pa.Array:
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(content) // width, [None, pa.py_buffer(content)])
