"""Time and peak host memory of a block of code."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

__all__ = ["HostPeak"]

EVERY = 0.01
"""Seconds between measurements."""


class HostPeak:
    """Measures a block of code from another thread.

    Pages of mapped files do not count: they are in the page cache once a machine, and are dropped when memory is short. The
    system's own peak (VmHWM) includes them.

    Attributes:
        seconds: duration of the block.
        start_bytes, bytes: memory of the process before the block, and its peak; 0 if the system does not report it.
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
        _, resident, shared = Path("/proc/self/statm").read_text(encoding="utf-8").split()[:3]
    except OSError:
        return 0.0
    return (int(resident) - int(shared)) * float(os.sysconf("SC_PAGE_SIZE"))
