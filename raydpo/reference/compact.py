"""Merge many small parts into few, and delete what is no longer needed. Safe to kill, and safe beside any reader.

Compaction only adds files. A merged part names the parts it supersedes, and a reader that finds it intact skips those.
``delete_garbage`` deletes superseded parts, but only if parts that stay answer every row of theirs.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from raydpo.data.index import as_bytes
from raydpo.reference.claims import CLAIMS
from raydpo.reference.part import COMPACTED, Part, encode_part, part_time
from raydpo.reference.store import PARTS, SET_ASIDE, UNVERIFIED, ReferenceCache
from raydpo.storage.files import FileInfo
from raydpo.storage.garbage import ABANDONED_SECONDS, Garbage, files_below, half_written

__all__ = ["TARGET_BYTES", "CompactReport", "compact", "delete_garbage", "find_garbage"]

TARGET_BYTES = 128 << 20
"""Size of a merged part: large enough that a cache needs few requests, small enough to be read into memory."""


@dataclass(frozen=True)
class CompactReport:
    """Result of a compaction.

    Attributes:
        before, after: parts that readers need.
        merged: how many of them were merged.
        rows: rows of the merged parts.
        dropped: rows left out because another row answers for the same completion.
    """

    before: int
    after: int
    merged: int
    rows: int
    dropped: int


def compact(cache: ReferenceCache, target_bytes: int = TARGET_BYTES) -> CompactReport:
    """Merge the parts smaller than half of ``target_bytes`` into parts of about that size.

    The answer for each key stays the same, to the last bit: of rows stored twice the one that answers is kept. Needs memory
    for one merged part plus 40 bytes per row of the cache.

    Raises:
        CacheError: if a part vanishes meanwhile, because another compaction and gc are running. Nothing is lost.
    """
    cache.reload()
    paths = cache.paths()
    winning_part, winning_row = cache.winners()
    needed = ~cache.superseded() | np.isin(np.arange(len(paths)), winning_part)
    by_name = {entry.name: entry.size for entry in cache.storage.entries(f"{cache.directory}/{PARTS}")}
    sizes = [by_name.get(path.rsplit("/", 1)[-1], target_bytes) for path in paths]
    small = [
        number
        for number in np.flatnonzero(needed).tolist()
        if cache.holds_tokens(number) and sizes[number] < target_bytes / 2
    ]
    merged = rows = dropped = written = 0
    for group in _groups(small, sizes, target_bytes):
        parts = [cache.read(paths[number]) for number in group]
        kept = [np.sort(winning_row[winning_part == number]) for number in group]
        name, data = _merged(cache, parts, kept, set(by_name))
        cache.storage.write(f"{cache.directory}/{PARTS}/{name}", data)
        merged, written = merged + len(group), written + 1
        rows += sum(map(len, kept))
        dropped += sum(part.info.rows for part in parts) - sum(map(len, kept))
    before = int(needed.sum())
    return CompactReport(before, before - merged + written, merged, rows, dropped)


def _groups(numbers: Sequence[int], sizes: Sequence[int], target_bytes: int) -> list[list[int]]:
    """Split ``numbers`` into consecutive groups of at least two parts and about ``target_bytes``."""
    groups: list[list[int]] = [[]]
    size = 0
    for number in numbers:
        if groups[-1] and size + sizes[number] > target_bytes:
            groups.append([])
            size = 0
        groups[-1].append(number)
        size += sizes[number]
    return [group for group in groups if len(group) > 1]


def _merged(cache: ReferenceCache, parts: list[Part], kept: list[np.ndarray], present: set[str]) -> tuple[str, bytes]:
    takes = [pa.array(rows) for rows in kept]
    provenance: Counter[str] = Counter()
    for part in parts:
        if "parts" in part.info.provenance:
            provenance.update({json.dumps(one["of"], sort_keys=True): one["count"] for one in part.info.provenance["parts"]})
        else:
            provenance[json.dumps(part.info.provenance, sort_keys=True)] += 1
    # Parts superseded by an earlier compaction stay superseded when that compaction's part is deleted.
    supersedes = {part.info.name for part in parts}
    supersedes |= {name for part in parts for name in part.info.supersedes if name in present}
    # The time of the first part, not the current time: two compactions of the same parts write the same file.
    return encode_part(
        cache.identity,
        pa.concat_arrays([part.keys.take(take) for part, take in zip(parts, takes, strict=True)]),
        np.concatenate([part.tokens[rows] for part, rows in zip(parts, kept, strict=True)]),
        pa.concat_arrays([part.logps.take(take) for part, take in zip(parts, takes, strict=True)]),
        {"parts": [{"count": count, "of": json.loads(text)} for text, count in sorted(provenance.items())]},
        builder=COMPACTED,
        time_ns=min(part_time(part.info.name) for part in parts),
        supersedes=sorted(supersedes),
    )


def find_garbage(cache: ReferenceCache) -> list[Garbage]:
    """Files of one identity that ``delete_garbage`` would delete, in order of path."""
    storage, directory = cache.storage, cache.directory

    def files(folder: str) -> dict[str, FileInfo]:
        return files_below(storage, f"{directory}/{folder}")

    cache.reload()
    folders = [directory, *(f"{directory}/{folder}" for folder in (PARTS, UNVERIFIED, SET_ASIDE, CLAIMS))]
    found = half_written(storage, folders, ABANDONED_SECONDS)
    if claims := files(CLAIMS):
        old = storage.clock() - ABANDONED_SECONDS
        why = "a claim that its build did not take back"
        found += [Garbage(path, entry.size, why) for path, entry in claims.items() if entry.modified < old]
    if imported := files(UNVERIFIED):  # only a cache opened with unverified=True reads these
        imports = ReferenceCache(storage, cache.identity, unverified=True)
        imports.refresh()
        why = "imported, and answered by later rows"
        found += [Garbage(path, imported[path].size, why) for path in imports.passed_over() if path in imported]
    parts, superseded = files(PARTS), cache.superseded()
    for number in np.flatnonzero(superseded).tolist():
        path = cache.paths()[number]
        if path in parts and _is_answered_elsewhere(cache, number, superseded):
            found.append(Garbage(path, parts[path].size, "superseded by a compacted part"))
    found += [Garbage(path, entry.size, "damaged or foreign, set aside") for path, entry in files(SET_ASIDE).items()]
    return sorted(found, key=lambda one: one.path)


def _is_answered_elsewhere(cache: ReferenceCache, number: int, superseded: np.ndarray) -> bool:
    """Whether parts that stay hold every row of this one."""
    part = cache.read(cache.paths()[number])
    answering, _ = cache.locate(as_bytes(part.keys), part.tokens)
    return not superseded[answering].any()


def delete_garbage(cache: ReferenceCache, garbage: Sequence[Garbage]) -> None:
    """Delete what ``find_garbage`` found. After a kill the rest is found again.

    A reader that was about to read one of the files lists the parts again and finds its rows in the part that replaced it.
    """
    for one in garbage:
        cache.storage.delete(one.path)
    cache.refresh()
