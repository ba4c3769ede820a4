"""Ranked lists as neighbouring rows of pairs: where a list begins, and what holds for a list as a whole.

A list of N completions is (N + 1) // 2 rows, best first; the rejected side of the last row of an odd list is empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from raydpo.data.messages import Malformed
from raydpo.data.shapes import common_prefix

if TYPE_CHECKING:
    from raydpo.data.tokenise import TokenisedPair

__all__ = ["NO_RANK", "aligned", "all_or_none", "begins", "most_agreed", "rows_of", "starts_of"]

NO_RANK = -1
"""Rank of a side without a completion."""


def begins(numbers: pa.ChunkedArray | np.ndarray) -> np.ndarray:
    """Which rows begin a list, bool [rows]; the first always does.

    Args:
        numbers: of the list of each row, or another number that differs between neighbouring lists.
    """
    numbers = np.asarray(numbers)
    return np.insert(numbers[1:] != numbers[:-1], 0, True) if len(numbers) else np.empty(0, bool)


def starts_of(begin: np.ndarray) -> np.ndarray:
    """First row of each list, and the number of rows at the end: int64 [lists + 1]."""
    return np.append(np.flatnonzero(begin), len(begin)).astype(np.int64)


def rows_of(starts: np.ndarray, lists: Sequence[int] | np.ndarray) -> np.ndarray:
    """The rows of ``lists``, one list after another, int64 [rows]. A list that occurs twice has its rows twice."""
    lists = np.asarray(lists, np.int64)
    sizes = starts[lists + 1] - starts[lists]
    within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.repeat(starts[lists], sizes) + within


def all_or_none(keep: np.ndarray, begin: np.ndarray) -> np.ndarray:
    """``keep``, bool [rows], without the lists of which it leaves out a row."""
    starts = starts_of(begin)
    return np.repeat(np.logical_and.reduceat(keep, starts[:-1]), np.diff(starts)) if len(keep) else keep


def aligned(rows: Sequence[TokenisedPair]) -> list[TokenisedPair] | Malformed:
    """The rows of a list with one prompt: what all their prompts begin with. Tokens merge across the boundary in one
    completion and not in another, and the log-probs of completions are comparable only after the same prompt."""
    prompt = rows[0].prompt[: min(common_prefix(rows[0].prompt, row.prompt) for row in rows)]
    if not len(prompt):
        return Malformed("prompt has no tokens")
    moved = [row if len(row.prompt) == len(prompt) else _begun_at(len(prompt), row) for row in rows]
    completions = [side.tobytes() for row in moved for side in (row.chosen, row.rejected) if len(side)]
    if len(set(completions)) < len(completions):
        return Malformed("two completions of a list have the same tokens")
    return moved


def _begun_at(boundary: int, row: TokenisedPair) -> TokenisedPair:
    """The row with completions that begin at an earlier token."""
    moved = row.prompt[boundary:]
    chosen, rejected = (np.concatenate([moved, side]) if len(side) else side for side in (row.chosen, row.rejected))
    return row._replace(prompt=row.prompt[:boundary], chosen=chosen, rejected=rejected)


def most_agreed(rows: Sequence[TokenisedPair]) -> int:
    """The most tokens with which two completions of a list both begin."""
    # Of completions in sorted order, those that have most in common are neighbours. Big-endian bytes sort as ids do.
    ordered = sorted(
        (side for row in rows for side in (row.chosen, row.rejected)), key=lambda ids: ids.astype(">u4").tobytes()
    )
    return max(common_prefix(one, other) for one, other in pairwise(ordered))
