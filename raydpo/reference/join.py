"""Join stored log-probs to pairs: one pass over the parts, with one part in memory."""

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
"""Log-probs that are copied at once. Each needs 24 bytes of indices meanwhile."""
FORGET_ROWS = 1 << 20
"""Rows after which the written pages of the file are released from this process."""


@dataclass(frozen=True)
class Joined:
    """Reference log-probs of completions, in the order of the request.

    Attributes:
        values: float32 [all their tokens], nats, in a memory-mapped unnamed file; NaN where the cache holds only a sum, or
            nothing.
        offsets: index of each completion's first value, int64 [completions + 1].
        sums: float64 [completions], nats; NaN where the cache holds nothing.
        known: whether the values are known, bool [completions].
    """

    values: np.ndarray
    offsets: np.ndarray
    sums: np.ndarray
    known: np.ndarray

    def lists(self, start: int, stop: int) -> pa.Array:
        """Values of the completions from ``start`` to ``stop`` as views into ``values``: a table of them can be filtered
        without copying values."""
        large = self.offsets[stop] > np.iinfo(np.int32).max
        views, width = (pa.LargeListViewArray, pa.int64()) if large else (pa.ListViewArray, pa.int32())
        starts, sizes = self.offsets[start:stop], np.diff(self.offsets[start : stop + 1])
        return views.from_arrays(pa.array(starts, width), pa.array(sizes, width), pa.array(self.values))


def join(cache: ReferenceCache, keys: np.ndarray, needed: np.ndarray) -> Joined:
    """Look up the log-probs of the first ``needed`` tokens of each completion. The values lie in a file below $TMPDIR.

    Args:
        keys: uint8 [completions, 16]; may repeat.
        needed: tokens in use of each, int32 [completions]. 0 is the missing side of a completion alone: its sum is 0, and
            it is never missing.

    Raises:
        CacheError: if parts vanish faster than they can be read.
        RaydpoError: if the disk has no room for the values.
    """
    offsets = np.concatenate([[0], np.cumsum(needed, dtype=np.int64)])
    values, forget = _file_of(int(offsets[-1]))
    empty = needed == 0
    joined = Joined(values, offsets, np.where(empty, 0.0, np.nan), empty)
    for places, part, rows in cache.answers(keys, needed):
        if part.logps is None:
            joined.sums[places] = part.sums[rows]
            continue
        joined.known[places] = True
        for start, stop in _blocks(needed[places]):
            _move(part, rows[start:stop], places[start:stop], needed, joined)
            forget(stop - start)
    for place in np.flatnonzero(~joined.known):  # a new file holds zeros, which look like log-probs
        values[offsets[place] : offsets[place + 1]] = np.nan
    return joined


def _move(part: Part, rows: np.ndarray, places: np.ndarray, needed: np.ndarray, joined: Joined) -> None:
    lengths = needed[places].astype(np.int64)
    ends = np.cumsum(lengths)
    within = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    moved = part.logps.values.to_numpy()[np.repeat(part.logps.offsets.to_numpy()[rows], lengths) + within]
    joined.values[np.repeat(joined.offsets[places], lengths) + within] = moved
    # Add in float64: sums are hundreds of nats, and the margin is their small difference.
    joined.sums[places] = np.add.reduceat(moved.astype(np.float64), ends - lengths)


def _blocks(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Split rows into (start, stop) of about ``BLOCK_VALUES`` values each."""
    block = np.cumsum(lengths, dtype=np.int64) // BLOCK_VALUES
    cuts = [0, *(np.flatnonzero(np.diff(block)) + 1).tolist(), len(lengths)]
    return list(pairwise(cuts)) if len(lengths) else []


def _file_of(count: int) -> tuple[np.ndarray, Callable[[int], None]]:
    """Create an unnamed file of ``count`` float32 zeros, mapped into memory.

    Returns:
        The array, and a function to be called with the number of rows written since its last call.
    """
    if not count:
        return np.empty(0, np.float32), lambda rows: None
    with (
        room_for(f"the reference's log-probs of this data, {4 * count:,} bytes,"),
        tempfile.TemporaryFile(prefix="raydpo-") as file,
    ):
        try:  # writing into a sparse file on a full disk would kill the process with SIGBUS
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, 4 * count)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # some file systems cannot
                raise
        file.truncate(4 * count)
        mapped = mmap.mmap(file.fileno(), 4 * count)
    written = 0

    def forget(rows: int) -> None:
        # Written pages stay in the system's page cache; this process need not count them as its own memory.
        nonlocal written
        written += rows
        if written >= FORGET_ROWS:
            mapped.madvise(mmap.MADV_DONTNEED)
            written = 0

    return np.frombuffer(mapped, np.float32), forget
