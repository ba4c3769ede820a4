"""Time of computations on a device: CUDA events on a GPU, the host's clock on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

__all__ = ["extrapolate", "seconds", "wait"]

WARM_UPS = 3
"""Runs before the first that counts: they make buffers, compile kernels, and raise the clocks."""


def seconds(run: Callable[[], object], device: torch.device, *, repeats: int = 5, warm_ups: int = WARM_UPS) -> float:
    """Median of ``repeats`` timed runs, after ``warm_ups`` others.

    Args:
        run: its result is dropped before the next run.
    """
    for _ in range(warm_ups):
        run()
    found = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) / 1000)
        else:
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
    return max(statistics.median(found), 1e-9)  # a clock's tick, so that rates stay finite


def wait(device: torch.device) -> None:
    """Wait until ``device`` has computed everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def extrapolate(layers: tuple[int, int], values: tuple[float, float], to: int) -> float:
    """Value at ``to`` layers, from those at two numbers of layers, since time and memory grow linearly with layers."""
    (few, many), (low, high) = layers, values
    return high + (to - many) * (high - low) / (many - few)
