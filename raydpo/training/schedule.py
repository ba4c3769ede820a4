"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

__all__ = ["learning_rate", "warmup_steps"]


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
