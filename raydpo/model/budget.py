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
    "PROBES",
    "TIGHT",
    "Budget",
    "Needs",
    "before_first_step",
    "find_budget",
    "free_memory",
    "is_out_of_memory",
    "probe_group",
    "probe_groups",
    "reset_peak_memory",
    "share_of_first_step",
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
"""Share to use of the memory that is left for positions. The rest is for fragmentation and for data of other shapes."""
TIGHT = 0.95
"""Share of a GPU's memory above which a first step is a warning that a later one may not fit."""
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
    """A measured budget.

    Attributes:
        tokens: token positions of one pass.
        bytes_per_token: measured bytes of a position in a forward pass.
        free_bytes: bytes that were free.
        step_bytes: bytes of them that a whole step of ``tokens`` positions needs; None = it is only a pass that is needed.
        doubt: see ``Needs``.
    """

    tokens: int
    bytes_per_token: float
    free_bytes: float
    step_bytes: float | None = None
    doubt: str = ""

    def line(self) -> str:
        """One line for the log; a warning if not even the smallest budget fits, or if that is not known."""
        said = (
            f"tokens_per_batch: auto = {self.tokens} positions ({self.bytes_per_token / 2**20:.2f} MiB each measured, "
            f"{self.free_bytes / 2**30:.1f} GiB free"
        )
        if self.doubt:
            return (
                f"warning: {said}); what the rest of a step takes is not known of this model ({self.doubt}): if memory runs "
                "out, set train.tokens_per_batch"
            )
        if self.step_bytes is None:
            return f"{said})"
        said = f"{said}, a step takes {self.step_bytes / 2**30:.1f})"
        if self.step_bytes <= self.free_bytes:
            return said
        return (
            f"warning: {said}; that does not fit, and fewer positions hardly help. Set train.zero higher, "
            "train.offload_optimizer=cpu, or model.lora"
        )


@dataclass(frozen=True)
class Needs:
    """What a step needs beyond the forward pass that is measured, as functions of the positions of its micro-batches.

    Attributes:
        step: bytes of a whole step at its peak, in addition to what is allocated already.
        probe: bytes of the measured forward pass, by the same ledger. The step is taken to differ from its ledger by as much
            a position as the measured pass does.
        doubt: why only a part of it is known, if that is so.
    """

    step: Callable[[int], float]
    probe: Callable[[int], float]
    doubt: str = ""


_NOTHING = Needs(step=lambda _: 0.0, probe=lambda _: 0.0)


def find_budget(
    run: Callable[[int], object],
    device: torch.device,
    *,
    most: Mapping[str, int],
    share: float = 1.0,
    needs: Needs | None = None,
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
        needs: what must fit in addition to the pass; None = nothing.
        known: bytes of a position as measured earlier, at least.
        agree: as for ``Recall``: whether all processes that compute the passes together need no more of them.
    """
    needs = needs or _NOTHING
    small, large = PROBES
    by_ledger = (needs.probe(large) - needs.probe(small)) / (large - small)

    def budget(per_token: float, foreseen: float) -> Budget:
        free, fixed, beyond = free_memory(device, share), needs.step(0), per_token - foreseen

        def taken(tokens: int) -> float:
            return needs.step(tokens) + beyond * tokens

        def fits(tokens: int) -> bool:
            return taken(tokens) - fixed <= MARGIN * (free - fixed)

        few, many = 1, most[device.type] // STEP
        while few < many:  # the largest number of steps that fits, or one
            middle = (few + many + 1) // 2
            few, many = (middle, many) if fits(middle * STEP) else (few, middle - 1)
        tokens = most[device.type] if fits(most[device.type]) else min(few * STEP, most[device.type])
        return Budget(tokens, per_token, free, None if needs is _NOTHING else taken(tokens), needs.doubt)

    foreseen = needs.probe(small) / small
    if known is None:
        found = budget(max(_peak(run, small, device) / small, 1.0), foreseen)
    else:  # measured in either way
        found = budget(known, min(foreseen, by_ledger))
    if agree(found.tokens == most[device.type]):
        return found
    if known:
        run(small)
    peaks = [_peak(run, tokens, device) for tokens in PROBES]
    return budget(max((peaks[1] - peaks[0]) / (large - small), 1.0), by_ledger)


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


def before_first_step(device: torch.device) -> float:
    """Start the peak of a GPU's memory, without what torch has reserved for earlier work. Returns the bytes that are
    allocated now; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.empty_cache()
    reset_peak_memory(device)
    return float(torch.cuda.memory_allocated(device))


def share_of_first_step(device: torch.device, before: float, share: float = 1.0) -> float | None:
    """Share of a GPU's memory that steps take at their peak, judged by the first one; None on a CPU.

    The first step makes the optimizer's moments at its end. Later ones have them from the beginning, and so take more.

    Args:
        before: what ``before_first_step`` returned.
        share: share of the device's memory that this process may use.
    """
    if device.type != "cuda":
        return None
    grown = max(0.0, torch.cuda.memory_allocated(device) - before)
    peak = max(torch.cuda.max_memory_reserved(device), torch.cuda.max_memory_allocated(device) + grown)
    return peak / (share * torch.cuda.get_device_properties(device).total_memory)


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
