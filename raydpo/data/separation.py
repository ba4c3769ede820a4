"""How well a figure tells one kind of completion from another: the area under the ROC curve, AUC."""

from __future__ import annotations

import numpy as np

from raydpo.data.interval import Interval, by_group, share

__all__ = ["auc_by_group", "effective_auc", "placements"]


def auc_by_group(rewards: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> Interval:
    """AUC of rewards, with Wilson's interval for its effective number of observations; None without both labels.

    Args:
        rewards: [n]. labels: 1 = desirable, -1 = undesirable, int [n]. groups: number of the group of each, [n].
    """
    value, count = effective_auc(rewards, labels, groups)
    return share(0, 0) if value is None else share(value * count, count)


def effective_auc(rewards: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> tuple[float | None, float]:
    """AUC of rewards, and the number of independent observations that would give a share as precisely.

    The AUC is the probability that a desirable completion has the higher reward of the two, where equal rewards count one
    half (Hanley and McNeil 1982, doi 10.1148/radiology.143.1.7063747). Its variance is that of its placements, summed over
    groups, which are taken as independent (Obuchowski 1997, doi 10.2307/2533958).

    Args:
        rewards, labels, groups: as of ``auc_by_group``.

    Returns:
        None and 0 without completions of both labels.
    """
    good, bad = rewards[labels > 0], rewards[labels < 0]
    if not len(good) or not len(bad):
        return None, 0.0
    over, under = placements(good, bad), 1 - placements(bad, good)  # shares that each is above of, and below of
    value = float(over.mean())
    influence = np.empty(len(good) + len(bad))
    influence[: len(good)], influence[len(good) :] = (over - value) / len(good), (under - value) / len(bad)
    sums, _ = by_group(influence, np.concatenate([groups[labels > 0], groups[labels < 0]]))
    most = float(len(good) + len(bad))
    variance = len(sums) / max(1, len(sums) - 1) * float((sums**2).sum())
    if variance < 1e-12:  # perfectly told apart, or all equal
        return value, float(min(len(good), len(bad)))
    return value, min(most, max(1.0, value * (1 - value) / variance))


def placements(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Share of ``others``, at least one, that each value is above, equal ones counting one half; [values]."""
    ordered = np.sort(others)
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")) / (2 * len(others))
