"""One file of the cache: Parquet with the identity in its metadata and the checksum of its bytes in its name.

A part holds either log-probs per token or, if imported from a trainer that keeps only totals, sums.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raydpo.errors import CacheError, RaydpoError, one_line
from raydpo.reference.identity import ReferenceIdentity
from raydpo.storage.content import checksum

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
"""Type of the key of a completion, see ``data.keys.completion_key``."""
PART_SCHEMA = pa.schema(
    [
        pa.field("key", KEY_TYPE, nullable=False),  # data.keys.completion_key of the completion before truncation
        pa.field("tokens", pa.int32(), nullable=False),  # number of its first tokens that were scored
        pa.field("logps", pa.list_(pa.float32()), nullable=False),  # natural-log probability of each of them
    ]
)
"""Columns of a part that was scored."""
SUM_SCHEMA = pa.schema(
    [PART_SCHEMA.field("key"), PART_SCHEMA.field("tokens"), pa.field("sum", pa.float64(), nullable=False)]
)  # over exactly this many tokens
"""Columns of a part of imported sums."""
_IDENTITY, _PROVENANCE = b"raydpo.identity", b"raydpo.provenance"
_FORMAT, _SUPERSEDES = b"raydpo.format", b"raydpo.supersedes"
FORMAT_VERSION = b"1"
COMPACTED = "compact0"
"""Takes the place of the builder in the name of a part that was merged from others."""
HIGHEST = 1e-3
"""Largest value accepted as a log-prob, nats. Rounding of an almost certain softmax may exceed 0 a little."""
_NAME = re.compile(r"part-(?P<time>\d{20})-(?P<builder>[0-9a-z]{8})-(?P<digest>[0-9a-f]{32})\.parquet")


class DamagedPart(CacheError):
    """A part whose bytes are not the ones that were written."""


@dataclass(frozen=True)
class PartInfo:
    """Content of the footer of a part.

    Attributes:
        per_token: whether it holds log-probs per token; else only sums.
        supersedes: names of the parts whose rows it contains.
    """

    name: str
    rows: int
    bytes: int
    identity: ReferenceIdentity
    provenance: dict[str, Any]
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
    """Whether this is the file name of a part."""
    return _NAME.fullmatch(name) is not None


def builder_of(name: str) -> str | None:
    """Builder of the part with this name: the tag of a build, ``COMPACTED``, or None if it is no name of a part."""
    match = _NAME.fullmatch(name)
    return match["builder"] if match else None


def part_time(name: str) -> int:
    """Nanoseconds since the epoch at which the part was written, by the clock of its builder."""
    return int(_NAME.fullmatch(name)["time"])


def digest_is_sound(name: str, data: bytes) -> bool:
    """Whether ``data`` have the checksum in the name."""
    match = _NAME.fullmatch(name)
    return match is not None and match["digest"] == checksum(data)


def encode_part(
    identity: ReferenceIdentity,
    keys: pa.Array,
    tokens: np.ndarray,
    values: pa.ListArray | np.ndarray,
    provenance: dict[str, object],
    *,
    builder: str,
    time_ns: int,
    supersedes: Sequence[str] = (),
) -> tuple[str, bytes]:
    """Encode rows as a part.

    Args:
        values: log-probs per token, list<float32>, or sums, float64.

    Returns:
        Name and bytes of the part.

    Raises:
        CacheError: if a value is not a log-prob.
    """
    per_token = not isinstance(values, np.ndarray)
    schema = PART_SCHEMA if per_token else SUM_SCHEMA
    table = pa.table(
        [keys, pa.array(tokens, pa.int32()), values if per_token else pa.array(values, pa.float64())],
        schema=schema.with_metadata(
            {
                _FORMAT: FORMAT_VERSION,
                _IDENTITY: identity.to_json().encode(),
                _PROVENANCE: json.dumps(provenance, sort_keys=True).encode(),
                _SUPERSEDES: json.dumps(sorted(supersedes)).encode(),
            }
        ),
    )
    if problem := _wrong_value(table):
        raise CacheError(
            f"{problem}; nothing of this part was stored. Score in float32 (score.dtype=float32) or check the weights"
        )
    sink = io.BytesIO()
    # Byte-stream split stores the exponents of all floats together, which zstd compresses well. Page checksums tell where
    # a damaged file is damaged.
    column = "logps.list.element" if per_token else "sum"
    pq.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=False,
        write_page_checksum=True,
        column_encoding={column: "BYTE_STREAM_SPLIT", "tokens": "PLAIN", "key": "PLAIN"},
    )
    data = sink.getvalue()
    return f"part-{time_ns:020d}-{builder}-{checksum(data)}.parquet", data


def decode_part(name: str, data: bytes, *, values: bool = True) -> Part:
    """Decode the part ``name`` from its bytes; with ``values=False`` only its keys and tokens.

    Raises:
        DamagedPart: if the bytes are not the ones that were written.
        CacheError: if they are, but cannot be read here, for instance because a newer raydpo wrote them.
    """
    if not digest_is_sound(name, data):
        raise DamagedPart(f"part {name} is damaged: its {len(data):,} bytes are not those that were written")
    info = read_footer(name, pa.BufferReader(data), len(data))
    schema = PART_SCHEMA if info.per_token else SUM_SCHEMA
    columns = [column for column in schema.names if values or column in ("key", "tokens")]
    try:
        table = pq.read_table(pa.BufferReader(data), columns=columns, page_checksum_verification=True)
        table = table.cast(pa.schema([schema.field(column) for column in columns])).combine_chunks()
    except MemoryError:
        raise  # also an ArrowException, but no fault of the part
    except (OSError, pa.ArrowException, ValueError) as error:
        raise CacheError(f"part {name} cannot be read: {one_line(error, 200)}") from None
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
    """Read the footer of a part without its rows.

    Raises:
        CacheError: if it cannot be read, or has another format.
    """
    try:
        parquet = pq.ParquetFile(stream)
        metadata = parquet.schema_arrow.metadata or {}
        if metadata.get(_FORMAT) != FORMAT_VERSION:
            raise CacheError(f"part {name} has format {metadata.get(_FORMAT)!r}, this raydpo reads {FORMAT_VERSION!r}")
        return PartInfo(
            name,
            parquet.metadata.num_rows,
            size,
            ReferenceIdentity.from_json(metadata[_IDENTITY]),
            json.loads(metadata.get(_PROVENANCE, b"{}")),
            tuple(json.loads(metadata.get(_SUPERSEDES, b"[]"))),
            "logps" in parquet.schema_arrow.names,
        )
    except (RaydpoError, MemoryError):
        raise
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
        raise CacheError(f"part {name} cannot be read: {one_line(error, 200)}") from None


def ragged(rows: Sequence[np.ndarray]) -> pa.ListArray:
    """Build a list<float32> array with one row per float array."""
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(rows), pa.float32()))


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
    # min and max propagate NaN, so the usual, sound case needs no mask of the size of the data.
    if len(flat) and not (np.isfinite(flat.min()) and flat.max() <= HIGHEST):
        bad = flat[~np.isfinite(flat) | (flat > HIGHEST)]
        return f"the value {bad[0]} is no log-prob"
    return None


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # which would copy
