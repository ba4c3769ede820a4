"""Plan what to score: which completions a run needs, and how they are cut into shards, each committed as one part.

A plan needs lengths, keys and a few first tokens of each pair. A shard names its completions by the places of their pairs;
who scores it reads their tokens. Nothing here makes a Python object for each completion, but for those of one shard.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from raydpo.data.index import KeyIndex, as_bytes
from raydpo.data.ragged import tokens_in_use
from raydpo.data.rows import TOKEN_SCHEMA, TokenSource
from raydpo.data.select import TokenTables
from raydpo.data.shapes import cut_group
from raydpo.errors import CacheError
from raydpo.model.layout import PromptGroup
from raydpo.reference.heads import Heads, in_order
from raydpo.reference.part import KEY_TYPE
from raydpo.reference.store import ReferenceCache

__all__ = [
    "WINDOWS",
    "Completion",
    "Plan",
    "Shard",
    "Wanted",
    "grouped",
    "plan_shards",
    "prompt_groups",
    "read_groups",
    "still_missing",
]

SIDES = ("chosen", "rejected")
_PLACE = (("set", np.int16), ("place", np.int64))
READ_AT_ONCE = 10_000
"""Completions whose tokens are read at once when all are looked at."""
WINDOWS = (0, 1 << 14, 5 << 14, 21 << 14)
"""First place of each window of a set: its first 16,384 pairs, the next 65,536, the next 262,144, and all others. The pairs
of a window are planned together. So scoring can begin when few pairs are known, and nearly all of a large set is planned at
once. Since a window is a range of places and not of time, a set that is still being made, one that was found, and a build
that is repeated give the same shards."""


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


@dataclass(frozen=True, eq=False)
class Shard:
    """Completions that are scored and committed together, 35 bytes each.

    Attributes:
        sets, places: the pair of each, as ``TokenSource.rows`` takes them: int16 and int64 [completions].
        sides: 0 = the pair's chosen completion, 1 = the rejected one; uint8 [completions].
        needed: number of its tokens that are needed, int32 [completions].
        prompt_tokens: int32 [completions].
        keys: uint8 [completions, 16].
    """

    sets: np.ndarray
    places: np.ndarray
    sides: np.ndarray
    needed: np.ndarray
    prompt_tokens: np.ndarray
    keys: np.ndarray

    def __len__(self) -> int:
        return len(self.sides)

    @property
    def tokens(self) -> int:
        """Tokens of all its completions, each with its prompt."""
        return int(self.needed.sum(dtype=np.int64) + self.prompt_tokens.sum(dtype=np.int64))

    def take(self, rows: np.ndarray | slice) -> Shard:
        """The shard of some of its completions, given by number or as bool [completions]."""
        return Shard(*(column[rows] for column in vars(self).values()))


class Wanted(Sequence[Completion]):
    """The distinct completions of tokenised pairs, each as long as its longest use.

    Stored in columns, tens of bytes per completion. ``Completion`` objects are made on access. The order is that of sets
    and places; a completion of several pairs belongs to the first one that needs most of it.

    Args:
        tables: pairs, with the columns of ``data.pairs.PAIR_SCHEMA``.
        tokens: source of the pairs' tokens; then the tables have the columns ``set`` and ``place``, too. None = the tables
            themselves, as sets 0, 1, ... with row numbers as places.
        light: for each set its rows of ``data.rows.LIGHT_SCHEMA``, by place; see ``Heads``.

    Attributes:
        source: where the tokens are read.
        tokens: number of its tokens that are needed, int32 [completions].
    """

    def __init__(
        self,
        tables: Iterable[pa.Table],
        tokens: TokenSource | None = None,
        light: Sequence[pa.Table] | None = None,
    ) -> None:
        tables = list(tables)
        self.source = TokenTables([[table.select(TOKEN_SCHEMA.names)] for table in tables]) if tokens is None else tokens
        if tokens is None:
            sets = _joined((np.full(table.num_rows, number) for number, table in enumerate(tables)), np.int16)
            places = _joined((np.arange(table.num_rows) for table in tables), np.int64)
        else:
            sets, places = (_joined((table[name].to_numpy() for table in tables), kind) for name, kind in _PLACE)
        order = _by_place(sets, places)
        self._sets, self._places = sets[order], places[order]
        self._prompts = _lengths(tables, "prompt")[order]
        # Pair by pair: chosen, rejected, chosen, ...
        lengths = np.stack([_lengths(tables, side)[order] for side in SIDES], axis=1).ravel()
        keys = np.concatenate([np.empty((0, 2, 16), np.uint8), *map(_keys, tables)])[order].reshape(-1, 16)
        numbers = np.arange(len(sets)) if isinstance(order, slice) else order
        self._heads = Heads(tables, numbers, self._sets, self._places, None if tokens is None else light)
        index = KeyIndex()
        index.add((keys, lengths, 0))
        rows = np.sort(index.row[index.winners])  # 2 * pair + side
        self._rows = rows[lengths[rows] > 0]  # the missing side of a completion alone has no tokens
        del index
        self.tokens, self._keys = lengths[self._rows], keys[self._rows]

    @property
    def keys(self) -> pa.Array:
        """binary(16) [completions]."""
        return pa.FixedSizeBinaryArray.from_buffers(KEY_TYPE, len(self), [None, pa.py_buffer(self._keys)])

    @property
    def prompt_tokens(self) -> np.ndarray:
        """int32 [completions]."""
        return self._prompts[self._rows >> 1]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.at(np.arange(len(self))[index])
        return self.at(np.array([range(len(self))[index]]))[0]

    def __iter__(self) -> Iterator[Completion]:
        for start in range(0, len(self), READ_AT_ONCE):
            yield from self.at(np.arange(start, min(start + READ_AT_ONCE, len(self))))

    def at(self, rows: np.ndarray) -> list[Completion]:
        """Some completions with their tokens, by number."""
        return _completions(self.shard(rows), self.source)

    def take(self, rows: np.ndarray) -> Wanted:
        """Only these completions, given in rising order by number or as bool [completions]."""
        taken = object.__new__(Wanted)
        vars(taken).update(vars(self))
        taken._rows, taken.tokens, taken._keys = self._rows[rows], self.tokens[rows], self._keys[rows]
        return taken

    def shard(self, rows: np.ndarray) -> Shard:
        """These completions as a shard, in the order of ``rows``."""
        found = self._rows[rows]
        pairs = found >> 1
        return Shard(
            self._sets[pairs],
            self._places[pairs],
            (found & 1).astype(np.uint8),
            self.tokens[rows],
            self._prompts[pairs],
            self._keys[rows],
        )

    def windows(self) -> list[Wanted]:
        """The completions of each window that has some, in order."""
        pairs = self._rows >> 1
        number = self._sets[pairs].astype(np.int64) * len(WINDOWS) + np.searchsorted(
            WINDOWS, self._places[pairs], side="right"
        )
        cuts = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(number)]
        return [self.take(slice(start, stop)) for start, stop in pairwise(cuts) if start < stop]

    def key_bytes(self, rows: np.ndarray) -> list[bytes]:
        """Keys of some completions, by number."""
        return [key.tobytes() for key in self._keys[rows]]

    def by_prompt(self) -> tuple[np.ndarray, np.ndarray]:
        """The completions in the order of their prompts (see ``heads.in_order``).

        Returns:
            Number of each in that order, int32 [completions], and the place of each prompt's first one, int64 [prompts].
        """
        pairs = self._rows >> 1
        first = np.flatnonzero(np.diff(pairs, prepend=-1))  # of each pair that has completions here
        counts = np.diff(first, append=len(pairs))
        mine = pairs[first]
        heads, hashes = self._heads.of(mine)
        order, changes = in_order(heads, self._prompts[mine], hashes)
        del heads, hashes
        ends = np.cumsum(counts[order])
        starts = ends - counts[order]
        completions = np.arange(len(pairs)) + np.repeat(first[order] - starts, counts[order])
        return completions.astype(np.int32), starts[changes]

    def beyond(self, earlier: KeyIndex) -> Wanted:
        """The completions that are not in ``earlier`` with as many tokens."""
        found = earlier.find(self._keys)
        known = found >= 0
        known[known] = earlier.tokens[found[known]] >= self.tokens[known]
        return self.take(~known) if known.any() else self

    def add_to(self, index: KeyIndex) -> None:
        """Add all completions to an index of those of earlier windows."""
        index.add((self._keys, self.tokens, 0))


class Plan(Sequence[Shard]):
    """The shards of one window.

    All wanted completions are planned, not only those that are missing: a build that was killed and repeated forms the same
    shards, hence the same batches and the same bits.

    Prompts are sorted by their first tokens (see ``Heads``), then by length, so that prompts that share much are neighbours,
    and shards are cut from that order. The completions of one prompt stay together, but those of a prompt with more than
    ``most`` tokens are split. The shards with the longest completions come first.

    Args:
        wanted: the completions of a window.
        tokens_per_shard: tokens of a shard, about; a prompt counts once for each of its completions.
        most: default ``tokens_per_shard``.
    """

    def __init__(self, wanted: Wanted, tokens_per_shard: int, most: int | None = None) -> None:
        self._wanted = wanted
        order, starts = wanted.by_prompt()
        stops = np.append(starts[1:], len(order))
        prompts = wanted.prompt_tokens[order]
        sizes = prompts + wanted.tokens[order]
        ends = np.cumsum(sizes, dtype=np.int64)[stops - 1] if len(order) else np.empty(0, np.int64)
        bounds, last, filled = [0], -1, 0
        while last + 1 < len(starts):  # the last prompt of a shard is the one that fills it
            last = min(len(starts) - 1, int(np.searchsorted(ends, filled + tokens_per_shard)))
            filled, start, stop = int(ends[last]), int(starts[last]), int(stops[last])
            lengths = wanted.tokens[order[start:stop]]
            most_here = tokens_per_shard if most is None else most
            if int(prompts[start]) + int(lengths.sum(dtype=np.int64)) > most_here:
                keys = wanted.key_bytes(order[start:stop])
                by_key = np.array(sorted(range(len(keys)), key=keys.__getitem__))
                order[start:stop] = order[start:stop][by_key]
                sizes[start:stop] = sizes[start:stop][by_key]
                runs = cut_group(int(prompts[start]), lengths[by_key].tolist(), most_here, "tree")
                bounds += [start + cut for cut, _ in runs[1:]]
            bounds.append(stop)
        self._order, self._bounds = order, np.array(bounds, np.int64)
        longest = np.maximum.reduceat(sizes, self._bounds[:-1]) if len(order) else sizes
        self._ranks = np.argsort(-longest, kind="stable")

    def __len__(self) -> int:
        return len(self._ranks)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        return self._wanted.shard(self._rows(index))

    def _rows(self, index: int) -> np.ndarray:
        rank = self._ranks[index]
        return self._order[self._bounds[rank] : self._bounds[rank + 1]]

    def missing(self, covered: np.ndarray, shuffled: random.Random | None = None) -> Iterator[Shard]:
        """The shards without what is ``covered``, bool [completions]; fully covered shards are left out.

        Args:
            shuffled: source of a random order of the shards; None = their own order.
        """
        numbers = list(range(len(self)))
        if shuffled is not None:
            shuffled.shuffle(numbers)
        for number in numbers:
            rows = self._rows(number)
            rows = rows[~covered[rows]]
            if len(rows):
                yield self._wanted.shard(rows)


def plan_shards(wanted: Wanted, tokens_per_shard: int, most: int | None = None) -> Iterator[Shard]:
    """The shards of all windows; arguments as those of ``Plan``."""
    for window in wanted.windows():
        yield from Plan(window, tokens_per_shard, most)


def still_missing(shard: Shard, cache: ReferenceCache, skip: Callable[[str], bool] | None = None) -> Shard:
    """The shard without the completions that ``cache`` holds by now. ``skip``: see ``ReferenceCache.covers``."""
    cache.refresh(skip=skip)
    return shard.take(cache.locate(shard.keys, shard.needed)[0] < 0)


def read_groups(shard: Shard, source: TokenSource) -> list[tuple[Completion, ...]]:
    """Read the tokens of a shard. Its completions grouped by prompt, see ``grouped``.

    Raises:
        CacheError: if the tokens at a place are not as many as planned.
    """
    return grouped(_completions(shard, source))


def grouped(completions: Iterable[Completion]) -> list[tuple[Completion, ...]]:
    """Completions grouped by prompt, in the order of the prompts' tokens, and those of a prompt in the order of keys."""
    groups: dict[bytes, list[Completion]] = {}
    for one in completions:
        groups.setdefault(np.asarray(one.prompt, ">u4").tobytes(), []).append(one)
    return [tuple(sorted(groups[prompt], key=lambda one: one.key)) for prompt in sorted(groups)]


