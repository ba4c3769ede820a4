"""Simulate the batch plan: what each rank would compute in sampled steps, and how much time imbalance costs.

Time is counted in token positions of work (``Shapes.cost``), which take equally long on all ranks. Communication is left
out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from raydpo.data.balance import joint_cost
from raydpo.data.plan import MicroBatch, epoch_order, split_over_ranks
from raydpo.data.shapes import PADDED_MULTIPLE, LayoutName, PositionCost, Shapes

__all__ = ["WORLD_SIZES", "Simulation", "amounts", "deal", "simulate", "steps_of", "training_order"]

WORLD_SIZES = tuple(2**power for power in range(13))
"""Numbers of ranks that ``raydpo plan`` compares."""
STEPS = 8
NAIVE_PAIRS = 8
"""Pairs of a micro-batch in the naive plan: the default per-device batch size of transformers' Trainer."""


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """Sampled steps on ``world_size`` ranks. All shares are of rank-time (ranks times the step's time), means over steps.

    Attributes:
        pairs_per_step: over all ranks.
        steps: number of sampled steps.
        imbalance: time lost waiting for the busiest rank if ranks synchronise once per step. Stand-ins count as lost.
        worst: the same, in the worst of the steps.
        bound: lower bound for any plan: a pair is never split, so no step is faster than its longest pair.
        lockstep: time lost if ranks synchronise after every micro-batch, as under ZeRO 2 and 3.
        repeated: share of the work that several ranks do, because their pairs share a prefix; 0 without sharing.
        naive: imbalance if pairs are dealt to ranks in turn, ``NAIVE_PAIRS`` per micro-batch, padded to its longest row.
        naive_time: time of such a step, relative to ours.
    """

    world_size: int
    pairs_per_step: int
    steps: int
    imbalance: float
    worst: float
    bound: float
    lockstep: float
    repeated: float
    naive: float
    naive_time: float


def simulate(
    order: np.ndarray,
    shapes: Shapes,
    *,
    world_size: int,
    pairs_per_step: int,
    tokens_per_batch: int,
    layout: LayoutName,
    work: PositionCost,
    steps: int = STEPS,
) -> Simulation:
    """Plan steps as a run would, and add up the time of each rank.

    Args:
        order: row numbers in ``shapes`` in the order of training, from ``training_order``; at least one step.
        steps: number of steps to sample, evenly over ``order``.
    """
    alone, padded = shapes.cost(layout, work), shapes.cost("padded", work)
    rows: list[dict[str, float]] = []
    for pairs in steps_of(order, pairs_per_step, steps):

        def plan(world_size: int, pairs: list[int] = pairs) -> list[list[MicroBatch]]:
            return split_over_ranks(
                pairs, shapes.take, world_size=world_size, tokens_per_batch=tokens_per_batch, layout=layout, work=work
            )

        ranks = plan(world_size)
        costs = np.array([[_batch_cost(batch.pairs, shapes, alone, layout, work) for batch in rank] for rank in ranks])
        useful = float((costs * [[batch.counts for batch in rank] for rank in ranks]).sum())
        whole = [_batch_cost(batch.pairs, shapes, alone, layout, work) for batch in plan(1)[0]]
        time, even = float(costs.sum(1).max()), useful / world_size
        naive = [
            sum(_batch_cost(batch, shapes, padded, "padded", work) for batch in batches)
            for batches in deal(pairs, world_size)
        ]
        rows.append(
            {
                "imbalance": 1 - even / time,
                "bound": 1 - even / max(even, alone[pairs].max()),
                "lockstep": 1 - even / costs.max(0).sum(),
                "repeated": max(0.0, 1 - sum(whole) / useful),
                "naive": 1 - sum(naive) / world_size / max(naive),
                "naive_time": max(naive) / time,
            }
        )
    means = dict(zip(rows[0], np.mean([list(row.values()) for row in rows], axis=0).tolist(), strict=True))
    worst = max(row["imbalance"] for row in rows)
    return Simulation(world_size=world_size, pairs_per_step=pairs_per_step, steps=len(rows), worst=worst, **means)


def training_order(sources: np.ndarray, weights: np.ndarray, *, seed: int, shuffle: bool, count: int) -> np.ndarray:
    """The first ``count`` row numbers of a run, over as many epochs as needed. Arguments as ``plan.epoch_order``."""
    epochs: list[np.ndarray] = []
    while sum(map(len, epochs)) < count:
        epochs.append(epoch_order(sources, weights, seed=seed, epoch=len(epochs), shuffle=shuffle))
    return np.concatenate(epochs)[:count]


def steps_of(order: np.ndarray, pairs_per_step: int, steps: int) -> list[list[int]]:
    """The pairs of up to ``steps`` whole steps, evenly over ``order``; if that is less than one step, all of it."""
    there = max(1, len(order) // pairs_per_step)
    chosen = np.unique(np.linspace(0, there - 1, min(steps, there)).astype(int))
    return [order[step * pairs_per_step : (step + 1) * pairs_per_step].tolist() for step in chosen]


def deal(pairs: Sequence[int], world_size: int) -> list[list[list[int]]]:
    """The naive plan, for comparison: pairs dealt to ranks in turn, in micro-batches of ``NAIVE_PAIRS``, by rank.

    A rank without pairs has no micro-batch: it waits.
    """
    return [
        [mine[start : start + NAIVE_PAIRS] for start in range(0, len(mine), NAIVE_PAIRS)]
        for mine in (list(pairs[rank::world_size]) for rank in range(world_size))
    ]


def amounts(batches: Iterable[Sequence[int]], shapes: Shapes, layout: LayoutName) -> np.ndarray:
    """Amounts computed in a forward pass of micro-batches: positions, query-key pairs, predicted tokens; float [3]."""
    looking = PositionCost(attention=1.0)
    alone, with_looks = shapes.cost(layout, PositionCost()), shapes.cost(layout, looking)
    total = np.zeros(3)
    for batch in batches:
        positions = _batch_cost(batch, shapes, alone, layout, PositionCost())
        looks = _batch_cost(batch, shapes, with_looks, layout, looking) - positions
        total += positions, looks, shapes.tokens[list(batch)].sum()
    return total


def _batch_cost(items: Sequence[int], shapes: Shapes, alone: np.ndarray, layout: LayoutName, work: PositionCost) -> float:
    """Work on a micro-batch, in token positions; padded rows are as wide as the longest."""
    cost = joint_cost(items, shapes, alone, layout, work)
    if layout != "padded":
        return cost
    widths = -(-shapes.longest[list(items)] // PADDED_MULTIPLE) * PADDED_MULTIPLE
    return cost + float(((widths.max() - widths) * shapes.rows[list(items)]).sum())
