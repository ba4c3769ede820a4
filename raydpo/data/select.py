"""Which pairs of tokenised sources a run trains on and measures, and how it cuts them: arithmetic on their light rows."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpo.config import DataConfig
from raydpo.data.counting import Counted, counted_of, needs_marks, train_on_of
from raydpo.data.index import KeyIndex, as_bytes
from raydpo.data.lists import all_or_none, begins
from raydpo.data.ragged import Ragged, first_values
from raydpo.data.rows import (
    CHARACTERS_A_TOKEN,
    DESIRABLE,
    MOST_CHARACTERS,
    PAIR_MARGIN,
    PAIR_WEIGHT,
    RANK_COLUMNS,
    SEVERAL_TURNS,
    TOKEN_SCHEMA,
    UNDESIRABLE,
    TokenSource,
)
from raydpo.data.split import held_out, kept
from raydpo.data.tally import FIRST_PLACES, DataReport, SourceReport
from raydpo.errors import DataError
from raydpo.storage.uri import redact

__all__ = [
    "COUNT_COLUMNS",
    "LABEL",
    "LIST_COLUMNS",
    "PAIR_SCHEMA",
    "SAME",
    "PairSets",
    "SourceRows",
    "TokenTables",
    "check_source",
    "select",
    "window",
]

_IDS, _KEY = pa.list_(pa.int32()), pa.binary(16)
PAIR_SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),  # source:row, plus #n for further pairs of a record that ranks several completions
        ("source", pa.string()),
        ("weight", pa.float64()),  # weight of the source
        ("prompt_ids", _IDS),
        ("chosen_ids", _IDS),
        ("rejected_ids", _IDS),  # truncated, as scored and trained on
        ("chosen_key", _KEY),
        ("rejected_key", _KEY),  # keys.completion_key of the completions before truncation
        ("chosen_full", pa.int32()),
        ("rejected_full", pa.int32()),  # their tokens before truncation
    ]
)
"""Columns of a table of tokenised pairs. Token columns may be lists of any Arrow layout, see ``ragged.Ragged``; those of
``select`` are views."""
PLACE_SCHEMA = pa.schema(
    [
        ("set", pa.int16()),  # number of the pair's source, in order; the held-out file comes last
        ("place", pa.int64()),  # 0-based number of the pair in its source
        ("prompt_hash", pa.uint64()),
        ("chosen_hash", pa.uint64()),
        ("rejected_hash", pa.uint64()),  # ragged.digests of the ids before truncation
        ("highest", pa.int32()),  # highest token id before truncation
    ]
)
"""Further columns of the tables that ``select`` returns. Those of a table from elsewhere may lack them."""
COUNT_COLUMNS = ("chosen_starts", "chosen_weights", "rejected_starts", "rejected_weights")
"""Further columns of a table of which not every token counts alike: runs of tokens in use, the first of each (list<int32>)
and the weight of its tokens (list<float32>). Neighbours have different weights."""
LABEL = "label"
"""Further column, int8, of a table with completions without a pair: as ``losses.PairLogps.labels``."""
LIST_COLUMNS = ("list", "chosen_rank", "rejected_rank")
"""Further columns of a table of ranked lists: number of the row's list (int64; the rows of a list are neighbours), and the
place of each completion in it (int32)."""
SAME = "identical after truncation"
"""Reason for which a pair is dropped whose completions are the same as far as they are used."""
NO_ROOM, TOO_LONG = "prompt leaves no room", "longer than max_length"
_SIDES = ("chosen", "rejected")
_BLOCK_ROWS = 1 << 20
_LISTS_OF_A_SET = 1 << 40
"""More than a source has records, so that lists of different sources have different numbers."""
_VIEW_ROWS = 10_000


@dataclass(frozen=True)
class SourceRows:
    """All pairs of one source, as ``rows.Rows`` of its blocks, one after another.

    Attributes:
        light: columns of ``rows.light_schema``.
        tokens: tables of ``rows.TOKEN_SCHEMA`` with the tokens of the same pairs; None if only lengths are needed.
        labels: files of the records, to which ``light["file"]`` refers.
        sources: names that ``light["source"]`` refers to.
        account: the sum of the accounts.
        name: the source's name in counts and metrics.
        path: where it was read from.
        weight: uses of each pair in an epoch.
        train_on: which tokens of its completions count, as ``counting.train_on_of`` gives them; needed if not all do.
    """

    light: pa.Table
    tokens: Sequence[pa.Table] | None
    labels: Sequence[str]
    sources: Sequence[str]
    account: SourceReport
    name: str
    path: str
    weight: float
    train_on: Mapping[str, float] | None = None


@dataclass(frozen=True)
class PairSets:
    """Tables of ``PAIR_SCHEMA`` and ``PLACE_SCHEMA``; ``eval`` is None if nothing is held out.

    Attributes:
        tokens: reads the tokens of a pair before truncation on any machine, given its set and place.
        sources: the rows of each set.
    """

    train: pa.Table
    eval: pa.Table | None
    report: DataReport
    tokens: TokenSource | None = None
    sources: tuple[SourceRows, ...] = field(default=(), repr=False)


class TokenTables:
    """A ``TokenSource`` of tables in memory.

    Args:
        tables: the token tables of each set.
    """

    def __init__(self, tables: Sequence[Sequence[pa.Table]]) -> None:
        self._tables = [list(each) for each in tables]
        self._opened: dict[int, list[Ragged]] = {}

    def rows(self, sets: np.ndarray, places: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for number in set(np.unique(sets).tolist()) - self._opened.keys():
            whole = pa.concat_tables(self._tables[number])
            self._opened[number] = [Ragged.of(whole[name]) for name in TOKEN_SCHEMA.names]
        found = []
        for number, place in zip(np.asarray(sets).tolist(), np.asarray(places).tolist(), strict=True):
            prompt, chosen, rejected = self._opened[number]
            found.append((prompt[place], chosen[place], rejected[place]))
        return found

    def __getstate__(self) -> dict[str, Any]:
        # A list view would take along all values of the column that it is a view of.
        return {"_tables": [[_without_views(table) for table in each] for each in self._tables], "_opened": {}}


def _without_views(table: pa.Table) -> pa.Table:
    """A table of tokens whose columns are lists in memory of their own."""
    if not any(pa.types.is_list_view(field.type) for field in table.schema):
        return table
    columns = [Ragged.of(table[name]) for name in TOKEN_SCHEMA.names]
    batches = [
        pa.RecordBatch.from_arrays(
            [column.lists(start, min(start + _VIEW_ROWS, len(table))) for column in columns], schema=TOKEN_SCHEMA
        )
        for start in range(0, len(table), _VIEW_ROWS)
    ]
    return pa.Table.from_batches(batches, schema=TOKEN_SCHEMA)


@dataclass(frozen=True)
class _Decided:
    """What is used of the pairs of a source.

    Attributes:
        keep: which are not dropped, bool [pairs].
        fits: which are not dropped for their length, bool [pairs].
        tokens: of prompt, chosen and rejected in use, int32 [pairs] each; means nothing for dropped ones.
        report: on the source, without duplicates.
        trained, measured: which tokens of pairs to train on and of held-out pairs count; None if every token does.
        labels: column ``LABEL``, int8 [pairs]; None if all are pairs.
    """

    keep: np.ndarray
    fits: np.ndarray
    tokens: tuple[np.ndarray, np.ndarray, np.ndarray]
    report: SourceReport
    trained: Counted | None = None
    measured: Counted | None = None
    labels: np.ndarray | None = None


def check_source(config: DataConfig, source: SourceRows) -> None:
    """Refuse a source as ``select`` does, before the next is read.

    Raises:
        DataError: if more of it is malformed or dropped than allowed, or no pair is left.
    """
    _decided(config, source).report.check(config)


def window(config: DataConfig, source: SourceRows, number: int, start: int, stop: int | None = None) -> pa.Table:
    """The pairs of a set with ``start <= place < stop`` that are not dropped: as ``select`` gives them without tokens.

    There may be more of them: with ``data.eval.train_on`` those of which no token counts, as long as it is not known which
    are held out, and rows of a ranked list that is dropped for a row beyond ``start`` or ``stop``.

    Args:
        number: of the set.
        stop: None = to the end.
    """
    length = None if stop is None else stop - start
    part = replace(source, light=source.light.slice(start, length), tokens=None)
    decided = _decided(config, part)
    # Which of these are held out is not known yet, and what counts in them may be something else.
    apart = config.eval is not None and config.eval.fraction is not None and config.eval.train_on is not None
    use = decided.fits if apart else decided.keep
    table = _part(number, part, decided, decided.trained, use, decided.labels is not None)
    place = table.column_names.index("place")
    return table.set_column(place, "place", pc.add(table["place"], start))


def select(
    config: DataConfig,
    sources: Sequence[SourceRows],
    held: SourceRows | None,
    tokens: TokenSource | None,
    *,
    template_date: date | None = None,
) -> PairSets:
    """Truncate, drop, split and thin the pairs of all sources.

    Args:
        sources: those of ``config.train``, in order.
        held: the pairs of ``config.eval.path``.
        tokens: where the tokens of ``sources`` and ``held`` can be read.
        template_date: as ``tally.DataReport``.

    Returns:
        Tables without a copy of tokens: their lists are views of ``SourceRows.tokens``. Without those, columns
        prompt_tokens, chosen_tokens and rejected_tokens, int32, the tokens in use, stand in place of the ids. With
        ``COUNT_COLUMNS`` if not every token counts alike (``counting.needs_marks``).

    Raises:
        DataError: if more of a source is malformed or dropped than allowed, no pair is left of it or to be held out, all
            pairs have the same prompt and some should be held out, or all weights are 0.
    """
    every = [*sources, *([] if held is None else [held])]
    decided = []
    for source in every:
        decided.append(_decided(config, source))
        decided[-1].report.check(config)
    out: list[np.ndarray] | None = None
    if config.eval is not None and config.eval.fraction is not None:
        # Which prompts are held out depends on no ``train_on``, so that runs with different ones can be compared.
        fits = [one.fits for one in decided]
        out = _divided(fits, held_out(_digests(sources, fits, "prompt_digest"), config.eval.fraction))
        if config.eval.train_on is not None:
            decided = [_decided(config, source, rows) for source, rows in zip(sources, out, strict=True)]
            for one in decided:
                one.report.check(config)
    report = DataReport([one.report for one in decided], template_date=template_date)
    trained = [one.keep for one in decided[: len(sources)]]
    for one, count in zip(decided, _duplicates(sources, trained), strict=False):
        one.report.duplicates = count
    measured: list[np.ndarray] | None = None
    if held is not None:
        (decided[-1].report.duplicates,) = _duplicates([held], [decided[-1].keep])
        measured = [*(np.zeros(len(keep), bool) for keep in trained), decided[-1].keep]
        trained = [*trained, np.zeros(held.light.num_rows, bool)]
    elif out is not None:
        measured = [use & rows for use, rows in zip(trained, out, strict=True)]
        trained = [use & ~rows for use, rows in zip(trained, out, strict=True)]
        _check_both_sides(config, trained, measured)
    if measured is not None:
        report.leaked = _leaked(every, trained, _units(every, measured))
    if config.fraction != 1:
        before = sum(int(use.sum()) for use in _units(every, trained))
        mask = kept(_digests(every, trained, "prompt_digest"), config.fraction, config.fraction_seed)
        trained = _divided(trained, mask)
        report.thinned = sum(int(use.sum()) for use in _units(every, trained)), before
    train = _table(every, decided, [one.trained for one in decided], trained)
    evaluated = None if measured is None else _table(every, decided, [one.measured for one in decided], measured)
    for name, pairs, use in (("training", train, "learned"), ("held-out", evaluated, "measured")):
        weighted = pairs is not None and pairs.num_rows and config.weight_column is not None
        if weighted and not pc.any(pc.greater(pairs[PAIR_WEIGHT], 0)).as_py():
            raise DataError(
                f"data.weight_column {config.weight_column!r} is 0 for all {pairs.num_rows:,} {name} pairs, so nothing "
                f"would be {use}; correct the weights, or drop data.weight_column"
            )
    return PairSets(train, evaluated, report, tokens, tuple(every))


def _check_both_sides(config: DataConfig, trained: Sequence[np.ndarray], measured: Sequence[np.ndarray]) -> None:
    """Refuse a split of which one side is empty, since no token of its completions counts."""
    for uses, what in ((trained, "to train on"), (measured, "to hold out")):
        if not any(use.any() for use in uses):
            raise DataError(
                f"no pair is left {what}: of all pairs on that side of data.eval.fraction {config.eval.fraction:g} no token "
                "counts, or those that count were not found; correct data.train_on or data.eval.train_on, or change the "
                "fraction"
            )


def _decided(config: DataConfig, source: SourceRows, out: np.ndarray | None = None) -> _Decided:
    """Truncate and drop pairs of one source. Each completion is cut by itself, as TRL does.

    Args:
        out: bool [pairs], the pairs in which ``data.eval.train_on`` says what counts.
    """
    light, report = source.light, copy.deepcopy(source.account)
    report.name, report.path = source.name, redact(source.path)
    prompt, chosen, rejected, agree = (
        light[name].to_numpy() for name in ("prompt_tokens", "chosen_tokens", "rejected_tokens", "agree")
    )
    limit = max(MOST_CHARACTERS, CHARACTERS_A_TOKEN * config.max_length)
    giant = light["characters"].to_numpy() > limit
    if (untold := ~giant & (prompt == 0)).any():
        raise ValueError(
            f"{int(untold.sum())} pairs of {source.path} were not tokenised for data.max_length {config.max_length}"
        )
    room = config.max_length - prompt
    used = np.minimum(chosen, room), np.minimum(rejected, room)
    dropped = giant | (room <= 0)
    faults = {f"text of more than {limit:,} characters": giant, NO_ROOM: dropped & ~giant}
    beyond = ~dropped & (np.maximum(chosen, rejected) > room)
    if config.truncation == "drop":
        faults[TOO_LONG] = beyond
    else:
        faults[SAME] = beyond & (agree >= room)
    fits = ~(dropped | np.logical_or.reduce(list(faults.values())))
    if (begin := _begins(light)) is not None:
        fits, report.ranked = all_or_none(fits, begin), True
    trained = measured = None
    if needs_marks(config):
        if source.train_on is None:
            raise ValueError(f"what counts in {source.name} is not known; see counting.train_on_of")
        trained = measured = counted_of(config, light, used, source.train_on)
        uncounted = trained.faults
        if out is not None:
            measured = counted_of(config, light, used, train_on_of(config, None))
            uncounted = {reason: mask & ~out for reason, mask in trained.faults.items()}
            for reason, mask in measured.faults.items():
                uncounted[reason] = uncounted.get(reason, False) | (mask & out)
        faults |= {reason: mask & fits for reason, mask in uncounted.items()}
    if begin is not None:
        dropped = ~all_or_none(~np.logical_or.reduce(list(faults.values())), begin)
        faults = _of_lists(faults, begin)
    found = [(reason, np.flatnonzero(mask)) for reason, mask in faults.items() if mask.any()]
    for reason, rows in sorted(found, key=lambda fault: int(fault[1][0])):
        dropped[rows] = True
        report.dropped.counts[reason] = len(rows)
        report.dropped.places[reason] = _first_places(source, rows)
    keep = ~dropped
    report.kept = int(keep.sum() if begin is None else (keep & begin).sum())
    report.truncated = sum(int((keep & (short < full)).sum()) for short, full in zip(used, (chosen, rejected), strict=True))
    flags = light["flags"].to_numpy()
    if trained is None or ("completion" in source.train_on and config.spans_column is None):
        several = keep & ((flags & SEVERAL_TURNS) > 0)
        report.several_turns = int((several if begin is None else begin & ~all_or_none(~several, begin)).sum())
    labels = ((flags & DESIRABLE) > 0).astype(np.int8) - ((flags & UNDESIRABLE) > 0).astype(np.int8)
    report.desirable, report.undesirable = (int((keep & (labels == label)).sum()) for label in (1, -1))
    if trained is not None:
        report.counted = trained.account(keep if out is None else keep & ~out)
        report.counted_held_out = None if out is None else measured.account(keep & out)
    return _Decided(keep, fits, (prompt, *used), report, trained, measured, labels if labels.any() else None)


def _begins(light: pa.Table) -> np.ndarray | None:
    """Which rows begin a ranked list, bool [rows]; None if rows are pairs."""
    return begins(light["row"]) if RANK_COLUMNS[0][0] in light.column_names else None


def _units(sources: Sequence[SourceRows], uses: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``uses`` without the further rows of ranked lists, to count lists."""
    found = ((use, _begins(source.light)) for source, use in zip(sources, uses, strict=True))
    return [use if begin is None else use & begin for use, begin in found]


