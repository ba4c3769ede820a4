"""A copy on this machine of files on a remote file system that never change: read once over the network, then from disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from raydpo.storage import Storage, remove_stale_temporaries

__all__ = ["LocalCopy", "local_home"]


class LocalCopy:
    """Read-through copies of the files below ``storage``, shared by all processes of a node.

    Args:
        directory: where they are kept; default ``$XDG_CACHE_HOME/raydpo/copies/<hash of the URI>``, below ``~/.cache`` if
            that is not set, or the directory of temporary files for a user without a home.

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


def local_home() -> Path:
    """Where this node keeps what it can fetch or compute again."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        cache = Path(tempfile.gettempdir()) / f"raydpo-{os.getuid()}"
    return cache / "raydpo"
