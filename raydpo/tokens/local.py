"""Token ids of sets in a cache, read by row from uncompressed copies that all processes of a machine map."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raydpo.data.ragged import Ragged
from raydpo.data.rows import TOKEN_SCHEMA
from raydpo.errors import CacheError, RaydpoError
from raydpo.storage.files import Storage, remove_stale_temporaries
from raydpo.storage.local_copy import local_home
from raydpo.storage.memory import one_at_a_time
from raydpo.tokens.block import BlockInfo, table_bytes
from raydpo.tokens.store import SETS, TokenSet

__all__ = ["StoredTokens"]

UNUSED_SECONDS = 24 * 3600.0
"""Age in seconds after which the copies of an unused set are deleted when copies of another one are made."""
SMALL_IDS = 1 << 18
"""Token ids of a set up to which each process decodes it in its own memory: 1 MiB, for which no file is worth while."""
_IDS = TOKEN_SCHEMA.names


@dataclass
class _Known:
    """What is known of a set: its blocks that hold pairs, whether these are all, and whether it is small."""

    tokens: TokenSet
    blocks: list[BlockInfo]
    whole: bool
    small: bool = False

    @cached_property
    def firsts(self) -> np.ndarray:
        """Place of each block's first pair, then the number of all pairs: int64 [blocks + 1]."""
        return np.array([0, *accumulate(block.pairs for block in self.blocks)], np.int64)


