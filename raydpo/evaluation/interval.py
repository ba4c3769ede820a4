"""Figures with their 95 % intervals, as evaluation.json holds them: value, low, high."""

from __future__ import annotations

import numpy as np

from raydpo.audit.measure import Z95, wilson

__all__ = ["Interval", "around", "mean", "share", "standard_error"]

Interval = dict[str, float | None]
"""``{"value": ..., "low": ..., "high": ...}``; None where too little was measured."""


def share(count: float, total: int) -> Interval:
    """A share of ``total`` and its Wilson interval; ties may count one half."""
    found = wilson(float(count), total)
    return {"value": found["share"], "low": found["low"], "high": found["high"]}


def mean(values: np.ndarray) -> Interval:
    """The mean of [n] independent values and its normal interval, which takes two of them."""
    if not len(values):
        return {"value": None, "low": None, "high": None}
    return around(float(values.mean()), standard_error(values))


def standard_error(values: np.ndarray) -> float | None:
    """Of the mean of [n] independent values; None of fewer than two."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def around(value: float, error: float | None) -> Interval:
    """A value whose estimator is normal with this standard error."""
    if error is None:
        return {"value": value, "low": None, "high": None}
    return {"value": value, "low": value - Z95 * error, "high": value + Z95 * error}
