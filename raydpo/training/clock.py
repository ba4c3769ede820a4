"""Where the wall time of a step went: phases that add up to it, and which rank the others wait for."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

__all__ = ["HOST_PHASES", "PHASES", "StepClock"]

PHASES = ("data", "forward", "backward", "optimizer", "checkpoint", "evaluation", "wait")
"""``wait``: for the slowest rank, before gradients are summed. ``other`` is what remains of the wall time."""
HOST_PHASES = frozenset({"data", "checkpoint", "evaluation"})
"""Phases that the clock of the host measures, on GPUs too."""


class StepClock:
    """Collects the seconds of phases; ``lap`` ends a step.

    On a GPU the phases of computation are measured by events in its own stream, so that the host need not wait for it.
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
        """Time a block; blocks must not lie inside one another."""
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
        # What a GPU computed while the host did something else would be counted twice.
        return row | {"time/other": max(0.0, wall - sum(found.values())), "time/step": max(wall, sum(found.values()))}
