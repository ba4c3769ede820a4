"""The reader of records as it was before sources were cut into pieces: what pieces are compared with."""

from __future__ import annotations

import bz2
import difflib
import gzip
import io
import json
import lzma
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from raydpo.config import SourceConfig, is_hub_name
from raydpo.config.data import COMPRESSION_SUFFIXES, DATA_SUFFIXES, bare_suffix
from raydpo.data.arrow import rows
from raydpo.data.locate import DataFile, data_files
from raydpo.errors import DataError, RaydpoError, one_line, reason
from raydpo.storage.pointers import is_pointer
from raydpo.storage.uri import is_uri, redact

__all__ = ["Record", "read_records"]

BATCH_ROWS = 1000
BOM = b"\xef\xbb\xbf"
INVALID, NOT_UTF8, HALF_PAIR = "not valid JSON", "not valid UTF-8", "text with half a surrogate pair"
_PACKED = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"BZh": ".bz2", b"\xfd7zXZ\0": ".xz"}
"""First bytes of compressed files."""


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
    if not is_uri(source.path) and not _exists(source.path):
        if not is_hub_name(source.path):
            raise DataError(f"there is no file {source.path!r}; check the path in data.train or data.eval")
        yield from _hub_records(source)
        return
    before = 0
    for file in data_files(source):
        last = 0
        for record in _noted(_explained(_file_records(file), file.label), file.note):
            last = record.row
            yield record if not before else replace(record, row=before + last)
        before += last


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError as error:  # no permission, or a name that is too long
        raise DataError(f"cannot open {path!r}: {reason(error)}") from None


def _explained(records: Iterable[Any], label: str) -> Iterator[Any]:
    """``records``, with any error of a file system, codec or parser turned into one sentence."""
    try:
        yield from records
    except RaydpoError:
        raise
    except Exception as error:
        raise DataError(f"cannot read {label}: {reason(error)}") from None


def _file_records(file: DataFile) -> Iterator[Record]:
    label, kind = file.label, bare_suffix(file.label)
    if not kind.endswith(DATA_SUFFIXES):
        raise DataError(
            f"{label} has an unknown suffix; use {', '.join(DATA_SUFFIXES)}, also with {', '.join(COMPRESSION_SUFFIXES)}"
        )
    with file.filesystem.open_input_file(file.path) as raw:
        head = raw.read(64)
        raw.seek(0)
        if is_pointer(head):
            raise DataError(
                f"{label} is a Git LFS pointer in place of the data; fetch them with 'git lfs pull' in its repository"
            )
        named = label.lower()[len(kind) :]
        packed = named or next((suffix for start, suffix in _PACKED.items() if head.startswith(start)), "")
        note = f"{label} is compressed ({packed.removeprefix('.')}), though not named so" if packed != named else None
        if head.startswith((b"PAR1", b"ARROW1")) or kind.endswith((".parquet", ".arrow")):
            stream = pa.BufferReader(_bytes(raw, packed).read()) if packed else raw
            records = _arrow_records(stream, label, parquet=head.startswith(b"PAR1") or kind.endswith(".parquet"))
        else:
            records = _json_records(_bytes(raw, packed), label, listed=kind.endswith(".json"))
        yield from _noted(records, note)


def _noted(records: Iterator[Record], note: str | None) -> Iterator[Record]:
    """``records``, the first with ``note`` before its own."""
    if note is not None and (first := next(records, None)) is not None:
        yield replace(first, note=f"{note}; {first.note}" if first.note else note)
    yield from records


def _bytes(raw: pa.NativeFile, suffix: str) -> IO[bytes]:
    """Stream of the content of a file, compressed as ``suffix`` says."""
    if suffix == ".gz":
        return gzip.open(raw)
    if suffix == ".bz2":
        return bz2.open(raw)
    if suffix == ".xz":
        return lzma.open(raw)
    return io.BufferedReader(pa.CompressedInputStream(raw, "zstd") if suffix == ".zst" else raw)


def _arrow_records(stream: Any, label: str, *, parquet: bool) -> Iterator[Record]:
    """Records of a Parquet file, or of an Arrow file in either of its two formats."""
    if parquet:
        batches: Iterable[pa.RecordBatch] = pq.ParquetFile(stream).iter_batches(batch_size=BATCH_ROWS)
    else:
        streamed = stream.read(6) != b"ARROW1"
        stream.seek(0)
        if streamed:
            batches = pa.ipc.open_stream(stream)
        else:
            file = pa.ipc.open_file(stream)
            batches = (file.get_batch(number) for number in range(file.num_record_batches))
    row = 0
    for batch in batches:
        if twice := [name for name, count in Counter(batch.schema.names).items() if count > 1]:
            raise DataError(f"{label} has more than one column {twice[0][:40]!r}; rename or drop all but one")
        for start in range(0, batch.num_rows, BATCH_ROWS):
            for value, absent in rows(batch.slice(start, BATCH_ROWS)):
                row += 1
                yield Record(f"{label}:{row}", row, value, absent=absent)


