"""One block of a tokenised set: the pairs of successive lines of one file, in two files.

The block itself is Parquet and holds the token ids. Its index is an uncompressed Arrow file, to be mapped, with the light
columns and, in its metadata, the block's part of the report. Light columns are in the index only, which is half as large as
the block: without its index a block is made again. Each file has the checksum of its bytes in its name, and the set's digest
and the span in its metadata.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from raydpo.data.rows import LIGHT_SCHEMA, TOKEN_SCHEMA, Rows
from raydpo.data.tally import SourceReport
from raydpo.errors import CacheError, RaydpoError, one_line
from raydpo.storage.content import checksum

__all__ = ["BlockInfo", "DamagedBlock", "Index", "Span", "decode", "decode_index", "decode_tokens", "encode", "table_bytes"]

_FORMAT, _SET, _SPAN, _ABOUT = b"raydpo.format", b"raydpo.set", b"raydpo.span", b"raydpo.about"
FORMAT_VERSION = b"1"
_NAME = re.compile(
    r"(?P<block>(?P<file>\d{5,})-(?P<start>\d{12,})-(?P<stop>\d{12,})-(?P<pairs>\d+)-(?P<checksum>[0-9a-f]{32}))"
    r"-(?P<index>[0-9a-f]{32})\.arrow"
)


class DamagedBlock(CacheError):
    """A file of a set that is damaged, or that belongs to another set or block."""


class Span(NamedTuple):
    """Lines or rows ``start <= line < stop`` of one file of a source, counted from 0. The next block of the file starts at
    ``stop``."""

    file: int
    start: int
    stop: int


@dataclass(frozen=True)
class BlockInfo:
    """What the names of a block's files say.

    Attributes:
        pairs: number of its pairs.
        name: ``<file>-<start>-<stop>-<pairs>-<checksum of the block>``.
        index: file name of its index, ``<name>-<checksum of the index>.arrow``.
    """

    span: Span
    pairs: int
    name: str
    index: str

    @property
    def file(self) -> str:
        """File name of the block."""
        return f"{self.name}.parquet"

    @classmethod
    def of(cls, index: str) -> BlockInfo | None:
        """The block whose index has this file name; None if it is no name of an index."""
        match = _NAME.fullmatch(index)
        if match is None:
            return None
        span = Span(*(int(match[part]) for part in ("file", "start", "stop")))
        return cls(span, int(match["pairs"]), match["block"], index)

    def index_is_sound(self, data: bytes | pa.Buffer) -> bool:
        """Whether these are the bytes of the index that were written."""
        return self.index == f"{self.name}-{checksum(data)}.arrow"

    def is_sound(self, data: bytes | pa.Buffer) -> bool:
        """Whether these are the bytes of the block that were written."""
        return self.name.endswith(f"-{checksum(data)}")


@dataclass(frozen=True)
class Index:
    """Content of an index: all of ``Rows`` but the tokens."""

    light: pa.Table
    labels: tuple[str, ...]
    sources: tuple[str, ...]
    account: SourceReport


def encode(rows: Rows, digest: str, span: Span) -> tuple[BlockInfo, bytes, pa.Buffer]:
    """Encode pairs as a block of set ``digest``.

    Returns:
        Its names, the bytes of the block and those of its index. Equal rows give equal bytes.

    Raises:
        ValueError: if the span is empty, or the tables have other columns, nulls or different numbers of rows.
    """
    if not 0 <= span.start < span.stop:
        raise ValueError(f"a block of lines {span.start:,} to {span.stop:,}; it should hold at least one")
    light, tokens = _checked(rows.light, LIGHT_SCHEMA), _checked(rows.tokens, TOKEN_SCHEMA)
    if light.num_rows != tokens.num_rows:
        raise ValueError(f"{light.num_rows:,} light rows and {tokens.num_rows:,} rows of tokens; there should be as many")
    metadata = {_FORMAT: FORMAT_VERSION, _SET: digest.encode(), _SPAN: json.dumps(span).encode()}
    about = {"labels": rows.labels, "sources": rows.sources, "account": rows.account.to_state()}
    sink = io.BytesIO()
    # The high bytes of ids are nearly all zero; stored together they compress to nothing.
    pq.write_table(
        tokens.replace_schema_metadata(metadata),
        sink,
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
        column_encoding={f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in TOKEN_SCHEMA.names},
    )
    block = sink.getvalue()
    index = table_bytes(light.replace_schema_metadata(metadata | {_ABOUT: json.dumps(about).encode()}))
    name = f"{span.file:05d}-{span.start:012d}-{span.stop:012d}-{light.num_rows}-{checksum(block)}"
    return BlockInfo(span, light.num_rows, name, f"{name}-{checksum(index)}.arrow"), block, index


def decode_index(info: BlockInfo, digest: str, data: pa.Buffer) -> Index:
    """Decode an index from its bytes, whose checksum is right, without copying them.

    Raises:
        DamagedBlock: if they are of another set or block.
        CacheError: if they cannot be read here, for instance because a newer raydpo wrote them.
    """
    with _readable(info.index):
        light = pa.ipc.open_file(pa.BufferReader(data)).read_all()
        metadata = light.schema.metadata or {}
        _check_origin(info, digest, metadata, light.num_rows)
        about = json.loads(metadata[_ABOUT])
        account = SourceReport.from_state(about["account"])
        return Index(light.replace_schema_metadata(None), tuple(about["labels"]), tuple(about["sources"]), account)


def decode_tokens(info: BlockInfo, digest: str, data: bytes) -> pa.Table:
    """Decode a block from its bytes: a table of ``TOKEN_SCHEMA`` with at most one chunk.

    Raises:
        DamagedBlock: if the bytes are not the ones that were written, or are of another set or block.
        CacheError: if they cannot be read here, for instance because a newer raydpo wrote them.
    """
    if not info.is_sound(data):
        raise DamagedBlock(f"block {info.name} is damaged: its {len(data):,} bytes are not those that were written")
    with _readable(info.file):
        table = pq.read_table(pa.BufferReader(data))
        _check_origin(info, digest, table.schema.metadata or {}, table.num_rows)
        return table.replace_schema_metadata(None).cast(TOKEN_SCHEMA).combine_chunks()


def decode(info: BlockInfo, digest: str, block: bytes, index: pa.Buffer) -> Rows:
    """The rows that ``encode`` was given.

    Raises:
        DamagedBlock: if bytes are not the ones that were written.
        CacheError: as ``decode_index``.
    """
    if not info.index_is_sound(index):
        raise DamagedBlock(f"index {info.index} is damaged: its {len(index):,} bytes are not those that were written")
    found = decode_index(info, digest, index)
    return Rows(found.light, decode_tokens(info, digest, block), found.labels, found.sources, found.account)


def table_bytes(table: pa.Table) -> pa.Buffer:
    """A table as an uncompressed Arrow file with at most one batch, to be mapped."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return sink.getvalue()


