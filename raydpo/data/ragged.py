"""Columns of lists, read by row number without copies."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpo.data.spool import MOST_SMALL

__all__ = ["Ragged", "digests", "first_values", "tokens_in_use"]

_BLOCK_ROWS = 10_000
"""Rows whose values ``sums`` copies at once."""
_DIGEST_ROWS = 50_000
"""Rows whose digests are computed at once."""
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


class Ragged:
    """Lists of numbers in the memory of an Arrow column: one chunk or many, in memory or mapped from a file.

    It holds views of the column's buffers and about 1 KB for each chunk, and nothing for each row.

    Args:
        chunks: (values, starts, stops) of each chunk: row i of a chunk is ``values[starts[i]:stops[i]]``.
        sized: whether the third arrays hold the sizes of the rows in place of their stops.
    """

    def __init__(self, chunks: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], *, sized: bool) -> None:
        self._chunks, self._sized = list(chunks), sized
        self._first = [0]  # number of the first row of each chunk, then the number of all rows
        for _, starts, _ in self._chunks:
            self._first.append(self._first[-1] + len(starts))

    @classmethod
    def of(cls, column: pa.Array | pa.ChunkedArray) -> Ragged:
        """The lists of a column of type list, large_list, list_view or large_list_view of numbers.

        Raises:
            TypeError: if the column holds something else.
            ValueError: if a list or a value is null.
        """
        kind = column.type
        views = pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind)
        if not (views or pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            raise TypeError(f"expected a column of lists, found {kind}")
        if column.null_count:
            raise ValueError(f"{column.null_count:,} of {len(column):,} lists are null, expected none")
        chunks = []
        for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
            if not len(chunk):
                continue
            # ``values`` and ``offsets`` copy nothing, and ``offsets`` of a slice are those of its own rows. ``flatten`` and
            # ``ChunkedArray.combine_chunks`` would copy, the latter even a single chunk.
            values, offsets = chunk.values.to_numpy(), chunk.offsets.to_numpy()
            if views:
                chunks.append((values, offsets, chunk.sizes.to_numpy()))
            else:
                chunks.append((values, offsets[:-1], offsets[1:]))
        return cls(chunks, sized=views)

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, row: int) -> np.ndarray:
        """The values of a row: a view that must not be changed."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        index = bisect_right(self._first, row) - 1
        values, starts, stops = self._chunks[index]
        row -= self._first[index]
        start = int(starts[row])
        return values[start : start + int(stops[row]) if self._sized else int(stops[row])]

    @property
    def lengths(self) -> np.ndarray:
        """Values of each row, int64 [rows]. A new array each time."""
        return np.concatenate([np.empty(0, np.int64), *(self._sizes(index) for index in range(len(self._chunks)))])

    def _sizes(self, index: int, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Values of each of a chunk's ``rows``, int64."""
        _, starts, stops = self._chunks[index]
        found = stops[rows].astype(np.int64)
        return found if self._sized else found - starts[rows]

    def gather(self, rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Copy rows out of the column.

        Args:
            rows: row numbers; they may repeat and be in any order.

        Returns:
            Their values one after another, and the index of each row's first value, int64 [rows + 1].
        """
        rows = np.asarray(rows, np.int64)
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self)}")
        of_chunk = np.searchsorted(self._first, rows, side="right") - 1
        parts = [(index, np.flatnonzero(of_chunk == index)) for index in np.unique(of_chunk)]
        lengths = np.zeros(len(rows), np.int64)
        for index, places in parts:
            lengths[places] = self._sizes(index, rows[places] - self._first[index])
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        gathered = np.empty(offsets[-1], self._chunks[0][0].dtype if self._chunks else np.int32)
        for index, places in parts:
            values, starts, _ = self._chunks[index]
            mine = lengths[places]
            ends = np.cumsum(mine)
            within = np.arange(ends[-1]) - np.repeat(ends - mine, mine)
            found = values[np.repeat(starts[rows[places] - self._first[index]], mine) + within]
            if len(parts) == 1:
                return found, offsets
            gathered[np.repeat(offsets[places], mine) + within] = found
        return gathered, offsets

    def lists(self, start: int, stop: int) -> pa.ListArray:
        """Copy of the rows from ``start`` to ``stop``, as an Arrow array without gaps."""
        values, offsets = self.gather(np.arange(start, stop))
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))

    def sums(self) -> np.ndarray:
        """Sum of each row's values, float64 [rows]; 0 for an empty row."""
        totals = np.zeros(len(self))
        for start in range(0, len(self), _BLOCK_ROWS):
            values, offsets = self.gather(np.arange(start, min(start + _BLOCK_ROWS, len(self))))
            filled = np.flatnonzero(np.diff(offsets))
            if len(filled):
                totals[start + filled] = np.add.reduceat(values.astype(np.float64), offsets[filled])
        return totals


def tokens_in_use(pairs: pa.Table, part: str) -> np.ndarray:
    """Tokens of the prompt, chosen or rejected completion of each pair, int32 [pairs].

    Args:
        pairs: rows of ``select.PAIR_SCHEMA``, with the token ids or in their place columns of their numbers.
    """
    if f"{part}_tokens" in pairs.column_names:
        return pairs[f"{part}_tokens"].to_numpy()
    return pc.list_value_length(pairs[f"{part}_ids"]).to_numpy().astype(np.int32, copy=False)


def digests(lists: pa.Array | pa.ChunkedArray, rows: np.ndarray | None = None) -> np.ndarray:
    """64-bit digest of each list of token ids, by which equal lists are counted, uint64 [lists]: a polynomial in an odd
    number, modulo 2^64.

    Args:
        rows: which lists; None = all.
    """
    ragged = Ragged.of(lists)
    count = len(ragged) if rows is None else len(rows)
    found = np.empty(count, np.uint64)
    for start in range(0, count, _DIGEST_ROWS):
        stop = min(start + _DIGEST_ROWS, count)
        values, offsets = ragged.gather(np.arange(start, stop) if rows is None else rows[start:stop])
        lengths = np.diff(offsets)
        flat = values.astype(np.uint64) + np.uint64(1)
        within = np.arange(len(flat)) - np.repeat(offsets[:-1], lengths)
        powers = np.cumprod(np.full(int(lengths.max(initial=0)) + 1, _FACTOR, np.uint64))
        total = np.concatenate([[np.uint64(0)], np.cumsum((flat * flat + flat) * powers[within], dtype=np.uint64)])
        found[start:stop] = (total[offsets[1:]] - total[offsets[:-1]]) * powers[0] + lengths.astype(np.uint64)
    return found


def first_values(columns: Sequence[pa.ChunkedArray], use: np.ndarray, sizes: np.ndarray) -> pa.ChunkedArray:
    """The first ``sizes`` values, int32 [pairs in use], of each list in use, as list views of the columns' own values.

    Args:
        columns: of type list or large_list, one after another.
        use: bool [lists].
    """
    found, row, done = [], 0, 0
    for chunk in (chunk for column in columns for chunk in column.chunks):
        mask, starts = use[row : row + len(chunk)], chunk.offsets.to_numpy()[:-1]
        starts = starts if mask.all() else starts[mask]
        found += _views_of(chunk.values, starts, sizes[done : done + len(starts)])
        row, done = row + len(chunk), done + len(starts)
    if row != len(use):
        raise ValueError(f"{row} pairs with tokens, {len(use)} light rows")
    return pa.chunked_array(found, pa.list_view(pa.int32()))


def _views_of(values: pa.Array, starts: np.ndarray, sizes: np.ndarray) -> Iterator[pa.Array]:
    """Views of one array of values. Several if their ends need more than 32 bits, since all offsets are from its start."""
    row = 0
    while row < len(starts):
        base = int(starts[row]) if int(starts[-1]) + int(sizes[-1]) > MOST_SMALL else 0
        ends = starts[row:].astype(np.int64) + sizes[row:] - base
        stop = row + max(1, int(np.searchsorted(ends, MOST_SMALL, side="right")))
        offsets = (starts[row:stop] - base).astype(np.int32, copy=False)
        yield pa.ListViewArray.from_arrays(pa.array(offsets), pa.array(sizes[row:stop]), values.slice(base))
        row = stop
