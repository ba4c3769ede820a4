"""Which trials go on after a rung of successive halving."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from raydpo.config import StopEarlyConfig

__all__ = ["best_first", "going_on", "rungs"]


def rungs(early: StopEarlyConfig) -> Iterator[int]:
    """The steps at which trials are compared: grace, and twice as many each time."""
    step = early.grace
    while True:
        yield step
        step *= 2


def best_first(scores: Mapping[str, float], *, lower_is_better: bool) -> list[str]:
    """Trials by their score; ties in their order, and what is no number last."""
    sign = 1 if lower_is_better else -1
    return sorted(scores, key=lambda name: math.inf if math.isnan(scores[name]) else sign * scores[name])


def going_on(scores: Mapping[str, float], keep: float, *, lower_is_better: bool) -> set[str]:
    """The better share of trials, rounded up."""
    return set(best_first(scores, lower_is_better=lower_is_better)[: math.ceil(keep * len(scores) - 1e-9)])
