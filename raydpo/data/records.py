"""Read records from files, directories, URIs and the hub, each with its origin."""

from __future__ import annotations

import bz2
import difflib
import gzip
import io
import json
import lzma
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from raydpo.config import SourceConfig, is_hub_name
from raydpo.config.data import COMPRESSION_SUFFIXES, DATA_SUFFIXES
from raydpo.errors import DataError, RaydpoError
from raydpo.storage.files import Storage
from raydpo.storage.uri import is_uri, redact

__all__ = ["Record", "read_records"]

BATCH_ROWS = 1000
NOT_UTF8, HALF_PAIR = "not valid UTF-8", "text with half a surrogate pair"
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
    """

    where: str
    row: int
    value: dict[str, Any] | None
    problem: str | None = None
    source: str | None = None


def read_records(source: SourceConfig) -> Iterator[Record]:
    """Yield all records of a source, in order, with its column map applied.

    A line that is not a JSON object gives a record with a problem, not an error.

    Raises:
        DataError: if the source cannot be read, is empty, or a mapped column is in none of its records.
    """
    count = 0
    never_seen, present = set(source.columns.values()), dict[str, None]()
    for record in _raw_records(source):
        if source.limit is not None and count >= source.limit:
            break
        count += 1
        if source.columns and record.value is not None:
            never_seen -= record.value.keys()
            present |= dict.fromkeys(record.value)
            record = replace(record, value=_rename(record.value, source.columns))
        yield record
    if not count:
        raise DataError(f"{redact(source.path)} holds no records; give it one JSON object a line, or rows")
    if never_seen and present:
        raise _missing_column(source, sorted(never_seen)[0], list(present))


def _rename(value: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
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


def _raw_records(source: SourceConfig) -> Iterator[Record]:
    if not is_uri(source.path) and not Path(source.path).exists():
        if not is_hub_name(source.path):
            raise DataError(f"there is no file {source.path!r}; check the path in data.train or data.eval")
        yield from _hub_records(source)
        return
    before = 0
    for filesystem, path, label in _files(source.path):
        last = 0
        for record in _explained(_file_records(filesystem, path, label), label):
            last = record.row
            yield replace(record, row=before + record.row)
        before += last


def _explained(records: Iterable[Record], label: str) -> Iterator[Record]:
    """``records``, with any error of a file system, codec or parser turned into one sentence."""
    try:
        yield from records
    except RaydpoError:
        raise
    except Exception as error:
        raise DataError(f"cannot read {label}: {_said(error)}") from None


def _said(error: Exception) -> str:
    return f"{' '.join(str(error).split())[:300] or 'no details'} ({type(error).__name__})"


def _files(path: str) -> Iterator[tuple[pafs.FileSystem, str, str]]:
    """Yield (file system, path on it, label) of each data file that ``path`` stands for."""
    try:
        storage = Storage(path)
        info = storage.fs.get_file_info(storage.root)
    except Exception as error:  # every file system has its own errors
        raise DataError(f"cannot open {redact(path)}: {_said(error)}") from None
    if info.type == pafs.FileType.NotFound:
        raise DataError(f"there is no file {redact(path)!r}; check the path in data.train or data.eval")
    if info.type != pafs.FileType.Directory:
        yield storage.fs, storage.root, info.base_name
        return
    names = [name for name in storage.list() if _bare(name).endswith(DATA_SUFFIXES) and not name.startswith((".", "_"))]
    if not names:
        raise DataError(f"the directory {redact(path)} holds no {', '.join(DATA_SUFFIXES)} files, compressed or not")
    for name in names:
        yield storage.fs, storage.path(name), name


def _bare(name: str) -> str:
    for suffix in COMPRESSION_SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def _file_records(filesystem: pafs.FileSystem, path: str, label: str) -> Iterator[Record]:
    kind = _bare(label)
    if not kind.endswith(DATA_SUFFIXES):
        raise DataError(
            f"{label} has an unknown suffix; use {', '.join(DATA_SUFFIXES)}, also with {', '.join(COMPRESSION_SUFFIXES)}"
        )
    with filesystem.open_input_file(path) as raw:
        if kind.endswith(".parquet"):
            yield from _parquet_records(raw if kind == label else pa.BufferReader(_bytes(raw, label).read()), label)
        elif kind.endswith(".json"):
            yield from _json_records(_bytes(raw, label).read(), label)
        else:
            yield from _line_records(_bytes(raw, label), label)


def _bytes(raw: pa.NativeFile, name: str) -> IO[bytes]:
    """Stream of the content of a file that may be compressed."""
    if name.endswith(".gz"):
        return gzip.open(raw)
    if name.endswith(".bz2"):
        return bz2.open(raw)
    if name.endswith(".xz"):
        return lzma.open(raw)
    return io.BufferedReader(pa.CompressedInputStream(raw, "zstd") if name.endswith(".zst") else raw)


def _parquet_records(stream: Any, label: str) -> Iterator[Record]:
    row = 0
    for batch in pq.ParquetFile(stream).iter_batches(batch_size=BATCH_ROWS):
        for value in batch.to_pylist():
            row += 1
            yield Record(f"{label}:{row}", row, _without_nulls(value))


def _without_nulls(value: Any) -> Any:
    """``value`` without nulls: Arrow gives each message the fields of all others, and a template would print them."""
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value


def _line_records(lines: Iterable[bytes], label: str) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _parse(line, f"{label}:{number}", number)


def _json_records(content: bytes, label: str) -> Iterator[Record]:
    """Records of a JSON list of objects, or of JSON lines in a file named .json, which is common."""
    if not content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _line_records(io.BytesIO(content), label)
        return
    problem = HALF_PAIR if _ESCAPE.search(content) else None
    try:
        encoding = json.detect_encoding(content)
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            # Invalid bytes become half surrogate pairs, which show the records that contain them.
            text, problem = content.decode(encoding, "surrogateescape"), NOT_UTF8
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{label} is not valid JSON: {' '.join(str(error).split())[:200]}; correct it there") from None
    for number, value in enumerate(values, 1):
        yield _as_record(value, f"{label}:{number}", number, problem)


def _parse(line: bytes, where: str, row: int) -> Record:
    try:
        text = line.decode("utf-8-sig" if row == 1 else "utf-8")
    except UnicodeDecodeError:
        return Record(where, row, None, NOT_UTF8)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return Record(where, row, None, "not valid JSON")
    return _as_record(value, where, row, HALF_PAIR if _ESCAPE.search(line) else None)


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


def _hub_records(source: SourceConfig) -> Iterator[Record]:
    try:
        from datasets import load_dataset

        dataset = load_dataset(source.path, split=source.split)
    except Exception as error:  # to the user every network, hub or format failure means the same: no data
        raise DataError(
            f"there is no file {source.path!r}, and the hub does not give split {source.split!r} of a data set "
            f"of that name: {_said(error)}"
        ) from None
    label = f"{source.path}[{source.split}]"
    for row, value in enumerate(_explained(dataset, label), 1):
        yield Record(f"{label}:{row}", row, _without_nulls(value))
