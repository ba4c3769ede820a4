"""Read records from files, directories, URIs and the hub, each with its origin."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from raydpo.config import SourceConfig
from raydpo.data.parse import Record
from raydpo.data.pieces import Piece, Sizes, pieces_of
from raydpo.errors import DataError
from raydpo.storage.uri import redact

__all__ = ["Record", "no_records", "read_records", "records_of"]

_SIZES = Sizes(first=1 << 16, most=1 << 18, lines=1000, first_lines=100)
"""Small pieces: many callers want the first records only."""


def read_records(source: SourceConfig, watch: Callable[[Piece], object] | None = None) -> Iterator[Record]:
    """Yield all records of a source, in order, with its column map applied.

    A line that is not a JSON object gives a record with a problem, not an error.

    Args:
        watch: called with each piece before its records are yielded.

    Raises:
        DataError: if the source cannot be read, is empty, or a mapped column is in none of its records.
    """
    empty, present = True, dict[str, None]()
    for piece in pieces_of(source, _SIZES):
        empty = False
        if watch is not None:
            watch(piece)
        yield from records_of(piece, source.columns, present)
    if empty:
        raise no_records(source)
    missing = sorted(set(source.columns.values()) - present.keys())
    if missing and present:
        raise _missing_column(source, missing[0], list(present))


def records_of(piece: Piece, columns: Mapping[str, str], present: dict[str, None] | None = None) -> Iterator[Record]:
    """Yield the records of a piece.

    Args:
        columns: maps our column names to the file's.
        present: takes up the names of all columns, if some are mapped.
    """
    if not columns:
        yield from piece.parsed()
        return
    for record in piece.parsed():
        if record.value is None:
            yield record
            continue
        if present is not None:
            present |= dict.fromkeys(record.value)
        yield replace(record, value=_rename(record.value, columns))


def no_records(source: SourceConfig) -> DataError:
    """The error for a source without records."""
    return DataError(f"{redact(source.path)} holds no records; give it one JSON object a line, or rows")


def _rename(value: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Apply ``columns``, which maps our names to theirs. A mapped column of ours is never taken under its own name."""
    gone = {*columns, *columns.values()}
    return {key: entry for key, entry in value.items() if key not in gone} | {
        ours: value[theirs] for ours, theirs in columns.items() if theirs in value
    }


def _missing_column(source: SourceConfig, theirs: str, present: list[str]) -> DataError:
    ours = next(ours for ours, name in source.columns.items() if name == theirs)
    near = difflib.get_close_matches(theirs, present, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return DataError(
        f"no record of {redact(source.path)} has the column {theirs!r} that its setting 'columns' maps to "
        f"{ours!r}; columns present: {', '.join(map(repr, present[:20]))}{hint}"
    )
