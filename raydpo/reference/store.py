"""The reference cache: immutable Parquet parts of (completion key -> per-token log-probs), one directory an identity.

    <cache>/<identity digest>/identity.json       what the directory is, for people; not authoritative
    <cache>/<identity digest>/parts/part-*.parquet

A part counts if and only if its footer reads and the identity inside it is the one asked for. There is no manifest to
corrupt and no lock: two builders at worst score a row twice, and a reader takes the longest, then the first by name.
"""

from __future__ import annotations

import io
import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raydpo.errors import CacheError, RaydpoError
from raydpo.reference.identity import ReferenceIdentity
from raydpo.storage import Storage, remove_stale_temporaries

__all__ = ["PART_SCHEMA", "PartInfo", "ReferenceCache"]

KEY_TYPE = pa.binary(16)
PART_SCHEMA = pa.schema([
    pa.field("key", KEY_TYPE, nullable=False),  # data.keys.completion_key: of the completion before truncation
    pa.field("tokens", pa.int32(), nullable=False),  # how many of its first tokens were scored
    pa.field("logps", pa.list_(pa.float32()), nullable=False),  # natural-log probability of each of them
])
_IDENTITY, _PROVENANCE, _FORMAT = b"raydpo.identity", b"raydpo.provenance", b"raydpo.format"
FORMAT_VERSION = b"1"


@dataclass(frozen=True)
class PartInfo:
    """What the footer of one part says."""

    name: str
    rows: int
    bytes: int
    identity: ReferenceIdentity
    provenance: dict[str, object]


@dataclass
class _Contents:
    keys: pa.Array
    tokens: np.ndarray
    logps: pa.Array | None
    part_of_row: list[str] = field(default_factory=list)


