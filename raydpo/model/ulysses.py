"""One micro-batch on several devices: each computes some positions, and in attention some heads of all positions.

DeepSpeed Ulysses (arXiv 2309.14509) for packed trees. Everything except attention works position by position, so a device
needs only its own positions. Around attention an all-to-all exchanges positions for heads and back. Nothing is approximated.
With S devices a sequence can be S times as long as one device can hold.

Shapes: S = ranks of the group, T = positions of the micro-batch, t = ceil(T / S) of one rank, A = query heads, G = key
heads, a, g = those of one rank, D = head size, N = predicted tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.nn.functional import all_to_all_single

from raydpo.errors import ModelError

__all__ = ["HeadShare", "SequenceGroup", "head_shares"]


@dataclass(frozen=True)
class HeadShare:
    """The attention heads of one rank.

    Attributes:
        queries: indices of its query heads.
        keys: indices of the key heads they use: one per query head, or fewer that are shared evenly.
    """

    queries: range
    keys: tuple[int, ...]

    @property
    def heads(self) -> tuple[Sequence[int], ...]:
        """Indices of the heads of queries, of keys and of values."""
        return self.queries, self.keys, self.keys


@cache
def head_shares(query_heads: int, key_heads: int, ranks: int) -> tuple[HeadShare, ...]:
    """Heads of each rank, divided as evenly as possible. If there are fewer key heads than ranks, ranks share a key head.

    Raises:
        ModelError: if there are more ranks than query heads.
    """
    if ranks > query_heads:
        raise ModelError(
            f"sequence_parallel {ranks} is more than the {query_heads} attention heads of this model; set it "
            f"to {query_heads} at most"
        )
    repeats = query_heads // key_heads
    unit, units = (repeats, key_heads) if key_heads >= ranks else (1, query_heads)
    ends = [unit * (units * rank // ranks) for rank in range(ranks + 1)]
    shares = []
    for first, last in pairwise(ends):
        used = [head // repeats for head in range(first, last)]
        distinct = sorted(set(used))
        even = all(used.count(key) == len(used) // len(distinct) for key in distinct)
        shares.append(HeadShare(range(first, last), tuple(distinct if even else used)))
    return tuple(shares)


@dataclass(frozen=True)
class SequenceGroup:
    """Ranks that compute the same micro-batches, each a part of the positions.

    Attributes:
        handle: torch.distributed's group.
        rank: index of this process in the group, from 0.
        size: S.
    """

    handle: Any
    rank: int
    size: int

    @classmethod
    def of_world(cls, size: int, timeout: timedelta) -> SequenceGroup | None:
        """Divide the ranks of the process group into groups of ``size`` neighbours and return this rank's.

        None for ``size`` 1. ``timeout``: of its collectives; without it torch takes 10 minutes with NCCL, 30 with gloo, not
        that of the process group.
        """
        if size == 1:
            return None
        world, rank = dist.get_world_size(), dist.get_rank()
        # Every rank must take part in creating every group.
        handles = [dist.new_group(range(first, first + size), timeout=timeout) for first in range(0, world, size)]
        return cls(handles[rank // size], rank % size, size)

    def smallest(self, value: int, device: torch.device) -> int:
        """The smallest ``value`` of all ranks."""
        agreed = torch.tensor(value, device=device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=self.handle)
        return int(agreed)

    def to_heads(self, query: Tensor, key: Tensor, value: Tensor, positions: int) -> tuple[Tensor, Tensor, Tensor]:
        """Exchange this rank's positions of all heads for all positions of its heads.

        Args:
            query: [1, A, t, D]; key, value: [1, G, t, D]. The head sizes may differ.
            positions: T; padding of the last rank after it is dropped.

        Returns:
            [1, a, T, D], [1, g, T, D], [1, g, T, D].
        """
        tensors = query, key, value
        shares = head_shares(query.shape[1], key.shape[1], self.size)
        rows, parts = query.shape[2], []
        for share in shares:
            sent = [tensor[0, _index(heads, tensor)] for tensor, heads in zip(tensors, share.heads, strict=True)]
            parts.append(torch.cat([one.transpose(0, 1).flatten(1) for one in sent], dim=1))
        heads = [len(mine) for mine in shares[self.rank].heads]
        widths = [count * tensor.shape[3] for count, tensor in zip(heads, tensors, strict=True)]
        whole = _exchange(parts, [(rows, sum(widths))] * self.size, self.handle)
        together = torch.cat(whole)[:positions].split(widths, dim=1)
        return tuple(one.view(1, positions, count, -1).transpose(1, 2) for one, count in zip(together, heads, strict=True))

    def to_positions(self, out: Tensor, query_heads: int, key_heads: int) -> Tensor:
        """Reverse of ``to_heads``: [1, T, a, D], all positions of its heads, to [1, t, A, D], its positions of all heads."""
        size, positions = out.shape[3], out.shape[1]
        rows = -(-positions // self.size)
        padded = F.pad(out[0].flatten(1), (0, 0, 0, rows * self.size - positions))
        counts = [len(share.queries) for share in head_shares(query_heads, key_heads, self.size)]
        parts = _exchange(padded.split(rows), [(rows, count * size) for count in counts], self.handle)
        return torch.cat(parts, dim=1).view(1, rows, query_heads, size)

    def join(self, logps: Tensor, places: Tensor, count: int) -> Tensor:
        """Gather all N log-probs of the micro-batch on every rank.

        The loss is then the same on every rank, and its gradient flows into the rank's own predictions. Summed over ranks,
        parameters get the gradient of one loss.

        Args:
            logps: [n], log-probs of this rank's predictions.
            places: [n], index of each among the N; N for the ignored one of ``Layout.part``.
            count: N.
        """
        return _Join.apply(logps, places, count, self.handle)


def _exchange(parts: Sequence[Tensor], shapes: Sequence[tuple[int, int]], handle: Any) -> list[Tensor]:
    """Send the i-th part to rank i, with gradient. ``shapes``: of the part that each rank sends here."""
    received = [rows * width for rows, width in shapes]
    flat = torch.cat([part.flatten() for part in parts])
    found = all_to_all_single(flat.new_empty(sum(received)), flat, received, [part.numel() for part in parts], group=handle)
    return [piece.view(shape) for piece, shape in zip(found.split(received), shapes, strict=True)]


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logps: Tensor, places: Tensor, count: int, handle: Any) -> Tensor:
        ctx.save_for_backward(places)
        whole = logps.new_zeros(count + 1).index_copy_(0, places, logps)
        whole[count] = 0
        dist.all_reduce(whole, group=handle)  # only one rank has each value, so the sum is exact
        return whole[:count]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return F.pad(grad, (0, 1))[places], None, None, None


def _index(heads: Sequence[int], tensor: Tensor) -> slice | Tensor:
    """Index of heads; a slice (so a view) if they are neighbours."""
    first, count = heads[0], len(heads)
    if list(heads) == list(range(first, first + count)):
        return slice(first, first + count)
    return torch.tensor(heads, device=tensor.device)
