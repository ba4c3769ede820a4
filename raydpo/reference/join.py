"""Reference values brought to the pairs that need them: one pass over the parts, one part in memory."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from raydpo.data.spool import room_for
from raydpo.reference.part import Part
from raydpo.reference.store import ReferenceCache

__all__ = ["Joined", "join"]

BLOCK_VALUES = 1 << 22
"""Log-probs that are moved at once: their places need 24 bytes each meanwhile."""
FORGET_ROWS = 1 << 20
"""Rows after which the pages of the values are let go."""


@dataclass(frozen=True)
class Joined:
    """Reference log-probs of completions in the order in which they were asked for.

    Attributes:
        values: float32 [all their tokens], nats, in a memory-mapped file without a name; NaN where the cache holds only the
            sum, or nothing.
        offsets: where each completion's values begin, int64 [completions + 1].
        sums: float64 [completions]; NaN where the cache holds nothing.
    """

    values: np.ndarray
    offsets: np.ndarray
    sums: np.ndarray

    def lists(self, start: int, stop: int) -> pa.Array:
        """Values of the completions ``start`` to ``stop`` as list<float32>, without a copy."""
        offsets = self.offsets[start : stop + 1] - self.offsets[start]
        flat = pa.array(self.values[self.offsets[start] : self.offsets[stop]])
        if offsets[-1] > np.iinfo(np.int32).max:
            return pa.LargeListArray.from_arrays(pa.array(offsets), flat)
        return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), flat)


def join(cache: ReferenceCache, keys: np.ndarray, needed: np.ndarray, directory: str | None = None) -> Joined:
    """The log-probs of the first ``needed`` tokens of each completion.

    Args:
        keys: uint8 [completions, 16]; the same one any number of times.
        needed: int32 [completions].
        directory: where the values lie; null = the system's place for temporary files ($TMPDIR).

    Raises:
        CacheError: if parts vanish faster than they can be read.
        RaydpoError: if there is no room for the values.
    """
    offsets = np.concatenate([[0], np.cumsum(needed, dtype=np.int64)])
    values, forget = _file_of(int(offsets[-1]), directory)
    sums, unknown = np.full(len(keys), np.nan), np.ones(len(keys), bool)
    for places, part, rows in cache.answers(keys, needed):
        if part.logps is None:
            sums[places] = part.sums[rows]
            continue
        unknown[places] = False
        for start, stop in _blocks(needed[places]):
            _move(part, rows[start:stop], places[start:stop], needed, offsets, values, sums)
            forget(stop - start)
    for place in np.flatnonzero(unknown):  # a new file is full of zeros, which are log-probs
        values[offsets[place] : offsets[place + 1]] = np.nan
    return Joined(values, offsets, sums)


def _move(part: Part, rows: np.ndarray, places: np.ndarray, needed: np.ndarray, offsets: np.ndarray, values: np.ndarray,
          sums: np.ndarray) -> None:
    lengths = needed[places].astype(np.int64)
    ends = np.cumsum(lengths)
    within = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    moved = part.logps.values.to_numpy()[np.repeat(part.logps.offsets.to_numpy()[rows], lengths) + within]
    values[np.repeat(offsets[places], lengths) + within] = moved
    # In float64: a long completion has hundreds of nats, of which the margin is the small difference.
    sums[places] = np.add.reduceat(moved.astype(np.float64), ends - lengths)


def _blocks(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Runs of rows of about ``BLOCK_VALUES`` values each."""
    block = np.cumsum(lengths, dtype=np.int64) // BLOCK_VALUES
    cuts = [0, *(np.flatnonzero(np.diff(block)) + 1).tolist(), len(lengths)]
    return list(pairwise(cuts)) if len(lengths) else []


def _allocate(descriptor: int, size: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # some file systems cannot
            raise


def _file_of(count: int, directory: str | None) -> tuple[np.ndarray, Callable[[int], None]]:
    """``count`` zeros in a file without a name, and what to call after so many rows of them were written."""
    if not count:
        return np.empty(0, np.float32), lambda rows: None
    with room_for(f"the reference's log-probs of this data, {4 * count:,} bytes,", directory), \
            tempfile.TemporaryFile(prefix="raydpo-", dir=directory) as file:
        if hasattr(os, "posix_fallocate"):
            # A file of holes would end the process with SIGBUS where the disk is full when they are filled.
            _allocate(file.fileno(), 4 * count)
        file.truncate(4 * count)
        mapped = mmap.mmap(file.fileno(), 4 * count)
    written = 0

    def forget(rows: int) -> None:
        # Pages that were written stay in the system's cache of the file; this process need not hold them, too.
        nonlocal written
        written += rows
        if written >= FORGET_ROWS and hasattr(mapped, "madvise"):
            mapped.madvise(mmap.MADV_DONTNEED)
            written = 0

    return np.frombuffer(mapped, np.float32), forget
