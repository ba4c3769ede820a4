"""Assign the pairs of a step to ranks, so that all ranks have equal work and shared prefixes are rarely computed twice."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np

from raydpo.data.shapes import LayoutName, PositionCost, Shapes

__all__ = ["joint_cost", "savings", "shares"]

WORTH_KEEPING = 0.1
"""Smallest share of a pair's work that a prefix shared with its neighbour must save, so that both stay on one rank."""
UNITS_PER_RANK = 4
"""A run of pairs that stay together is at most a rank's work divided by this number; larger runs could not be balanced."""
PARTNERS = 64
"""Number of least-busy ranks considered for a swap with the busiest one."""
ROUNDS = 4
"""Largest number of swaps, per rank."""
TRIES = 8
"""Number of most promising swaps whose exact effect is computed."""
PAIRS_UP_TO = 8
"""Ranks with more units than this swap them one at a time, which suffices to balance that many."""


def joint_cost(items: Sequence[int], shapes: Shapes, alone: np.ndarray, layout: LayoutName, work: PositionCost) -> float:
    """Work on groups that are computed together, in token positions: in a tree, what they share counts once.

    Args:
        alone: ``shapes.cost(layout, work)``, passed in because callers have many sets of groups.
    """
    ordered = sorted(items, key=lambda item: (shapes.place[item], item))
    return float(alone[ordered].sum() - _saved_work(savings(ordered, shapes, layout), work).sum())


def shares(pairs: list[int], shapes: Shapes, world_size: int, layout: LayoutName, work: PositionCost) -> list[list[int]]:
    """The pairs of each rank; a rank may have none."""
    if world_size == 1:
        return [pairs]
    units, costs = _units(pairs, shapes, world_size, layout, work)
    # Largest first, to the rank with the least load; ties go to the lower rank, so the result is deterministic.
    heap = [(0.0, rank) for rank in range(world_size)]
    owned: list[list[int]] = [[] for _ in range(world_size)]
    for unit in sorted(range(len(units)), key=lambda unit: (-costs[unit], units[unit][0])):
        load, rank = heapq.heappop(heap)
        owned[rank].append(unit)
        heapq.heappush(heap, (load + costs[unit], rank))

    def pairs_of(mine: list[int]) -> list[int]:
        return [pair for unit in mine for pair in units[unit]]

    alone = shapes.cost(layout, work)
    _even_out(owned, costs, lambda mine: joint_cost(pairs_of(mine), shapes, alone, layout, work))
    return [pairs_of(mine) for mine in owned]


def _units(
    pairs: list[int], shapes: Shapes, world_size: int, layout: LayoutName, work: PositionCost
) -> tuple[list[list[int]], np.ndarray]:
    """Runs of pairs that stay together because they share much, small enough to be balanced over ranks; and their costs.

    Every rank computes once what all pairs of the step share, such as a system prompt. It is left out of the costs and is no
    reason to stay together.
    """
    ordered = sorted(pairs, key=lambda item: (shapes.place[item], item))
    saved = _saved_work(savings(ordered, shapes, layout), work)
    everywhere = float(saved[1:].min()) if len(ordered) > 1 else 0.0
    saved -= everywhere
    alone = shapes.cost(layout, work)[ordered] - everywhere
    largest = float(alone.sum() - saved[1:].sum()) / world_size / UNITS_PER_RANK
    units: list[list[int]] = []
    costs: list[float] = []
    for index, item in enumerate(ordered):
        more = float(alone[index] - saved[index])
        if units and saved[index] >= WORTH_KEEPING * alone[index] and costs[-1] + more <= largest:
            units[-1].append(item)
            costs[-1] += more
        else:
            units.append([item])
            costs.append(float(alone[index]))
    return units, np.array(costs)


def savings(ordered: Sequence[int], shapes: Shapes, layout: LayoutName) -> np.ndarray:
    """Positions that each group saves by following the one before it, int [groups]."""
    saved = np.zeros(len(ordered), dtype=np.int64)
    if layout == "tree":
        for index in range(1, len(ordered)):
            saved[index] = shapes.shared(ordered[index - 1], ordered[index])
    return saved


def _saved_work(saved: np.ndarray, work: PositionCost) -> np.ndarray:
    """Work that saved positions stand for: the positions, and the attention of a prefix to itself."""
    return saved + work.attention * saved.astype(np.float64) ** 2 / 2


def _even_out(owned: list[list[int]], costs: np.ndarray, load_of: Callable[[list[int]], float]) -> None:
    """Swap units between the busiest rank and another while that lowers the larger load of the two.

    Costs of units are estimates, since what a unit shares depends on the others of its rank. So a swap is kept only if the
    exact loads improve.

    Args:
        load_of: work of a rank that has these units.
    """
    moves = [_moves(mine, costs) for mine in owned]
    loads = np.array([load_of(mine) for mine in owned])
    for _ in range(ROUNDS * len(owned)):
        busiest = int(loads.argmax())
        gives, give_costs = moves[busiest]
        partners = [int(rank) for rank in np.argsort(loads, kind="stable")[:PARTNERS] if rank != busiest]
        takes = [(rank, move) for rank in partners for move in moves[rank][0]]
        moved = give_costs[:, None] - np.concatenate([moves[rank][1] for rank in partners])  # [gives, takes]
        theirs = np.repeat(loads[partners], [len(moves[rank][0]) for rank in partners])
        busier = np.maximum(loads[busiest] - moved, theirs + moved).ravel()  # of the two ranks, after the exchange
        best = np.argpartition(busier, min(TRIES, len(busier)) - 1)[:TRIES]
        for choice in best[np.argsort(busier[best], kind="stable")]:
            given, (other, taken) = gives[choice // len(takes)], takes[choice % len(takes)]
            mine = [unit for unit in owned[busiest] if unit not in given] + list(taken)
            yours = [unit for unit in owned[other] if unit not in taken] + list(given)
            after = load_of(mine), load_of(yours)
            if max(after) < loads[busiest] * (1 - 1e-9):
                break
        else:
            return
        owned[busiest], owned[other] = mine, yours
        for rank, load in ((busiest, after[0]), (other, after[1])):
            moves[rank], loads[rank] = _moves(owned[rank], costs), load


def _moves(mine: list[int], costs: np.ndarray) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """Sets of units that a rank can give in a swap, the empty set included, and the cost of each."""
    most = 1 if len(mine) > PAIRS_UP_TO else 2
    moves = [move for size in range(most + 1) for move in combinations(mine, size)]
    return moves, np.array([costs[list(move)].sum() for move in moves])
