"""A copy on this machine of files on a remote file system that never change: read once over the network, then from disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from raydpo.storage import Storage, remove_stale_temporaries

__all__ = ["LocalCopy"]


class LocalCopy:
    """Read-through copies of the files below ``storage``, shared by all processes of a node.

    Args:
        directory: where they are kept; default ``$XDG_CACHE_HOME/raydpo/copies/<hash of the URI>``.

    Attributes:
        problems: a sentence if copies cannot be kept, which costs time and nothing else.
    """

    def __init__(self, storage: Storage, directory: Path | None = None) -> None:
        self.storage = storage
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raydpo" / "copies"
        self.local = Storage(str(directory or home / hashlib.sha256(storage.uri.encode()).hexdigest()[:16]))
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
                                     f"{self.local}: {error.strerror}; set XDG_CACHE_HOME to a disk with room")
        return data

    def prune(self, name: str, keep: set[str]) -> int:
        """Delete the copies in directory ``name`` that are not in ``keep``; how many there were."""
        gone = [entry for entry in self.local.list(name) if not entry.startswith(".") and entry not in keep]
        for entry in gone:
            self.local.delete(f"{name}/{entry}")
        return len(gone) + remove_stale_temporaries(self.local, name)
