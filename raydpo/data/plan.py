"""The batch plan: which pairs form a step, which rank computes them, and which of them share a micro-batch.

A pure function of lengths, seed and settings. The pairs of a step depend on seed and epoch only, never on the number of
workers. The position in a run is one integer, which is all that a resumed run needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from raydpo.data.balance import savings, shares
from raydpo.data.lists import rows_of
from raydpo.data.shapes import PADDED_MULTIPLE, POSITIONS_ONLY, LayoutName, PositionCost, Shapes

__all__ = ["BatchPlan", "MicroBatch", "ShapesOf", "epoch_order", "fill_batches", "split_over_ranks", "splitmix"]


ShapesOf = Callable[[np.ndarray], Shapes]
"""Gives the shapes of distinct pairs, by their row numbers in ascending order, int64 [pairs]; of ranked lists by the numbers
of the lists."""


@dataclass(frozen=True)
class MicroBatch:
    """Pairs of one forward pass, as row numbers; of ranked lists all rows, one list after another. ``counts`` is False for a
    stand-in: a rank without pairs left computes one pair with weight zero, because every rank must take part in every
    collective."""

    pairs: tuple[int, ...]
    counts: bool = True


def epoch_order(sources: np.ndarray, weights: np.ndarray, *, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """Row numbers of one epoch, in order.

    A source of n rows and weight w contributes round(w * n) rows. Each epoch continues in the source where the last one
    stopped, so that with a weight of 0.5 every row is seen after two epochs.

    Args:
        sources: number of the source of each row, int [rows].
        weights: weight of each source, float [sources].

    Returns:
        int [rows of the epoch], of the smallest type that holds them: every worker keeps it.
    """
    counts = _epoch_counts(sources, weights)
    chosen = []
    for source, count in enumerate(counts):
        rows = np.flatnonzero(sources == source).astype(np.min_scalar_type(-len(sources)))
        if shuffle:
            rows = rows[np.argsort(_hashes(len(rows), seed, 2 * source + 1), kind="stable")]
        start = epoch * count % max(1, len(rows))
        chosen.append(np.resize(np.roll(rows, -start), count))
    order = np.concatenate(chosen)
    if not shuffle:
        return np.sort(order, kind="stable")
    return order[np.argsort(_hashes(len(order), seed, 2 * epoch), kind="stable")]


def _epoch_counts(sources: np.ndarray, weights: np.ndarray) -> list[int]:
    """Rows of one epoch from each source."""
    sizes = np.bincount(sources, minlength=len(weights)).tolist()
    return [max(1, round(weight * size)) if size else 0 for weight, size in zip(weights, sizes, strict=True)]


def fill_batches(items: Sequence[int], shapes: Shapes, tokens_per_batch: int, layout: LayoutName) -> list[list[int]]:
    """Cut groups into batches, each within a budget of token positions.

    The tree layout takes neighbours in the order of their prompts, so that what they share is computed once. The padded
    layout takes the longest first, because a batch is as wide as its longest row.

    Args:
        items: numbers of the groups in ``shapes``.

    Returns:
        Group numbers of each batch. A group larger than the budget is a batch of its own; see ``cut_group``.
    """
    return _fill(items, shapes, tokens_per_batch, layout, shapes.positions(layout))


def _fill(
    items: Sequence[int], shapes: Shapes, tokens_per_batch: int, layout: LayoutName, alone: np.ndarray, least: int = 1
) -> list[list[int]]:
    """As ``fill_batches``. ``alone`` is ``shapes.positions(layout)``, and ``least`` the wanted number of batches."""
    batches: list[list[int]] = []
    if layout == "padded":
        width = filled = 0
        for item in sorted(items, key=lambda item: (-shapes.longest[item], item)):
            if not batches or (filled + shapes.rows[item]) * width > tokens_per_batch:
                batches.append([])
                filled, width = 0, -(-int(shapes.longest[item]) // PADDED_MULTIPLE) * PADDED_MULTIPLE
            batches[-1].append(item)
            filled += int(shapes.rows[item])
        return batches
    ordered = sorted(items, key=lambda item: (shapes.place[item], item))
    saved = savings(ordered, shapes, layout)
    more = alone[ordered] - saved
    left, filled, target = int(more.sum()), 0, 0
    for index, item in enumerate(ordered):
        # Fill evenly: a greedy filling ends with a small batch, which costs as many kernel launches as a full one.
        if not batches or filled + int(more[index]) // 2 > target or filled + int(more[index]) > tokens_per_batch:
            batches.append([])
            filled = int(saved[index])  # the first group of a batch saves nothing
            target = filled + left // max(1, least - len(batches) + 1, -(-left // tokens_per_batch))
        batches[-1].append(item)
        filled += int(more[index])
        left -= int(more[index])
    return batches


def split_over_ranks(
    pairs: Sequence[int],
    shapes_of: ShapesOf,
    *,
    world_size: int,
    tokens_per_batch: int,
    layout: LayoutName,
    work: PositionCost = POSITIONS_ONLY,
    starts: np.ndarray | None = None,
) -> list[list[MicroBatch]]:
    """Assign pairs to ranks so that their work is equal, and cut each rank's share into micro-batches.

    Pairs that share much of their prompts stay together as far as balance allows.

    Args:
        pairs: row numbers; one may occur twice.
        starts: of ranked lists, see ``lists.starts_of``: then ``pairs`` are numbers of lists, which are never cut.

    Returns:
        Micro-batches of each rank: the same number for every rank, at least one.
    """
    # Computed with their places among the distinct pairs. These are in order of row numbers, so ties are broken as by those.
    rows, places = np.unique(np.asarray(pairs, np.int64), return_inverse=True)
    shapes, items, numbers = shapes_of(rows), places.tolist(), rows.tolist()
    dealt = shares(items, shapes, world_size, layout, work)
    alone = shapes.positions(layout)
    ranks = [_fill(share, shapes, tokens_per_batch, layout, alone) for share in dealt]
    wanted = max(1, max(len(batches) for batches in ranks))
    # Ranks that synchronise after every micro-batch should finish it together: the same number, even sizes, largest first.
    ranks = [
        again if len(again := _fill(share, shapes, tokens_per_batch, layout, alone, wanted)) <= wanted else batches
        for share, batches in zip(dealt, ranks, strict=True)
    ]

    def rows_of_items(chosen: Sequence[int]) -> tuple[int, ...]:
        found = [numbers[item] for item in chosen]
        return tuple(found if starts is None else rows_of(starts, found).tolist())

    return [
        [
            MicroBatch(rows_of_items(batch.pairs), batch.counts)
            for batch in sorted(
                _exactly(batches, wanted, stand_in=items[0]),
                key=lambda batch: -batch.counts * alone[list(batch.pairs)].sum(),
            )
        ]
        for batches in ranks
    ]


def _exactly(batches: list[list[int]], wanted: int, stand_in: int) -> list[MicroBatch]:
    """Split the largest batches until there are ``wanted``; if all are single pairs, add stand-ins."""
    batches = list(batches)
    while len(batches) < wanted and any(len(batch) > 1 for batch in batches):
        largest = max(range(len(batches)), key=lambda index: (len(batches[index]), -index))
        half = len(batches[largest]) // 2
        batches[largest : largest + 1] = [batches[largest][:half], batches[largest][half:]]
    counted = [MicroBatch(tuple(batch)) for batch in batches]
    return counted + [MicroBatch((stand_in,), counts=False)] * (wanted - len(counted))


class BatchPlan:
    """The steps of a run.

    Args:
        shapes_of: gives the shapes of the pairs of a step.
        sources: number of the source of each pair, int [pairs].
        weights: weight of each source, float [sources].
        pairs_per_step: pairs of one optimizer step over all ranks; an epoch's last step may have fewer.
        starts: of ranked lists, see ``lists.starts_of``. Then lists are what is counted, drawn and assigned as a whole.
        first: steps that an earlier training took on the same pairs; step 0 is the next one in their order.
        tokens_per_batch: token positions of one micro-batch.
        layout, work: how a micro-batch is computed, and what that costs.
        steps: total number of steps, or None for ``epochs`` whole epochs.
    """

    def __init__(
        self,
        shapes_of: ShapesOf,
        sources: np.ndarray,
        weights: np.ndarray,
        *,
        seed: int,
        pairs_per_step: int,
        tokens_per_batch: int,
        world_size: int,
        shuffle: bool,
        epochs: int,
        steps: int | None,
        layout: LayoutName = "tree",
        work: PositionCost = POSITIONS_ONLY,
        starts: np.ndarray | None = None,
        first: int = 0,
    ) -> None:
        self.starts, self.first = starts, first
        sources = sources if starts is None else sources[starts[:-1]]
        self.shapes_of, self.layout, self.work = shapes_of, layout, work
        self.sources, self.weights = sources, weights
        self.seed, self.shuffle = seed, shuffle
        self.pairs_per_step, self.tokens_per_batch, self.world_size = pairs_per_step, tokens_per_batch, world_size
        self.pairs_per_epoch = sum(_epoch_counts(sources, weights))
        self.steps_per_epoch = -(-self.pairs_per_epoch // pairs_per_step)
        self.total_steps = steps if steps is not None else epochs * self.steps_per_epoch
        self._order: tuple[int, np.ndarray] | None = None

    def pairs(self, step: int) -> np.ndarray:
        """Row numbers of the pairs of ``step``, counted from 0; of its lists all rows, one list after another."""
        items = self._items(step)
        return items if self.starts is None else rows_of(self.starts, items)

    def count(self, step: int) -> int:
        """Number of the pairs, or of the ranked lists, of ``step``."""
        return len(self._items(step))

    def _items(self, step: int) -> np.ndarray:
        """Numbers of the pairs or lists of ``step``."""
        epoch, index = divmod(self.first + step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, epoch_order(self.sources, self.weights, seed=self.seed, epoch=epoch, shuffle=self.shuffle))
        return self._order[1][index * self.pairs_per_step : (index + 1) * self.pairs_per_step].astype(np.int64)

    def micro_batches(self, step: int, rank: int) -> list[MicroBatch]:
        """Micro-batches of ``rank`` in ``step``; the same number for every rank."""
        return split_over_ranks(
            self._items(step).tolist(),
            self.shapes_of,
            world_size=self.world_size,
            tokens_per_batch=self.tokens_per_batch,
            layout=self.layout,
            work=self.work,
            starts=self.starts,
        )[rank]


def _hashes(count: int, seed: int, stream: int) -> np.ndarray:
    """uint64 [count]: splitmix64 of (seed, stream, index). Written out here, because the order of a resumed run must not
    depend on the version of a library's random generator."""
    with np.errstate(over="ignore"):
        base = splitmix(splitmix(np.uint64(seed)) ^ np.uint64(stream))
        return splitmix(base + np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def splitmix(value: np.ndarray | np.uint64) -> np.ndarray | np.uint64:
    """Mixed bits of each number, uint64: the function of Steele et al. 2014 (doi 10.1145/2660193.2660195)."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
