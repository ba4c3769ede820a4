"""Which tokens of a completion count, and how much: runs of weights, made of a set's marks, and sums over them.

A run is a number of successive tokens with the same weight. The functions that take a table read ``select.COUNT_COLUMNS``.
In a table without these, every token counts with weight 1. Weights are float32 wherever they are used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from raydpo.config import DataConfig, SourceConfig
from raydpo.config.counting import part_weights, train_on_text
from raydpo.data.marks import ANSWER, ASSISTANT, LAST_TURN, MARK_BITS, REASONING, REASONING_NOT_FOUND, TURNS_NOT_FOUND
from raydpo.data.plan import splitmix
from raydpo.data.ragged import Ragged, tokens_in_use
from raydpo.data.tally import CountedTokens

__all__ = [
    "Counted",
    "RunColumns",
    "Runs",
    "all_count",
    "counted_of",
    "counted_tokens",
    "counts",
    "mask_digests",
    "needs_marks",
    "token_weights",
    "train_on_of",
    "weight_runs",
    "weighted_sums",
]

_BITS = {"assistant": ASSISTANT, "last_turn": LAST_TURN, "answer": ANSWER, "reasoning": REASONING}
"""Bit of a mark for each part of ``config.counting.PARTS`` but ``completion``, which is every token."""
_BLOCK_VALUES = 1 << 22
"""Log-probs that ``weighted_sums`` copies at once, as float64."""


def needs_marks(data: DataConfig) -> bool:
    """Whether the tokenised sets of a configuration need marks: not every token counts alike, of training or held-out
    pairs."""
    every = [train_on_of(data, source) for source in data.train]
    if data.eval is not None:
        every.append(train_on_of(data, None))
    return data.spans_column is not None or any(each != {"completion": 1.0} for each in every)


def train_on_of(data: DataConfig, source: SourceConfig | None) -> dict[str, float]:
    """Weight of each part of the completions of a source that counts, by name.

    Args:
        source: one of ``data.train``; None = the held-out pairs of a file. What counts in these, if ``data.eval.train_on``
            is not set, is what counts in the sources, if that is the same in all of them, else ``data.train_on``.
    """
    if source is not None:
        return part_weights(data.train_on if source.train_on is None else source.train_on)
    if data.eval is not None and data.eval.train_on is not None:
        return part_weights(data.eval.train_on)
    first, *others = (train_on_of(data, each) for each in data.train)
    return first if all(each == first for each in others) else part_weights(data.train_on)


@dataclass(frozen=True)
class Runs:
    """Runs of one side of some pairs, one pair after another.

    Attributes:
        starts: first token of each run, int32 [runs]; the first run of a completion starts at 0. A completion without tokens
            has no runs.
        weights: weight of each token of a run, float32 [runs]. Neighbours within a completion have different weights.
        offsets: index of the first run of each completion, int64 [rows + 1].
        tokens: tokens in use, int32 [rows].
    """

    starts: np.ndarray
    weights: np.ndarray
    offsets: np.ndarray
    tokens: np.ndarray

    @property
    def owners(self) -> np.ndarray:
        """Row of each run, int64 [runs]."""
        return np.repeat(np.arange(len(self.tokens)), np.diff(self.offsets))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each run, int64 [runs]."""
        ends = np.append(self.starts[1:], 0).astype(np.int64)[: len(self.starts)]
        filled = np.diff(self.offsets) > 0
        ends[self.offsets[1:][filled] - 1] = self.tokens[filled]
        return ends - self.starts

    def totals(self, values: np.ndarray) -> np.ndarray:
        """Sum of the values of each row's runs, float64 [rows].

        Args:
            values: one for each run.
        """
        return np.bincount(self.owners, values, minlength=len(self.tokens))

    def counts(self) -> np.ndarray:
        """Sum of the weights of each row's tokens, float64 [rows]."""
        return self.totals(self.lengths * self.weights.astype(np.float64))

    def counted_tokens(self) -> np.ndarray:
        """Number of each row's tokens with a weight above 0, int32 [rows]."""
        return self.totals(self.lengths * (self.weights > 0)).astype(np.int32)

    def token_weights(self) -> np.ndarray:
        """Weight of each token, row after row, float32 [tokens of all rows]."""
        return np.repeat(self.weights, self.lengths)

    def of(self, use: np.ndarray) -> Runs:
        """The runs of the rows for which ``use``, bool [rows], is true."""
        sizes, mine = np.diff(self.offsets), np.repeat(use, np.diff(self.offsets))
        return Runs(self.starts[mine], self.weights[mine], _offsets(sizes[use]), self.tokens[use])

    def columns(self) -> tuple[pa.Array, pa.Array]:
        """Columns of ``select.COUNT_COLUMNS`` of this side."""
        offsets = pa.array(self.offsets, pa.int32())
        return tuple(pa.ListArray.from_arrays(offsets, pa.array(each)) for each in (self.starts, self.weights))