def _checked(table: pa.Table, schema: pa.Schema) -> pa.Table:
    if table.column_names[: len(schema)] != schema.names or any(table.schema.field(each.name) != each for each in schema):
        raise ValueError(f"the columns {table.schema.to_string()}; there should be {schema.to_string()}")
    if nulls := [name for name in table.column_names if table[name].null_count]:
        raise ValueError(f"column {nulls[0]} has nulls")
    return table


def _check_origin(info: BlockInfo, digest: str, metadata: dict[bytes, bytes], rows: int) -> None:
    if metadata.get(_FORMAT) != FORMAT_VERSION:
        raise CacheError(f"block {info.name} has format {metadata.get(_FORMAT)!r}, this raydpo reads {FORMAT_VERSION!r}")
    if metadata[_SET] != digest.encode():
        raise DamagedBlock(f"block {info.name} is of set {metadata[_SET].decode()}, not of {digest}")
    if (span := Span(*json.loads(metadata[_SPAN]))) != info.span or rows != info.pairs:
        raise DamagedBlock(f"block {info.name} holds {rows:,} pairs of {span}, which its name does not say")


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn what libraries raise on a file that they cannot read into one sentence."""
    try:
        yield
    except (RaydpoError, MemoryError):
        raise
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError, AttributeError) as error:
        raise CacheError(f"{name} cannot be read: {one_line(error, 200)}") from None
