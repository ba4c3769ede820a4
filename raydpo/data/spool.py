"""Tables larger than memory: columns are appended to files, and read back as one memory-mapped Arrow table."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from raydpo.errors import RaydpoError

__all__ = ["Spool", "room_for", "spooled"]

MOST_SMALL = 2**31 - 1
"""Values of a list or string column above which its offsets take 64 bits."""


def spooled(tables: Iterable[pa.Table], schema: pa.Schema) -> pa.Table:
    """Write all rows of ``tables`` to a temporary file and return them as one table with one chunk per column."""
    spool = Spool(schema)
    for table in tables:
        spool.append(table)
    return spool.finish()


class Spool:
    """Collects tables of one schema, without nulls, into one. Only the table being appended is in memory; the rest lies in
    unnamed files in the system's directory for temporary files ($TMPDIR).

    Args:
        schema: fixed-width columns, strings, and lists of fixed-width values.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema
        self.rows = 0
        self._values = [_file() for _ in schema]
        self._offsets = {index: _file() for index, field in enumerate(schema) if _is_ragged(field.type)}
        self._ends = dict.fromkeys(self._offsets, 0)
        for file in self._offsets.values():
            file.write(np.int64(0).tobytes())

    def append(self, table: pa.Table) -> None:
        """Append all rows of ``table``.

        Raises:
            RaydpoError: if the disk has no room for them.
        """
        with room_for("the tokenised pairs"):
            for batch in table.to_batches():
                for index, field in enumerate(self.schema):
                    column = batch.column(field.name)
                    self._append(index, column if _is_wide(column.type) else column.cast(field.type))
                self.rows += batch.num_rows

    def _append(self, index: int, column: pa.Array) -> None:
        if column.null_count:
            raise ValueError(f"column {self.schema.names[index]} has nulls")
        if index not in self._offsets:
            width = column.type.bit_width // 8
            self._values[index].write(memoryview(column.buffers()[1])[column.offset * width :][: len(column) * width])
            return
        if not len(column):
            return
        is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        kind = np.int64 if _is_wide(column.type) else np.int32
        offsets = np.frombuffer(column.buffers()[1], kind)[column.offset :][: len(column) + 1].astype(np.int64)
        width = 1 if is_text else column.type.value_type.bit_width // 8
        data = column.buffers()[2] if is_text else column.buffers()[-1]
        shift = 0 if is_text else column.values.offset
        self._values[index].write(memoryview(data)[(shift + offsets[0]) * width : (shift + offsets[-1]) * width])
        self._offsets[index].write((offsets[1:] - offsets[0] + self._ends[index]).tobytes())
        self._ends[index] += int(offsets[-1] - offsets[0])

    def finish(self) -> pa.Table:
        """Return the table. The spool cannot be used afterwards; its unnamed files are freed with the table.

        Raises:
            RaydpoError: if the disk has no room for the last rows.
        """
        with room_for("the tokenised pairs"):
            for file in (*self._values, *self._offsets.values()):
                file.flush()
        columns = []
        for index, field in enumerate(self.schema):
            values = _mapped(self._values[index])
            if index not in self._offsets:
                columns.append(pa.Array.from_buffers(field.type, self.rows, [None, values]))
                continue
            offsets, small = _mapped(self._offsets[index]), self._ends[index] <= MOST_SMALL
            if small:
                offsets = pa.py_buffer(np.frombuffer(offsets, np.int64).astype(np.int32))
            if pa.types.is_string(field.type):
                kind = pa.string() if small else pa.large_string()
                columns.append(pa.Array.from_buffers(kind, self.rows, [None, offsets, values]))
            else:
                inner = field.type.value_type
                flat = pa.Array.from_buffers(inner, self._ends[index], [None, values])
                kind = pa.list_(inner) if small else pa.large_list(inner)
                columns.append(pa.Array.from_buffers(kind, self.rows, [None, offsets], children=[flat]))
        return pa.table(columns, names=self.schema.names)


def _file() -> BinaryIO:
    return tempfile.TemporaryFile(prefix="raydpo-")


@contextlib.contextmanager
def room_for(what: str, where: str | None = None) -> Iterator[None]:
    """Turn the error of a full disk into a sentence.

    Args:
        where: directory that is written to; None = the system's directory for temporary files.

    Raises:
        RaydpoError: in place of the system's error.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        move = ", or set TMPDIR to a directory on a larger disk" if where is None else ""
        raise RaydpoError(
            f"there is no room for {what} in {where or tempfile.gettempdir()} ({error.strerror}); nothing stored is lost. "
            f"Free some space there{move}"
        ) from None


def _mapped(file: BinaryIO) -> pa.Buffer:
    size = os.fstat(file.fileno()).st_size
    with file:
        return pa.py_buffer(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b"")


def _is_wide(kind: pa.DataType) -> bool:
    """Whether it is the type that ``finish`` gives a column of more than ``MOST_SMALL`` values."""
    return pa.types.is_large_list(kind) or pa.types.is_large_string(kind)


def _is_ragged(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_string(kind)
