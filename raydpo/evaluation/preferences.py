"""Figures of a policy's implicit rewards on labelled pairs: accuracy, margin, calibration, and preference for length.

Shapes: n = pairs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from raydpo.config import ObjectiveConfig
from raydpo.data.facts import LENGTH_BINS
from raydpo.data.interval import by_group, mean_by_group, share_by_group
from raydpo.data.separation import auc_by_group
from raydpo.errors import RaydpoError
from raydpo.losses import PairLogps, implicit_rewards
from raydpo.losses.pairs import TIE

__all__ = ["ScoredPairs", "measure_preferences"]

CALIBRATION_BINS = 10
"""Number of bins of confidence, of equal width between 0.5 and 1."""
CHANCE_DRAWS = 1000
"""Number of simulated evaluations from which ``calibration_chance`` is computed."""


@dataclass(frozen=True)
class ScoredPairs:
    """Sums of log-probs over the completions of n pairs, nats; numbers of tokens; source and number of the prompt of each
    pair. Each is [n].

    Sums are over the tokens that count, each times its weight, and numbers of tokens are the sums of these weights. Rows of
    which ``labels`` is 1 or -1 have a chosen or a rejected completion alone; None = all are pairs.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    ref_chosen: np.ndarray
    ref_rejected: np.ndarray
    chosen_tokens: np.ndarray
    rejected_tokens: np.ndarray
    sources: np.ndarray
    prompts: np.ndarray
    labels: np.ndarray | None = None

    def take(self, mask: np.ndarray) -> ScoredPairs:
        """The rows for which ``mask``, bool [n], is true."""
        return ScoredPairs(*(None if each is None else each[mask] for each in vars(self).values()))

    def rewards(self, beta: float, objective: ObjectiveConfig) -> tuple[np.ndarray, np.ndarray]:
        """Return the rewards of chosen and rejected completions by ``objective``, [n] each."""
        sums = (self.chosen, self.rejected, self.ref_chosen, self.ref_rejected)
        # A side without tokens has no mean.
        tokens = (np.where(each == 0, 1, each) for each in (self.chosen_tokens, self.rejected_tokens))
        logps = PairLogps(*(torch.from_numpy(np.asarray(each, np.float64)) for each in (*sums, *tokens)))
        chosen, rejected = implicit_rewards(objective, logps, beta)
        return chosen.numpy(), rejected.numpy()

    def margins(self, beta: float, objective: ObjectiveConfig) -> np.ndarray:
        """Return reward of the chosen completion minus reward of the rejected one, [n], by the rewards of ``objective``.

        Raises:
            RaydpoError: if a margin is not finite, for example the exponential of a divergence.
        """
        chosen, rejected = self.rewards(beta, objective)
        with np.errstate(invalid="ignore"):  # infinite ones are refused below
            margins = chosen - rejected
        if not np.isfinite(margins).all():
            raise RaydpoError(
                f"the rewards of {np.count_nonzero(~np.isfinite(margins)):,} pairs are not finite under "
                f"{objective.f_divergence_type}, because the policy is too far from the reference; set "
                "evaluate.log_ratios=sum"
            )
        return margins

    def wins(self, margins: np.ndarray, objective: ObjectiveConfig) -> np.ndarray:
        """Return 1 where the margin is positive, and 1/2 where it is zero up to rounding, as in training; [n]."""
        nats = self.chosen - self.rejected
        if objective.needs_reference:
            nats = nats - (self.ref_chosen - self.ref_rejected)
        alike = np.abs(nats) <= TIE * (self.chosen_tokens + self.rejected_tokens)
        return np.where(alike, 0.5, _wins(margins))


def measure_preferences(pairs: ScoredPairs, beta: float, objective: ObjectiveConfig) -> dict[str, Any]:
    """Compute the figures of all pairs, by source, and by difference in length (in the bins of the audit).

    Intervals are over prompts; lengths are of the tokens that count. The figures of a group of pairs:

    - ``accuracy``: share whose margin is positive, a tie counting one half; ``margin``: its mean, in units of reward.
    - ``loss``: mean of -log sigmoid(margin) (arXiv 2305.18290, eq. 7).
    - ``log_likelihood_accuracy``: share whose chosen completion has the higher log-prob under the policy alone.
    - ``calibration``: accuracy by bins of confidence. sigmoid(margin) is the probability of the label; confidence is the
      larger of that and one minus that. ``calibration_error`` is the mean distance of the two, weighted by pairs (expected
      calibration error, Guo et al. 2017, arXiv 1706.04599). It is above 0 by chance alone: for perfectly calibrated
      confidences it is below ``calibration_chance`` in 95 % of draws.
    - ``longer_is_wrong``, ``longer_is_right``: accuracy where the rejected, or the chosen, completion is longer. A policy
      that prefers length is poor at the former and good at the latter.
    - ``chosen_fell``: share whose chosen completion is less likely than under the reference.

    With completions alone there is also ``labels``, of them all and by source, and the figures above are of the pairs:

    - ``auc``: probability that a desirable completion has a higher reward than an undesirable one (``data.separation``).
    - ``desirable_rose``, ``undesirable_fell``: share of each that is more, or less, likely than under the reference.
    - ``desirable_reward``, ``undesirable_reward``: mean rewards.
    """
    if pairs.labels is not None:
        alone = pairs.labels != 0
        found = measure_preferences(dataclasses.replace(pairs.take(~alone), labels=None), beta, objective)
        return found | {"labels": _of_labels(pairs.take(alone), beta, objective)}
    margins = pairs.margins(beta, objective)
    wins = pairs.wins(margins, objective)
    difference = pairs.chosen_tokens - pairs.rejected_tokens

    def figures(mask: np.ndarray) -> dict[str, Any]:
        return _figures(pairs, margins, wins, difference, mask)

    by_length = []
    for low, high in pairwise((-np.inf, *LENGTH_BINS, np.inf)):
        edges = {"from": None if np.isinf(low) else int(low), "to": None if np.isinf(high) else int(high) - 1}
        by_length.append(edges | figures((difference >= low) & (difference < high)))
    return {
        "total": figures(np.ones(len(margins), bool)),
        "by_source": {name: figures(pairs.sources == name) for name in dict.fromkeys(pairs.sources.tolist())},
        "by_length": by_length,
    }


