"""Results that this machine remembers: found once, then read from disk as long as nothing that decides them has changed."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raydpo.storage.local_copy import alone, local_home

__all__ = ["content_stamp", "keep", "last_start", "one_at_a_time", "program", "recall", "remembered", "stamp", "versions"]


def remembered(kind: str, decides: object, find: Callable[[], Any]) -> Any:
    """The result of ``find``, from disk if it was found before. Processes that ask for it at once wait until one has it.

    Args:
        kind: name of the folder in ``local_home``.
        decides: everything that the result depends on, as JSON.
        find: returns what JSON can store, but not None. What it raises is not remembered.
    """
    known = recall(kind, decides)
    if known is None:
        with one_at_a_time(_place(kind, decides)):
            known = recall(kind, decides)
            if known is None:
                known = find()
                keep(kind, decides, known)
    return known


@contextlib.contextmanager
def one_at_a_time(place: Path) -> Iterator[None]:
    """Let one process of this machine at a time into the block; without a writable home, all of them."""
    lock = place.with_suffix(".lock")
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            lock.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(alone(lock))
            held.callback(lock.unlink, missing_ok=True)
        yield


def recall(kind: str, decides: object) -> Any:
    """The result that ``keep`` was given with equal ``decides``, or None."""
    try:
        return json.loads(_place(kind, decides).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def keep(kind: str, decides: object, result: Any) -> None:
    """Remember ``result``. Without a writable home it is found again next time."""
    place = _place(kind, decides)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_suffix(f".{uuid.uuid4().hex}")
        temporary.write_text(json.dumps(result), encoding="utf-8")
        os.replace(temporary, place)
    except OSError:
        pass


def _place(kind: str, decides: object) -> Path:
    return local_home() / kind / f"{hashlib.sha256(json.dumps(decides).encode()).hexdigest()}.json"


def stamp(file: Path) -> list[str | int]:
    """What changes whenever a file does: its path, inode, size and times.

    A copy that preserves times cannot set the change time (ctime), so overwritten files are always noticed.
    """
    return [str(file.resolve()), *content_stamp(file)]


def content_stamp(file: Path | str) -> list[int]:
    """``stamp`` without the path: ten times quicker, for thousands of files in one place."""
    stat = os.stat(file)
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


@functools.cache
def last_start() -> str:
    """What changes whenever this machine is started again; empty where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


@functools.cache
def program(*packages: str) -> list[str]:
    """Versions of ``packages``, and a digest of raydpo's own code for models: what a result of that code depends on."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].glob("model/*.py")):
        digest.update(file.name.encode() + file.read_bytes())
    return [digest.hexdigest(), *versions(*packages)]


@functools.cache
def versions(*packages: str) -> tuple[str, ...]:
    """``name version`` of each package; version None if it is not installed."""
    return tuple(f"{name} {_version(name)}" for name in packages)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
