"""The blocks of ``raydpo gpu check``, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from raydpo.gpu.cached import cached_is_live
from raydpo.gpu.environment import environment
from raydpo.gpu.figures import Findings
from raydpo.gpu.fusing import fusing
from raydpo.gpu.kernels import kernels
from raydpo.gpu.logits import logits
from raydpo.gpu.memory import auto_budget, memory_plan
from raydpo.gpu.numerics import numerics
from raydpo.gpu.offload import offload
from raydpo.gpu.resume import resume
from raydpo.gpu.speed import scoring_speed, training_speed
from raydpo.gpu.world import World

__all__ = ["BLOCKS", "Block"]


@dataclass(frozen=True)
class Block:
    """A part of the check.

    Attributes:
        quick: whether ``--quick`` runs it.
    """

    number: int
    name: str
    run: Callable[[World, Findings], None]
    quick: bool = True


BLOCKS = (
    Block(0, "environment", environment),
    Block(1, "kernels", kernels),
    Block(2, "head", logits),
    Block(3, "cached = live", cached_is_live),
    Block(4, "memory plan", memory_plan),
    Block(5, "auto budget", auto_budget),
    Block(6, "scoring speed", scoring_speed, quick=False),
    Block(7, "training speed", training_speed, quick=False),
    Block(8, "resume", resume),
    Block(9, "offload", offload, quick=False),
    Block(10, "fused", fusing, quick=False),
    Block(11, "numerics", numerics, quick=False),
)
"""All blocks, in the order in which they run."""
