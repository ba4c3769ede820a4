"""Callbacks of the training loop: progress, checkpoints, stop requests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["TrainHooks"]


class TrainHooks:
    """Base class whose callbacks do nothing. All ranks call all of them, with the same rows. They call those marked
    collective at the same step, and may wait for each other there."""

    def phase(self, name: str) -> None:
        """A phase of the start-up begins, such as "loading the policy"."""

    def begin(self, first_step: int, total_steps: int, facts: Mapping[str, Any]) -> None:
        """Training starts, or restarts, after ``first_step`` finished steps."""

    def step(self, row: Mapping[str, float]) -> None:
        """A step is done."""

    def evaluated(self, row: Mapping[str, float]) -> None:
        """A held-out evaluation is done."""

    def note(self, line: str) -> None:
        """Show ``line`` to the user."""

    def flush(self) -> None:
        """A checkpoint follows: store the rows so far, which a resumed run keeps."""

    def upload(self, directory: Path, step: int) -> None:
        """Store this rank's share of a checkpoint, the files in ``directory``, and move them if that is quicker. Called in
        its own thread; raises OSError or RaydpoError, and is then called again with the files that are left."""

    def register(self, step: int, metrics: Mapping[str, float], *, wait: bool) -> None:
        """Make the checkpoint valid, now that every rank has stored its share. ``wait`` until it is certain. Collective."""

    def stop_requested(self) -> bool:
        """Whether the run must stop after this step, with a checkpoint."""
        return False

    def preempted(self) -> float | None:
        """Seconds until a machine of this run is taken away (0 if unknown), None if no machine is. Collective."""
        return None
