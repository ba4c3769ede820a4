"""Successive halving: the steps at which trials are compared, and which of them continue."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from raydpo.config import StopEarlyConfig

__all__ = ["best_first", "rungs", "survivors"]


def rungs(early: StopEarlyConfig) -> Iterator[int]:
    """Yield the steps at which trials are compared: ``early.grace``, then twice as many each time."""
    step = early.grace
    while True:
        yield step
        step *= 2


def best_first(scores: Mapping[str, float], *, lower_is_better: bool) -> list[str]:
    """Sort trials by score. Ties keep their order; NaN comes last."""
    sign = 1 if lower_is_better else -1
    return sorted(scores, key=lambda name: math.inf if math.isnan(scores[name]) else sign * scores[name])


def survivors(scores: Mapping[str, float], keep: float, *, lower_is_better: bool) -> set[str]:
    """Return the best share ``keep`` of the trials; their number is rounded up."""
    return set(best_first(scores, lower_is_better=lower_is_better)[: math.ceil(keep * len(scores) - 1e-9)])