def _of_lists(faults: Mapping[str, np.ndarray], begin: np.ndarray) -> dict[str, np.ndarray]:
    """Faults of rows as faults of lists, at the first row of each, for the first reason only."""
    found, clean = {}, begin.copy()
    for reason, mask in faults.items():
        whole = clean & ~all_or_none(~mask, begin)
        found[reason], clean = whole, clean & ~whole
    return found


def _first_places(source: SourceRows, rows: np.ndarray) -> list[str]:
    """The first places of ``rows``, as ``tally.Faults`` keeps them."""
    found: list[str] = []
    for row in map(int, rows):
        label, line = source.labels[source.light["file"][row].as_py()], source.light["line"][row].as_py()
        if (where := f"{label}:{line}" if line >= 0 else label) not in found:
            found.append(where)
        if len(found) == FIRST_PLACES:
            break
    return found


def _divided(uses: Sequence[np.ndarray], mask: np.ndarray) -> list[np.ndarray]:
    """Those of the pairs in ``uses`` for which ``mask``, bool [pairs in use], is true."""
    found, start = [], 0
    for use in uses:
        left = use.copy()
        stop = start + int(use.sum())
        left[use] = mask[start:stop]
        found.append(left)
        start = stop
    return found


def _blocks(
    sources: Sequence[SourceRows], uses: Sequence[np.ndarray], names: Sequence[str]
) -> Iterator[tuple[np.ndarray, ...]]:
    """Columns of 16 bytes of the pairs in use, block by block: uint8 [block, 16] each."""
    for source, use in zip(sources, uses, strict=True):
        start = 0
        for batch in source.light.select(list(names)).to_batches(max_chunksize=_BLOCK_ROWS):
            mask = use[start : start + batch.num_rows]
            start += batch.num_rows
            yield tuple(as_bytes(column) if mask.all() else as_bytes(column)[mask] for column in batch.columns)