def _of_labels(alone: ScoredPairs, beta: float, objective: ObjectiveConfig) -> dict[str, Any]:
    """Figures of completions alone, see ``measure_preferences``."""
    good = alone.labels > 0
    rewards = np.where(good, *alone.rewards(beta, objective))
    moved = np.where(good, alone.chosen - alone.ref_chosen, alone.rejected - alone.ref_rejected)
    tokens = np.where(good, alone.chosen_tokens, alone.rejected_tokens)
    rose = np.where(np.abs(moved) <= TIE * tokens, 0.5, moved > 0)

    def figures(mask: np.ndarray) -> dict[str, Any]:
        kinds = {"desirable": mask & good, "undesirable": mask & ~good}
        return {
            "completions": int(mask.sum()),
            "prompts": len(np.unique(alone.prompts[mask])),
            **{name: int(of.sum()) for name, of in kinds.items()},
            "auc": auc_by_group(rewards[mask], alone.labels[mask], alone.prompts[mask]),
            "desirable_rose": share_by_group(rose[kinds["desirable"]], alone.prompts[kinds["desirable"]]),
            "undesirable_fell": share_by_group(1 - rose[kinds["undesirable"]], alone.prompts[kinds["undesirable"]]),
            **{f"{name}_reward": mean_by_group(rewards[of], alone.prompts[of]) for name, of in kinds.items()},
        }

    return {
        "total": figures(np.ones(len(good), bool)),
        "by_source": {name: figures(alone.sources == name) for name in dict.fromkeys(alone.sources.tolist())},
    }


def _figures(
    pairs: ScoredPairs, margins: np.ndarray, wins: np.ndarray, difference: np.ndarray, mask: np.ndarray
) -> dict[str, Any]:
    count, margin = int(mask.sum()), margins[mask]
    alone = (pairs.chosen - pairs.rejected)[mask]
    fell = (pairs.chosen - pairs.ref_chosen)[mask] < -TIE * pairs.chosen_tokens[mask]
    prompts = pairs.prompts[mask]
    return {
        "pairs": count,
        "prompts": len(np.unique(prompts)),
        "accuracy": share_by_group(wins[mask], prompts),
        "margin": mean_by_group(margin, prompts),
        "loss": float(np.logaddexp(0, -margin).mean()) if count else None,
        "log_likelihood_accuracy": share_by_group(_wins(alone), prompts),
        **_calibration(margin, wins[mask], prompts),
        "longer_is_wrong": _accuracy(wins, pairs.prompts, mask & (difference < 0)),
        "longer_is_right": _accuracy(wins, pairs.prompts, mask & (difference > 0)),
        "chosen_fell": share_by_group(fell.astype(float), prompts),
    }


def _accuracy(wins: np.ndarray, prompts: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
    return {"pairs": int(mask.sum()), "accuracy": share_by_group(wins[mask], prompts[mask])}


def _wins(margins: np.ndarray) -> np.ndarray:
    return np.where(np.abs(margins) <= TIE, 0.5, margins > 0)


def _calibration(margins: np.ndarray, wins: np.ndarray, prompts: np.ndarray) -> dict[str, Any]:
    """Return bins of confidence, the calibration error, and the largest error that chance explains."""
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    edges = np.linspace(0.5, 1.0, CALIBRATION_BINS + 1)
    place = np.minimum(np.searchsorted(edges, confidence, "right") - 1, CALIBRATION_BINS - 1)
    bins, error = [], 0.0
    for number, (low, high) in enumerate(pairwise(edges.tolist())):
        inside = place == number
        count = int(inside.sum())
        observed = share_by_group(wins[inside], prompts[inside])
        predicted = float(confidence[inside].mean()) if count else None
        around = {"observed": observed["value"], "low": observed["low"], "high": observed["high"]}
        bins.append({"from": low, "to": high, "pairs": count, "predicted": predicted} | around)
        if count:
            error += count / len(margins) * abs(predicted - observed["value"])
    return {
        "calibration_error": error if len(margins) else None,
        "calibration": bins,
        "calibration_chance": _chance(bins, wins - confidence, prompts * CALIBRATION_BINS + place) if len(margins) else None,
    }


def _chance(bins: list[dict[str, Any]], residuals: np.ndarray, groups: np.ndarray) -> float:
    """Return the 95 % quantile of the calibration error if confidences are true probabilities.

    The wins of each bin are drawn as if pairs were independent, and the error is multiplied by the root of the design effect
    of pairs that share a prompt.

    Args:
        residuals: wins minus confidence of each pair, [n]. groups: a number for its prompt and bin, [n].
    """
    filled = [each for each in bins if each["pairs"]]
    pairs, predicted = (np.array([each[name] for each in filled]) for name in ("pairs", "predicted"))
    drawn = np.random.default_rng(0).binomial(pairs, predicted, (CHANCE_DRAWS, len(filled)))
    errors = np.abs(drawn - pairs * predicted).sum(1) / pairs.sum()
    apart = residuals - residuals.mean()
    alone, together = float((apart**2).sum()), float((by_group(apart, groups)[0] ** 2).sum())
    return float(np.quantile(errors, 0.95)) * max(1.0, together / alone if alone else 1.0) ** 0.5
