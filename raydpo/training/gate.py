"""Step-0 gate: check before the first update that the stored log-probs are those of the starting policy.

If the policy starts as the reference, both must agree up to rounding, and the first loss must be that of the reference
(ln 2 for sigmoid). A larger gap means that the cache holds other weights, other tokens or altered values, and the run stops.
Reference values are never computed from the policy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from raydpo.errors import GateError
from raydpo.losses import Objective
from raydpo.training.evaluate import Comparison, Gaps, reference_logps
from raydpo.training.pairs import TrainingPairs

__all__ = ["GateReport", "StepGate", "expected_first_loss", "gate_rows", "judge"]

TOLERANCES = {"float32": (1e-3, 2e-2), "bfloat16": (0.1, 3.0)}
"""By the coarser of the two precisions: largest mean gap of a pair's tokens, and largest gap of a token, in nats. Rounding
gives gaps ten times smaller; other weights or tokens give gaps far larger."""


@dataclass(frozen=True)
class GateReport:
    """Result of the gate: gaps in nats, over ``pairs`` pairs."""

    pairs: int
    mean_gap: float
    worst_gap: float
    worst_pair: str
    first_loss: float

    def line(self) -> str:
        return (
            f"step-0 gate: {self.pairs} pairs computed again, cached and live log-probs differ by {self.mean_gap:.2g} nats "
            f"a token on average, {self.worst_gap:.2g} at most (pair {self.worst_pair}); loss {self.first_loss:.6f}"
        )

    def __add__(self, other: GateReport) -> GateReport:
        pairs = self.pairs + other.pairs

        def mean(name: str) -> float:
            return sum(getattr(one, name) * one.pairs for one in (self, other)) / pairs

        worst = max(self, other, key=lambda one: one.worst_gap)
        return GateReport(pairs, mean("mean_gap"), worst.worst_gap, worst.worst_pair, mean("first_loss"))


@dataclass
class StepGate:
    """The gate within the first step: compares the pairs of the step in its own forward pass, before the update.

    Attributes:
        gaps: collects the differences of these pairs.
        accept: accepts their comparison, or raises GateError.
        report: the result, after ``close``.
    """

    gaps: Gaps
    accept: Callable[[Comparison], GateReport]
    report: GateReport | None = None

    def close(self) -> None:
        """Judge what was collected. All ranks call it.

        Raises:
            GateError: if a gap is above its tolerance.
        """
        self.report = self.accept(self.gaps.join())


def gate_rows(pairs: TrainingPairs, first_step: np.ndarray, *, count: int, seed: int) -> list[int]:
    """Choose the pairs to compute beside those of the first step: as many as are missing for ``count``, and at least a third
    of it. Half of them have the lowest and highest stored log-prob a token (where an altered value shows), half are random
    (so that a change beyond the first step of data in file order can show). Ranked lists are whole."""
    total, known = len(pairs), {int(row) for row in first_step}
    if count >= total:
        return [row for row in range(total) if row not in known]
    wanted = max(count // 3, count - len(known))
    half = -(-wanted // 2)
    with np.errstate(invalid="ignore"):  # NaN for the missing side of a completion alone, which fmin and fmax pass over
        chosen, rejected = pairs.ref_chosen / pairs.chosen_counted, pairs.ref_rejected / pairs.rejected_counted
    lowest = _lowest(np.fmin(chosen, rejected), half + len(known))
    highest = _lowest(-np.fmax(chosen, rejected), half + len(known))
    extremes = np.stack([lowest, highest], axis=1).ravel()
    shuffled = np.random.default_rng(seed).permutation(total)
    rows: dict[int, None] = {}
    for candidates, size in ((extremes, half), (shuffled, wanted)):
        for row in (int(each) for each in candidates if int(each) not in known):
            if len(rows) >= size:
                break
            rows.setdefault(row)
    return pairs.with_lists(list(rows))


def _lowest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the ``count`` lowest values, or of all, the lowest first; of equal ones the first."""
    count = min(count, len(values))
    among = np.flatnonzero(values <= np.partition(values, count - 1)[count - 1])
    return among[np.argsort(values[among], kind="stable")][:count]


def expected_first_loss(objective: Objective, pairs: TrainingPairs, rows: np.ndarray, beta: float) -> float:
    """Mean loss of ``rows`` if the policy equals the reference: ln 2 for sigmoid. For a ranked list it is the sum of log(1 +
    number of completions below) over its completions. WPO's weights, which depend on the policy, count as 1."""
    logps = reference_logps(pairs, rows, objective.config)
    return float(objective(logps, beta).losses.sum() / logps.count)


def judge(
    comparison: Comparison,
    pairs: TrainingPairs,
    objective: Objective,
    beta: float,
    dtype: str,
    policy: str,
    reference: str,
) -> GateReport:
    """Accept a comparison, or stop the run.

    Args:
        beta: beta of the first step.
        dtype: the coarser precision of policy and reference.
        policy, reference: digests of the identities of the starting policy and of the cache.

    Raises:
        GateError: if a gap is above its tolerance; names both identities and the worst pair.
    """
    known = reference_logps(pairs, comparison.rows, objective.config)
    live = {
        name: value + torch.from_numpy(getattr(comparison, f"{name}_gap"))
        for name in ("chosen", "rejected", "chosen_tail", "rejected_tail")
        if (value := getattr(known, name)) is not None
    }
    losses = objective(dataclasses.replace(known, **live), beta).losses
    pair_ids = [pairs.ids[int(row)].as_py() for row in comparison.rows]
    worst = int(np.argmax(comparison.token_gap))
    mean_gap, worst_gap = float(comparison.mean_gap.mean()), float(comparison.token_gap.max())
    report = GateReport(len(comparison.rows), mean_gap, worst_gap, pair_ids[worst], float(losses.sum() / known.count))
    mean_tolerance, token_tolerance = TOLERANCES[dtype]
    over_mean = comparison.mean_gap.max() > mean_tolerance
    if over_mean or report.worst_gap > token_tolerance or not np.isfinite(report.worst_gap):
        if over_mean and not report.worst_gap > token_tolerance:
            worst = int(np.argmax(comparison.mean_gap))
        raise GateError(
            f"the cached reference log-probs are not those of the starting policy: pair {pair_ids[worst]} differs by "
            f"{comparison.mean_gap[worst]:.3g} nats a token on average and {comparison.token_gap[worst]:.3g} at most "
            f"(tolerance {mean_tolerance:g} and {token_tolerance:g} in {dtype}); {report.pairs} pairs were compared, the "
            f"first loss would be {report.first_loss:.6f} instead of "
            f"{expected_first_loss(objective, pairs, comparison.rows, beta):.6f}. Policy identity {policy}, cache identity "
            f"{reference}. " + _advice(policy, reference)
        )
    return report


def _advice(policy: str, reference: str) -> str:
    again = f"delete the directory {reference} of the cache and run 'raydpo score' again"
    if policy != reference:
        return f"The cache was made by other weights or altered: {again}"
    return (
        "Both identities are equal, and the values are not: either the cache was altered, or the model is not a function of "
        "its files (its own code may draw random numbers, or a machine computes wrongly). "
        f"{again[0].upper()}{again[1:]}, which compares two loads of the model and refuses it if they differ"
    )