def _digests(sources: Sequence[SourceRows], uses: Sequence[np.ndarray], name: str) -> np.ndarray:
    """A column of 16 bytes of all pairs in use, uint8 [pairs in use, 16]."""
    return np.concatenate([np.empty((0, 16), np.uint8), *(block for (block,) in _blocks(sources, uses, [name]))])


def _leaked(sources: Sequence[SourceRows], trained: Sequence[np.ndarray], measured: Sequence[np.ndarray]) -> int:
    """Number of held-out pairs whose question is also trained on."""
    asked, index = _digests(sources, measured, "question_digest"), KeyIndex()
    index.add((asked, np.zeros(len(asked), np.int32), 0))
    known = np.zeros(len(asked) + 1, bool)  # the last stands for questions that are not held out, found at -1
    for (block,) in _blocks(sources, trained, ["question_digest"]):
        known[index.find(block)] = True
    return int(known[index.find(asked)].sum())


def _duplicates(sources: Sequence[SourceRows], uses: Sequence[np.ndarray]) -> list[int]:
    """Number of pairs in use, of each source, with both keys of an earlier one; of lists all of whose rows have."""
    names = [f"{side}_key" for side in _SIDES]
    mixed = np.concatenate(
        [
            np.empty(0, np.uint64),
            *(
                chosen[:, 0] + np.uint64(3) * rejected[:, 0]
                for chosen, rejected in map(_halves, _blocks(sources, uses, names))
            ),
        ]
    )
    order = np.argsort(mixed)
    mixed = mixed[order]
    again = mixed[1:] == mixed[:-1]
    of_several = np.append(again, False) | np.insert(again, 0, False) if len(mixed) else again
    rows = order[of_several]
    if not len(rows):
        return [0] * len(sources)
    starts = np.flatnonzero(np.insert(np.diff(mixed[of_several]) != 0, 0, True))
    del mixed, order, again
    first = np.repeat(np.minimum.reduceat(rows, starts), np.diff(np.append(starts, len(rows))))
    keys = np.concatenate([np.hstack(_halves(block)) for block in _blocks(sources, uses, names)])
    differ = (keys[rows] != keys[first]).any(axis=1)
    later = rows[(rows != first) & ~differ]
    if differ.any():  # different keys of the same digest
        seen: set[bytes] = set()
        more = []
        for row in np.sort(rows[differ]).tolist():
            content = keys[row].tobytes()
            more += [row] if content in seen else []
            seen.add(content)
        later = np.concatenate([later, np.array(more, later.dtype)])
    ends = np.cumsum([int(use.sum()) for use in uses])
    if _begins(sources[0].light) is not None:
        begin = np.concatenate([_begins(source.light)[use] for source, use in zip(sources, uses, strict=True)])
        again = np.zeros(len(begin), bool)
        again[later] = True
        later = np.flatnonzero(all_or_none(again, begin) & begin)
    return np.bincount(np.searchsorted(ends, later, side="right"), minlength=len(sources)).tolist()


