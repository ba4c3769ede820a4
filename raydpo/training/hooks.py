"""What the training loop tells the outside, and asks of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["Hooks"]


class Hooks:
    """Does nothing; the launcher overrides it. All ranks call all hooks, with the same rows.

    Hooks marked collective are called by all ranks at the same step and may wait for each other.
    """

    def begin(self, first_step: int, total_steps: int, facts: Mapping[str, Any]) -> None:
        """Training (re)starts after ``first_step`` finished steps."""

    def step(self, row: Mapping[str, float]) -> None:
        """A step is done."""

    def evaluated(self, row: Mapping[str, float]) -> None:
        """A held-out evaluation is done."""

    def note(self, line: str) -> None:
        """Something to tell the user."""

    def flush(self) -> None:
        """A checkpoint is about to be made: a resumed run will keep the rows up to here."""

    def upload(self, directory: Path, step: int) -> None:
        """Store this rank's share of a checkpoint; called in a thread of its own. Raises OSError or RaydpoError."""

    def register(self, step: int, metrics: Mapping[str, float], *, wait: bool) -> None:
        """Every rank's share is stored: from now on it counts. ``wait`` until that is certain. Collective."""

    def stop_requested(self) -> bool:
        """Whether someone wants the run to stop after this step, with a checkpoint."""
        return False

    def preempted(self) -> float | None:
        """Seconds until a machine of this run is taken away (0 if that is not told), None if none will be. Collective."""
        return None
