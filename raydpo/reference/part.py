"""One file of the cache: Parquet that carries its identity inside and the checksum of all its bytes in its name.

A part holds rows either of per-token log-probs or, if they were imported from a trainer that keeps only totals, of sums.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raydpo.errors import CacheError, RaydpoError
from raydpo.reference.identity import ReferenceIdentity

__all__ = [
    "COMPACTED",
    "HIGHEST",
    "KEY_TYPE",
    "PART_SCHEMA",
    "SUM_SCHEMA",
    "DamagedPart",
    "Part",
    "PartInfo",
    "builder_of",
    "decode_part",
    "digest_is_sound",
    "encode_part",
    "is_part",
    "part_time",
    "ragged",
    "read_footer",
]

KEY_TYPE = pa.binary(16)
"""Of the name of a completion, see ``data.keys.completion_key``."""
PART_SCHEMA = pa.schema([
    pa.field("key", KEY_TYPE, nullable=False),  # data.keys.completion_key: of the completion before truncation
    pa.field("tokens", pa.int32(), nullable=False),  # how many of its first tokens were scored
    pa.field("logps", pa.list_(pa.float32()), nullable=False),  # natural-log probability of each of them
])
"""Of a part that was scored."""
SUM_SCHEMA = pa.schema([PART_SCHEMA.field("key"), PART_SCHEMA.field("tokens"),
                        pa.field("sum", pa.float64(), nullable=False)])  # over exactly so many tokens
"""Of a part of imported sums."""
_IDENTITY, _PROVENANCE, _FORMAT, _SUPERSEDES = (b"raydpo.identity", b"raydpo.provenance", b"raydpo.format",
                                                b"raydpo.supersedes")
FORMAT_VERSION = b"1"
COMPACTED = "compact0"
"""Stands in the name of a part in the place of its builder if it was made of other parts."""
HIGHEST = 1e-3
"""A log-prob is at most 0, but for the rounding of a softmax that is all but sure."""
# Names of raydpo 0.1's first caches lack the checksum; page checksums inside guard their values.
_NAME = re.compile(r"part-(?P<time>\d{20})-(?:(?P<builder>[0-9a-z]{8})-(?P<digest>[0-9a-f]{32})|[0-9a-f]{12})\.parquet")


class DamagedPart(CacheError):
    """A part whose bytes are not those that were written."""


@dataclass(frozen=True)
class PartInfo:
    """What the footer of a part says.

    Attributes:
        per_token: whether it holds log-probs of tokens, else only sums.
        supersedes: names of the parts whose rows it took over.
    """

    name: str
    rows: int
    bytes: int
    identity: ReferenceIdentity
    provenance: dict[str, object]
    supersedes: tuple[str, ...] = ()
    per_token: bool = True


@dataclass(frozen=True)
class Part:
    """A part in memory: ``keys`` and ``tokens`` [rows], and ``logps`` (list<float32>) or ``sums`` (float64 [rows])."""

    info: PartInfo
    keys: pa.FixedSizeBinaryArray
    tokens: np.ndarray
    logps: pa.ListArray | None = None
    sums: np.ndarray | None = None


def is_part(name: str) -> bool:
    """Whether a file is named as parts are."""
    return _NAME.fullmatch(name) is not None


def builder_of(name: str) -> str | None:
    """Who wrote the part of this name: the tag of one build, or ``COMPACTED``."""
    match = _NAME.fullmatch(name)
    return match["builder"] if match else None


def part_time(name: str) -> int:
    """Nanoseconds since the epoch by the clock of its builder."""
    match = _NAME.fullmatch(name)
    return int(match["time"]) if match else 0


def digest_is_sound(name: str, data: bytes) -> bool:
    """Whether ``data`` are the very bytes that were written under this name, as far as the name tells."""
    match = _NAME.fullmatch(name)
    return match is not None and (match["digest"] is None or match["digest"] == _checksum(data))


def encode_part(identity: ReferenceIdentity, keys: pa.Array, tokens: np.ndarray, values: pa.ListArray | np.ndarray,
                provenance: dict[str, object], *, builder: str, time_ns: int,
                supersedes: Sequence[str] = ()) -> tuple[str, bytes]:
    """Name and bytes of a part with these rows.

    Args:
        values: list<float32> log-probs of each token, or float64 sums.

    Raises:
        CacheError: if a value is not a log-prob.
    """
    per_token = not isinstance(values, np.ndarray)
    schema = PART_SCHEMA if per_token else SUM_SCHEMA
    table = pa.table([keys, pa.array(tokens, pa.int32()), values if per_token else pa.array(values, pa.float64())],
                     schema=schema.with_metadata({
                         _FORMAT: FORMAT_VERSION, _IDENTITY: identity.to_json().encode(),
                         _PROVENANCE: json.dumps(provenance, sort_keys=True).encode(),
                         _SUPERSEDES: json.dumps(sorted(supersedes)).encode()}))
    problem = _wrong_value(table)
    if problem:
        raise CacheError(f"{problem}; nothing of this part was stored. Score in float32 (score.dtype=float32) or check the "
                         "weights")
    sink = io.BytesIO()
    # Byte-stream split gathers the exponents of neighbouring floats, which zstd then shortens; page checksums say where
    # a file that the checksum in its name condemns is broken.
    column = "logps.list.element" if per_token else "sum"
    pq.write_table(table, sink, compression="zstd", use_dictionary=False, write_page_checksum=True,
                   column_encoding={column: "BYTE_STREAM_SPLIT", "tokens": "PLAIN", "key": "PLAIN"})
    data = sink.getvalue()
    return f"part-{time_ns:020d}-{builder}-{_checksum(data)}.parquet", data


def decode_part(name: str, data: bytes, *, values: bool = True) -> Part:
    """The part ``name`` from its bytes; without its log-probs unless ``values``.

    Raises:
        DamagedPart: if the bytes are not those that were written, in one sentence that names the part.
        CacheError: if they are, and cannot be read here, for instance because a newer raydpo wrote them.
    """
    if not digest_is_sound(name, data):
        raise DamagedPart(f"part {name} is damaged: its {len(data):,} bytes are not those that were written"
                         f"{_whereabouts(data)}")
    try:
        return _decoded(name, data, values)
    except CacheError as error:
        if _NAME.fullmatch(name)["digest"]:
            raise
        raise DamagedPart(str(error)) from None  # a name without a checksum has proved nothing


def _decoded(name: str, data: bytes, values: bool) -> Part:
    info = read_footer(name, pa.BufferReader(data), len(data))
    schema = PART_SCHEMA if info.per_token else SUM_SCHEMA
    columns = [column for column in schema.names if values or column in ("key", "tokens")]
    try:
        table = pq.read_table(pa.BufferReader(data), columns=columns, page_checksum_verification=True)
        table = table.cast(pa.schema([schema.field(column) for column in columns])).combine_chunks()
    except MemoryError:
        raise  # also an ArrowException, which says nothing about the part
    except (OSError, pa.ArrowException, ValueError) as error:
        raise CacheError(f"part {name} cannot be read: {_one_line(error)}") from None
    problem = _wrong_value(table) if values else None
    if problem:
        raise CacheError(f"part {name} cannot be read: {problem}")
    keys, tokens = _one_array(table["key"]), table["tokens"].to_numpy()
    if not values:
        return Part(info, keys, tokens)
    if info.per_token:
        return Part(info, keys, tokens, logps=_one_array(table["logps"]))
    return Part(info, keys, tokens, sums=table["sum"].to_numpy())


def read_footer(name: str, stream: object, size: int) -> PartInfo:
    """What the footer says; the rows are not looked at.

    Raises:
        CacheError: if it cannot be read, or is of another format.
    """
    try:
        parquet = pq.ParquetFile(stream)
        metadata = parquet.schema_arrow.metadata or {}
        if metadata.get(_FORMAT) != FORMAT_VERSION:
            raise CacheError(f"part {name} has format {metadata.get(_FORMAT)!r}, this raydpo reads {FORMAT_VERSION!r}")
        return PartInfo(name, parquet.metadata.num_rows, size, ReferenceIdentity.from_json(metadata[_IDENTITY]),
                        json.loads(metadata.get(_PROVENANCE, b"{}")), tuple(json.loads(metadata.get(_SUPERSEDES, b"[]"))),
                        "logps" in parquet.schema_arrow.names)
    except (RaydpoError, MemoryError):
        raise
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
        raise CacheError(f"part {name} cannot be read: {_one_line(error)}") from None


def ragged(rows: Sequence[np.ndarray]) -> pa.ListArray:
    """One list<float32> row for each float array."""
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(rows), pa.float32()))


def _checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _whereabouts(data: bytes) -> str:
    if not data:
        return " (the file is empty)"
    return "" if data[-4:] == b"PAR1" else " (its end is missing)"


def _wrong_value(table: pa.Table) -> str | None:
    """What is wrong with the values of a part, or None."""
    tokens = table["tokens"]
    if table.num_rows and pc.min(tokens).as_py() < 1:
        return "it holds no value for a completion"
    if "logps" in table.column_names:
        if not pc.all(pc.equal(pc.list_value_length(table["logps"]), tokens), min_count=0).as_py():
            return "it holds log-probs whose number differs from its token counts"
        flat = pc.list_flatten(table["logps"]).to_numpy()
    else:
        flat = table["sum"].to_numpy()
    # min and max carry a NaN on: no mask of the size of the data is made for the usual, sound case.
    if len(flat) and not (np.isfinite(flat.min()) and flat.max() <= HIGHEST):
        bad = flat[~np.isfinite(flat) | (flat > HIGHEST)]
        return f"the value {bad[0]} is no log-prob"
    return None


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks) if column.num_chunks else (
        pa.array([], column.type))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
