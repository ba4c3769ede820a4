"""Collective operations of an engine. Needs only torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["RankGroup"]


class RankGroup:
    """Base class of an engine on ``device`` in a process group."""

    device: torch.device

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    @property
    def rank(self) -> int:
        return dist.get_rank()

    def barrier(self) -> None:
        """Wait, on the device, until all ranks have called this."""
        if self.world_size > 1:
            dist.all_reduce(torch.zeros(1, device=self.device))

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """All-reduce in place."""
        dist.all_reduce(values, op=dist.ReduceOp.SUM)
        return values

    def gather_objects(self, value: Any) -> list[Any]:
        """``value`` of every rank, in order of ranks."""
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, value)
        return everyone