class RunColumns:
    """The runs of one side of a table of pairs, read by row number.

    Args:
        table: rows with the tokens in use (see ``ragged.tokens_in_use``).
        side: chosen or rejected.
    """

    def __init__(self, table: pa.Table | pa.RecordBatch, side: str) -> None:
        self.tokens = tokens_in_use(table, side)
        names = (f"{side}_starts", f"{side}_weights")
        there = names[0] in table.schema.names
        self._columns = tuple(Ragged.of(table[name]) for name in names) if there else None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def alike(self) -> bool:
        """Whether the table has no ``select.COUNT_COLUMNS``, so that every token has weight 1."""
        return self._columns is None

    def at(self, rows: np.ndarray) -> Runs:
        """The runs of ``rows``, int [rows], in that order."""
        tokens = self.tokens[rows]
        if self._columns is None:
            offsets = _offsets(tokens > 0)
            return Runs(np.zeros(offsets[-1], np.int32), np.ones(offsets[-1], np.float32), offsets, tokens)
        (starts, offsets), (weights, _) = (column.gather(rows) for column in self._columns)
        return Runs(starts, weights, offsets, tokens)

    def every(self) -> Runs:
        """The runs of all rows."""
        return self.at(np.arange(len(self)))


def all_count(table: pa.Table | pa.RecordBatch) -> bool:
    """Whether every token in use counts with weight 1."""
    if f"{_SIDES[0]}_starts" not in table.schema.names:
        return True
    runs = (RunColumns(table, side).every() for side in _SIDES)
    return all(bool((each.weights == 1).all()) for each in runs)


def token_weights(table: pa.Table, side: str, row: int) -> np.ndarray:
    """Weight of each token in use of one completion, float32 [tokens]."""
    return RunColumns(table.slice(row, 1), side).every().token_weights()


def counts(table: pa.Table, side: str) -> np.ndarray:
    """Sum of the weights of the tokens in use of each completion of a side, float64 [rows]."""
    columns = RunColumns(table, side)
    return columns.tokens.astype(np.float64) if columns.alike else columns.every().counts()


def counted_tokens(table: pa.Table, side: str) -> np.ndarray:
    """Number of tokens in use of each completion of a side that have a weight above 0, int32 [rows]."""
    columns = RunColumns(table, side)
    return columns.tokens if columns.alike else columns.every().counted_tokens()


def mask_digests(table: pa.Table, side: str) -> np.ndarray:
    """64-bit digest of the weights of each completion of a side, uint64 [rows]; 0 where every token has weight 1."""
    runs = RunColumns(table, side).every()
    mixed = splitmix(runs.starts.astype(np.uint64) << np.uint64(32) | runs.weights.view(np.uint32).astype(np.uint64))
    totals = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed, dtype=np.uint64)])
    alike = runs.totals(runs.weights != 1) == 0
    return np.where(alike, np.uint64(0), totals[runs.offsets[1:]] - totals[runs.offsets[:-1]])


def weighted_sums(values: np.ndarray, offsets: np.ndarray, table: pa.Table, side: str) -> np.ndarray:
    """Sum over each completion's tokens of weight times value, float64 [rows]. A value whose weight is 0 may be NaN.

    Args:
        values: of all tokens in use, one completion after another, float32.
        offsets: index of each completion's first value, int64 [rows + 1].
        side: chosen or rejected.

    Raises:
        ValueError: if a completion has not as many values as tokens.
    """
    columns, found = RunColumns(table, side), np.zeros(table.num_rows)
    if not np.array_equal(np.diff(offsets), columns.tokens):
        raise ValueError(f"the {side} completions have other numbers of values than of tokens")
    for start, stop in _blocks(offsets):
        runs, first = columns.at(np.arange(start, stop)), offsets[start]
        if not len(runs.starts):
            continue
        # A run ends where the next one begins, in the same completion or another.
        begins = np.repeat(offsets[start:stop] - first, np.diff(runs.offsets)) + runs.starts
        sums = np.add.reduceat(values[first : offsets[stop]].astype(np.float64), begins)
        counting = runs.weights != 0
        found[start:stop] = runs.totals(np.multiply(sums, runs.weights, out=np.zeros(len(sums)), where=counting))
    return found


@dataclass(frozen=True)
class Counted:
    """Which tokens of the pairs of a source count.

    Attributes:
        what: what counts, in words.
        runs: of chosen and rejected completions.
        faults: pairs that cannot be used, by reason, bool [pairs] each.
        idle: the column of spans, if no token of the source has another factor than 1.
    """

    what: str
    runs: tuple[Runs, Runs]
    faults: Mapping[str, np.ndarray]
    idle: str | None = None

    def account(self, use: np.ndarray) -> CountedTokens:
        """How many tokens of the pairs in ``use``, bool [pairs], count."""
        of_use = [runs.of(use) for runs in self.runs]
        total = sum(int(runs.tokens.sum(dtype=np.int64)) for runs in of_use)
        counted = sum(int(runs.counted_tokens().sum(dtype=np.int64)) for runs in of_use)
        return CountedTokens(self.what, total, counted, self.idle)

    def columns(self, use: np.ndarray) -> list[pa.Array]:
        """``select.COUNT_COLUMNS`` of the pairs in ``use``, bool [pairs]."""
        return [column for runs in self.runs for column in runs.of(use).columns()]


