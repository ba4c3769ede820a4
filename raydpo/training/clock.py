"""Wall time of a step by phase, and the seconds that a rank computed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

__all__ = ["PHASES", "StepClock"]

PHASES = ("data", "forward", "backward", "optimizer", "checkpoint", "evaluation", "wait")
"""``wait``: until the slowest rank is ready to sum gradients. ``other`` is the rest of the wall time."""
HOST_PHASES = frozenset({"data", "checkpoint", "evaluation"})
"""Phases that are measured by the host's clock, on GPUs too."""


class StepClock:
    """Collects the seconds of phases; ``lap`` ends a step.

    On a GPU, phases of computation are measured by CUDA events, so that the host does not wait for the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._lap_start = time.perf_counter()
        self.busy = 0.0
        """Seconds that this rank computed in the last lap: forward and backward, without waiting."""

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a block. Blocks must not be nested."""
        if self._cuda and name not in HOST_PHASES:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            try:
                yield
            finally:
                end.record()
                self._events.append((name, start, end))
            return
        start_s = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start_s

    def lap(self) -> dict[str, float]:
        """End the step: seconds by ``time/<phase>`` since the last lap; their sum, with ``time/other``, is ``time/step``."""
        for name, start, end in self._events:
            end.synchronize()
            self._seconds[name] += start.elapsed_time(end) / 1000
        now = time.perf_counter()
        wall, self._lap_start = now - self._lap_start, now
        found, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        self._events.clear()
        self.busy = found["forward"] + found["backward"]
        row = {f"time/{name}": seconds for name, seconds in found.items()}
        # Phases of GPU and host may overlap, so their sum may exceed the wall time.
        return row | {"time/other": max(0.0, wall - sum(found.values())), "time/step": max(wall, sum(found.values()))}
