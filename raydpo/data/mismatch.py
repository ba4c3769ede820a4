"""Mismatched completions: the completion of one row after the prompt of another, by which KTO estimates how far the policy
has drifted from the reference.

TRL 1.16 rotates the completions of each batch by one (trainer/kto_trainer.py, ``add_kl_completion_ids``). The same is done
here, once for all commands: a row with one completion gets that of the row before it as its other side, with a key of its
own. It is then scored, cached and computed like any other completion.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from raydpo.config import Config, TrainConfig
from raydpo.data.counting import counted_tokens
from raydpo.data.index import as_bytes
from raydpo.data.keys import completion_key
from raydpo.data.ragged import Ragged, tokens_in_use
from raydpo.data.rows import TOKEN_SCHEMA, TokenSource
from raydpo.data.select import COUNT_COLUMNS, LABEL, PairSets
from raydpo.data.spool import Spool

__all__ = ["MismatchedTokens", "as_trained", "mismatched_run", "uncounted", "with_mismatched"]

_SIDES = ("chosen", "rejected")
_BLOCK_ROWS = 10_000
_PLACE_BITS = 44
"""Bits of a place in a code ``set << _PLACE_BITS | place``."""


def mismatched_run(train: TrainConfig) -> int | None:
    """Rows within which completions are mismatched, see ``with_mismatched``; None if the loss needs none."""
    return train.pairs_per_step if train.estimates_drift else None


def as_trained(sets: PairSets, config: Config) -> PairSets:
    """``sets`` with the mismatched completions that the loss needs."""
    run = mismatched_run(config.train)
    return sets if run is None else with_mismatched(sets, run, config.data.max_length)


def with_mismatched(sets: PairSets, run: int, max_length: int) -> PairSets:
    """``sets`` in which each completion alone has a mismatched completion as its other side, cut to ``max_length``.

    Rows with one completion are taken in the order of the table, ``run`` at a time. Each gets the completion of the one
    before it, and the first of a run that of the last. A run of one row gets its own completion.

    Returns:
        ``sets`` itself, if no row is alone, or those that are have mismatched completions already. Else tables whose
        completions lie in unnamed temporary files, and a token source that reads the same on any machine.

    Raises:
        ValueError: if completions are already mismatched within other runs, or the tokens are not known.
    """
    if not any(table is not None and LABEL in table.column_names for table in (sets.train, sets.eval)):
        return sets
    if sets.tokens is None:
        raise ValueError("mismatched completions need the tokens of the pairs")
    if isinstance(sets.tokens, MismatchedTokens):
        if sets.tokens.run != run:
            raise ValueError(f"completions are already mismatched within runs of {sets.tokens.run} rows, not of {run}")
        return sets
    tables = {name: table for name in ("train", "eval") if (table := getattr(sets, name)) is not None}
    # The tables of one set of pairs hold different rows, so that one source can serve all.
    tokens = MismatchedTokens(sets.tokens, [_codes(table)[_alone(table)] for table in tables.values()], run)
    filled = {name: _filled(table, tokens, run, max_length) for name, table in tables.items()}
    return dataclasses.replace(sets, **filled, tokens=tokens)


def uncounted(table: pa.Table) -> int:
    """Number of mismatched completions in a table of ``with_mismatched`` of which no token counts, since the longer prompt
    leaves no room for those that do. They say nothing about the drift."""
    if COUNT_COLUMNS[0] not in table.column_names or not len(alone := _alone(table)):
        return 0
    chosen, rejected = (counted_tokens(table, side)[alone] for side in _SIDES)
    return int((np.where(table[LABEL].to_numpy()[alone] > 0, rejected, chosen) == 0).sum())


class MismatchedTokens:
    """A ``rows.TokenSource`` that reads the mismatched completion in place of a side without tokens. It is sent to other
    processes with 8 bytes for each row that is alone.

    Args:
        inner: where the tokens of the pairs are read.
        alone: codes of the rows of each table that are alone, in its order: int64 [rows] each.
        run: as of ``with_mismatched``.
    """

    def __init__(self, inner: TokenSource, alone: Sequence[np.ndarray], run: int) -> None:
        self.inner, self.alone, self.run = inner, tuple(alone), run

    def __reduce__(self) -> tuple[Any, ...]:
        return MismatchedTokens, (self.inner, self.alone, self.run)

    @cached_property
    def _partners(self) -> tuple[np.ndarray, np.ndarray]:
        """Codes of all rows that are alone, rising, and the code of the row whose completion each of them gets."""
        rows = np.concatenate([np.empty(0, np.int64), *self.alone])
        partners = np.concatenate([np.empty(0, np.int64), *(each[_rotated(len(each), self.run)] for each in self.alone)])
        order = np.argsort(rows, kind="stable")
        return rows[order], partners[order]

    def rows(self, sets: np.ndarray, places: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """As ``rows.TokenSource``."""
        known, partners = self._partners
        codes = np.asarray(sets, np.int64) << _PLACE_BITS | np.asarray(places, np.int64)
        at = np.minimum(np.searchsorted(known, codes), max(0, len(known) - 1))
        mine = np.flatnonzero(known[at] == codes) if len(known) else np.empty(0, np.int64)
        wanted = partners[at[mine]] if len(known) else np.empty(0, np.int64)
        every = np.concatenate([codes, wanted])
        found = list(self.inner.rows(*_split(every)))
        for row, (_, chosen, rejected) in zip(mine.tolist(), found[len(codes) :], strict=True):
            prompt, own_chosen, own_rejected = found[row]
            other = chosen if len(chosen) else rejected
            found[row] = (prompt, own_chosen, other) if len(own_chosen) else (prompt, other, own_rejected)
        return found[: len(codes)]


def _rotated(count: int, run: int) -> np.ndarray:
    """Number of the row before each, within runs of ``run`` rows; before the first is the last of its run."""
    numbers = np.arange(count)
    first = numbers // run * run
    return np.where(numbers > first, numbers - 1, np.minimum(first + run, count) - 1)


def _alone(table: pa.Table) -> np.ndarray:
    """Numbers of the rows with one completion."""
    return np.flatnonzero(table[LABEL].to_numpy()) if LABEL in table.column_names else np.empty(0, np.int64)


def _codes(table: pa.Table) -> np.ndarray:
    """Set and place of each row as one number, int64 [rows]."""
    return table["set"].to_numpy().astype(np.int64) << _PLACE_BITS | table["place"].to_numpy()


def _split(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sets, int16, and places, int64, of ``_codes``."""
    return (codes >> _PLACE_BITS).astype(np.int16), codes & ((1 << _PLACE_BITS) - 1)


