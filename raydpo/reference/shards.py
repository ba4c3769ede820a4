"""Which completions a run wants, and how the scoring of them is cut into shards, each committed as one part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from raydpo.model.layout import PromptGroup
from raydpo.model.tree import common_prefix
from raydpo.reference.store import ReferenceCache

__all__ = ["Completion", "Shard", "plan_shards", "still_missing", "wanted_completions"]


@dataclass(frozen=True)
class Completion:
    """One completion that a run needs log-probs for: those of its first ``len(tokens)`` tokens."""

    key: bytes
    prompt: np.ndarray
    tokens: np.ndarray

    @property
    def length(self) -> int:
        """Tokens of prompt and completion together."""
        return len(self.prompt) + len(self.tokens)


@dataclass(frozen=True)
class Shard:
    """Completions that are scored and committed together, grouped by prompt."""

    groups: tuple[tuple[Completion, ...], ...]

    @property
    def completions(self) -> list[Completion]:
        return [completion for group in self.groups for completion in group]

    @property
    def tokens(self) -> int:
        return sum(completion.length for completion in self.completions)

    def prompt_groups(self) -> list[PromptGroup]:
        return [PromptGroup(group[0].prompt, tuple(completion.tokens for completion in group)) for group in self.groups]


def wanted_completions(tables: Iterable[pa.Table]) -> list[Completion]:
    """The distinct completions of tokenised pairs (``data.pairs.PAIR_SCHEMA``), each as long as its longest use."""
    wanted: dict[bytes, Completion] = {}
    for table in tables:
        prompts = _rows(table, "prompt_ids")
        for side in ("chosen", "rejected"):
            keys = table[f"{side}_key"].to_pylist()
            for key, prompt, tokens in zip(keys, prompts, _rows(table, f"{side}_ids"), strict=True):
                known = wanted.get(key)
                if known is None or len(known.tokens) < len(tokens):
                    wanted[key] = Completion(key, prompt, tokens)
    return list(wanted.values())


FAMILY_SHARE = 0.5
"""Prompts whose neighbour in order begins with at least this share of them are scored together: a dialogue that goes on."""


def plan_shards(wanted: Sequence[Completion], tokens_per_shard: int) -> list[Shard]:
    """All wanted completions, by prompt, prompts that share much next to each other, longest first, in shards of about so
    many tokens.

    A pure function of what is wanted, not of what is missing: a build that was killed and started again forms the same
    shards, hence the same batches, hence the same bits.
    """
    groups: dict[bytes, list[Completion]] = {}
    for completion in wanted:
        groups.setdefault(completion.prompt.tobytes(), []).append(completion)
    families = sorted(_families(list(groups.values()), tokens_per_shard),
                      key=lambda family: (-max(_length(group) for group in family), min(one.key for one in family[0])))
    shards: list[list[tuple[Completion, ...]]] = []
    size = 0
    for family in families:
        for group in family:
            if not shards or size >= tokens_per_shard:
                shards.append([])
                size = 0
            shards[-1].append(tuple(sorted(group, key=lambda one: one.key)))
            size += sum(one.length for one in group)
    return [Shard(tuple(groups)) for groups in shards]


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


def still_missing(shards: Sequence[Shard], cache: ReferenceCache) -> list[Shard]:
    """The shards without the completions that ``cache`` already holds; shards that it holds whole are left out."""
    completions = [completion for shard in shards for completion in shard.completions]
    if not completions:
        return []
    keys = pa.array([completion.key for completion in completions], pa.binary(16))
    covered = cache.covers(keys, np.array([len(completion.tokens) for completion in completions]))
    present = {completion.key for completion, there in zip(completions, covered, strict=True) if there}
    remaining = []
    for shard in shards:
        groups = [tuple(one for one in group if one.key not in present) for group in shard.groups]
        if any(groups):
            remaining.append(Shard(tuple(group for group in groups if group)))
    return remaining


def _rows(table: pa.Table, column: str) -> list[np.ndarray]:
    """A list column as one array per row, without a Python object per token."""
    rows: list[np.ndarray] = []
    for chunk in table[column].chunks:
        flat = chunk.values.to_numpy()
        offsets = chunk.offsets.to_numpy()
        rows += [flat[start:end] for start, end in pairwise(offsets)]
    return rows
