"""Reaction to preemption: a machine of the run is about to be taken away."""

from __future__ import annotations

import time

import torch

from raydpo.training.hooks import TrainHooks
from raydpo.training.policy.engine import StepEngine

__all__ = ["PreemptionGuard"]

AFTER = 60.0
"""Seconds to wait after the announced end; the machine may stay a little longer."""
SLACK = 5.0


class PreemptionGuard:
    """Asks for a preemption notice every few steps, and decides the same on every rank.

    After a notice a checkpoint is made at once. Training continues until shortly before the end; then another checkpoint is
    made and training waits, since further steps would be lost.

    Args:
        every: steps between two checks.
    """

    def __init__(self, engine: StepEngine, hooks: TrainHooks, every: int) -> None:
        self._engine, self._hooks, self._every = engine, hooks, every
        self._noticed = self._outlived = False
        self._end = 0.0

    def ask(self, step: int, step_seconds: float, save_seconds: float) -> bool:
        """Whether a checkpoint is needed after ``step``. All ranks call it.

        Args:
            step_seconds, save_seconds: duration of the last step and of the last checkpoint.
        """
        if self._outlived or step % self._every:
            return False
        left = self._hooks.preempted()
        if left is None:
            return False
        # Clocks differ between machines, so rank 0 decides.
        margin = SLACK + 2 * (self._every * step_seconds + save_seconds)
        agreed = torch.tensor(
            [left, left <= margin] if self._engine.rank == 0 else [0, 0], dtype=torch.float64, device=self._engine.device
        )
        left, near = self._engine.sum_over_ranks(agreed).tolist()
        self._end = time.monotonic() + left if near else 0.0
        if not self._noticed:
            self._hooks.note(f"a machine of this run is taken away in {max(0.0, left):.0f} s; making a checkpoint")
        first, self._noticed = not self._noticed, True
        return first or bool(near)

    def wait(self, step: int) -> None:
        """Wait for the end after the checkpoint of ``step``, if the end is near."""
        if not self._end:
            return
        self._hooks.note(
            f"the checkpoint of step {step} is stored; training waits for the machine to be taken away, and "
            "continues on others"
        )
        time.sleep(max(0.0, self._end - time.monotonic()) + AFTER)
        self._end, self._outlived = 0.0, True
        self._hooks.note(
            f"warning: the machine is still there {AFTER:.0f} s after its announced end; training continues, "
            "and ignores further notices"
        )