def counted_of(
    data: DataConfig, light: pa.Table, used: tuple[np.ndarray, np.ndarray], train_on: Mapping[str, float]
) -> Counted:
    """Find which tokens of the pairs of a source count.

    Args:
        light: light rows of a set with marks.
        used: tokens of chosen and rejected in use, int32 [pairs] each.
        train_on: result of ``train_on_of``.

    Raises:
        ValueError: if the set has no marks.
    """
    if f"chosen_{_COLUMNS[0]}" not in light.column_names:
        raise ValueError("the tokenised set has no marks, which data.train_on and data.spans_column need")
    what = f"train_on {train_on_text(tuple({name: weight} for name, weight in train_on.items()))}"
    what += f" in {data.spans_column!r}" if data.spans_column is not None else ""
    runs = tuple(weight_runs(light, side, each, train_on) for side, each in zip(_SIDES, used, strict=True))
    flags = light["flags"].to_numpy()
    lost = np.zeros(len(flags), bool)
    if any(name in _BITS for name in train_on):
        lost = (flags & TURNS_NOT_FOUND) > 0
    faults = {f"turns not found ({what})": lost}
    if "answer" in train_on or "reasoning" in train_on:
        faults[f"reasoning not found ({what})"] = ~lost & ((flags & REASONING_NOT_FOUND) > 0)
    known = ~np.logical_or.reduce(list(faults.values()))
    for side, each in zip(_SIDES, runs, strict=True):
        nothing = known & (each.tokens > 0) & (each.counted_tokens() == 0)
        faults[f"no token of the {side} completion counts ({what})"] = nothing
        known &= ~nothing
    idle = data.spans_column
    for side in _SIDES:
        factors, _ = Ragged.of(light[f"{side}_{_COLUMNS[1]}"]).gather(np.arange(len(light)))
        idle = None if (factors != 1).any() else idle
    return Counted(what, runs, faults, idle)


def weight_runs(light: pa.Table, side: str, used: np.ndarray, train_on: Mapping[str, float]) -> Runs:
    """Runs of weights of one side of a source's pairs, from their marks.

    A token's weight is the sum of the weights of its parts times its factor. Of a completion without marks only
    ``completion`` counts.

    Args:
        light: rows with ``marks.MARK_COLUMNS``.
        used: tokens in use of each pair, int32 [rows]; none where it is below 1.
        train_on: result of ``train_on_of``.

    Raises:
        ValueError: if marks do not begin at a completion's first token.
    """
    every = np.arange(len(light))
    (marks, offsets), (factors, _) = (Ragged.of(light[f"{side}_{what}"]).gather(every) for what in _COLUMNS)
    used = np.maximum(used, 0).astype(np.int32)
    sizes = np.diff(offsets)
    owners = np.repeat(np.arange(len(used)), sizes)
    starts, parts = marks >> MARK_BITS, marks & (1 << MARK_BITS) - 1
    if (starts[offsets[:-1][sizes > 0]] != 0).any():
        raise ValueError(f"marks of {side} completions do not begin at their first token")
    by_parts = np.array([_weight_of(bits, train_on) for bits in range(1 << MARK_BITS)])
    weights = (by_parts[parts] * factors).astype(np.float32)
    unmarked = np.flatnonzero(sizes == 0)
    if len(unmarked):
        places = offsets[unmarked]
        starts, owners = np.insert(starts, places, 0), np.insert(owners, places, unmarked)
        weights = np.insert(weights, places, np.float32(by_parts[0]))
    inside = starts < used[owners]
    starts, weights, owners = starts[inside].astype(np.int32), weights[inside], owners[inside]
    changes = np.ones(len(starts), bool)
    changes[1:] = (owners[1:] != owners[:-1]) | (weights[1:] != weights[:-1])
    sizes = np.bincount(owners[changes], minlength=len(used))
    return Runs(starts[changes], weights[changes], _offsets(sizes), used)


_COLUMNS = ("marks", "factors")
_SIDES = ("chosen", "rejected")


def _weight_of(bits: int, train_on: Mapping[str, float]) -> float:
    """Weight of a token with these parts."""
    return sum(weight for name, weight in train_on.items() if name == "completion" or bits & _BITS[name])


def _offsets(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def _blocks(offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    """Split completions into (start, stop) of about ``_BLOCK_VALUES`` values each."""
    start, rows = 0, len(offsets) - 1
    while start < rows:
        stop = int(np.searchsorted(offsets, offsets[start] + _BLOCK_VALUES, side="left"))
        stop = min(max(stop, start + 1), rows)
        yield start, stop
        start = stop
