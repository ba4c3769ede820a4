"""Shards from the whole tokens of all completions, one object each: what a plan of first tokens is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from raydpo.data.plan import fill_batches
from raydpo.data.shapes import common_prefix, cut_group
from raydpo.model.layout import PromptGroup, shapes_of
from raydpo.reference.shards import Completion

FAMILY_SHARE = 0.5
"""Neighbouring prompts in sort order that share at least this part of their tokens are scored together, for example the
turns of one dialogue."""


def planned_by_families(
    wanted: Sequence[Completion], tokens_per_shard: int, most: int | None = None
) -> list[tuple[tuple[Completion, ...], ...]]:
    """Cut all wanted completions into shards of about ``tokens_per_shard`` tokens.

    Completions are grouped by prompt, prompts that share much are neighbours, and the longest come first. The completions of
    one prompt are split where they have more than ``most`` tokens (default ``tokens_per_shard``).

    A pure function of what is wanted, not of what is missing: a build that was killed and restarted forms the same shards,
    hence the same batches and the same bits.
    """
    groups: dict[bytes, list[Completion]] = {}
    for completion in wanted:
        groups.setdefault(completion.prompt.tobytes(), []).append(completion)
    families = sorted(
        _families(list(groups.values()), tokens_per_shard),
        key=lambda family: (-max(_length(group) for group in family), min(one.key for one in family[0])),
    )
    shards: list[list[tuple[Completion, ...]]] = []
    size = 0
    for family in families:
        for group in family:
            if not shards or size >= tokens_per_shard:
                shards.append([])
                size = 0
            shards[-1].append(tuple(sorted(group, key=lambda one: one.key)))
            size += sum(one.length for one in group)
    return [piece for groups in shards for piece in _pieces(groups, tokens_per_shard if most is None else most)]


def _pieces(groups: list[tuple[Completion, ...]], most: int) -> Iterator[tuple[tuple[Completion, ...], ...]]:
    """Split a shard whose last group, the only one that may be large, has more than ``most`` tokens."""
    *others, last = groups
    runs = cut_group(len(last[0].prompt), [len(one.tokens) for one in last], most, "tree")
    for start, stop in runs:
        yield (*others, last[start:stop])
        others = []


def _length(group: list[Completion]) -> int:
    return max(one.length for one in group)


def _families(groups: list[list[Completion]], most_tokens: int) -> list[list[list[Completion]]]:
    """Groups by prompt in runs whose prompts share much, each of about ``most_tokens`` at most."""
    groups.sort(key=lambda group: np.asarray(group[0].prompt, ">u4").tobytes())
    families: list[list[list[Completion]]] = []
    size = 0
    for group in groups:
        prompt = group[0].prompt
        near = families and common_prefix(families[-1][-1][0].prompt, prompt) >= FAMILY_SHARE * len(prompt)
        if not near or size >= most_tokens:
            families.append([])
            size = 0
        families[-1].append(group)
        size += sum(one.length for one in group)
    return families


def positions(groups: Sequence[PromptGroup], budget: int = 2000) -> int:
    """Token positions of scoring the groups of a shard, in batches of the tree layout."""
    shapes, total = shapes_of(groups), 0
    for batch in fill_batches(range(len(groups)), shapes, budget, "tree"):
        total += int(shapes.positions("tree")[batch].sum())
        total -= sum(shapes.shared(one, two) for one, two in pairwise(batch))
    return total
