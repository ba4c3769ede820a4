"""Objectives that compare the step's chosen completions with its rejected ones as distributions, quantile by quantile.

A pair's loss is that of its quantile; only the mean over the step has a meaning.
"""

from __future__ import annotations

from torch import Tensor

from raydpo.config import ObjectiveConfig
from raydpo.losses.margin import smoothed_logistic
from raydpo.losses.pairs import PairLogps

__all__ = ["aot", "aot_unpaired"]


def aot(logps: PairLogps, s: ObjectiveConfig, beta: float) -> Tensor:
    """AOT (Melnyk et al., arXiv 2406.05882, paired): the logistic loss of ``beta`` times the quantiles of log pi(y_w|x) -
    log pi(y_l|x) minus those of the reference."""
    return _by_quantile(logps.chosen - logps.rejected, logps.ref_chosen - logps.ref_rejected, s, beta)


def aot_unpaired(logps: PairLogps, s: ObjectiveConfig, beta: float) -> Tensor:
    """AOT (the same paper, unpaired): quantiles of the chosen log-ratios minus those of the rejected ones."""
    return _by_quantile(logps.chosen_logratio, logps.rejected_logratio, s, beta)


def _by_quantile(better: Tensor, worse: Tensor, s: ObjectiveConfig, beta: float) -> Tensor:
    """Loss of each quantile, assigned to the pair whose ``better`` is at that quantile."""
    quantiles, owners = better.sort(stable=True)
    losses = smoothed_logistic(beta * (quantiles - worse.sort().values), s.label_smoothing)
    return losses[owners.argsort()]
