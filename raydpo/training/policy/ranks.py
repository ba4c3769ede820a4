"""Collective operations of an engine. Needs only torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["RankGroup", "group_timeout"]


@contextlib.contextmanager
def group_timeout(timeout: timedelta) -> Iterator[None]:
    """Give groups of ranks that libraries make within the block this timeout for their collectives.

    torch 2.13 gives a new group 10 minutes (NCCL) or 30 (gloo), whatever the process group has
    (``torch/distributed/distributed_c10d.py``). DeepSpeed 0.19 makes such a group for its gradients (``utils/groups.py``).
    """
    make = dist.new_group
    dist.new_group = partial(make, timeout=timeout)
    try:
        yield
    finally:
        dist.new_group = make


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