def _json_records(stream: IO[bytes], label: str, *, listed: bool) -> Iterator[Record]:
    """Records of JSON lines, of one JSON list, or of objects over several lines, whatever the file is called."""
    head, note = list(_to_first_text(stream)), None
    if head and (head[0].startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head[0][:4]):
        stream, note = _recoded(b"".join((*head, stream.read())), label)
        head = list(_to_first_text(stream))
    yield from _noted(_utf8_records(head, stream, label, listed=listed), note)


def _recoded(content: bytes, label: str) -> tuple[IO[bytes], str]:
    """Content in UTF-16 or UTF-32 as UTF-8, and what was found."""
    encoding = json.detect_encoding(content)
    try:
        text = content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError:
        if encoding.startswith("utf-8"):
            raise DataError(f"{label} holds bytes that are no text (is it compressed twice?); save it as UTF-8") from None
        raise DataError(f"{label} is neither UTF-8 nor valid {encoding.upper()}; save it as UTF-8") from None
    return io.BytesIO(text.encode("utf-8", "surrogatepass")), f"{label} is {encoding.upper()}, not UTF-8"


def _utf8_records(head: list[bytes], stream: Iterable[bytes], label: str, *, listed: bool) -> Iterator[Record]:
    first = head[-1].removeprefix(BOM).lstrip() if head else b""
    if first.startswith(b"["):
        content = b"".join((*head, stream.read()))
        try:
            yield from _list_records(content, label, None if listed else f"{label} is a JSON list, though not named so")
            return
        except DataError:
            if listed or _parse(head[-1], "", len(head)).problem == INVALID:
                raise
        stream = io.BytesIO(content)
    elif first.startswith(b"{") and _parse(head[-1], "", len(head)).problem == INVALID:
        content = b"".join((*head, stream.read()))
        objects = list(_object_records(content, label))
        if objects and objects[-1] is not None:
            yield from objects
            return
        stream = io.BytesIO(content)
    else:
        stream = chain(head, stream)
    for number, line in enumerate(stream, 1):
        if not line.isspace():
            yield _parse(line, f"{label}:{number}", number)


def _to_first_text(stream: IO[bytes]) -> Iterator[bytes]:
    """The lines up to the first that is not blank."""
    for line in stream:
        yield line
        if line.removeprefix(BOM).strip():
            return


def _list_records(content: bytes, label: str, note: str | None) -> Iterator[Record]:
    try:
        text, problem = _decoded(content)
        values = _decode(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{label} is not valid JSON: {one_line(error, 200)}; correct it there") from None
    for number, value in enumerate(values, 1):
        yield replace(_as_record(value, f"{label}:{number}", number, problem), note=note if number == 1 else None)


def _object_records(content: bytes, label: str) -> Iterator[Record | None]:
    """Records of JSON objects that follow each other, each over several lines. None where that fails."""
    decode = _DECODER.raw_decode
    try:
        text, problem = _decoded(content)
        place, line, number = _SPACE.match(text).end(), 1, 0  # type: ignore[union-attr]
        line += text.count("\n", 0, place)
        while place < len(text):
            value, end = decode(text, place)
            number += 1
            note = f"{label} holds objects over several lines" if number == 1 else None
            yield replace(_as_record(value, f"{label}:{line}", number, problem), note=note)
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


def _parse(line: bytes, where: str, row: int) -> Record:
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


def _hub_records(source: SourceConfig) -> Iterator[Record]:
    try:
        from datasets import load_dataset

        names = {} if source.subset is None else {"name": source.subset}
        dataset = load_dataset(source.path, **names, split=source.split)
    except Exception as error:  # to the user every network, hub or format failure means the same: no data
        hint = "; set the source's subset" if "onfig name is missing" in str(error) else ""
        raise DataError(
            f"there is no file {source.path!r}, and the hub does not give split {source.split!r} of a data set "
            f"of that name: {reason(error)}{hint}"
        ) from None
    label = f"{source.path}[{source.split}]"
    for row, (value, absent) in enumerate(_explained(_hub_rows(dataset), label), 1):
        yield Record(f"{label}:{row}", row, value, absent=absent)


def _hub_rows(dataset: Any) -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
    """Rows as Arrow holds them: no image is decoded, and nulls are told from absent fields as in files."""
    for table in dataset.with_format("arrow").iter(BATCH_ROWS):
        yield from rows(table)
