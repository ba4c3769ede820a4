"""Cut the files of a source into pieces of whole lines or rows, which any process turns into records."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from raydpo.config import SourceConfig
from raydpo.config.data import COMPRESSION_SUFFIXES, DATA_SUFFIXES, bare_suffix
from raydpo.data.arrow import rows as rows_of
from raydpo.data.locate import DataFile, data_files, hub_dataset, is_on_hub
from raydpo.data.parse import BOM, INVALID, Record, list_records, object_records, parse
from raydpo.errors import DataError, RaydpoError, reason
from raydpo.storage.pointers import is_pointer

__all__ = ["Piece", "Sizes", "explained", "pieces_of"]

BATCH_ROWS = 1000
_READ_BYTES = io.DEFAULT_BUFFER_SIZE
"""Bytes that are read at once. Of a damaged file more lines are lost if it is more."""
_PACKED = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"BZh": ".bz2", b"\xfd7zXZ\0": ".xz"}
"""First bytes of compressed files."""


@dataclass(frozen=True)
class Sizes:
    """Where pieces end. It depends on nothing but the file, so that each reader cuts it in the same places.

    Attributes:
        first: bytes of the second piece of a file.
        most: bytes of the largest. Sizes grow in proportion to what lies before, from ``first`` up to this.
        lines: lines or rows of a piece.
        first_lines: lines or rows of the first piece of a file, which may have as many bytes as the largest.
    """

    first: int
    most: int
    lines: int
    first_lines: int

    def at(self, position: int) -> tuple[int, int]:
        """Bytes and lines of the piece that begins at this byte."""
        if not position:
            return self.most, self.first_lines
        return min(self.most, max(self.first, position // 16)), self.lines


@dataclass(frozen=True)
class Piece:
    """Successive lines or rows of one file of a source, with at least one record.

    Attributes:
        file: number of the file in the source, from 0.
        label: its name for messages.
        start, stop: the lines or rows are those with ``start < number <= stop``, counted from 1 in each file.
        before: records are numbered through all files of a source; this is added to the number in this file.
        records: number of records, 0 only in a part of a piece.
        last: number in the file of the last record.
        content: whole lines; Arrow batches as a stream of Arrow IPC; or the records.
        is_lines: whether it is whole lines.
        note: how the file was understood; for its first record.
        read: bytes of the source that have been read so far, as they are stored.
    """

    file: int
    label: str
    start: int
    stop: int
    records: int
    last: int
    content: bytes | tuple[Record, ...]
    is_lines: bool = False
    before: int = 0
    note: str | None = None
    read: int = 0

    def parsed(self) -> Iterator[Record]:
        """Yield the records.

        Raises:
            DataError: if a value has no counterpart in Python.
        """
        records = _noted(explained(self._parsed(), self.label), self.note)
        yield from (replace(record, row=self.before + record.row) for record in records) if self.before else records

    def _parsed(self) -> Iterator[Record]:
        if not isinstance(self.content, bytes):
            yield from self.content
        elif self.is_lines:
            for number, line in enumerate(io.BytesIO(self.content), self.start + 1):
                if not line.isspace():
                    yield parse(line, f"{self.label}:{number}", number)
        else:
            number = self.start
            for batch in pa.ipc.open_stream(self.content):
                for value, absent in rows_of(batch):
                    number += 1
                    yield Record(f"{self.label}:{number}", number, value, absent=absent)

    def first(self, records: int) -> Piece:
        """The part with the first ``records`` records."""
        if records >= self.records:
            return self
        if self.is_lines:
            lines = (number for number, line in enumerate(io.BytesIO(self.content), 1) if not line.isspace())
            return self.part(self.start, self.start + next(islice(lines, records - 1, None)))
        return self.part(self.start, self.start + records)

    def part(self, start: int, stop: int) -> Piece:
        """The part with lines or rows ``start < number <= stop``."""
        if (start, stop) == (self.start, self.stop):
            return self
        note, low, high = self.note if start == self.start else None, start - self.start, stop - self.start
        if not isinstance(self.content, bytes):
            content: Any = self.content[low:high]
            records, last = len(content), stop
        elif self.is_lines:
            lines = list(islice(io.BytesIO(self.content), low, high))
            content, (records, last) = b"".join(lines), _count(lines, start)
        else:
            content = _ipc(pa.ipc.open_stream(self.content).read_all().slice(low, high - low).to_batches())
            records, last = high - low, stop
        return replace(self, start=start, stop=stop, records=records, last=last, content=content, note=note)


def pieces_of(source: SourceConfig, sizes: Sizes) -> Iterator[Piece]:
    """Yield the pieces of a source, in order. They hold every record, or the first ``limit``.

    Raises:
        DataError: if the source cannot be read.
    """
    left = source.limit
    for piece in _all_pieces(source, sizes):
        if left is not None:
            piece = piece.first(left)
            left -= piece.records
        yield piece
        if left == 0:
            return


def _all_pieces(source: SourceConfig, sizes: Sizes) -> Iterator[Piece]:
    if is_on_hub(source):
        dataset, label = hub_dataset(source), f"{source.path}[{source.split}]"
        # Rows as Arrow holds them: no image is decoded, and nulls are told from absent fields as in files.
        tables = dataset.with_format("arrow").iter(BATCH_ROWS)
        batches = (batch for table in tables for batch in table.to_batches())
        yield from explained(_arrow_pieces(batches, label, sizes, lambda done: 0), label)
        return
    before = read = 0
    for number, file in enumerate(data_files(source)):
        last = size = 0
        for piece in _noted(explained(_file_pieces(file, sizes), file.label), file.note):
            last, size = piece.last, piece.read
            yield replace(piece, file=number, before=before, read=read + size)
        before += last
        read += size


def explained(found: Iterable[Any], label: str) -> Iterator[Any]:
    """``found``, with any error of a file system, codec or parser turned into one sentence."""
    try:
        yield from found
    except RaydpoError:
        raise
    except Exception as error:
        raise DataError(f"cannot read {label}: {reason(error)}") from None


def _noted(found: Iterator[Any], note: str | None) -> Iterator[Any]:
    """Pieces or records, the first with ``note`` before its own."""
    if note is not None and (first := next(found, None)) is not None:
        yield replace(first, note=f"{note}; {first.note}" if first.note else note)
    yield from found


def _file_pieces(file: DataFile, sizes: Sizes) -> Iterator[Piece]:
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
        size = raw.size()

        def at(done: int = 0) -> int:  # a stream that has been read to its end may have closed the file
            return size * done // rows if rows else size if raw.closed else raw.tell()

        rows = 0
        if head.startswith((b"PAR1", b"ARROW1")) or kind.endswith((".parquet", ".arrow")):
            stream = pa.BufferReader(_bytes(raw, packed).read()) if packed else raw
            batches, rows = _batches(stream, parquet=head.startswith(b"PAR1") or kind.endswith(".parquet"))
            pieces = _arrow_pieces(batches, label, sizes, at)
        else:
            pieces = _json_pieces(_bytes(raw, packed), label, sizes, at, listed=kind.endswith(".json"))
        yield from _noted(pieces, note)


def _bytes(raw: pa.NativeFile, suffix: str) -> IO[bytes]:
    """Stream of the content of a file, compressed as ``suffix`` says."""
    if suffix == ".gz":
        return gzip.open(raw)
    if suffix == ".bz2":
        return bz2.open(raw)
    if suffix == ".xz":
        return lzma.open(raw)
    return io.BufferedReader(pa.CompressedInputStream(raw, "zstd") if suffix == ".zst" else raw)


def _batches(stream: Any, *, parquet: bool) -> tuple[Iterator[pa.RecordBatch], int]:
    """Batches of a Parquet file, or of an Arrow file in either of its two formats, and its rows, 0 if unknown."""
    if parquet:
        file = pq.ParquetFile(stream)
        return file.iter_batches(batch_size=BATCH_ROWS), file.metadata.num_rows
    streamed = stream.read(6) != b"ARROW1"
    stream.seek(0)
    if streamed:
        return iter(pa.ipc.open_stream(stream)), 0
    file = pa.ipc.open_file(stream)
    return (file.get_batch(number) for number in range(file.num_record_batches)), 0


def _arrow_pieces(batches: Iterable[pa.RecordBatch], label: str, sizes: Sizes, at: Callable[[int], int]) -> Iterator[Piece]:
    """Pieces of a table.

    Args:
        at: gives the bytes that have been read, from the number of rows that have been.
    """
    held: list[pa.RecordBatch] = []
    start = stop = size = position = 0

    def piece() -> Piece:
        return Piece(0, label, start, stop, stop - start, stop, _ipc(held), read=at(stop))

    failed = None
    try:
        for batch in batches:
            if twice := [name for name, count in Counter(batch.schema.names).items() if count > 1]:
                raise DataError(f"{label} has more than one column {twice[0][:40]!r}; rename or drop all but one")
            a_row, done = max(1, batch.nbytes // max(1, batch.num_rows)), 0
            while done < batch.num_rows:
                most, lines = sizes.at(position)
                taken = batch.slice(done, max(1, min(-(-(most - size) // a_row), lines - (stop - start))))
                held.append(taken)
                done += taken.num_rows
                stop += taken.num_rows
                size += taken.num_rows * a_row
                if size >= most or stop - start >= lines:
                    yield piece()
                    held, start, position, size = [], stop, position + size, 0
    except Exception as error:  # what was read before it is whole
        failed = error
    if held:
        yield piece()
    if failed is not None:
        raise failed


def _ipc(batches: list[pa.RecordBatch]) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _json_pieces(stream: IO[bytes], label: str, sizes: Sizes, at: Callable[[], int], *, listed: bool) -> Iterator[Piece]:
    """Pieces of JSON lines, of one JSON list, or of objects over several lines, whatever the file is called."""
    head, note = list(_to_first_text(stream)), None
    if head and (head[0].startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head[0][:4]):
        stream, note = _recoded(b"".join((*head, stream.read())), label)
        head = list(_to_first_text(stream))
    yield from _noted(_utf8_pieces(head, stream, label, sizes, at, listed=listed), note)


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


def _utf8_pieces(
    head: list[bytes], stream: IO[bytes], label: str, sizes: Sizes, at: Callable[[], int], *, listed: bool
) -> Iterator[Piece]:
    first = head[-1].removeprefix(BOM).lstrip() if head else b""
    if first.startswith(b"["):
        content = b"".join((*head, stream.read()))
        note = None if listed else f"{label} is a JSON list, though not named so"
        try:
            yield from _noted(_parsed_pieces(list_records(content, label), label, sizes, len(content), at()), note)
            return
        except DataError:
            if listed or parse(head[-1], "", len(head)).problem == INVALID:
                raise
        head, stream = [], io.BytesIO(content)
    elif first.startswith(b"{") and parse(head[-1], "", len(head)).problem == INVALID:
        content = b"".join((*head, stream.read()))
        objects = list(object_records(content, label))
        if objects and objects[-1] is not None:
            pieces = _parsed_pieces(iter(objects), label, sizes, len(content), at())
            yield from _noted(pieces, f"{label} holds objects over several lines")
            return
        head, stream = [], io.BytesIO(content)
    yield from _line_pieces(b"".join(head), stream, label, sizes, at)


def _to_first_text(stream: IO[bytes]) -> Iterator[bytes]:
    """The lines up to the first that is not blank."""
    for line in stream:
        yield line
        if line.removeprefix(BOM).strip():
            return


def _parsed_pieces(records: Iterator[Record], label: str, sizes: Sizes, size: int, read: int) -> Iterator[Piece]:
    """Pieces of records of a file of ``size`` bytes, of which ``read`` are stored."""
    found = list(records)
    a_record, start, position = max(1, size // max(1, len(found))), 0, 0
    while start < len(found):
        most, lines = sizes.at(position)
        stop = min(len(found), start + max(1, min(lines, -(-most // a_record))))
        content = tuple(found[start:stop])
        yield Piece(0, label, start, stop, stop - start, stop, content, read=read * stop // len(found))
        start, position = stop, position + (stop - start) * a_record


def _line_pieces(head: bytes, stream: IO[bytes], label: str, sizes: Sizes, at: Callable[[], int]) -> Iterator[Piece]:
    """Pieces of JSON lines. Lines without text belong to the piece of the next record."""
    start = stop = 0
    held: list[bytes] = []
    for lines in _whole_lines(head, stream, sizes):
        held.append(lines)
        records, last = _count(io.BytesIO(lines), stop)
        stop += lines.count(b"\n") + (not lines.endswith(b"\n"))
        if records:
            yield Piece(0, label, start, stop, records, last, b"".join(held), is_lines=True, read=at())
            held, start = [], stop


def _count(lines: Iterable[bytes], before: int) -> tuple[int, int]:
    """How many of successive lines have text, and the number of the last that has; 0 if none."""
    with_text = [number for number, line in enumerate(lines, before + 1) if not line.isspace()]
    return len(with_text), with_text[-1] if with_text else 0


def _whole_lines(head: bytes, stream: IO[bytes], sizes: Sizes) -> Iterator[bytes]:
    """The content of a stream, cut after the line that reaches the size of a piece or is the last that it may have.

    An error of the stream is raised after the lines before it.
    """
    held, position, ended, failed = bytearray(head), 0, False, None
    count = searched = 0  # line ends in the first ``searched`` bytes of ``held``
    while not ended or held:
        most, lines = sizes.at(position)
        count += held.count(b"\n", searched)
        searched = len(held)
        if not ended and count < lines and held.find(b"\n", most - 1) < 0:
            try:
                more = stream.read1(_READ_BYTES)  # type: ignore[attr-defined]
            except Exception as error:
                failed, more = error, b""
                del held[held.rfind(b"\n") + 1 :]
                searched = len(held)
            ended = not more
            held += more
            continue
        end = held.find(b"\n", most - 1) + 1 or len(held)
        if count >= lines:
            place = 0
            for _ in range(lines):
                place = held.find(b"\n", place) + 1
            end = min(end, place)
        yield bytes(held[:end])
        count -= held.count(b"\n", 0, end)
        del held[:end]
        searched -= end
        position += end
    if failed is not None:
        raise failed
