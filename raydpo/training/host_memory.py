"""Host memory that a process needs for itself while it does something, and how long that takes."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

__all__ = ["HostPeak"]

EVERY = 0.01
"""Seconds between looks."""


class HostPeak:
    """Watches a block of code from a thread.

    Pages of files do not count: a weights file that is mapped, by however many processes of a machine, lies in its cache
    once, and leaves when memory is short. The system's own high-water mark counts them.

    Attributes:
        seconds: that the block took.
        start_bytes, bytes: of the process before it, and at the most; 0 where the system does not tell.
    """

    def __enter__(self) -> HostPeak:
        self.start_bytes = self.bytes = _own_bytes()
        self._started, self._over = time.perf_counter(), threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="raydpo-host-memory", daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self._started
        self._over.set()
        self._watcher.join()
        self.bytes = max(self.bytes, _own_bytes())

    def _watch(self) -> None:
        while not self._over.wait(EVERY):
            self.bytes = max(self.bytes, _own_bytes())


def _own_bytes() -> float:
    try:
        _, resident, shared = Path("/proc/self/statm").read_text().split()[:3]
    except OSError:
        return 0.0
    return (int(resident) - int(shared)) * float(os.sysconf("SC_PAGE_SIZE"))
