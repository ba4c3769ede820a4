"""Plan what to score: which completions a run needs, and how they are cut into shards, each committed as one part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpo.data.index import KeyIndex, as_bytes
from raydpo.data.ragged import Ragged
from raydpo.data.shapes import common_prefix, cut_group
from raydpo.model.layout import PromptGroup
from raydpo.reference.part import KEY_TYPE
from raydpo.reference.store import ReferenceCache

__all__ = ["Completion", "Shard", "Wanted", "list_rows", "missing_shards", "plan_shards", "still_missing"]

SIDES = ("chosen", "rejected")
WINDOW = 100_000
"""Completions that are planned together."""


@dataclass(frozen=True)
class Completion:
    """A completion that a run needs log-probs of: those of its first ``len(tokens)`` tokens."""

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

    def without(self, keys: set[bytes]) -> Shard:
        """The shard without the completions with these keys; it may become empty."""
        groups = (tuple(one for one in group if one.key not in keys) for group in self.groups)
        return Shard(tuple(group for group in groups if group))

    def prompt_groups(self) -> list[PromptGroup]:
        return [PromptGroup(group[0].prompt, tuple(completion.tokens for completion in group)) for group in self.groups]


class Wanted(Sequence[Completion]):
    """The distinct completions of tokenised pairs (``data.pairs.PAIR_SCHEMA``), each as long as its longest use.

    Stored in columns, tens of bytes per completion. ``Completion`` objects are made on access.

    Attributes:
        keys: binary(16) [completions], in order of first use.
        tokens: number of its tokens that are needed, int32 [completions].
        prompt_tokens: int32 [completions].
    """

    def __init__(self, tables: Iterable[pa.Table]) -> None:
        # Tables with more than 2^31 tokens have 64-bit offsets, others 32-bit.
        self._table = pa.concat_tables(tables, promote_options="permissive")
        # Pair by pair: chosen, rejected, chosen, ...
        keys = np.stack([as_bytes(self._table[f"{side}_key"]) for side in SIDES], axis=1).reshape(-1, 16)
        lengths = np.stack([_lengths(self._table[f"{side}_ids"]) for side in SIDES], axis=1).ravel()
        index = KeyIndex()
        index.add((keys, lengths, 0))
        self._places = np.sort(index.row[index.winners])
        self.tokens = lengths[self._places]
        self.keys = pa.FixedSizeBinaryArray.from_buffers(
            KEY_TYPE, len(self._places), [None, pa.py_buffer(keys[self._places])]
        )
        self.prompt_tokens = _lengths(self._table["prompt_ids"])[self._places // 2]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            return self._window(start, stop)
        return self._window(index, index + 1)[0]

    def __iter__(self) -> Iterator[Completion]:
        for start in range(0, len(self), WINDOW):
            yield from self._window(start, start + WINDOW)

    def _window(self, start: int, stop: int) -> list[Completion]:
        places = self._places[start:stop]
        if not len(places):
            return []
        first = int(places[0]) // 2
        table = self._table.slice(first, int(places[-1]) // 2 - first + 1)
        rows = [list_rows(table[f"{side}_ids"]) for side in SIDES]
        prompts = list_rows(table["prompt_ids"])
        return [
            Completion(key, prompts[place // 2 - first], rows[place % 2][place // 2 - first])
            for key, place in zip(self.keys[start:stop].to_pylist(), places.tolist(), strict=True)
        ]


FAMILY_SHARE = 0.5
"""Neighbouring prompts in sort order that share at least this part of their tokens are scored together, for example the
turns of one dialogue."""


def plan_shards(wanted: Sequence[Completion], tokens_per_shard: int, most: int | None = None) -> list[Shard]:
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


def _pieces(groups: list[tuple[Completion, ...]], most: int) -> Iterator[Shard]:
    """Split a shard whose last group, the only one that may be large, has more than ``most`` tokens."""
    *others, last = groups
    runs = cut_group(len(last[0].prompt), [len(one.tokens) for one in last], most, "tree")
    for start, stop in runs:
        yield Shard((*others, last[start:stop]))
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


def missing_shards(wanted: Wanted, covered: np.ndarray, tokens_per_shard: int, most: int | None = None) -> Iterator[Shard]:
    """The shards of ``plan_shards`` without what is ``covered``, bool [completions]; fully covered shards are left out.

    Planned in windows of ``WINDOW`` completions in the order of the data, of which one is in memory at a time.
    """
    for start in range(0, len(wanted), WINDOW):
        if covered[start : start + WINDOW].all():
            continue
        window = wanted[start : start + WINDOW]
        present = {one.key for one, there in zip(window, covered[start : start + WINDOW], strict=True) if there}
        remaining = (shard.without(present) for shard in plan_shards(window, tokens_per_shard, most))
        yield from (shard for shard in remaining if shard.groups)


def still_missing(shard: Shard, cache: ReferenceCache, skip: Callable[[str], bool] | None = None) -> Shard:
    """The shard without the completions that ``cache`` holds by now. ``skip``: see ``ReferenceCache.covers``."""
    completions = shard.completions
    keys = pa.array([one.key for one in completions], KEY_TYPE)
    covered = cache.covers(keys, np.array([len(one.tokens) for one in completions], np.int32), skip=skip)
    return shard.without({one.key for one, there in zip(completions, covered, strict=True) if there})


def list_rows(column: pa.ChunkedArray) -> list[np.ndarray]:
    """Split a list column into one array per row, without a Python object per value."""
    rows = Ragged.of(column)
    return [rows[row] for row in range(len(rows))]


def _lengths(column: pa.ChunkedArray) -> np.ndarray:
    return pc.list_value_length(column).to_numpy().astype(np.int32, copy=False)
