"""Amounts of work of a run, from the shapes of its pairs. Of millions of pairs, some are planned and stand for all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpo.data.plan import fill_batches
from raydpo.data.ragged import Ragged
from raydpo.data.shapes import LayoutName, PositionCost, Shapes
from raydpo.data.simulate import amounts
from raydpo.model.layout import PromptGroup, shapes_of
from raydpo.reference.shards import Wanted, plan_shards

__all__ = ["MOST_PLANNED", "by_scale", "evaluation_pass", "lengths_of", "pair_groups", "reference_pass", "shapes_of_steps"]

MOST_PLANNED = 50_000
"""Completions whose batches are planned, which takes seconds. Of more, ``WINDOWS`` runs of successive ones are planned,
evenly over the data. What they share with others is not seen: of dialogues, 1 to 3 % of the positions."""
WINDOWS = 5
_SIDES = ("prompt", "chosen", "rejected")


def pair_groups(table: pa.Table, rows: Iterable[int] | None = None) -> tuple[list[PromptGroup], Shapes]:
    """The pairs in ``rows`` (None = all) of a table of ``data.pairs.PAIR_SCHEMA`` as groups (chosen, rejected), and their
    shapes."""
    prompts, chosen, rejected = (Ragged.of(table[f"{side}_ids"]) for side in _SIDES)
    rows = range(table.num_rows) if rows is None else map(int, rows)
    groups = [PromptGroup(prompts[row], (chosen[row], rejected[row])) for row in rows]
    return groups, shapes_of(groups)


def lengths_of(table: pa.Table) -> list[np.ndarray]:
    """Tokens of the prompt, the chosen and the rejected completion of each pair, int32 [pairs] each."""
    return [pc.list_value_length(table[f"{side}_ids"]).to_numpy().astype(np.int32, copy=False) for side in _SIDES]


def shapes_of_steps(table: pa.Table, runs: Sequence[list[list[int]]]) -> tuple[Shapes, list[list[list[int]]]]:
    """Shapes of the pairs of some steps alone, and these steps as numbers of shapes. What the pairs of a step share does not
    depend on others, so its plan is the same as with the shapes of all pairs.

    Args:
        runs: lists of steps, each a list of row numbers of ``table``.
    """
    rows = np.unique(np.concatenate([step for steps in runs for step in steps]))
    return pair_groups(table, rows)[1], [[np.searchsorted(rows, step).tolist() for step in steps] for steps in runs]


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
    tables: Sequence[pa.Table], budget: int, tokens_per_part: int, layout: LayoutName
) -> tuple[int, int, np.ndarray]:
    """Number of distinct completions, how many of them were planned, and the amounts [3] of scoring all in the shards of a
    build."""
    wanted, total = Wanted(tables), np.zeros(3)
    parts = _windows(len(wanted), MOST_PLANNED)
    for shard in plan_shards([one for start, stop in parts for one in wanted[start:stop]], tokens_per_part):
        shapes = shapes_of(shard.prompt_groups())
        total += amounts(fill_batches(range(len(shapes)), shapes, budget, layout), shapes, layout)
    lengths = [wanted.prompt_tokens, wanted.tokens]
    return len(wanted), sum(stop - start for start, stop in parts), total * _stands_for(lengths, parts, layout)


def evaluation_pass(table: pa.Table, budget: int, layout: LayoutName) -> tuple[int, np.ndarray]:
    """How many held-out pairs were planned, and the amounts [3] of one evaluation of all."""
    parts = _windows(table.num_rows, MOST_PLANNED // 2)
    rows = np.concatenate([np.arange(start, stop) for start, stop in parts])
    shapes = pair_groups(table, rows)[1]
    once = amounts(fill_batches(range(len(shapes)), shapes, budget, layout), shapes, layout)
    return len(rows), once * _stands_for(lengths_of(table), parts, layout)


def _windows(count: int, most: int) -> list[tuple[int, int]]:
    """Start and stop of the runs that are planned of ``count`` rows."""
    if count <= most:
        return [(0, count)]
    size = most // WINDOWS
    return [(int(start), int(start) + size) for start in np.linspace(0, count - size, WINDOWS)]


def _stands_for(lengths: Sequence[np.ndarray], parts: list[tuple[int, int]], layout: LayoutName) -> np.ndarray:
    """Amounts [3] of all groups over those of the groups in ``parts``, if none shares anything with another.

    Args:
        lengths: tokens of the prompt and of each completion, int [groups] each.
    """
    if parts == [(0, len(lengths[0]))]:
        return np.ones(3)

    def alone(values: Sequence[np.ndarray]) -> np.ndarray:
        shapes = Shapes.of_lengths(*values)
        positions, looks = shapes.positions(layout), shapes.cost(layout, PositionCost(attention=1.0))
        return np.array([positions.sum(), looks.sum() - positions.sum(), shapes.tokens.sum()], float)

    return alone(lengths) / sum(alone([each[start:stop] for each in lengths]) for start, stop in parts)
