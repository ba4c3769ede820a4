"""The blocks of ``raydpo gpu check``, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from raydpo.gpu.environment import environment
from raydpo.gpu.figures import Findings
from raydpo.gpu.kernels import kernels
from raydpo.gpu.logits import logits
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
)
