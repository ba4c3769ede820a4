"""Token positions that fit in one forward pass, measured on the device."""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from raydpo.model.layout import PromptGroup

__all__ = [
    "MOST_SCORED",
    "MOST_TRAINED",
    "Budget",
    "find_budget",
    "free_memory",
    "is_out_of_memory",
    "probe_group",
    "probe_groups",
    "used_memory",
]

MOST_SCORED = {"cuda": 65536, "cpu": 4096}
"""Most positions of a scoring pass, by device. More are not faster: the matrix products are large enough."""
MOST_TRAINED = {"cuda": 65536, "cpu": 1024}
"""The same for training, where each position keeps its activations. With a model of 135M parameters a step of 2,000
positions took as long in micro-batches of 1,024 positions, with half the memory."""
PROBES = (256, 768)
"""Positions of the two passes that are measured."""
MARGIN = 0.8
"""Share of the free memory to use. The rest is for fragmentation and the backward pass."""
STEP = 256
"""Budgets are multiples of this many positions."""

_NO_MEMORY = re.compile(
    r"can't allocate memory|out of memory|bad alloc"
    r"|cudaErrorMemoryAllocation|CU(?:BLAS|DNN|SPARSE|SOLVER)_STATUS_ALLOC_FAILED"
)
"""What torch's CPU allocator, the CUDA runtime and CUDA's libraries say, within a RuntimeError. The libraries allocate their
workspaces beside torch's allocator, which therefore raises no OutOfMemoryError."""


@dataclass(frozen=True)
class Budget:
    """A measured budget: token positions of one pass, bytes per position, and free bytes."""

    tokens: int
    bytes_per_token: float
    free_bytes: float

    def line(self) -> str:
        """One line for the log."""
        return (
            f"tokens_per_batch: auto = {self.tokens} positions ({self.bytes_per_token / 2**20:.2f} MiB each measured, "
            f"{self.free_bytes / 2**30:.1f} GiB free)"
        )


def find_budget(
    run: Callable[[int], object],
    device: torch.device,
    *,
    most: Mapping[str, int],
    share: float = 1.0,
    reserve: float = 0.0,
    known: float | None = None,
    agree: Callable[[bool], bool] = bool,
) -> Budget:
    """Find the largest budget that fits.

    A first short pass also makes buffers that later ones use, so its peak is more than its positions need. If even so many
    bytes for each position leave room for ``most``, that is the budget. Else two passes are compared: memory grows linearly
    with positions.

    Args:
        run: computes a pass of the given number of positions and returns what must stay alive (in training, the graph).
        most: ``MOST_SCORED`` or ``MOST_TRAINED``.
        share: share of the device's memory that this process may use, 0 to 1.
        reserve: bytes to keep free for something else.
        known: bytes of a position as measured earlier, at least.
        agree: as for ``Recall``: whether all processes that compute the passes together need no more of them.
    """

    def budget(per_token: float) -> Budget:
        free = max(0.0, free_memory(device, share) - reserve)
        fits = int(MARGIN * free / per_token)
        return Budget(min(most[device.type], max(STEP, fits // STEP * STEP)), per_token, free)

    found = budget(known or max(_peak(run, PROBES[0], device) / PROBES[0], 1.0))
    if agree(found.tokens == most[device.type]):
        return found
    if known:
        run(PROBES[0])
    small, large = (_peak(run, tokens, device) for tokens in PROBES)
    return budget(max((large - small) / (PROBES[1] - PROBES[0]), 1.0))


def probe_group(tokens: int, vocabulary: int) -> PromptGroup:
    """A random pair of ``tokens`` positions in total, half of them in the prompt."""
    rng = np.random.default_rng(0)
    sizes = tokens // 2, tokens // 4, tokens - tokens // 2 - tokens // 4
    prompt, chosen, rejected = (rng.integers(0, vocabulary, size).astype(np.int32) for size in sizes)
    return PromptGroup(prompt, (chosen, rejected))


def probe_groups(tokens: int, vocabulary: int, longest: int | None = None) -> list[PromptGroup]:
    """Random pairs of ``tokens`` positions in total: one, or several of at most ``longest`` positions."""
    size = tokens if longest is None else min(tokens, longest)
    starts = range(0, max(1, tokens - 7), size)  # no pair of fewer than eight positions, which might be empty
    return [probe_group(min(size, tokens - start), vocabulary) for start in starts]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that torch, or a library of CUDA, could not allocate memory, on a GPU or a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error)))


def used_memory(device: torch.device) -> float:
    """Peak bytes since ``reset_peak_memory``: allocated by torch on a GPU, or used by this process on a CPU.

    0 on a CPU whose system has no /proc.
    """
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    try:
        found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    except OSError:
        return 0.0
    return float(found[1]) * 1024 if found else 0.0


def reset_peak_memory(device: torch.device) -> None:
    """Start the peak of ``used_memory`` from what is in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    # The C library keeps freed memory, which a pass would use without being noticed.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    # Resets the process's high-water mark. Where the system does not allow it, the mark only grows.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _peak(run: Callable[[int], object], tokens: int, device: torch.device) -> float:
    reset_peak_memory(device)
    before = used_memory(device)
    kept = run(tokens)
    peak = used_memory(device) - before
    del kept
    return peak


def free_memory(device: torch.device, share: float = 1.0) -> float:
    """Bytes that this process may still use on a GPU, or on a CPU in the memory of its machine or container."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        mine = total * share - torch.cuda.memory_reserved(device)
        return min(free, mine) + unused
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return float(2**33) * share
    found = re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text(encoding="utf-8"))
    return min(float(found[1]) * 1024, _cgroup_free()) * share if found else float(2**33) * share


def _cgroup_free() -> float:
    """Bytes that a container may still use; infinity without a limit."""
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        try:
            root = Path("/sys/fs/cgroup")
            return float((root / limit).read_text(encoding="utf-8")) - float((root / used).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # another version of control groups, or no limit
    return float("inf")
