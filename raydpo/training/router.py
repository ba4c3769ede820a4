"""The router loss over the micro-batches of all ranks, of one optimizer step or one evaluation."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from raydpo.config import ObjectiveConfig
from raydpo.data.plan import MicroBatch
from raydpo.model.layout import Layout
from raydpo.training.policy.engine import StepEngine

__all__ = ["RouterLoss"]


class RouterLoss:
    """A mean over micro-batches in which each weighs as much as it has tokens; stand-ins weigh nothing.

    So each token weighs the same, whichever rank and micro-batch it is in. What remains of the split is that the shares of
    the experts are those of a micro-batch, as in TRL, not of the whole step.

    Attributes:
        values: float64 [2], to be summed over ranks: loss times tokens, and tokens.
    """

    def __init__(self, engine: StepEngine, coef: float) -> None:
        self._engine, self._coef = engine, coef
        self._last = self._total = torch.zeros((), dtype=torch.float64, device=engine.device)
        self.values = torch.zeros(2, dtype=torch.float64, device=engine.device)

    @classmethod
    def asked(cls, engine: StepEngine, config: ObjectiveConfig) -> RouterLoss | None:
        """One if the policy trains with a router loss, else None."""
        return cls(engine, config.router_aux_loss_coef) if config.router_aux_loss_coef else None

    def add(self, batch: MicroBatch, layout: Layout, loss: Tensor) -> None:
        """Add the router loss [] of a micro-batch."""
        self._last = loss
        self.values += torch.stack([loss.detach().double(), torch.ones_like(self.values[0])]) * self._counted(batch, layout)

    def begin(self, batches: Iterable[tuple[MicroBatch, Layout]]) -> None:
        """Add up the tokens of a step's micro-batches over all ranks. All ranks call it with their own."""
        own = sum(self._counted(batch, layout) for batch, layout in batches)
        self._total = self._engine.sum_over_ranks(torch.full_like(self._total, own))

    def share(self, batch: MicroBatch, layout: Layout) -> Tensor:
        """What the micro-batch that was added last contributes to the loss of the step, [] with gradient."""
        return (self._coef * self._last * (layout.tokens * batch.counts / self._total)).float()

    def metrics(self) -> dict[str, float]:
        """``aux_loss``: the mean over the micro-batches added, of all ranks after an all-reduce; without the coefficient."""
        loss, tokens = self.values.tolist()
        return {"aux_loss": loss / tokens}

    def _counted(self, batch: MicroBatch, layout: Layout) -> int:
        return layout.tokens * (batch.counts and self._engine.is_leader)
