"""Order prompts by their first tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from raydpo.data.ragged import Ragged, digests
from raydpo.data.rows import FIRST_RECORDS, HEAD_TOKENS, heads_of
from raydpo.data.shapes import common_prefix

__all__ = ["Heads", "in_order"]

WORDS = HEAD_TOKENS // 3
"""Numbers of 64 bits in a head, of three tokens each."""
_HEAD = np.dtype((">u8", WORDS))
_BLOCK = 100_000


class Heads:
    """The first tokens of prompts, after those that all prompts of a set share, and a hash of each prompt.

    They come from the rows in ``light``; else from the columns ``head`` and ``prompt_hash`` of the tables, as in
    ``data.rows.LIGHT_SCHEMA``; else from the prompts' tokens.

    Args:
        tables: pairs, with the columns of ``data.pairs.PAIR_SCHEMA``.
        order: row number of each pair in the tables, one after another: int64 [pairs].
        sets, places: of each pair, in that order.
        light: for each set its rows of ``data.rows.LIGHT_SCHEMA``, by place.
    """

    def __init__(
        self,
        tables: Sequence[pa.Table],
        order: np.ndarray,
        sets: np.ndarray,
        places: np.ndarray,
        light: Sequence[pa.Table] | None = None,
    ) -> None:
        names = ["head", "prompt_hash"]
        self._light = light
        if light is not None:
            self._sets, self._places = sets, places
            return
        self._order = order
        self._tables = tables
        self._stored = all(name in table.column_names for table in tables for name in names)

    def of(self, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Heads as big-endian numbers, uint64 [pairs, WORDS], and hashes, uint64 [pairs], of some pairs by number."""
        heads, hashes = np.empty((len(pairs), WORDS), np.uint64), np.empty(len(pairs), np.uint64)
        if self._light is not None:
            rows, tables, of = self._places[pairs], self._light, self._sets[pairs]
        else:
            firsts = np.cumsum([0, *(table.num_rows for table in self._tables)])
            tables = self._tables
            of = np.searchsorted(firsts, self._order[pairs], side="right") - 1
            rows = self._order[pairs] - firsts[of]
        for number, table in enumerate(tables):
            mine = np.flatnonzero(of == number)
            if not len(mine):
                continue
            if self._light is not None or self._stored:
                _gather(table["head"], rows[mine], heads, mine)
                _gather(table["prompt_hash"], rows[mine], hashes, mine)
            else:
                hashes[mine] = digests(table["prompt_ids"])[rows[mine]]
                _read_heads(Ragged.of(table["prompt_ids"]), rows[mine], heads, mine)
        return heads, hashes


def _read_heads(prompts: Ragged, rows: np.ndarray, heads: np.ndarray, places: np.ndarray) -> None:
    first, count = prompts[0], min(len(prompts), FIRST_RECORDS)
    shared = min((common_prefix(first, prompts[row]) for row in range(1, count)), default=0)
    for start in range(0, len(rows), _BLOCK):
        heads[places[start : start + _BLOCK]] = heads_of(*prompts.gather(rows[start : start + _BLOCK]), shared)


def _gather(column: pa.ChunkedArray, rows: np.ndarray, into: np.ndarray, places: np.ndarray) -> None:
    """Copy rows of a column of fixed width to the given places of an array of as many bytes a row."""
    kind = _HEAD if into.ndim == 2 else into.dtype
    if not (rows[1:] >= rows[:-1]).all():
        order = np.argsort(rows, kind="stable")
        rows, places = rows[order], places[order]
    first = start = 0
    for chunk in column.chunks:
        stop = int(np.searchsorted(rows, first + len(chunk)))
        if stop > start:
            flat = np.frombuffer(chunk.buffers()[1], kind, chunk.offset + len(chunk))
            into[places[start:stop]] = flat[chunk.offset + rows[start:stop] - first]
        first, start = first + len(chunk), stop


def in_order(heads: np.ndarray, lengths: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort prompts by head, length and hash; equal ones stay in their order.

    Returns:
        Number of each prompt in the new order, and whether it differs from the one before it in any of the three:
        int64 and bool [prompts].
    """
    count = len(hashes)
    order = np.argsort(heads[:, 0], kind="stable")
    changes = np.ones(count, bool)
    values = heads[order, 0]
    changes[1:] = values[1:] != values[:-1]
    for column in (*heads.T[1:], lengths, hashes):
        # Only prompts that agree so far are compared further.
        tied = np.flatnonzero(~changes | ~np.append(changes[1:], True))
        rows, block = order[tied], np.cumsum(changes)[tied]
        values = column[rows]
        sorted_ = np.lexsort((values, block))
        order[tied], values = rows[sorted_], values[sorted_]
        changes[tied[1:]] |= values[1:] != values[:-1]
    return order, changes
