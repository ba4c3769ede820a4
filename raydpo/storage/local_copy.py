"""Copies of remote files on this machine: downloaded once, then read from disk."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from raydpo.errors import ModelError, RaydpoError
from raydpo.storage.files import Storage, remove_stale_temporaries

__all__ = ["LocalCopy", "RemoteDirectory", "alone", "local_home"]

UNUSED_SECONDS = 3600.0
"""Age in seconds after which an unused copy of a directory is deleted when another one is made."""


class LocalCopy:
    """Copies of the files in ``storage``, made on first read and shared by all processes of a node.

    Attributes:
        local: where they are kept, ``copies/<hash of the URI>`` in ``local_home``.
        problems: one sentence if copies cannot be kept, which only costs time.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        name = hashlib.sha256(storage.uri.encode()).hexdigest()[:16]
        self.local = Storage(str(local_home() / "copies" / name))
        self.problems: list[str] = []

    def fetch(self, name: str, sound: Callable[[bytes], bool]) -> bytes:
        """Content of the file ``name``: the local copy if ``sound`` accepts it, else the remote file, which is copied if
        sound.

        Two processes may download the same file at once; each renames its own copy into place, so no process sees a partial
        one.

        Raises:
            FileNotFoundError: if the file exists neither here nor remotely.
        """
        try:
            data = self.local.read(name)
            if sound(data):
                return data
        except OSError:
            pass
        data = self.storage.read(name)
        if sound(data) and not self.problems:
            try:
                self.local.write(name, data)
            except OSError as error:
                self.problems.append(
                    f"parts are read over the network each time, because their copies cannot be kept in "
                    f"{self.local}: {error.strerror or error}; set XDG_CACHE_HOME to a disk with room"
                )
        return data

    def prune(self, name: str, keep: set[str]) -> None:
        """Delete the copies in directory ``name`` that are not in ``keep``. Those that cannot be deleted stay."""
        with contextlib.suppress(OSError):
            for entry in self.local.entries(name):
                if entry.name not in keep and not entry.name.startswith("."):
                    self.local.delete(f"{name}/{entry.name}")
            remove_stale_temporaries(self.local, name)


@dataclass(frozen=True)
class RemoteDirectory:
    """The files directly in a remote directory, at the time of ``now``. It can be sent to other machines, each of which
    fetches its own copy.

    Attributes:
        uri: URI of the storage.
        name: name of the directory in it.
        stamp: digest of the files' names, sizes and times.
    """

    uri: str
    name: str
    stamp: str

    @classmethod
    def now(cls, storage: Storage, name: str) -> RemoteDirectory:
        """The directory with its current files."""
        return cls(storage.uri, name, _stamp(storage, name) or uuid.uuid4().hex[:16])

    def here(self) -> str:
        """Path of a copy on this machine. The first process that asks downloads it; others wait for it.

        Raises:
            ModelError: if the files are no longer those that ``now`` saw.
            RaydpoError: if the copy cannot be kept.
        """
        storage = Storage(self.uri)
        kept = local_home() / "models" / hashlib.sha256(f"{self.uri}/{self.name}".encode()).hexdigest()[:16] / self.stamp
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with alone(kept.parent / "lock"):
                if not kept.is_dir():
                    self._fetch(storage, kept)
                os.utime(kept)
        except OSError as error:
            raise RaydpoError(
                f"cannot keep a copy of {storage}/{self.name} in {kept}: {error.strerror or error}; set "
                "XDG_CACHE_HOME to a disk with room"
            ) from None
        return str(kept)

    def _fetch(self, storage: Storage, kept: Path) -> None:
        for other in kept.parent.parent.glob("*/*"):
            if other.is_dir() and time.time() - other.stat().st_mtime > UNUSED_SECONDS:
                shutil.rmtree(other, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".fetch-") as place:
            whole = Path(place) / kept.name
            whole.mkdir()
            storage.download(self.name, whole)
            if _stamp(storage, self.name) not in (None, self.stamp):
                raise ModelError(
                    f"{storage}/{self.name} has changed since this command began: it was trained again; run "
                    "the command again"
                )
            whole.rename(kept)


def _stamp(storage: Storage, name: str) -> str | None:
    """Digest of the files, or None if the store does not tell when they were written: equal sizes prove nothing."""
    files = storage.entries(name)
    if not all(file.modified for file in files):
        return None
    return hashlib.sha256(repr([(file.name, file.size, file.modified) for file in files]).encode()).hexdigest()[:16]


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Hold the file lock ``lock``, exclusive among the processes of this machine, if the file system supports locks."""
    with open(lock, "w", encoding="utf-8") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def local_home() -> Path:
    """Directory in which this node keeps what it can download or compute again.

    ``$XDG_CACHE_HOME/raydpo``, else ``~/.cache/raydpo``; in the directory for temporary files if there is no home directory
    or this user may not write to it.
    """
    given = os.environ.get("XDG_CACHE_HOME")
    if given:
        return Path(given) / "raydpo"
    with contextlib.suppress(RuntimeError, OSError):
        home = Path.home() / ".cache" / "raydpo"
        home.mkdir(parents=True, exist_ok=True)
        if os.access(home, os.W_OK):
            return home
    place = Path(tempfile.gettempdir()) / f"raydpo-{os.getuid()}"
    with contextlib.suppress(OSError):
        place.mkdir(mode=0o700, exist_ok=True)
        if place.stat().st_uid != os.getuid():  # another user made it, so its content cannot be trusted
            place = Path(tempfile.mkdtemp(prefix="raydpo-"))
    return place / "raydpo"
