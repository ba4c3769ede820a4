"""Warnings about the metrics of a training, each once: loss spikes, collapsing log-probs or routers, a slow rank."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from statistics import fmean, median, pstdev

__all__ = ["TrainingWatch"]

WINDOW = 20
"""Number of steps that a warning looks at."""
SPIKE_DEVIATIONS = 6.0
"""Standard deviations above the mean of the steps before, from which a loss is a spike."""
LEAST_SPREAD = 0.02
"""Smallest standard deviation that counts, as a share of the mean: losses may hardly vary."""
COLLAPSE = math.log(0.5)
"""Mean log-ratio in nats a token over the window at which the policy is warned about: chosen tokens are half as likely."""
LAG = 0.25
UNBALANCED = 1.5
"""Mean router loss over the window, relative to that of the first steps, from which it is reported."""


class TrainingWatch:
    """Checks the metrics of every step.

    Args:
        warned: kinds of warnings that this run has given, also before a restart; extended in place.
    """

    def __init__(self, warned: list[str]) -> None:
        self._warned = warned
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._chosen: deque[float] = deque(maxlen=WINDOW)
        self._laggards: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        self._first_routed: list[float] = []
        self._routed: deque[float] = deque(maxlen=WINDOW)

    def look(self, step: int, row: Mapping[str, float]) -> Iterator[str]:
        """Warnings about this step. Each kind is given at most once a run."""
        for kind, line in (
            ("spike", self._spike(step, row["loss"])),
            ("collapse", self._collapse(step, row)),
            ("unbalanced", self._unbalanced(step, row)),
            ("slow rank", self._slow(row)),
        ):
            if line and kind not in self._warned:
                self._warned.append(kind)
                yield f"warning: {line}"

    def _spike(self, step: int, loss: float) -> str | None:
        earlier = list(self._losses)
        if not math.isfinite(loss):
            return None
        self._losses.append(loss)
        if len(earlier) < WINDOW:
            return None
        usual, spread = fmean(earlier), pstdev(earlier)
        if loss <= usual + SPIKE_DEVIATIONS * max(spread, LEAST_SPREAD * abs(usual)):
            return None
        return (
            f"the loss of step {step} is {loss:.4f}, the {WINDOW} steps before it had {usual:.4f} on average (standard "
            f"deviation {spread:.4f}). If it stays up, lower train.lr or train.clip, or look for outliers in the data "
            "with 'raydpo audit'"
        )

    def _collapse(self, step: int, row: Mapping[str, float]) -> str | None:
        value = row.get("logratio/chosen_per_token", math.nan)  # missing without a reference
        if not math.isfinite(value):
            return None
        self._chosen.append(value)
        mean = fmean(self._chosen)
        if len(self._chosen) < WINDOW or mean > COLLAPSE:
            return None
        return (
            f"the policy forgets the chosen completions: over the {WINDOW} steps up to {step} it gives their tokens "
            f"{math.exp(mean):.2g} of the probability that the reference gives them ({mean:.2f} nats a token). DPO only "
            "increases the difference of chosen and rejected, and both may fall; raise train.beta, lower train.lr, or "
            "train fewer steps"
        )

    def _unbalanced(self, step: int, row: Mapping[str, float]) -> str | None:
        value = row.get("aux_loss", math.nan)  # only with a router loss
        if not math.isfinite(value):
            return None
        if len(self._first_routed) < WINDOW:
            self._first_routed.append(value)
        self._routed.append(value)
        before, mean = fmean(self._first_routed), fmean(self._routed)
        if mean < UNBALANCED * before:
            return None
        return (
            f"the routers send more and more tokens to few experts: aux_loss is {mean:.2f} over the {WINDOW} steps up to "
            f"{step}, and was {before:.2f} at first. Raise train.router_aux_loss_coef, or lower train.lr"
        )

    def _slow(self, row: Mapping[str, float]) -> str | None:
        if "slowest_rank" not in row:
            return None
        self._laggards.append((int(row["slowest_rank"]), row["slowest_lag"]))
        ranks = {rank for rank, _ in self._laggards}
        lag = median(lag for _, lag in self._laggards)
        if len(self._laggards) < WINDOW or len(ranks) > 1 or lag < LAG:
            return None
        return (
            f"rank {ranks.pop()} has been the slowest for {WINDOW} steps, by {lag:.0%} over the median rank; all others "
            "wait for it. Look at its node: another job, a throttled device, a slower link"
        )
