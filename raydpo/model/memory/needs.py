"""What a training step needs beyond the forward pass that is measured when ``tokens_per_batch`` is auto."""

from __future__ import annotations

from functools import cache

from raydpo.config import TrainConfig
from raydpo.model.budget import Needs
from raydpo.model.memory.activations import Batch
from raydpo.model.memory.adapters import Trained
from raydpo.model.memory.anatomy import Anatomy
from raydpo.model.memory.ledger import Device, MemoryEstimate, estimate_memory

__all__ = ["needs_of"]

PROPORTIONS = Batch.of_pairs([(4096, 2048, 2048)])
"""A micro-batch with the proportions of ``model.budget.probe_group``, in a step of several."""


def needs_of(
    anatomy: Anatomy,
    policy: Trained,
    train: TrainConfig,
    *,
    workers: int,
    dtype: str,
    device: Device = "cuda",
    updates: bool = True,
) -> Needs:
    """Make them from the ledger; parameters as of ``estimate_memory``.

    Args:
        updates: whether DeepSpeed trains. If not, passes add up gradients and nothing is done with them.

    Raises:
        ConfigError: as ``estimate_memory``.
    """

    @cache
    def ledger(positions: int) -> MemoryEstimate:
        return estimate_memory(
            anatomy, policy, train, PROPORTIONS.scaled(positions), workers=workers, dtype=dtype, device=device
        )

    def step(positions: int) -> float:
        found = ledger(positions)
        if updates:
            return found.device - found.standing.total
        return max(moment.activations + moment.gradients + moment.head for moment in found.passes)

    def probe(positions: int) -> float:
        forward = (moment for moment in ledger(positions).passes if moment.name.startswith("forward"))
        return max(moment.activations + moment.head for moment in forward)

    return Needs(step=step, probe=probe)
