"""Which rank computes which pairs of a step, so that all have as much to do and prefixes are seldom computed twice."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np

from raydpo.data.shapes import POSITIONS_ONLY, LayoutName, Shapes, Work

__all__ = ["joint_cost", "rank_costs", "savings", "shares"]

WORTH_KEEPING = 0.1
"""Share of a pair's work that its neighbour's prompt must save for the two to be kept on one rank."""
UNITS_PER_RANK = 4
"""Runs of pairs kept together are at most this part of a rank's work, or they could not be evened out."""
PARTNERS = 64
"""Of the least busy ranks, how many are looked at for an exchange with the busiest."""
ROUNDS = 4
"""Exchanges, times the number of ranks."""
TRIES = 8
"""Of the exchanges that promise most, how many are looked at in full."""
PAIRS_UP_TO = 8
"""Ranks with more units exchange them one by one: with so many, that evens them out."""


def rank_costs(pairs: Sequence[int], shapes: Shapes, *, world_size: int, layout: LayoutName,
               work: Work = POSITIONS_ONLY) -> np.ndarray:
    """Work of each rank in a step of ``pairs``, in token positions, float [world_size]: what the plan evens out."""
    alone = shapes.cost(layout, work)
    return np.array([joint_cost(share, shapes, alone, layout, work)
                     for share in shares(list(pairs), shapes, world_size, layout, work)])


def joint_cost(items: Sequence[int], shapes: Shapes, alone: np.ndarray, layout: LayoutName, work: Work) -> float:
    """Work on groups that are computed together, in token positions: in a tree, what they share counts once.

    Args:
        alone: ``shapes.cost(layout, work)``, which a caller with many sets of groups computes once.
    """
    ordered = sorted(items, key=lambda item: (shapes.place[item], item))
    return float(alone[ordered].sum() - _saved_work(savings(ordered, shapes, layout), work).sum())


def shares(pairs: list[int], shapes: Shapes, world_size: int, layout: LayoutName, work: Work) -> list[list[int]]:
    """The pairs of each rank; a rank may have none."""
    if world_size == 1:
        return [pairs]
    units, costs = _units(pairs, shapes, world_size, layout, work)
    # Largest first to the rank with the least to do; ties go to the lower rank, so the result is unique.
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


def _units(pairs: list[int], shapes: Shapes, world_size: int, layout: LayoutName,
           work: Work) -> tuple[list[list[int]], np.ndarray]:
    """Runs of pairs that stay together because they share much, none so large that ranks could not be evened out.

    What all pairs of the step share, such as a system prompt, every rank computes once whichever pairs it has: it is left
    out of the costs and is no reason to stay together.
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
    """Positions that each group saves by standing behind the one before it, int [groups]."""
    saved = np.zeros(len(ordered), dtype=np.int64)
    if layout == "tree":
        for index in range(1, len(ordered)):
            saved[index] = shapes.shared(ordered[index - 1], ordered[index])
    return saved


def _saved_work(saved: np.ndarray, work: Work) -> np.ndarray:
    """The work that positions saved stand for: theirs, and that of a prefix looking at itself."""
    return saved + work.attention * saved.astype(np.float64) ** 2 / 2


def _even_out(owned: list[list[int]], costs: np.ndarray, load_of: Callable[[list[int]], float]) -> None:
    """Exchange units between the busiest rank and another while that makes the busier of the two less busy.

    Costs of units are estimates, since what a unit shares depends on the others of its rank; an exchange is kept for what
    it really does.

    Args:
        load_of: the work of a rank that has these units.
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
    """What a rank can give in an exchange, nothing among it, and what each costs."""
    most = 1 if len(mine) > PAIRS_UP_TO else 2
    moves = [move for size in range(most + 1) for move in combinations(mine, size)]
    return moves, np.array([costs[list(move)].sum() for move in moves])
