"""Figures with 95 % intervals, as in evaluation.json: value, low, high.

Pairs of one prompt are not independent: a record that ranks four answers gives six related pairs. So intervals assume that
prompts are independent, and not that pairs are.
"""

from __future__ import annotations

import math

import numpy as np

__all__ = [
    "Z95",
    "Interval",
    "around",
    "by_group",
    "effective_count",
    "mean",
    "mean_by_group",
    "ratio",
    "share",
    "share_by_group",
    "share_error",
    "standard_error",
    "student95",
]

Z95 = 1.959964
"""Half-width of a 95 % interval, in standard errors, where the standard error is known."""
_STUDENT = (math.inf, 12.706205, 4.302653, 3.182446, 2.776445)
Interval = dict[str, float | None]
"""``{"value": ..., "low": ..., "high": ...}``; a value is None if too little was measured."""


def student95(freedom: int) -> float:
    """Half-width of a 95 % interval, in standard errors estimated with ``freedom`` degrees of freedom: Student's t.

    From 5 degrees on it uses the expansion around the normal distribution (Abramowitz and Stegun 26.7.5).
    """
    if freedom < len(_STUDENT):
        return _STUDENT[freedom]
    z, terms = Z95, ((1, 1, 4), (5, 16, 3, 96), (3, 19, 17, -15, 384), (79, 776, 1482, -1920, -945, 92160))
    return z + sum(
        z * float(np.polyval(over, z * z)) / (under * freedom**power) for power, (*over, under) in enumerate(terms, 1)
    )


# ---- shares


def share(count: float, total: float) -> Interval:
    """Share of ``total`` with Wilson's interval (1927, doi 10.1080/01621459.1927.10502953). Ties may count one half."""
    if not total:
        return {"value": None, "low": None, "high": None}
    z, value = Z95, count / total
    centre = value + z * z / (2 * total)
    spread = z * math.sqrt(max(value * (1 - value), 0.0) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    # Rounding would take the bounds of shares of 0 and 1 beyond them.
    return {"value": value, "low": max(0.0, (centre - spread) / scale), "high": min(1.0, (centre + spread) / scale)}


def share_error(value: float, total: float) -> float:
    """Standard error of a share, taken at the centre of Wilson's interval, so that it is above 0 for shares of 0 and 1 too.

    Source: Agresti and Coull 1998, doi 10.1080/00031305.1998.10480550.

    Args:
        total: number of independent observations; ``effective_count`` if pairs share prompts.
    """
    more = total + Z95 * Z95
    centre = (value * total + Z95 * Z95 / 2) / more
    return math.sqrt(centre * (1 - centre) / more)


def effective_count(sums: np.ndarray, sizes: np.ndarray) -> float:
    """Number of independent observations that would give a share as precisely as these grouped observations.

    It is the number of observations divided by the design effect, which is estimated from the spread of the groups, and is
    smaller if there are few groups (Korn and Graubard, Survey Methodology 24, 1998, p. 193). It equals the number of
    observations if each is its own group, and is never larger. If all observations are equal, the design effect cannot be
    estimated; then the observations of a group count as identical.

    Args:
        sums: sum of the observations, each from 0 to 1, of each group, [groups]. sizes: their number, [groups].
    """
    groups, total = len(sums), float(sizes.sum())
    if groups == total:
        return total
    value = float(sums.sum()) / total
    least = total**2 / float((sizes.astype(float) ** 2).sum())
    if groups < 2:
        return least
    variance = groups / (groups - 1) * float(((sums - value * sizes) ** 2).sum()) / total**2
    if variance < 1e-12:
        return least
    count = value * (1 - value) / variance * total / (total - 1)
    return min(total, count * (student95(int(total) - 1) / student95(groups - 1)) ** 2)


def share_by_group(values: np.ndarray, groups: np.ndarray) -> Interval:
    """Mean of [n] values from 0 to 1 with Wilson's interval for their ``effective_count``.

    Args:
        groups: number of the group of each value, [n].
    """
    sums, sizes = by_group(values, groups)
    if not len(values):
        return share(0, 0)
    count = effective_count(sums, sizes)
    return share(float(sums.sum()) / len(values) * count, count)


# ---- means


def mean(values: np.ndarray) -> Interval:
    """Mean of [n] independent values with Student's interval, which needs two values."""
    if not len(values):
        return {"value": None, "low": None, "high": None}
    return around(float(values.mean()), standard_error(values), len(values))


def standard_error(values: np.ndarray) -> float | None:
    """Standard error of the mean of [n] independent values, or None for fewer than two."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def mean_by_group(values: np.ndarray, groups: np.ndarray) -> Interval:
    """Mean of [n] values with an interval that takes groups as independent; it needs two groups.

    Args:
        groups: number of the group of each value, [n].
    """
    return ratio(*by_group(values, groups)) if len(values) else mean(values)


def ratio(above: np.ndarray, below: np.ndarray) -> Interval:
    """Mean of ``above`` divided by mean of ``below``, [n] independent pairs of values. The error is by the delta method."""
    value = float(above.mean() / below.mean())
    error = standard_error(above - value * below)
    return around(value, None if error is None else error / float(below.mean()), len(above))


def around(value: float, error: float | None, count: int) -> Interval:
    """Interval of a normal estimator whose standard error is estimated from ``count`` independent values."""
    if error is None:
        return {"value": value, "low": None, "high": None}
    spread = student95(count - 1) * error
    return {"value": value, "low": value - spread, "high": value + spread}


def by_group(values: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum and the number of the values of each group, [groups] each."""
    _, inverse = np.unique(groups, return_inverse=True)
    return np.bincount(inverse, values), np.bincount(inverse)