def prompt_groups(groups: Iterable[Sequence[Completion]]) -> list[PromptGroup]:
    """The groups as a model takes them."""
    return [PromptGroup(group[0].prompt, tuple(one.tokens for one in group)) for group in groups]


def _completions(shard: Shard, source: TokenSource) -> list[Completion]:
    found = []
    columns = (shard.sets, shard.places, shard.sides, shard.needed, shard.prompt_tokens)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    for key, pair, row in zip(shard.keys, source.rows(shard.sets, shard.places), rows, strict=True):
        number, place, side, needed, prompt_tokens = row
        prompt, completion = pair[0], pair[1 + side]
        # Tokens of another pair would be scored under this key, for instance where a machine sees the files of a set late.
        if len(prompt) != prompt_tokens or len(completion) < needed:
            raise CacheError(
                f"the pair at place {place:,} of set {number} was read as a prompt of {len(prompt):,} and a completion of "
                f"{len(completion):,} tokens, expected {prompt_tokens:,} and at least {needed:,}; run the command again"
            )
        found.append(Completion(key.tobytes(), prompt, completion[:needed]))
    return found


def _by_place(sets: np.ndarray, places: np.ndarray) -> np.ndarray | slice:
    """Order of pairs by set and place; all as they are, if they are in order."""
    code = (sets.astype(np.int64) << 48) | places
    return slice(None) if (code[1:] >= code[:-1]).all() else np.argsort(code, kind="stable")


def _joined(arrays: Iterable[np.ndarray], kind: type) -> np.ndarray:
    return np.concatenate([np.empty(0, kind), *arrays], dtype=kind)


def _lengths(tables: Iterable[pa.Table], part: str) -> np.ndarray:
    return _joined((tokens_in_use(table, part) for table in tables), np.int32)


def _keys(table: pa.Table) -> np.ndarray:
    return np.stack([as_bytes(table[f"{side}_key"]) for side in SIDES], axis=1)