class StoredTokens:
    """The ``rows.TokenSource`` of sets in a cache. It is sent to other processes as its arguments alone.

    A block is decoded on its first use on a machine, to a file in ``local_home()/sets/<digest>`` that all its processes map;
    blocks of a small set are decoded in the memory of each process. A set may still be being made: then the blocks before
    the last pair that is asked for have to be there.

    Args:
        uri: of the cache.
        digests: the sets, by the numbers that ``rows`` is given.
    """

    def __init__(self, uri: str, digests: Sequence[str]) -> None:
        self.uri, self.digests = uri, tuple(digests)
        self._sets: dict[int, _Known] = {}
        self._lists: dict[str, tuple[Ragged, Ragged, Ragged]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredTokens, (self.uri, self.digests)

    def rows(self, sets: np.ndarray, places: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """As ``rows.TokenSource``. The arrays are views of mapped files.

        Raises:
            CacheError: if a set has no such pairs, or a block is damaged.
            RaydpoError: if this machine has no room for the copies.
        """
        sets, places = np.asarray(sets), np.asarray(places, np.int64)
        found: list[Any] = [None] * len(places)
        for number in np.unique(sets).tolist():
            mine = np.flatnonzero(sets == number)
            known = self._known(number, places[mine])
            blocks = np.searchsorted(known.firsts, places[mine], side="right") - 1
            lists = {index: self._lists_of(known, known.blocks[index]) for index in np.unique(blocks).tolist()}
            rows = places[mine] - known.firsts[blocks]
            for pair, index, row in zip(mine.tolist(), blocks.tolist(), rows.tolist(), strict=True):
                prompts, chosen, rejected = lists[index]
                found[pair] = prompts[row], chosen[row], rejected[row]
        return found

    def tables(self, number: int) -> list[pa.Table]:
        """Mapped tables of ``TOKEN_SCHEMA`` of a whole set: one for each block that holds pairs, in order.

        Raises:
            CacheError: if the set is not complete, or a block is damaged.
            RaydpoError: as ``rows``.
        """
        known = self._known(number, np.empty(0, np.int64))
        if not known.whole:
            raise CacheError(
                f"the set {known.tokens.digest} in {known.tokens.storage} is not complete; run the command again"
            )
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            return list(pool.map(lambda block: self._table(known, block), known.blocks))

    def _known(self, number: int, places: np.ndarray) -> _Known:
        """The set of this number, of which at least the blocks that hold ``places`` are known."""
        last = int(places.max(initial=-1))
        known = self._sets.get(number)
        if known is None or (not known.whole and last >= known.firsts[-1]):
            known = self._listed(number, last)
            self._sets[number] = known
        if len(places) and not 0 <= places.min() <= last < known.firsts[-1]:
            raise CacheError(
                f"the set {known.tokens.digest} in {known.tokens.storage} holds {known.firsts[-1]:,} pairs, and places "
                f"{places.min():,} to {last:,} are wanted"
            )
        return known

    def _listed(self, number: int, last: int) -> _Known:
        tokens = TokenSet(Storage(self.uri), self.digests[number])
        whole = tokens.complete(check=False)
        if whole is not None:
            small = whole.tokens <= SMALL_IDS
            known = _Known(tokens, [block for block in whole.blocks if block.pairs], True, small)
            if not small:
                self._make_room(known, whole.tokens)
            return known
        blocks = [block for block in tokens.first_blocks(last + 1, check=False) if block.pairs]
        known = _Known(tokens, blocks, False)
        self._make_room(known, 0)
        return known

    def _make_room(self, known: _Known, ids: int) -> None:
        """Delete copies of sets that were not used for long, and check that the copies of this one will fit.

        Args:
            ids: number of its token ids.
        """
        folder = self._folder(known.tokens)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            os.utime(folder)
            remove_stale_temporaries(Storage(str(folder)), "")
            for other in folder.parent.iterdir():
                if time.time() - other.stat().st_mtime > UNUSED_SECONDS:
                    shutil.rmtree(other, ignore_errors=True)
            there, free = set(os.listdir(folder)), shutil.disk_usage(folder).free
        except OSError as error:
            raise _no_copies(folder, str(error.strerror or error)) from None
        missing = sum(block.pairs for block in known.blocks if f"{block.name}.arrow" not in there)
        wanted = int(4 * (ids + len(_IDS) * known.firsts[-1]) * missing / max(1, known.firsts[-1]))
        if wanted > free:
            raise _no_copies(folder, f"they take {wanted / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free")

    def _folder(self, tokens: TokenSet) -> Path:
        return local_home() / SETS / tokens.digest

    def _lists_of(self, known: _Known, block: BlockInfo) -> tuple[Ragged, Ragged, Ragged]:
        if block.name not in self._lists:
            table = self._table(known, block)
            self._lists[block.name] = tuple(Ragged.of(table[name]) for name in _IDS)  # type: ignore[assignment]
        return self._lists[block.name]

    def _table(self, known: _Known, block: BlockInfo) -> pa.Table:
        """The mapped token ids of a block. The first process of the machine that asks decodes it; others wait for it."""
        if known.small:
            return known.tokens.tokens(block)
        place = self._folder(known.tokens) / f"{block.name}.arrow"
        table = _mapped_table(place, block)
        if table is None:
            with one_at_a_time(place):
                table = _mapped_table(place, block)
                if table is None:
                    data = table_bytes(known.tokens.tokens(block))
                    try:
                        Storage(str(place.parent)).write(place.name, data)
                    except OSError as error:
                        raise _no_copies(place.parent, str(error.strerror or error)) from None
                    table = _mapped_table(place, block)
        if table is None:
            raise _no_copies(place.parent, f"{place.name} cannot be read")
        return table


def _mapped_table(place: Path, block: BlockInfo) -> pa.Table | None:
    """The table in a local copy, mapped; None if it is not there or is not whole."""
    try:
        with pa.memory_map(str(place)) as stream:
            table = pa.ipc.open_file(stream).read_all()
    except (OSError, pa.ArrowException):
        return None
    return table if table.num_rows == block.pairs and table.schema.equals(TOKEN_SCHEMA) else None


def _no_copies(folder: Path, reason: str) -> RaydpoError:
    return RaydpoError(
        f"cannot keep uncompressed copies of tokens in {folder}: {reason}; set XDG_CACHE_HOME to a local disk with room"
    )
