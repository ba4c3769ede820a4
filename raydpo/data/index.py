"""Index of all keys of a cache, sorted in memory: finds the stored row that answers a completion."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

__all__ = ["KeyIndex", "as_bytes", "as_values"]


def as_bytes(keys: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """A binary(16) array without nulls as uint8 [rows, 16]: a view of an array, a copy of a column of chunks."""
    if isinstance(keys, pa.ChunkedArray):
        return np.concatenate([np.empty((0, 16), np.uint8), *map(as_bytes, keys.chunks)])
    flat = np.frombuffer(keys.buffers()[1], np.uint8) if len(keys) else np.empty(0, np.uint8)
    return flat[keys.offset * 16 : (keys.offset + len(keys)) * 16].reshape(-1, 16)


def as_values(keys: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """A binary(16) array without nulls as values that can be compared and sorted: V16 [rows]."""
    return as_bytes(keys).view("V16").ravel()


class KeyIndex:
    """Rows of parts by their 128-bit keys. A row is named by its locator: its number in the order in which rows were added.

    If several rows have the same key, the row with the most tokens answers; among these, the row added first. Costs 40 bytes
    per row.

    Attributes:
        keys: key of each row, uint8 [rows, 16].
        tokens: tokens of each row, int32 [rows].
        part: number of the part of each row, int32 [rows].
        row: position of each row in its part, int32 [rows].
        winners: locators of the rows that answer, one per distinct key, in order of key, int32 [distinct keys].
    """

    def __init__(self) -> None:
        self.keys = np.empty((0, 16), np.uint8)
        self.tokens = self.part = self.row = np.empty(0, np.int32)
        self.winners = np.empty(0, np.int32)
        self._sorted = np.empty(0, np.uint64)

    def add(self, *parts: tuple[np.ndarray, np.ndarray, int]) -> None:
        """Add all rows of some parts. Sorts the whole index once, so add many parts in one call.

        Args:
            parts: keys, uint8 [rows, 16]; tokens, int32 [rows]; and the number of each part.
        """
        if not parts:
            return
        self.keys = np.concatenate([self.keys, *(keys for keys, _, _ in parts)])
        self.tokens = np.concatenate([self.tokens, *(tokens for _, tokens, _ in parts)], dtype=np.int32)
        self.part = np.concatenate([self.part, *(np.full(len(keys), part, np.int32) for keys, _, part in parts)])
        self.row = np.concatenate([self.row, *(np.arange(len(keys), dtype=np.int32) for keys, _, _ in parts)])
        high = _half(self.keys, 0)
        order = np.argsort(high).astype(np.int32)
        self._sorted = high[order]
        # Rows that agree in their first half are nearly always the same key stored twice: put the winner first.
        agree = self._sorted[1:] == self._sorted[:-1]
        if agree.any():
            low = _half(self.keys, 1)
            tied = np.flatnonzero(np.append(agree, False) | np.insert(agree, 0, False))
            rows = order[tied]
            order[tied] = rows[np.lexsort((rows, -self.tokens[rows], low[rows], high[rows]))]
            repeated = np.zeros(len(order), bool)
            repeated[1:] = agree & (low[order[1:]] == low[order[:-1]])
            order, self._sorted = order[~repeated], self._sorted[~repeated]
        self.winners = order

    def find(self, wanted: np.ndarray) -> np.ndarray:
        """Locator of the row that answers each key, or -1: int64 [keys].

        Args:
            wanted: keys, uint8 [keys, 16].
        """
        if not len(self.winners):
            return np.full(len(wanted), -1, np.int64)
        high = _half(wanted, 0)
        order = np.argsort(high)  # searching in sorted order makes better use of the processor's cache
        place = np.empty(len(wanted), np.int64)
        place[order] = np.searchsorted(self._sorted, high[order])
        found = np.full(len(wanted), -1, np.int64)
        todo = np.arange(len(wanted))
        while len(todo):  # repeats only where different keys agree in their first 64 bits
            todo = todo[place[todo] < len(self._sorted)]
            todo = todo[self._sorted[place[todo]] == high[todo]]
            locators = self.winners[place[todo]]
            same = _half(self.keys, 1)[locators] == _half(wanted, 1)[todo]
            found[todo[same]] = locators[same]
            todo = todo[~same]
            place[todo] += 1
        return found


def _half(keys: np.ndarray, half: int) -> np.ndarray:
    return np.ascontiguousarray(keys).view(np.uint64)[:, half]
