"""What a policy's implicit rewards make of labelled pairs: accuracy, margin, calibration, and the pull of length.

Shapes: n = pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from raydpo.audit.measure import LENGTH_BINS
from raydpo.evaluation.interval import mean, share
from raydpo.training.metrics import TIE

__all__ = ["ScoredPairs", "measure_preferences"]

CALIBRATION_BINS = 10
"""Of equal width between 0.5 and 1."""


@dataclass(frozen=True)
class ScoredPairs:
    """Sums of log-probs over the completions of n pairs, nats; their tokens; the source of each pair. Each is [n]."""

    chosen: np.ndarray
    rejected: np.ndarray
    ref_chosen: np.ndarray
    ref_rejected: np.ndarray
    chosen_tokens: np.ndarray
    rejected_tokens: np.ndarray
    sources: np.ndarray

    def margins(self, beta: float, per_token: bool) -> np.ndarray:
        """beta * (log-ratio of the chosen completion - that of the rejected one), as sums or per token."""
        chosen, rejected = self.chosen - self.ref_chosen, self.rejected - self.ref_rejected
        if per_token:
            chosen, rejected = chosen / self.chosen_tokens, rejected / self.rejected_tokens
        return beta * (chosen - rejected)

    def wins(self, margins: np.ndarray) -> np.ndarray:
        """1 where the margin is positive, 1/2 where it is zero but for rounding, as while training."""
        nats = (self.chosen - self.ref_chosen) - (self.rejected - self.ref_rejected)
        alike = np.abs(nats) <= TIE * (self.chosen_tokens + self.rejected_tokens)
        return np.where(alike, 0.5, _wins(margins))


def measure_preferences(pairs: ScoredPairs, beta: float, *, per_token: bool = False) -> dict[str, Any]:
    """Figures over all pairs, by source, and by how much longer the chosen completion is (in the bins of the audit).

    Of each group of pairs:

    - ``accuracy``: share whose margin is positive, a tie counting one half; ``margin``: its mean, in units of reward.
    - ``loss``: mean of -log sigmoid(margin) (arXiv 2305.18290, eq. 7).
    - ``log_likelihood_accuracy``: share to whose chosen completion the policy alone gives the higher log-prob.
    - ``calibration``: sigmoid(margin) is the probability that the policy gives to the label. Its confidence is that or one
      minus that, whichever is larger; by bins of confidence, how often the label agrees. ``calibration_error`` is the mean
      distance of the two, weighted by pairs (expected calibration error, Guo et al. 2017, arXiv 1706.04599).
    - ``longer_is_wrong``, ``longer_is_right``: accuracy where the rejected, or the chosen, completion is the longer one. A
      policy that has learned length is poor at the former and good at the latter.
    - ``chosen_fell``: share whose chosen completion is less likely than under the reference.
    """
    margins = pairs.margins(beta, per_token)
    wins = pairs.wins(margins)
    difference = pairs.chosen_tokens - pairs.rejected_tokens

    def figures(mask: np.ndarray) -> dict[str, Any]:
        return _figures(pairs, margins, wins, difference, mask)

    by_length = []
    for low, high in pairwise((-np.inf, *LENGTH_BINS, np.inf)):
        edges = {"from": None if np.isinf(low) else int(low), "to": None if np.isinf(high) else int(high) - 1}
        by_length.append(edges | figures((difference >= low) & (difference < high)))
    return {"total": figures(np.ones(len(margins), bool)),
            "by_source": {name: figures(pairs.sources == name) for name in dict.fromkeys(pairs.sources.tolist())},
            "by_length": by_length}


def _figures(pairs: ScoredPairs, margins: np.ndarray, wins: np.ndarray, difference: np.ndarray,
             mask: np.ndarray) -> dict[str, Any]:
    count, margin = int(mask.sum()), margins[mask]
    alone = (pairs.chosen - pairs.rejected)[mask]
    fell = (pairs.chosen - pairs.ref_chosen)[mask] < -TIE * pairs.chosen_tokens[mask]
    bins, error = _calibration(margin, wins[mask])
    return {
        "pairs": count, "accuracy": share(wins[mask].sum(), count), "margin": mean(margin),
        "loss": float(np.logaddexp(0, -margin).mean()) if count else None,
        "log_likelihood_accuracy": share(_wins(alone).sum(), count),
        "calibration_error": error, "calibration": bins,
        "longer_is_wrong": _accuracy(wins[mask & (difference < 0)]),
        "longer_is_right": _accuracy(wins[mask & (difference > 0)]),
        "chosen_fell": share(int(fell.sum()), count)}


def _accuracy(wins: np.ndarray) -> dict[str, Any]:
    return {"pairs": len(wins), "accuracy": share(wins.sum(), len(wins))}


def _wins(margins: np.ndarray) -> np.ndarray:
    return np.where(np.abs(margins) <= TIE, 0.5, margins > 0)


def _calibration(margins: np.ndarray, wins: np.ndarray) -> tuple[list[dict[str, Any]], float | None]:
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    edges = np.linspace(0.5, 1.0, CALIBRATION_BINS + 1)
    place = np.minimum(np.searchsorted(edges, confidence, "right") - 1, CALIBRATION_BINS - 1)
    bins, error = [], 0.0
    for number, (low, high) in enumerate(pairwise(edges.tolist())):
        inside = place == number
        count = int(inside.sum())
        observed = share(wins[inside].sum(), count)
        predicted = float(confidence[inside].mean()) if count else None
        bins.append({"from": low, "to": high, "pairs": count, "predicted": predicted, "observed": observed["value"],
                     "low": observed["low"], "high": observed["high"]})
        if count:
            error += count / len(margins) * abs(predicted - observed["value"])
    return bins, error if len(margins) else None