def _filled(table: pa.Table, tokens: MismatchedTokens, run: int, max_length: int) -> pa.Table:
    """``table`` with the columns of its mismatched completions."""
    alone = _alone(table)
    if not len(alone):
        return table
    codes, partners = _codes(table), alone[_rotated(len(alone), run)]
    desirable = table[LABEL].to_numpy() > 0
    room = max_length - tokens_in_use(table, "prompt")
    used = {side: tokens_in_use(table, side).copy() for side in _SIDES}
    own = {name: np.where(desirable, *(table[f"{side}_{name}"].to_numpy() for side in _SIDES)) for name in _numbers(table)}
    # Which tokens of a completion count is known only as far as it is in use.
    most = np.where(desirable, used["chosen"], used["rejected"]) if COUNT_COLUMNS[0] in table.column_names else own["full"]
    keys = {side: np.array(as_bytes(table[f"{side}_key"])) for side in _SIDES}
    columns: dict[str, pa.Array] = {}
    for side, label in zip(_SIDES, (False, True), strict=True):
        mine = desirable[alone] == label  # a desirable row lacks its rejected side
        rows, others = alone[mine], partners[mine]
        used[side][rows] = np.minimum(most[others], room[rows])
        for name, values in own.items():
            column = table[f"{side}_{name}"].to_numpy().copy()
            column[rows] = values[others]
            columns[f"{side}_{name}"] = pa.array(column)
    ids = Spool(pa.schema([TOKEN_SCHEMA.field(f"{side}_ids") for side in _SIDES]))
    for start in range(0, table.num_rows, _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, table.num_rows)
        read = tokens.rows(*_split(codes[start:stop]))
        for row in alone[np.searchsorted(alone, start) : np.searchsorted(alone, stop)].tolist():
            prompt, *sides = read[row - start]
            missing = 1 if desirable[row] else 0
            keys[_SIDES[missing]][row] = np.frombuffer(completion_key(prompt, sides[missing]), np.uint8)
        ids.append(pa.table(list(_cut(read, [used[side][start:stop] for side in _SIDES])), names=ids.schema.names))
    listed = ids.finish()
    for side in _SIDES:
        columns[f"{side}_key"] = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(16), table.num_rows, [None, pa.py_buffer(keys[side].tobytes())]
        )
        if f"{side}_ids" in table.column_names:
            columns[f"{side}_ids"] = listed[f"{side}_ids"]
        else:
            columns[f"{side}_tokens"] = pa.array(used[side])
    if "highest" in table.column_names:
        highest = table["highest"].to_numpy().copy()
        highest[alone] = np.maximum(highest[alone], highest[partners])
        columns["highest"] = pa.array(highest)
    columns |= _weights(table, alone, partners, desirable, used)
    for name, column in columns.items():
        table = table.set_column(table.column_names.index(name), name, column)
    return table


