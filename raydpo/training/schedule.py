"""Learning rate and beta as pure functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from raydpo.config import TrainConfig

__all__ = ["Schedule", "learning_rate", "warmup_steps"]


def warmup_steps(warmup: float, total_steps: int) -> int:
    """``train.warmup`` as a number of steps: a share below 1 is rounded up, as transformers does."""
    return math.ceil(warmup * total_steps) if warmup < 1 else int(warmup)


def learning_rate(step: int, *, peak: float, schedule: str, warmup: int, total_steps: int) -> float:
    """Learning rate of step ``step``, counted from 0.

    Warm-up rises linearly to the peak, starting above zero so that the first step has an effect. Then the rate decays
    towards zero (linear or cosine), or stays constant.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    progress = (step - warmup) / max(1, total_steps - warmup)
    return peak * (1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class Schedule:
    """Learning rate and beta of the steps of a training, which may be a part of a longer schedule.

    Attributes:
        total_steps: steps of the whole schedule.
        first: its steps before the first one of this training.
    """

    train: TrainConfig
    total_steps: int
    first: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of step ``step`` of this training, counted from 0."""
        train, total = self.train, self.total_steps
        warmup = warmup_steps(train.warmup, total)
        return learning_rate(self.first + step, peak=train.lr, schedule=train.schedule, warmup=warmup, total_steps=total)

    def beta(self, step: int) -> float:
        """Beta of step ``step`` of this training, counted from 0, before ``dynamic_beta``."""
        return self.train.beta_at(self.first + step, self.total_steps)
