"""The time until the first step: seconds by phase, and what saves some of them."""

from __future__ import annotations

import atexit
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["Phases", "Seldom", "collect_rarely"]

IMPORTS = "imports and settings"
SELDOM_SECONDS = 10.0
"""Seconds until the first sign of something long, and between two signs. What ends sooner, such as loading a small model, is
not told."""


class Seldom:
    """Passes on some of many calls: none in the first ``SELDOM_SECONDS``, then one each time they have passed, and the last.

    Args:
        tell: called with what is done and all there is to do, such as bytes.
    """

    def __init__(self, tell: Callable[[int, int], None]) -> None:
        self._tell, self._due, self._done, self._told = tell, 0.0, 0, False

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if not self._due or done < self._done:  # the first call, or it begins again
            self._due, self._told = now + SELDOM_SECONDS, False
        self._done = done
        if now >= self._due or (self._told and done >= total):
            self._due, self._told = now + SELDOM_SECONDS, True
            self._tell(done, total)


class Phases:
    """Phases of a start-up. Each ends where the next one begins.

    Attributes:
        seconds: by name of the phase, in their order. A name that occurs again adds up.
    """

    def __init__(self, *, whole_process: bool = False) -> None:
        """Args:
        whole_process: begin with the process, not now.
        """
        self.seconds: dict[str, float] = {}
        self._name: str | None = IMPORTS
        self._start = self._since = time.monotonic() - (_process_seconds() if whole_process else 0.0)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def running(self) -> bool:
        """Whether the start-up has not ended."""
        return self._name is not None

    def begin(self, name: str) -> None:
        """End the present phase and begin ``name``, unless the start-up has ended."""
        if self._name is not None:
            now = time.monotonic()
            self.seconds[self._name] = self.seconds.get(self._name, 0.0) + now - self._since
            self._name, self._since = name, now

    def end(self) -> None:
        """End the start-up."""
        self.begin("")
        self._name = None

    def line(self) -> str:
        """One line: the sum, and the phases of at least a tenth of a second."""
        parts = [f"{name} {seconds:.1f}" for name, seconds in self.seconds.items() if seconds >= 0.05]
        return f"start-up: {sum(self.seconds.values()):.1f} s ({', '.join(parts)})"


def collect_rarely() -> None:
    """Look for garbage rarely, and not at all when the process ends.

    Importing torch and transformers makes a million objects that stay. Looking through them again and again takes a fifth of
    the time, and half a second at the end.
    """
    gc.set_threshold(100_000, 20, 20)
    atexit.register(gc.freeze)


def _process_seconds() -> float:
    """Seconds since this process was started; 0 where the system does not tell."""
    try:
        started = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
        uptime = Path("/proc/uptime").read_text(encoding="utf-8").split()[0]
        return max(0.0, float(uptime) - float(started) / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return 0.0
