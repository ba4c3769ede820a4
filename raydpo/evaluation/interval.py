"""Figures with their 95 % intervals, as evaluation.json holds them: value, low, high.

Pairs of one prompt are alike: a record that ranks four answers gives six pairs that stand or fall together. So the prompts
count as independent, and not their pairs.
"""

from __future__ import annotations

import math

import numpy as np

__all__ = ["Z95", "Interval", "around", "by_group", "effective_count", "mean", "mean_by_group", "ratio", "share",
           "share_by_group", "share_error", "standard_error", "student95"]

Z95 = 1.959964
"""Standard errors to each side of a 95 % interval, where the standard error is known."""
_STUDENT = (math.inf, 12.706205, 4.302653, 3.182446, 2.776445)
Interval = dict[str, float | None]
"""``{"value": ..., "low": ..., "high": ...}``; None where too little was measured."""


def student95(freedom: int) -> float:
    """Standard errors to each side of a 95 % interval, where the standard error is an estimate of ``freedom`` degrees of
    freedom: Student's t, from 5 on by its expansion around the normal distribution (Abramowitz and Stegun 26.7.5)."""
    if freedom < len(_STUDENT):
        return _STUDENT[freedom]
    z, terms = Z95, ((1, 1, 4), (5, 16, 3, 96), (3, 19, 17, -15, 384), (79, 776, 1482, -1920, -945, 92160))
    return z + sum(z * float(np.polyval(over, z * z)) / (under * freedom**power)
                   for power, (*over, under) in enumerate(terms, 1))


# ---- shares


def share(count: float, total: float) -> Interval:
    """A share of ``total`` and its interval (Wilson 1927, doi 10.1080/01621459.1927.10502953); ties may count one half."""
    if not total:
        return {"value": None, "low": None, "high": None}
    z, value = Z95, count / total
    centre = value + z * z / (2 * total)
    spread = z * math.sqrt(max(value * (1 - value), 0.0) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return {"value": value, "low": (centre - spread) / scale, "high": (centre + spread) / scale}


def share_error(value: float, total: float) -> float:
    """Standard error of a share of ``total``, taken at the centre of Wilson's interval: it is above 0 for shares of 0 and of
    1, too (Agresti and Coull 1998, doi 10.1080/00031305.1998.10480550).

    Args:
        total: independent observations; ``effective_count`` of pairs that share prompts.
    """
    more = total + Z95 * Z95
    centre = (value * total + Z95 * Z95 / 2) / more
    return math.sqrt(centre * (1 - centre) / more)


def effective_count(sums: np.ndarray, sizes: np.ndarray) -> float:
    """How many independent observations would say as much of a share as these do, of which those of one group are alike.

    It is the number of observations over the design effect, which the groups' spread tells, and less where few groups tell
    it (Korn and Graubard, Survey Methodology 24, 1998, p. 193). At most the number of observations, and exactly that where
    each is a group of its own. Where all are equal nothing tells how alike a group is: then it is taken to be entirely so.

    Args:
        sums: of the observations, each from 0 to 1, of each group, [groups]. sizes: number of its observations, [groups].
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
    """The mean of [n] values from 0 to 1, and Wilson's interval of as many as they are worth: those of one group are alike.

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
    """The mean of [n] independent values and Student's interval, which takes two of them."""
    if not len(values):
        return {"value": None, "low": None, "high": None}
    return around(float(values.mean()), standard_error(values), len(values))


def standard_error(values: np.ndarray) -> float | None:
    """Of the mean of [n] independent values; None of fewer than two."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def mean_by_group(values: np.ndarray, groups: np.ndarray) -> Interval:
    """The mean of [n] values, those of one group alike; its interval takes two groups.

    Args:
        groups: number of the group of each value, [n].
    """
    return ratio(*by_group(values, groups)) if len(values) else mean(values)


def ratio(above: np.ndarray, below: np.ndarray) -> Interval:
    """Mean of ``above`` over mean of ``below``, [n] independent pairs of values, its error by the delta method."""
    value = float(above.mean() / below.mean())
    error = standard_error(above - value * below)
    return around(value, None if error is None else error / float(below.mean()), len(above))


def around(value: float, error: float | None, count: int) -> Interval:
    """A value whose estimator is normal, with a standard error that ``count`` independent values tell."""
    if error is None:
        return {"value": value, "low": None, "high": None}
    spread = student95(count - 1) * error
    return {"value": value, "low": value - spread, "high": value + spread}


def by_group(values: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the values of each group, and their number, [groups] each."""
    _, inverse = np.unique(groups, return_inverse=True)
    return np.bincount(inverse, values), np.bincount(inverse)