def _numbers(table: pa.Table) -> list[str]:
    """Columns of a side that depend on its completion alone, without its beginning."""
    return [name for name in ("full", "hash") if f"chosen_{name}" in table.column_names]


def _cut(read: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], used: Sequence[np.ndarray]) -> Iterator[pa.ListArray]:
    """The first ``used`` tokens of chosen and rejected completions, as columns."""
    for side, lengths in enumerate(used, 1):
        flat = np.concatenate(
            [np.empty(0, np.int32), *(row[side][:length] for row, length in zip(read, lengths, strict=True))]
        )
        yield pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32()), pa.array(flat))


def _weights(
    table: pa.Table, alone: np.ndarray, partners: np.ndarray, desirable: np.ndarray, used: dict[str, np.ndarray]
) -> dict[str, pa.Array]:
    """Columns of the weights of tokens, with those of the mismatched completions: their own, as far as they are in use."""
    if COUNT_COLUMNS[0] not in table.column_names:
        return {}
    # Each side's own completions, but for the mismatched ones: places among all chosen and then all rejected completions.
    places = {side: np.arange(table.num_rows) + place * table.num_rows for place, side in enumerate(_SIDES)}
    for side, label in zip(_SIDES, (False, True), strict=True):
        mine = desirable[alone] == label
        others = partners[mine]
        places[side][alone[mine]] = others + np.where(desirable[others], 0, table.num_rows)
    both = {what: [chunk for side in _SIDES for chunk in table[f"{side}_{what}"].chunks] for what in ("starts", "weights")}
    lists = {what: Ragged.of(pa.chunked_array(chunks)) for what, chunks in both.items()}
    found: dict[str, pa.Array] = {}
    for side in _SIDES:
        (starts, offsets), (weights, _) = (each.gather(places[side]) for each in lists.values())
        owners = np.repeat(np.arange(table.num_rows), np.diff(offsets))
        kept = starts < used[side][owners]
        sizes = np.bincount(owners[kept], minlength=table.num_rows)
        offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int32())
        for what, values in (("starts", starts), ("weights", weights)):
            found[f"{side}_{what}"] = pa.ListArray.from_arrays(offsets, pa.array(values[kept]))
    return found
