"""Contests between the answers of policy and reference, and their counted verdicts."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raydpo.data.interval import Interval, around, mean, share
from raydpo.data.messages import Text
from raydpo.data.preference import as_text
from raydpo.errors import ConfigError, RaydpoError

__all__ = ["Contest", "by_scores", "count_wins", "own_function", "own_scores"]

PRIOR_DEVIATION = 3.0
"""Standard deviation, in log odds, of the prior on a and b in the estimate of the win rate at equal length."""
NEWTON_STEPS = 25


@dataclass(frozen=True)
class Contest:
    """A prompt and the two answers to it, as text."""

    prompt: Text
    policy: str
    reference: str


def count_wins(judge: str, mode: str, contests: Sequence[Contest], verdicts: np.ndarray, **more: Any) -> dict[str, Any]:
    """Count verdicts: ``win_rate`` with its interval, and ``equal_length``, the win rate at equal length.

    Args:
        verdicts: one for each contest: 1 if the policy won, 0.5 for a tie, 0 if the reference won, NaN without a verdict.
        more: further figures of the judge.
    """
    known = ~np.isnan(verdicts)
    judged = verdicts[known]
    longer = np.array([len(contest.policy) - len(contest.reference) for contest in contests], float)[known]
    wins, ties = int((judged == 1).sum()), int((judged == 0.5).sum())
    return {
        "judge": judge,
        "mode": mode,
        "win_rate": share(wins + ties / 2, len(judged)),
        "equal_length": win_rate_at_equal_length(judged, longer),
        "wins": wins,
        "ties": ties,
        "losses": len(judged) - wins - ties,
        "not_judged": len(verdicts) - len(judged),
    } | more


def win_rate_at_equal_length(verdicts: np.ndarray, longer: np.ndarray) -> Interval:
    """Estimate the win rate for answers of equal length by logistic regression (Dubois et al. 2024, arXiv 2404.04475).

    The model is sigmoid(a + b * tanh(difference / deviation)); sigmoid(a) is the win rate without the effect of length. A
    weak prior keeps a and b finite if length alone explains all verdicts. The interval follows from the curvature of the
    likelihood; with many ties it is too wide.

    Args:
        verdicts: 1, 0.5 or 0 of each contest, [contests]. longer: characters by which the policy's answer is longer.
    """
    if len(verdicts) < 2:
        return {"value": None, "low": None, "high": None}
    spread = float(np.sqrt((longer**2).mean())) or 1.0
    features = np.stack([np.ones(len(longer)), np.tanh(longer / spread)], 1)
    prior, weights = np.eye(2) / PRIOR_DEVIATION**2, np.zeros(2)
    for _ in range(NEWTON_STEPS):
        likely = 1 / (1 + np.exp(-features @ weights))
        curvature = (features.T * (likely * (1 - likely))) @ features + prior
        weights = weights + np.linalg.solve(curvature, features.T @ (verdicts - likely) - prior @ weights)
    at_zero = around(float(weights[0]), float(np.sqrt(np.linalg.inv(curvature)[0, 0])), len(verdicts))
    return {name: 1 / (1 + math.exp(-value)) for name, value in at_zero.items()}


def by_scores(policy: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the verdicts that follow from two scores of each contest, [contests], and the mean difference of the scores.
    A contest with a score of NaN is not judged."""
    higher = policy - reference
    return (np.sign(higher) + 1) / 2, {"score_difference": mean(higher[~np.isnan(higher)])}


def own_scores(path: str, contests: Sequence[Contest]) -> tuple[np.ndarray, np.ndarray]:
    """Score the answers of policy and reference with the user's ``module:function``, float64 [contests] each.

    Raises:
        ConfigError: if there is no such function.
        RaydpoError: if it fails, or returns something other than a finite number.
    """
    function = own_function(path)

    def score(prompt: Text, answer: str) -> float:
        try:
            value = function(as_text(prompt), answer)
        except Exception as error:
            raise RaydpoError(
                f"evaluate.score_with {path} failed on the answer {answer[:80]!r}: {type(error).__name__}: {error}"
            ) from error
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
            raise RaydpoError(
                f"evaluate.score_with {path} returned {str(value)[:80]!r} for the answer {answer[:80]!r}; "
                "expected a finite number"
            )
        return float(value)

    policy, reference = ([score(one.prompt, getattr(one, side)) for one in contests] for side in ("policy", "reference"))
    return np.array(policy), np.array(reference)


def own_function(path: str) -> Callable[[str, str], Any]:
    """Import the user's function ``module:function`` from an installed package or from the working directory.

    Raises:
        ConfigError: if there is no such function.
    """
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # an installed command does not search the working directory
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # the user's module may raise any exception
        raise ConfigError(
            f"evaluate.score_with is {path!r}, but {error}; the module must be in this directory or on PYTHONPATH"
        ) from None
    if not callable(function):
        raise ConfigError(f"evaluate.score_with is {path!r}, which is not a function but a {type(function).__name__}")
    return function
