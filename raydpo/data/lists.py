"""Ranked lists as neighbouring rows of pairs: where a list begins, and what holds for a list as a whole.

A list of N completions is (N + 1) // 2 rows, best first; the rejected side of the last row of an odd list is empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpo.data.messages import Malformed
from raydpo.data.shapes import common_prefix

if TYPE_CHECKING:
    from raydpo.data.tokenise import TokenisedPair

__all__ = [
    "NO_RANK",
    "aligned",
    "all_or_none",
    "all_pairs",
    "begins",
    "compared",
    "count_of",
    "most_agreed",
    "rows_of",
    "starts_of",
    "starts_of_table",
    "whole_lists",
]

_LIST = "list"
"""The first of ``select.LIST_COLUMNS``."""
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


def starts_of_table(table: pa.Table) -> np.ndarray | None:
    """``starts_of`` the rows of a table that ``select`` returns; None if they are pairs."""
    return starts_of(begins(table[_LIST])) if _LIST in table.column_names else None


def count_of(table: pa.Table | None) -> int:
    """Number of pairs of such a table, or of its ranked lists; 0 without a table."""
    if table is None:
        return 0
    starts = starts_of_table(table)
    return table.num_rows if starts is None else len(starts) - 1


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


def compared(lists: np.ndarray, chosen_ranks: np.ndarray, rejected_ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each better completion of a list with each worse one, in order: int64 [comparisons] each. They are places among the
    completions, which are chosen and rejected of each row in turn. Completions of equal rank are not compared.

    Args:
        lists: number of the list of each row; the rows of a list are neighbours.
        chosen_ranks, rejected_ranks: of each row; ``NO_RANK`` = no completion.
    """
    ranks = np.stack([chosen_ranks, rejected_ranks], 1)
    found = [np.empty((0, 2), np.int64)]
    apart = 0
    # All rows are compared with those one, two, ... rows further on in their lists.
    while len(rows := np.flatnonzero(lists[: len(lists) - apart] == lists[apart:])):
        for one, other in ((0, 0), (0, 1), (1, 0), (1, 1)) if apart else ((0, 1),):
            mine, theirs = ranks[rows, one], ranks[rows + apart, other]
            places = np.stack([2 * rows + one, 2 * (rows + apart) + other], 1)
            there = (mine != NO_RANK) & (theirs != NO_RANK)
            found += [places[there & (mine < theirs)], places[there & (mine > theirs)][:, ::-1]]
        apart += 1
    better, worse = np.concatenate(found).T
    order = np.lexsort((worse, better))
    return better[order], worse[order]


def all_pairs(table: pa.Table) -> pa.Table:
    """The pairs of completions of which one is ranked above the other, in place of rows of lists: as ``data.ranked: pairs``
    has them. A table of pairs is returned as it is. Columns that name a row's place are left out."""
    if _LIST not in table.column_names:
        return table
    better, worse = compared(*(table[name].to_numpy() for name in (_LIST, "chosen_rank", "rejected_rank")))
    rows = pa.array(better // 2)

    def of_side(name: str, places: np.ndarray) -> pa.ChunkedArray:
        both = [table[name.replace(*sides)] for sides in (("rejected", "chosen"), ("chosen", "rejected"))]
        side_by_side = pa.chunked_array([chunk for column in both for chunk in column.chunks], both[0].type)
        return side_by_side.take(pa.array(places // 2 + places % 2 * table.num_rows))

    begin = begins(table[_LIST])
    first = np.maximum.accumulate(np.where(begin, np.arange(len(begin)), 0))[better // 2]
    number = pa.array(np.arange(len(first)) - np.searchsorted(first, first))
    names = table["pair_id"].take(pa.array(first))
    further = pc.binary_join_element_wise(names, number.cast(pa.string()), "#")
    columns = {"pair_id": pc.if_else(pc.equal(number, 0), names, further)}
    for name in table.column_names:
        if name in columns or name in ("set", "place", _LIST):
            continue
        if "chosen" in name or "rejected" in name:
            columns[name] = of_side(name, better if "chosen" in name else worse)
        else:
            columns[name] = table[name].take(rows)
    if "highest" in columns:
        columns["highest"] = pc.max_element_wise(columns["highest"], table["highest"].take(pa.array(worse // 2)))
    return pa.table(columns)


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


def whole_lists(found: Sequence[Any], faults: list[tuple[int, str]]) -> list[Any]:
    """Rows, each a ``rows.Found``, without those of records that ``faults`` names, and each list with one prompt. Adds to
    ``faults``."""
    kept: list[Any] = []
    wrong = {record for record, _ in faults}
    for record, group in groupby(found, key=lambda each: each.entry.record):
        rows = list(group)
        if record in wrong:
            continue
        if all(row.tokens is not None for row in rows):
            one = aligned([row.tokens for row in rows])
            if isinstance(one, Malformed):
                faults.append((record, str(one)))
                continue
            moved = [len(row.tokens.prompt) - len(tokens.prompt) for row, tokens in zip(rows, one, strict=True)]
            rows = [
                row._replace(tokens=tokens, marks=row.marks.later(by))
                for row, tokens, by in zip(rows, one, moved, strict=True)
            ]
        # What is odd about a list counts once.
        kept.append(rows[0]._replace(remarks=[each for row in rows for each in row.remarks]))
        kept += [row._replace(remarks=()) for row in rows[1:]]
    return kept


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
