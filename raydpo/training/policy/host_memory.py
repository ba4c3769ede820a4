"""The host's memory: copies of tensors, what is free, and the peak of a block of code."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["HostPeak", "free_bytes", "host_copy"]

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


def host_copy(tensor: Tensor) -> Tensor:
    """Copy a tensor to the host's memory. From a GPU to page-locked memory, where there is any: that is several times as
    fast, and torch keeps it for the next copy."""
    target = None
    if tensor.is_cuda:
        with contextlib.suppress(RuntimeError):  # no more memory may be locked
            target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return tensor.to("cpu", copy=True) if target is None else target.copy_(tensor)


def free_bytes(proc: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes of the host's memory that this process could still use, within the limit of its container; 0 if unknown.

    Args:
        proc, cgroup: where Linux tells it; ``cgroup`` of version 1 or 2.
    """
    try:
        told = dict(line.split(":", 1) for line in proc.read_text(encoding="ascii").splitlines())
        free = float(told["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return 0.0
    for limit, used, stat, name in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError):  # no limit of this kind
            most, taken = (float((cgroup / one).read_text(encoding="ascii")) for one in (limit, used))
            dropped = dict(line.split() for line in (cgroup / stat).read_text(encoding="ascii").splitlines()).get(name, 0)
            free = min(free, most - taken + float(dropped))  # files that nobody uses make room
    return max(0.0, free)
