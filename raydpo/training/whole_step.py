"""Objectives over a whole step, whose pairs are computed in micro-batches on several ranks.

A first pass without gradients computes the log-probs of all pairs of the step. Every rank then computes the step's loss
and its derivative by each log-prob. The second pass, with gradients, uses that the gradient of sum(derivative * log-prob) is
that of the loss. So the result does not depend on how the step is split; it costs one more forward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from raydpo.losses import Objective, ObjectiveState, PairLogps, PreferenceLoss
from raydpo.training.pairs import send

__all__ = ["WholeStep"]

_WITH_GRADIENT = ("chosen", "rejected", "chosen_tail", "rejected_tail")


class WholeStep:
    """Losses of a step's pairs and their derivatives, [pairs] each, by row number.

    Args:
        rows: row numbers of the step's pairs; one may occur twice.
        logps: log-probs of ``rows``, in that order.
        beta: beta before ``train.dynamic_beta`` changes it.
        memory: state of the objective before the step.

    Attributes:
        beta: beta of this step.
        memory: state of the objective after the step.
    """

    def __init__(
        self, objective: Objective, rows: np.ndarray, logps: PairLogps, beta: float, memory: ObjectiveState
    ) -> None:
        self.beta, self.memory = objective.remember(logps, beta, memory)
        inputs = {
            name: value.detach().requires_grad_() for name in _WITH_GRADIENT if (value := getattr(logps, name)) is not None
        }
        with torch.enable_grad():
            loss = objective(dataclasses.replace(logps, **inputs), self.beta, self.memory)
            slopes = torch.autograd.grad(loss.losses.sum(), list(inputs.values()), allow_unused=True)
        self._distinct, places = np.unique(rows, return_inverse=True)
        self._places = torch.from_numpy(places).to(logps.chosen.device)
        self._slopes = {name: self._by_row(slope) for name, slope in zip(inputs, slopes, strict=True) if slope is not None}
        self._loss = [self._by_row(value.detach()) for value in (loss.losses, loss.chosen_rewards, loss.rejected_rewards)]
        self._threshold = loss.threshold

    def _by_row(self, values: Tensor) -> Tensor:
        """[pairs] -> [distinct rows]. A row that occurs twice, at two quantiles, gets the mean."""
        totals = values.new_zeros(len(self._distinct)).index_add_(0, self._places, values)
        return totals / torch.bincount(self._places, minlength=len(self._distinct))

    def part(self, rows: Sequence[int], logps: PairLogps) -> tuple[PreferenceLoss, Tensor]:
        """Losses and rewards of one micro-batch, and a number whose gradient is that of the losses' sum."""
        place = send(np.searchsorted(self._distinct, np.asarray(rows)), logps.chosen.device)
        carrier = sum((slope[place] * getattr(logps, name)).sum() for name, slope in self._slopes.items())
        return PreferenceLoss(*(value[place] for value in self._loss), self._threshold), carrier