class ReferenceCache:
    """The log-probs of one reference.

    Args:
        storage: the cache's root, which may hold other identities too.
        identity: whose log-probs are wanted.

    Attributes:
        problems: one sentence for each part that was set aside while reading.
    """

    def __init__(self, storage: Storage, identity: ReferenceIdentity) -> None:
        self.storage = storage
        self.identity = identity
        self.problems: list[str] = []

    @classmethod
    def open(cls, uri: str, identity: ReferenceIdentity | str | None = None) -> ReferenceCache:
        """Open the cache at ``uri`` for an identity, a prefix of its digest, or the only one there is.

        Raises:
            CacheError: if the choice is not unique.
        """
        storage = Storage(uri)
        if isinstance(identity, ReferenceIdentity):
            return cls(storage, identity)
        found = [one for one in cls.identities(storage) if one.digest.startswith(identity or "")]
        if len(found) != 1:
            wanted = f"that begin with {identity!r}" if identity else ""
            raise CacheError(f"the cache at {uri} holds {len(found)} identities {wanted}".rstrip() + (
                f" ({', '.join(one.digest for one in found)}); say which one" if found else
                "; build it with 'raydpo score'"))
        return cls(storage, found[0])

    @staticmethod
    def identities(storage: Storage) -> list[ReferenceIdentity]:
        """All identities of which the cache holds at least one readable part."""
        found = []
        for name in storage.list():
            for part in storage.list(f"{name}/parts") if len(name) == 32 else ():
                try:
                    identity = _read_info(storage, f"{name}/parts/{part}").identity
                except CacheError:
                    continue
                if identity.digest == name:
                    found.append(identity)
                    break
        return found

    @property
    def directory(self) -> str:
        return self.identity.digest

    # ---- writing

    def prepare(self, description: dict[str, object]) -> int:
        """Make the directory ready for a build: writable, described, free of what killed builders left half-written.

        Returns:
            Number of temporary files removed.
        """
        self.storage.probe()
        removed = remove_stale_temporaries(self.storage, self.directory)
        removed += remove_stale_temporaries(self.storage, f"{self.directory}/parts")
        if not self.storage.exists(f"{self.directory}/identity.json"):
            text = json.dumps({"identity": json.loads(self.identity.to_json())} | description, indent=2)
            self.storage.write(f"{self.directory}/identity.json", text.encode())
        return removed

    def commit(self, keys: Sequence[bytes], logps: Sequence[np.ndarray], provenance: dict[str, object]) -> str:
        """Write one part, whole or not at all, and return its name.

        Args:
            keys: one for each completion.
            logps: float32 [tokens] for each completion.

        Raises:
            CacheError: if a value is not a log-prob; nothing is written then.
        """
        for key, values in zip(keys, logps, strict=True):
            if not len(values) or not np.isfinite(values).all() or values.max() > 1e-3:
                raise CacheError(f"the reference gave {_describe_bad(values)} for completion {key.hex()}; nothing of "
                                 "this part was stored. Score in float32 (score.dtype=float32) or check the weights")
        offsets = np.concatenate([[0], np.cumsum([len(values) for values in logps])]).astype(np.int32)
        table = pa.table([
            pa.array(list(keys), KEY_TYPE),
            pa.array(np.diff(offsets), pa.int32()),
            pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(logps), pa.float32())),
        ], schema=PART_SCHEMA.with_metadata({
            _FORMAT: FORMAT_VERSION, _IDENTITY: self.identity.to_json().encode(),
            _PROVENANCE: json.dumps(provenance, sort_keys=True).encode(),
        }))
        sink = io.BytesIO()
        # Byte-stream split gathers the exponents of neighbouring floats, which zstd then shortens; page checksums
        # catch a flipped bit on reading.
        pq.write_table(table, sink, compression="zstd", use_dictionary=False, write_page_checksum=True,
                       column_encoding={"logps.list.element": "BYTE_STREAM_SPLIT", "tokens": "PLAIN", "key": "PLAIN"})
        name = f"part-{time.time_ns():020d}-{uuid.uuid4().hex[:12]}.parquet"
        self.storage.write(f"{self.directory}/parts/{name}", sink.getvalue())
        return name

    # ---- reading

    def parts(self) -> list[PartInfo]:
        """Every sound part in order of name; the others are named in ``problems``."""
        sound = []
        self.problems = []
        for name in self.storage.list(f"{self.directory}/parts"):
            if not name.endswith(".parquet") or name.startswith("."):
                continue
            try:
                info = _read_info(self.storage, f"{self.directory}/parts/{name}")
            except CacheError as error:
                self.problems.append(str(error))
                continue
            if info.identity != self.identity:
                self.problems.append(
                    f"part {name} in {self.directory} was made by another reference, {info.identity.digest} "
                    f"({'; '.join(self.identity.differences(info.identity))}); it is not used")
                continue
            sound.append(info)
        return sound

    def covers(self, keys: pa.Array, tokens: np.ndarray) -> np.ndarray:
        """Which of the wanted completions are stored with at least so many tokens: bool [len(keys)]."""
        contents = self._read(values=False)
        rows = _find(contents.keys, keys)
        if not len(contents.tokens):
            return np.zeros(len(keys), dtype=bool)
        return (rows >= 0) & (contents.tokens[np.maximum(rows, 0)] >= tokens)

    def lookup(self, keys: Sequence[bytes] | pa.Array) -> pa.Table:
        """Stored rows of the given completions, in their order: ``key``, ``tokens`` (0 if missing), ``logps`` (null if
        missing, else float32 of each token)."""
        wanted = keys if isinstance(keys, pa.Array) else pa.array([bytes(key) for key in keys], KEY_TYPE)
        contents = self._read(values=True)
        rows = _find(contents.keys, wanted)
        index = pa.array(rows, mask=rows < 0)
        tokens = pc.fill_null(pa.array(contents.tokens, pa.int32()).take(index), 0)
        return pa.table({"key": wanted, "tokens": tokens, "logps": contents.logps.take(index)})

    def scored_tokens(self) -> np.ndarray:
        """Number of scored tokens of every stored row: int32 [rows]."""
        return self._read(values=False).tokens

    def _read(self, *, values: bool) -> _Contents:
        columns = ["key", "tokens"] + (["logps"] if values else [])
        tables, names = [], []
        for part in self.parts():
            path = self.storage.path(f"{self.directory}/parts/{part.name}")
            try:
                table = pq.read_table(path, filesystem=self.storage.fs, columns=columns, page_checksum_verification=True,
                                      partitioning=None).cast(pa.schema([PART_SCHEMA.field(name) for name in columns]))
                if values:
                    _check_values(part.name, table)
            except (OSError, pa.ArrowException, CacheError) as error:
                self.problems.append(f"part {part.name} in {self.directory} is damaged and not used: {error}")
                continue
            tables.append(table)
            names += [part.name] * table.num_rows
        if not tables:
            empty = pa.array([], pa.list_(pa.float32())) if values else None
            return _Contents(pa.array([], KEY_TYPE), np.zeros(0, np.int32), empty)
        table = pa.concat_tables(tables)
        tokens = table["tokens"].to_numpy()
        # The longest first, then by name of the part: a stable sort keeps that order among equals.
        order = np.argsort(-tokens, kind="stable")
        table = table.take(pa.array(order)).combine_chunks()
        return _Contents(_one_array(table["key"]), tokens[order], _one_array(table["logps"]) if values else None,
                         [names[row] for row in order])


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _find(present: pa.Array, wanted: pa.Array) -> np.ndarray:
    """For each wanted key the first row of ``present`` that has it, or -1: int64 [len(wanted)]."""
    found = pc.index_in(wanted.cast(pa.binary()), value_set=present.cast(pa.binary()))
    return pc.fill_null(found, -1).to_numpy().astype(np.int64)


def _read_info(storage: Storage, name: str) -> PartInfo:
    short = name.rsplit("/", 1)[-1]
    path = storage.path(name)
    try:
        with storage.fs.open_input_file(path) as stream:
            size = stream.size()
            parquet = pq.ParquetFile(stream)
            metadata, rows = parquet.schema_arrow.metadata or {}, parquet.metadata.num_rows
        version = metadata.get(_FORMAT)
        if version != FORMAT_VERSION:
            raise CacheError(f"part {short} has format {version!r}, this raydpo reads {FORMAT_VERSION!r}; it is not used")
        return PartInfo(short, rows, size, ReferenceIdentity.from_json(metadata[_IDENTITY]),
                        json.loads(metadata.get(_PROVENANCE, b"{}")))
    except RaydpoError:
        raise
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
        raise CacheError(f"part {short} is damaged and not used: {' '.join(str(error).split())[:200]}") from None


def _check_values(name: str, table: pa.Table) -> None:
    lengths = pc.list_value_length(table["logps"])
    if not pc.all(pc.equal(lengths, table["tokens"])).as_py() and table.num_rows:
        raise CacheError(f"part {name} holds log-probs whose number differs from its token counts")
    flat = pc.list_flatten(table["logps"]).to_numpy()
    if not np.isfinite(flat).all() or (len(flat) and flat.max() > 1e-3):
        raise CacheError(f"part {name} holds {_describe_bad(flat)}, which is no log-prob")


def _describe_bad(values: np.ndarray) -> str:
    if not len(values):
        return "no value"
    bad = values[~np.isfinite(values) | (values > 1e-3)]
    return f"the value {bad[0]}" if len(bad) else "a value"
