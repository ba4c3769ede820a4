"""Which stored row answers a completion: all keys of a cache in memory, sorted, tens of bytes each."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

__all__ = ["KeyIndex", "as_bytes"]


def as_bytes(keys: pa.Array) -> np.ndarray:
    """A binary(16) array without nulls as uint8 [rows, 16], without a copy."""
    flat = np.frombuffer(keys.buffers()[1], np.uint8) if len(keys) else np.empty(0, np.uint8)
    return flat[keys.offset * 16 : (keys.offset + len(keys)) * 16].reshape(-1, 16)


class KeyIndex:
    """Rows of parts by their 128-bit keys. A row is named by its locator: its number in the order in which rows were added.

    Of rows with the same key the one with the most tokens answers, then the one that was added first. Costs 40 bytes a row.
    """

    def __init__(self) -> None:
        self._added: list[tuple[np.ndarray, np.ndarray, int]] = []
        self._keys = np.empty((0, 16), np.uint8)
        self._tokens = self._part = self._row = np.empty(0, np.int32)
        self._sorted, self._first = np.empty(0, np.uint64), np.empty(0, np.int32)

    def add(self, keys: pa.Array | np.ndarray, tokens: np.ndarray, part: int) -> None:
        """All rows of one part.

        Args:
            keys: binary(16) or uint8 [rows, 16]. tokens: int32 [rows].
        """
        self._added.append((keys if isinstance(keys, np.ndarray) else as_bytes(keys), tokens, part))

    def find(self, keys: pa.Array | np.ndarray) -> np.ndarray:
        """Locator of the row that answers each key, or -1: int64 [keys]."""
        self._settle()
        wanted = keys if isinstance(keys, np.ndarray) else as_bytes(keys)
        if not len(self._first):
            return np.full(len(wanted), -1, np.int64)
        high = _half(wanted, 0)
        order = np.argsort(high)  # searching in order keeps the memory that is looked at in the processor's cache
        place = np.empty(len(wanted), np.int64)
        place[order] = np.searchsorted(self._sorted, high[order])
        found = np.full(len(wanted), -1, np.int64)
        todo = np.arange(len(wanted))
        while len(todo):  # more than once only where the first 64 bits of different keys agree
            todo = todo[place[todo] < len(self._sorted)]
            todo = todo[self._sorted[place[todo]] == high[todo]]
            locators = self._first[place[todo]]
            same = (_half(self._keys, 1)[locators] == _half(wanted, 1)[todo])
            found[todo[same]] = locators[same]
            todo = todo[~same]
            place[todo] += 1
        return found

    def winners(self) -> np.ndarray:
        """Locators of the rows that answer, one for each distinct key, in order of key."""
        self._settle()
        return self._first

    @property
    def tokens(self) -> np.ndarray:
        """Tokens of each row: int32 [rows]."""
        self._settle()
        return self._tokens

    @property
    def part(self) -> np.ndarray:
        """Number of the part of each row: int32 [rows]."""
        self._settle()
        return self._part

    @property
    def row(self) -> np.ndarray:
        """Place of each row in its part: int32 [rows]."""
        self._settle()
        return self._row

    def key_bytes(self) -> np.ndarray:
        """Key of each row: uint8 [rows, 16]."""
        self._settle()
        return self._keys

    def _settle(self) -> None:
        """Take in what was added since the last look."""
        if not self._added:
            return
        added, self._added = self._added, []
        self._keys = np.concatenate([self._keys, *(keys for keys, _, _ in added)])
        self._tokens = np.concatenate([self._tokens, *(tokens for _, tokens, _ in added)], dtype=np.int32)
        self._part = np.concatenate([self._part, *(np.full(len(keys), part, np.int32) for keys, _, part in added)])
        self._row = np.concatenate([self._row, *(np.arange(len(keys), dtype=np.int32) for keys, _, _ in added)])
        high = _half(self._keys, 0)
        order = np.argsort(high).astype(np.int32)
        self._sorted = high[order]
        # Rows that agree in their first half are nearly always the same key stored twice: put the winner first.
        agree = self._sorted[1:] == self._sorted[:-1]
        if agree.any():
            tied = np.flatnonzero(np.append(agree, False) | np.insert(agree, 0, False))
            rows = order[tied]
            rows = rows[np.lexsort((rows, -self._tokens[rows], _half(self._keys, 1)[rows], high[rows]))]
            order[tied] = rows
            repeated = np.zeros(len(order), bool)
            repeated[1:] = agree & (_half(self._keys, 1)[order[1:]] == _half(self._keys, 1)[order[:-1]])
            order, self._sorted = order[~repeated], self._sorted[~repeated]
        self._first = order


def _half(keys: np.ndarray, half: int) -> np.ndarray:
    return np.ascontiguousarray(keys).view(np.uint64)[:, half]
