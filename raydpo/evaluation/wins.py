"""Whose answer is better, the policy's or the reference's: verdicts of any judge, counted."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raydpo.data.preference import Text
from raydpo.errors import ConfigError, RaydpoError
from raydpo.evaluation.interval import mean, share
from raydpo.evaluation.prompts import as_text

__all__ = ["Contest", "compare_scores", "count_wins", "own_scores"]


@dataclass(frozen=True)
class Contest:
    """Two answers to one prompt, as text."""

    prompt: Text
    policy: str
    reference: str


def count_wins(judge: str, mode: str, verdicts: np.ndarray, **more: Any) -> dict[str, Any]:
    """``win_rate`` with its interval, a tie counting one half.

    Args:
        verdicts: of each contest 1 if the policy won, 0.5 if nobody did, 0 if the reference won, NaN if it was not judged.
        more: what else a judge has to say.
    """
    judged = verdicts[~np.isnan(verdicts)]
    wins, ties = int((judged == 1).sum()), int((judged == 0.5).sum())
    return {"judge": judge, "mode": mode, "win_rate": share(wins + ties / 2, len(judged)), "wins": wins, "ties": ties,
            "losses": len(judged) - wins - ties, "not_judged": len(verdicts) - len(judged)} | more


def compare_scores(judge: str, mode: str, policy: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """Wins by scores, higher is better, [contests] each; equal ones are ties."""
    return count_wins(judge, mode, (np.sign(policy - reference) + 1) / 2, score_difference=mean(policy - reference))


def own_scores(path: str, contests: Sequence[Contest]) -> tuple[np.ndarray, np.ndarray]:
    """What the user's function ``module:function`` gives the answers of policy and reference, float64 [contests] each.

    Raises:
        ConfigError: if there is no such function.
        RaydpoError: if it fails, or returns what is no finite number.
    """
    function = _imported(path)

    def score(prompt: Text, answer: str) -> float:
        try:
            value = function(as_text(prompt), answer)
        except Exception as error:
            raise RaydpoError(f"evaluate.score_with {path} failed on the answer {answer[:80]!r}: {type(error).__name__}: "
                              f"{error}") from error
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
            raise RaydpoError(f"evaluate.score_with {path} returned {str(value)[:80]!r} for the answer {answer[:80]!r}; a "
                              "finite number is wanted")
        return float(value)

    return (np.array([score(one.prompt, one.policy) for one in contests]),
            np.array([score(one.prompt, one.reference) for one in contests]))


def _imported(path: str) -> Callable[[str, str], Any]:
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # the command may have been started from anywhere
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"evaluate.score_with is {path!r}, but {error}; the module must lie here or on "
                          "PYTHONPATH") from None
    if not callable(function):
        raise ConfigError(f"evaluate.score_with is {path!r}, which is no function but {type(function).__name__}")
    return function
