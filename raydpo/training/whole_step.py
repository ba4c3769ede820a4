"""Objectives that speak of a whole step at once, though its pairs are computed in micro-batches on several ranks.

A first pass without gradients finds the log-probs of all pairs of the step. Every rank then has the step's loss and its
derivative by each log-prob, and the second pass, with gradients, needs no more than these: the gradient of sum(derivative *
log-prob) is that of the loss. So the step is the same however it is split, for the price of a forward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from raydpo.losses import Memory, Objective, PairLogps, PreferenceLoss

__all__ = ["WholeStep"]

_WITH_GRADIENT = ("chosen", "rejected", "chosen_tail", "rejected_tail")


class WholeStep:
    """The losses of a step's pairs and their derivatives, [pairs] each, by row number.

    Args:
        rows: row numbers of the step's pairs; one may be there twice.
        logps: of all of them, in that order.
        beta: before the step itself changes it.

    Attributes:
        beta: of this step.
        memory: what the objective knows once the step is taken.
    """

    def __init__(self, objective: Objective, rows: np.ndarray, logps: PairLogps, beta: float, memory: Memory) -> None:
        self.beta, self.memory = objective.remember(logps, beta, memory)
        inputs = {name: value.detach().requires_grad_() for name in _WITH_GRADIENT
                  if (value := getattr(logps, name)) is not None}
        with torch.enable_grad():
            loss = objective(dataclasses.replace(logps, **inputs), self.beta, self.memory)
            slopes = torch.autograd.grad(loss.losses.sum(), list(inputs.values()), allow_unused=True)
        self._distinct, places = np.unique(rows, return_inverse=True)
        self._places = torch.from_numpy(places).to(logps.chosen.device)
        self._slopes = {name: self._by_row(slope) for name, slope in zip(inputs, slopes, strict=True) if slope is not None}
        self._loss = [self._by_row(value.detach()) for value in (loss.losses, loss.chosen_rewards, loss.rejected_rewards)]

    def _by_row(self, values: Tensor) -> Tensor:
        """[pairs] -> [distinct rows]: of a row that is there twice, and stands at two quantiles, the mean."""
        totals = values.new_zeros(len(self._distinct)).index_add_(0, self._places, values)
        return totals / torch.bincount(self._places, minlength=len(self._distinct))

    def part(self, rows: Sequence[int], logps: PairLogps) -> tuple[PreferenceLoss, Tensor]:
        """Of one micro-batch: losses and rewards, and a number whose gradient is that of the losses' sum."""
        place = torch.from_numpy(np.searchsorted(self._distinct, np.asarray(rows))).to(logps.chosen.device)
        carrier = sum((slope[place] * getattr(logps, name)).sum() for name, slope in self._slopes.items())
        return PreferenceLoss(*(value[place] for value in self._loss)), carrier