def _halves(keys: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Keys, uint8 [rows, 16] each, as uint64 [rows, 2] each."""
    return [np.ascontiguousarray(each).view(np.uint64) for each in keys]


def _table(
    sources: Sequence[SourceRows],
    decided: Sequence[_Decided],
    counted: Sequence[Counted | None],
    uses: Sequence[np.ndarray],
) -> pa.Table:
    """The pairs in use of all sources."""
    labelled = any(one.labels is not None and one.labels[use].any() for one, use in zip(decided, uses, strict=True))
    every = list(zip(sources, decided, counted, uses, strict=True))
    parts = [
        _part(number, source, one, tokens, use, labelled)
        for number, (source, one, tokens, use) in enumerate(every)
        if use.any() or (number == 0 and not any(map(np.any, uses)))
    ]
    return pa.concat_tables(parts)


def _part(
    number: int, source: SourceRows, decided: _Decided, counted: Counted | None, use: np.ndarray, labelled: bool
) -> pa.Table:
    """The pairs of one source that are in use; with column ``LABEL`` if ``labelled``.

    Args:
        counted: which of their tokens count; None if all do.
    """
    numbers = [name for name in (PAIR_WEIGHT, PAIR_MARGIN) if name in source.light.column_names]
    names = ["row", "number", "source", *(f"{side}_key" for side in _SIDES), *(f"{side}_tokens" for side in _SIDES)]
    ranks = [name for name, _ in RANK_COLUMNS if name in source.light.column_names]
    names += [*PLACE_SCHEMA.names[2:], *numbers, *ranks]
    whole = bool(use.all())
    light = source.light.select(names)
    light = light if whole else light.filter(pa.array(use))
    columns: dict[str, Any] = {"pair_id": _pair_ids(light, source.name), "source": _source_names(light, source)}
    columns["weight"] = _constant(light, pa.scalar(float(source.weight)))
    sizes = decided.tokens if whole else tuple(each[use] for each in decided.tokens)
    for name, used in zip(("prompt", *_SIDES), sizes, strict=True):
        if source.tokens is None:
            columns[f"{name}_tokens"] = pa.array(used)
        else:
            columns[f"{name}_ids"] = first_values([table[f"{name}_ids"] for table in source.tokens], use, used)
    columns |= {f"{side}_key": light[f"{side}_key"] for side in _SIDES}
    columns |= {f"{side}_full": light[f"{side}_tokens"] for side in _SIDES}
    columns |= {name: light[name] for name in numbers}
    columns["set"] = _constant(light, pa.scalar(number, pa.int16()))
    columns["place"] = pa.array(np.flatnonzero(use))
    columns |= {name: light[name] for name in PLACE_SCHEMA.names[2:]}
    if counted is not None:
        columns |= dict(zip(COUNT_COLUMNS, counted.columns(use), strict=True))
    if ranks:
        columns[LIST_COLUMNS[0]] = pa.array(number * _LISTS_OF_A_SET + light["row"].to_numpy())
        columns |= {name: light[name] for name in ranks}
    if labelled:
        pairs_alone = decided.labels is None
        columns[LABEL] = _constant(light, pa.scalar(0, pa.int8())) if pairs_alone else pa.array(decided.labels[use])
    return pa.table(columns)


def _pair_ids(light: pa.Table, name: str) -> pa.ChunkedArray:
    """``name:row``, and ``#n`` for further pairs of a record."""
    chunks = []
    for batch in light.select(["row", "number"]).to_batches(max_chunksize=_BLOCK_ROWS):
        row, number = batch.columns
        ids = pc.binary_join_element_wise(pa.scalar(name), row.cast(pa.string()), ":")
        if pc.max(number).as_py():
            further = pc.binary_join_element_wise(ids, number.cast(pa.string()), "#")
            ids = pc.if_else(pc.greater(number, 0), further, ids)
        chunks.append(ids)
    return pa.chunked_array(chunks, pa.string())


def _source_names(light: pa.Table, source: SourceRows) -> pa.ChunkedArray:
    """The name of the source that each pair counts as."""
    if not source.sources:
        return _constant(light, pa.scalar(source.name))
    names = pa.array([*source.sources, source.name])
    indices = (np.where(chunk.to_numpy() < 0, len(source.sources), chunk.to_numpy()) for chunk in light["source"].chunks)
    return pa.chunked_array([names.take(pa.array(each)) for each in indices], pa.string())


def _constant(light: pa.Table, value: pa.Scalar) -> pa.ChunkedArray:
    """``value`` for each pair. All blocks share its memory."""
    lengths = [min(_BLOCK_ROWS, light.num_rows - start) for start in range(0, light.num_rows, _BLOCK_ROWS)]
    same = pa.repeat(value, max(lengths, default=0))
    return pa.chunked_array([same.slice(0, length) for length in lengths], value.type)
