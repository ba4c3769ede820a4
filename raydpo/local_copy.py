"""Copies on this machine of what lies on a remote file system: read once over the network, then from disk."""

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
from raydpo.storage import Storage, remove_stale_temporaries

__all__ = ["LocalCopy", "RemoteDirectory", "local_home"]

UNUSED_SECONDS = 3600.0
"""After which the copy of a directory makes room for another one."""


class LocalCopy:
    """Read-through copies of the files below ``storage``, shared by all processes of a node.

    Args:
        directory: where they are kept; default ``copies/<hash of the URI>`` below ``local_home``.

    Attributes:
        problems: a sentence if copies cannot be kept, which costs time and nothing else.
    """

    def __init__(self, storage: Storage, directory: Path | None = None) -> None:
        self.storage = storage
        name = hashlib.sha256(storage.uri.encode()).hexdigest()[:16]
        self.local = Storage(str(directory or local_home() / "copies" / name))
        self.problems: list[str] = []

    def fetch(self, name: str, sound: Callable[[bytes], bool]) -> bytes:
        """The file ``name``: the copy if it is ``sound``, else from afar, kept if that is sound.

        Two processes may download the same file at once; each renames its own into place, and none sees a torn one.

        Raises:
            FileNotFoundError: if it is neither here nor there.
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
                self.problems.append(f"parts are read over the network each time, because their copies cannot be kept in "
                                     f"{self.local}: {error.strerror or error}; set XDG_CACHE_HOME to a disk with room")
        return data

    def prune(self, name: str, keep: set[str]) -> int:
        """Delete the copies in directory ``name`` that are not in ``keep``; how many there were.

        Where nothing can be deleted they stay, which costs space and nothing else.
        """
        removed = 0
        with contextlib.suppress(OSError):
            for entry in self.local.entries(name):
                if entry.name not in keep and not entry.name.startswith("."):
                    self.local.delete(f"{name}/{entry.name}")
                    removed += 1
            removed += remove_stale_temporaries(self.local, name)
        return removed


@dataclass(frozen=True)
class RemoteDirectory:
    """The files directly in a remote directory, as they were when it was looked at. It travels to other machines, each of
    which fetches a copy of its own.

    Attributes:
        uri: of the storage.
        name: of the directory in it.
        stamp: a digest of the files' names, sizes and times.
    """

    uri: str
    name: str
    stamp: str

    @classmethod
    def now(cls, storage: Storage, name: str) -> RemoteDirectory:
        """As it is at this moment."""
        return cls(storage.uri, name, _stamp(storage, name) or uuid.uuid4().hex[:16])

    def here(self) -> str:
        """The path of a copy on this machine. The first process that asks for it fetches it, others wait for that one.

        Raises:
            ModelError: if the files are no longer those that ``now`` saw.
            RaydpoError: if the copy cannot be kept.
        """
        storage = Storage(self.uri)
        kept = local_home() / "models" / hashlib.sha256(f"{self.uri}/{self.name}".encode()).hexdigest()[:16] / self.stamp
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with _alone(kept.parent / "lock"):
                if not kept.is_dir():
                    self._fetch(storage, kept)
                os.utime(kept)
        except OSError as error:
            raise RaydpoError(f"cannot keep a copy of {storage}/{self.name} in {kept}: {error.strerror or error}; set "
                              "XDG_CACHE_HOME to a disk with room") from None
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
                raise ModelError(f"{storage}/{self.name} has changed since this command began: it was trained again; run "
                                 "the command again")
            whole.rename(kept)


def _stamp(storage: Storage, name: str) -> str | None:
    """None where the store does not say when files were written: equal sizes prove nothing."""
    files = storage.entries(name)
    if not all(file.modified for file in files):
        return None
    return hashlib.sha256(repr([(file.name, file.size, file.modified) for file in files]).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Within the block no other process of this machine holds ``lock``, where the file system has locks."""
    with open(lock, "w", encoding="utf-8") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def local_home() -> Path:
    """Where this node keeps what it can fetch or compute again: ``$XDG_CACHE_HOME/raydpo``, else ``~/.cache/raydpo``; below
    the directory of temporary files where there is no home, or one in which this user may not write."""
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
        if place.stat().st_uid != os.getuid():  # someone else may have put there what we would take for ours
            place = Path(tempfile.mkdtemp(prefix="raydpo-"))
    return place / "raydpo"
