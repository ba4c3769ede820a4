"""Amounts of work of a run, from the shapes of its pairs. Of millions of pairs, some are planned and stand for all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpo.data.lists import starts_of_table
from raydpo.data.plan import fill_batches, split_over_ranks
from raydpo.data.ragged import Ragged, tokens_in_use
from raydpo.data.shapes import LayoutName, PositionCost, Shapes
from raydpo.data.simulate import amounts
from raydpo.model.layout import PromptGroup, shapes_of
from raydpo.reference.shards import Plan, Shard, Wanted, plan_shards, prompt_groups, read_groups

__all__ = [
    "MOST_PLANNED",
    "by_scale",
    "evaluation_pass",
    "lengths_of",
    "pair_groups",
    "reference_pass",
    "shapes_of_steps",
]

MOST_PLANNED = 50_000
"""Completions whose batches are planned, which takes seconds. Of more, about so many are planned, in ``RUNS`` runs of
successive pairs that lie evenly in the data. What they share with others is not seen: 1 to 3 % of positions in dialogues."""
RUNS = 5
_SIDES = ("prompt", "chosen", "rejected")


def pair_groups(table: pa.Table, items: Iterable[int] | None = None) -> tuple[list[PromptGroup], Shapes]:
    """The pairs, or the ranked lists, with these numbers (None = all) of a table of ``data.pairs.PAIR_SCHEMA``: groups of a
    prompt and its completions, and their shapes."""
    prompts, *sides = (Ragged.of(table[f"{side}_ids"]) for side in _SIDES)
    starts = starts_of_table(table)
    starts = np.arange(table.num_rows + 1) if starts is None else starts
    items = range(len(starts) - 1) if items is None else map(int, items)
    groups = [
        PromptGroup(
            prompts[int(starts[item])],
            tuple(side[row] for row in range(starts[item], starts[item + 1]) for side in sides),
        )
        for item in items
    ]
    return groups, shapes_of(groups)


def lengths_of(table: pa.Table) -> list[np.ndarray]:
    """Tokens of the prompt, the chosen and the rejected completion of each pair, int32 [pairs] each. Of each ranked list
    those of the prompt and of all its completions; 0 beyond the last of a shorter list."""
    prompt, *sides = (tokens_in_use(table, part) for part in _SIDES)
    if (starts := starts_of_table(table)) is None:
        return [prompt, *sides]
    sizes = np.diff(starts)
    places = np.arange(table.num_rows) - np.repeat(starts[:-1], sizes)
    found = np.zeros((2 * int(sizes.max(initial=1)), len(sizes)), np.int32)
    for side, tokens in enumerate(sides):
        found[2 * places + side, np.repeat(np.arange(len(sizes)), sizes)] = tokens
    return [prompt[starts[:-1]], *found]


def shapes_of_steps(table: pa.Table, runs: Sequence[list[list[int]]]) -> tuple[Shapes, list[list[list[int]]]]:
    """Shapes of the pairs of some steps alone, and these steps as numbers of shapes. What the pairs of a step share does not
    depend on others, so its plan is the same as with the shapes of all pairs.

    Args:
        runs: lists of steps, each a list of numbers of pairs, or ranked lists, of ``table``.
    """
    items = np.unique(np.concatenate([step for steps in runs for step in steps]))
    return pair_groups(table, items)[1], [[np.searchsorted(items, step).tolist() for step in steps] for steps in runs]


def by_scale(tables: Sequence[pa.Table], scales: Mapping[str, float]) -> Iterator[tuple[float, list[pa.Table]]]:
    """The pairs of ``tables`` by the number of pairs for which each of them stands.

    Args:
        scales: that number by name of source; 1 where a source is not named.
    """
    names = {name for table in tables for name in table["source"].unique().to_pylist()}
    for scale in sorted({scales.get(name, 1.0) for name in names}):
        chosen = pa.array([name for name in names if scales.get(name, 1.0) == scale], pa.string())
        everything = len(chosen) == len(names)
        yield scale, [table if everything else table.filter(pc.is_in(table["source"], chosen)) for table in tables]


def reference_pass(
    tables: Sequence[pa.Table],
    budget: int,
    tokens_per_part: int,
    layout: LayoutName,
    replicas: int = 1,
    gathers: float = 0.0,
) -> tuple[int, int, np.ndarray, float]:
    """Number of distinct completions, how many of them were planned, the amounts [3] of scoring all in the shards of a
    build, and the share of the time that the processes of a team wait: for each other, or for gathers.

    Args:
        replicas: processes that hold the weights together, each with micro-batches of its own of every shard.
        gathers: positions that a replica computes in the time of one pass's gathers, which go on beside products.
    """
    wanted = planned = Wanted(tables)
    if len(wanted) > MOST_PLANNED:
        pairs = sum(table.num_rows for table in tables)
        planned = Wanted([_part(table, MOST_PLANNED // 2 * table.num_rows // pairs) for table in tables])
        # Of a large set nearly all pairs are planned together.
        shards: Iterable[Shard] = Plan(planned, tokens_per_part * replicas)
    else:
        shards = plan_shards(wanted, tokens_per_part * replicas)
    total, busy, taken = np.zeros(3), 0.0, 0.0
    for shard in shards:
        shapes = shapes_of(prompt_groups(read_groups(shard, planned.source)))
        items = range(len(shapes))
        total += amounts(fill_batches(items, shapes, budget, layout), shapes, layout)
        if replicas > 1 or gathers:
            found = split_over_ranks(items, shapes.take, world_size=replicas, tokens_per_batch=budget, layout=layout)
            alone = shapes.positions(layout)
            sizes = [[batch.counts * alone[list(batch.pairs)].sum() for batch in rank] for rank in found]
            busy, taken = busy + np.sum(sizes), taken + replicas * np.maximum(np.max(sizes, axis=0), gathers).sum()
    of_all, of_planned = ([each.prompt_tokens, each.tokens] for each in (wanted, planned))
    waiting = 1 - busy / taken if taken else 0.0
    return len(wanted), len(planned), total * _stands_for(of_all, of_planned, layout), float(waiting)


def evaluation_pass(table: pa.Table, budget: int, layout: LayoutName) -> tuple[int, np.ndarray]:
    """How many held-out pairs, or ranked lists, were planned, and the amounts [3] of one evaluation of all."""
    planned = _part(table, MOST_PLANNED // 2)
    shapes = pair_groups(planned)[1]
    once = amounts(fill_batches(range(len(shapes)), shapes, budget, layout), shapes, layout)
    return len(shapes), once * _stands_for(lengths_of(table), lengths_of(planned), layout)


def _part(table: pa.Table, most: int) -> pa.Table:
    """``table``, or the runs of its rows that are planned if it has more than ``most``."""
    if table.num_rows <= most:
        return table
    size = max(1, most // RUNS)
    return pa.concat_tables([table.slice(int(start), size) for start in np.linspace(0, table.num_rows - size, RUNS)])


def _stands_for(of_all: Sequence[np.ndarray], of_planned: Sequence[np.ndarray], layout: LayoutName) -> np.ndarray:
    """Amounts [3] of all groups over those of the groups that were planned, if none shares anything with another.

    Args:
        of_all, of_planned: tokens of the prompt and of each completion, int [groups] each.
    """
    if len(of_all[0]) == len(of_planned[0]):
        return np.ones(3)

    def alone(lengths: Sequence[np.ndarray]) -> np.ndarray:
        shapes = Shapes.of_lengths(*lengths)
        positions, looks = shapes.positions(layout), shapes.cost(layout, PositionCost(attention=1.0))
        return np.array([positions.sum(), looks.sum() - positions.sum(), shapes.tokens.sum()], float)

    return alone(of_all) / alone(of_planned)
