"""Records from files, directories, URIs and the hub, each with the place it came from."""

from __future__ import annotations

import bz2
import difflib
import gzip
import io
import json
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from raydpo.config import COMPRESSION_SUFFIXES, DATA_SUFFIXES, SourceConfig, is_hub_name, is_uri
from raydpo.errors import DataError, RaydpoError
from raydpo.storage import Storage

__all__ = ["Record", "read_records"]


@dataclass(frozen=True)
class Record:
    """One line or row: ``where`` is ``file:line`` for people; ``value`` is None where it could not be read, because of
    ``problem``."""

    where: str
    row: int
    value: dict[str, Any] | None
    problem: str | None = None


def read_records(source: SourceConfig) -> Iterator[Record]:
    """All records of a source, in order, with its column map applied.

    Raises:
        DataError: if the source cannot be read at all, is empty, or lacks a mapped column.
    """
    count = 0
    for record in _raw_records(source):
        if source.limit is not None and count >= source.limit:
            return
        count += 1
        yield _rename(record, source) if source.columns and record.value is not None else record
    if not count:
        raise DataError(f"{source.path} holds no records")


def _raw_records(source: SourceConfig) -> Iterator[Record]:
    if not is_uri(source.path) and not Path(source.path).exists():
        if not is_hub_name(source.path):
            raise DataError(f"there is no file {source.path!r}")
        yield from _hub_records(source)
        return
    row = 0
    for storage, name, label in _files(source.path):
        try:
            for record in _file_records(storage, name, label):
                row += 1
                # Rows are counted through all files of a source, so that every pair has an id of its own.
                yield Record(record.where, row, record.value, record.problem)
        except (OSError, EOFError, lzma.LZMAError, pa.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {label}: {' '.join(str(error).split())[:300]}") from None


def _rename(record: Record, source: SourceConfig) -> Record:
    renamed = {theirs: ours for ours, theirs in source.columns.items()}
    for ours, theirs in source.columns.items():
        if theirs not in record.value:
            near = difflib.get_close_matches(theirs, list(record.value), n=1, cutoff=0.4)
            raise DataError(f"{record.where}: there is no column {theirs!r} to use as {ours!r} (data.train.columns); it has "
                            f"{', '.join(record.value)}" + (f"; did you mean {near[0]!r}?" if near else ""))
    value = {renamed.get(key, key): entry for key, entry in record.value.items() if renamed.get(key, key) not in
             record.value or key in renamed}
    return Record(record.where, record.row, value)


def _files(path: str) -> Iterator[tuple[Storage, str, str]]:
    """(storage, name below it, label) of each data file that ``path`` stands for."""
    parent, _, leaf = path.rstrip("/").rpartition("/")
    try:
        storage = Storage(parent if parent or not path.startswith("/") else "/")
        if not parent and not is_uri(path):
            storage = Storage("." if not path.startswith("/") else "/")
        kind = storage.fs.get_file_info(storage.path(leaf)).type
    except (OSError, RaydpoError) as error:
        raise DataError(f"cannot open {path}: {error}") from None
    if kind == pafs.FileType.NotFound:
        raise DataError(f"there is no file {path!r}")
    if kind != pafs.FileType.Directory:
        yield storage, leaf, leaf
        return
    names = [name for name in storage.list(leaf) if _bare(name).endswith(DATA_SUFFIXES)]
    if not names:
        raise DataError(f"the directory {path} holds no {', '.join(DATA_SUFFIXES)} files")
    for name in names:
        yield storage, f"{leaf}/{name}", name


def _bare(name: str) -> str:
    for suffix in COMPRESSION_SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def _file_records(storage: Storage, name: str, label: str) -> Iterator[Record]:
    kind = _bare(name)
    if not kind.endswith(DATA_SUFFIXES):
        raise DataError(f"{label}: unknown kind of file; use one of {', '.join(DATA_SUFFIXES)}, compressed or not")
    with storage.fs.open_input_file(storage.path(name)) as raw:
        if kind.endswith(".parquet"):
            stream = raw if kind == name else pa.BufferReader(_decompressed(raw, name).read())
            yield from _parquet_records(stream, label)
            return
        text = io.TextIOWrapper(_decompressed(raw, name), encoding="utf-8-sig")
        if kind.endswith(".json"):
            yield from _json_records(text, label)
        else:
            yield from _line_records(text, label)


def _decompressed(raw: Any, name: str) -> IO[bytes]:
    if name.endswith(".gz"):
        return gzip.open(raw)
    if name.endswith(".bz2"):
        return bz2.open(raw)
    if name.endswith(".xz"):
        return lzma.open(raw)
    if name.endswith(".zst"):
        return pa.CompressedInputStream(raw, "zstd")
    return raw


def _parquet_records(stream: Any, label: str) -> Iterator[Record]:
    row = 0
    for batch in pq.ParquetFile(stream).iter_batches(batch_size=1000):
        for value in batch.to_pylist():
            row += 1
            yield Record(f"{label}:{row}", row, value)


def _line_records(text: IO[str], label: str) -> Iterator[Record]:
    for number, line in enumerate(text, 1):
        if line.strip():
            yield _parse(line, f"{label}:{number}", number)


def _json_records(text: IO[str], label: str) -> Iterator[Record]:
    """A list of objects; or JSON lines under another name, which many data sets are."""
    whole = text.read()
    if not whole.lstrip().startswith("["):
        yield from _line_records(io.StringIO(whole), label)
        return
    try:
        values = json.loads(whole)
    except json.JSONDecodeError as error:
        raise DataError(f"{label} is not valid JSON: {error}") from None
    for number, value in enumerate(values, 1):
        yield _as_record(value, f"{label}:{number}", number)


def _parse(line: str, where: str, row: int) -> Record:
    try:
        return _as_record(json.loads(line), where, row)
    except json.JSONDecodeError:
        return Record(where, row, None, "not valid JSON")


def _as_record(value: Any, where: str, row: int) -> Record:
    if isinstance(value, dict):
        return Record(where, row, value)
    return Record(where, row, None, "not a JSON object")


def _hub_records(source: SourceConfig) -> Iterator[Record]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(source.path, split=source.split)
    except Exception as error:  # every network, hub and format failure is the same to the user: no data
        raise DataError(f"there is no file {source.path!r}, and the hub does not give split {source.split!r} of a data set "
                        f"of that name: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from None
    for row, value in enumerate(dataset, 1):
        yield Record(f"{source.path}[{source.split}]:{row}", row, dict(value))
