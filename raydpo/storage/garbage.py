"""Files of a cache that are no longer needed."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from raydpo.storage.files import FileInfo, Storage, stale_temporaries

__all__ = ["ABANDONED_SECONDS", "Garbage", "files_below", "half_written", "now"]

ABANDONED_SECONDS = 24 * 3600.0
"""Age at which a temporary file of another machine counts as left by a dead writer: writing takes seconds."""


@dataclass(frozen=True)
class Garbage:
    """A file that is not needed: its path below the cache's root, its size in bytes, and the reason."""

    path: str
    bytes: int
    reason: str


def half_written(storage: Storage, folders: Iterable[str], older_than: float = ABANDONED_SECONDS) -> list[Garbage]:
    """Temporary files of dead writers directly in ``folders``, see ``files.stale_temporaries``."""
    return [
        Garbage(f"{folder}/{entry.name}", entry.size, "left half-written")
        for folder in folders
        for entry in stale_temporaries(storage, folder, older_than=older_than)
    ]


def files_below(storage: Storage, folder: str) -> dict[str, FileInfo]:
    """The files directly in ``folder`` by path, but for hidden ones such as temporary files."""
    return {f"{folder}/{entry.name}": entry for entry in storage.entries(folder) if not entry.name.startswith(".")}


def now(storage: Storage) -> float:
    """Current time by the clock that stamps the files of ``storage``, in seconds since the epoch; this machine's where that
    cannot be asked."""
    try:
        return storage.clock()
    except Exception:  # asking needs a write, which a read-only cache refuses
        return time.time()
