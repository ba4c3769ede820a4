"""Records of JSON text: of a line, of a list, or of objects that follow each other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from raydpo.errors import DataError, one_line

__all__ = ["BOM", "INVALID", "Record", "list_records", "object_records", "parse"]

BOM = b"\xef\xbb\xbf"
"""What some programs write before UTF-8."""
INVALID = "not valid JSON"
"""The problem of a line that is not."""
NOT_UTF8, HALF_PAIR = "not valid UTF-8", "text with half a surrogate pair"


class _Twice(ValueError):
    """A key that stands twice in one object of JSON, with different values."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, refused if a key has two values."""
    found = dict(pairs)
    if len(found) != len(pairs):
        for key, value in pairs:
            if found[key] != value:
                raise _Twice(f"the key {key[:40]!r} twice in one object, with different values")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
_decode = _DECODER.decode
_SPACE = re.compile(r"\s*")
_ESCAPE = re.compile(rb"\\u[dD]")
"""Escape of a surrogate in JSON; most are valid pairs."""


@dataclass(frozen=True)
class Record:
    """One line or row.

    Attributes:
        where: ``file:line``, for people.
        row: its number, from 1, counted through all files of a source, so that it identifies a record of the source.
        value: None if it could not be read, because of ``problem``.
        source: name of the source that it counts as, if that is not the one it was read from.
        note: how the file or directory was understood, on the first record only.
        absent: fields inside which a null that may be meant was read as absent, see ``arrow.rows``.
    """

    where: str
    row: int
    value: dict[str, Any] | None
    problem: str | None = None
    source: str | None = None
    note: str | None = None
    absent: tuple[str, ...] = ()


def list_records(content: bytes, label: str) -> Iterator[Record]:
    """Yield the records of one JSON list.

    Raises:
        DataError: if it is not valid.
    """
    try:
        text, problem = _decoded(content)
        values = _decode(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{label} is not valid JSON: {one_line(error, 200)}; correct it there") from None
    for number, value in enumerate(values, 1):
        yield _as_record(value, f"{label}:{number}", number, problem)


def object_records(content: bytes, label: str) -> Iterator[Record | None]:
    """Yield the records of JSON objects that follow each other, each over several lines, and None where that fails."""
    decode = _DECODER.raw_decode
    try:
        text, problem = _decoded(content)
        place, line, number = _SPACE.match(text).end(), 1, 0  # type: ignore[union-attr]
        line += text.count("\n", 0, place)
        while place < len(text):
            value, end = decode(text, place)
            number += 1
            yield _as_record(value, f"{label}:{line}", number, problem)
            end = _SPACE.match(text, end).end()  # type: ignore[union-attr]
            line += text.count("\n", place, end)
            place = end
    except (ValueError, RecursionError):
        yield None


def _decoded(content: bytes) -> tuple[str, str | None]:
    """The text of JSON, and what may be wrong with it. Invalid bytes become half surrogate pairs, which show the records
    that contain them."""
    encoding = json.detect_encoding(content)
    try:
        return content.decode(encoding), HALF_PAIR if _ESCAPE.search(content) else None
    except UnicodeDecodeError:
        return content.decode(encoding, "surrogateescape"), NOT_UTF8


def parse(line: bytes, where: str, row: int) -> Record:
    """The record on one line, or what is wrong with it.

    Args:
        row: number of the line in its file, from 1.
    """
    try:
        text = line.decode("utf-8-sig" if row == 1 else "utf-8")
    except UnicodeDecodeError:
        return Record(where, row, None, NOT_UTF8)
    try:
        value = _decode(text)
    except _Twice as error:
        return Record(where, row, None, str(error))
    except (ValueError, RecursionError):
        return Record(where, row, None, INVALID)
    return _as_record(value, where, row, HALF_PAIR if b"\\u" in line and _ESCAPE.search(line) else None)


def _as_record(value: Any, where: str, row: int, problem: str | None) -> Record:
    """A record, or what is wrong with it: ``problem`` if its text has half a surrogate pair."""
    if not isinstance(value, dict):
        return Record(where, row, None, "not a JSON object")
    if problem is not None:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # valid in JSON, but no tokenizer accepts it
            return Record(where, row, None, problem)
    return Record(where, row, value)
