"""Claims: notes by which builders of one cache tell each other what they are scoring.

    <cache>/<identity digest>/claims/<time>-<builder>-<digest>.keys

A claim is a hint, not a lock. A build skips completions that another build has claimed and checks them again later. If a
claim is lost, late or ignored, completions are scored twice; nothing is wrong. A claim counts while its builder is alive.
Clocks are not compared for this: a builder is alive if it committed or claimed something since this build started. So claims
of a killed build delay no other build.
"""

from __future__ import annotations

import re
import time
import uuid

import numpy as np

from raydpo.reference.part import builder_of
from raydpo.reference.shards import Shard
from raydpo.reference.store import ReferenceCache

__all__ = ["CLAIMS", "Claims"]

CLAIMS = "claims"
"""Folder of an identity with the claims, beside the parts."""
_NAME = re.compile(r"\d{20}-(?P<builder>[0-9a-z]{8})-[0-9a-f]{32}\.keys")
_ROWS = np.dtype([("key", "V16"), ("tokens", "<u4")])


class Claims:
    """The claims on rows of one cache.

    Args:
        cache: the cache; ``cache.builder`` is the builder that claims through this object.
        known: names of the claims and parts that existed when the build started.
    """

    def __init__(self, cache: ReferenceCache, known: frozenset[str]) -> None:
        self.cache, self.known = cache, known
        self._read: dict[str, dict[bytes, int]] = {}

    @staticmethod
    def names(cache: ReferenceCache) -> list[str]:
        """Names of all claims, of living and dead builders, oldest first by the clocks of their builders."""
        return [name for name in cache.storage.list(f"{cache.directory}/{CLAIMS}") if _NAME.fullmatch(name)]

    def take(self, shard: Shard) -> tuple[Shard, str | None]:
        """Claim what no other builder is scoring.

        If builders claim the same completions at the same moment, the claim whose name sorts first wins.

        Returns:
            The completions of ``shard`` to score, and the name of the claim on them for ``release`` (None without
                completions).
        """
        shard = _unclaimed(shard, self._of_others())
        if not len(shard):
            return shard, None
        rows = np.empty(len(shard), _ROWS)
        rows["key"], rows["tokens"] = shard.keys.view("V16")[:, 0], shard.needed
        mine = f"{time.time_ns():020d}-{self.cache.builder}-{uuid.uuid4().hex}.keys"
        self.cache.storage.write(self._path(mine), rows.tobytes())
        shard = _unclaimed(shard, self._of_others(before=mine))
        if not len(shard):
            self.release(mine)
            return shard, None
        return shard, mine

    def release(self, name: str) -> None:
        """Delete a claim, because its rows are committed or will not be scored."""
        self.cache.storage.delete(self._path(name))

    def clear(self) -> None:
        """Delete all claims of this builder, including those of actors that died."""
        for name in self.names(self.cache):
            if _builder(name) == self.cache.builder:
                self.release(name)

    def _path(self, name: str) -> str:
        return f"{self.cache.directory}/{CLAIMS}/{name}"

    def _of_others(self, before: str | None = None) -> dict[bytes, int]:
        """Most tokens that another living builder is scoring now, by key. ``before``: only claims that sort before it."""
        names = [name for name in self.names(self.cache) if _builder(name) != self.cache.builder]
        parts = [path.rsplit("/", 1)[-1] for path in self.cache.paths()]
        living = {_builder(name) for name in names if name not in self.known} | {
            builder_of(name) for name in parts if name not in self.known
        }
        claimed: dict[bytes, int] = {}
        for name in names:
            if _builder(name) in living and (before is None or name < before):
                for key, tokens in self._rows(name).items():
                    claimed[key] = max(tokens, claimed.get(key, 0))
        return claimed

    def _rows(self, name: str) -> dict[bytes, int]:
        if name not in self._read:
            try:
                data = self.cache.storage.read(self._path(name))
            except FileNotFoundError:
                return {}  # released just now
            rows = np.frombuffer(data[: len(data) // _ROWS.itemsize * _ROWS.itemsize], _ROWS)
            self._read[name] = dict(zip((key.tobytes() for key in rows["key"]), rows["tokens"].tolist(), strict=True))
        return self._read[name]


def _builder(name: str) -> str:
    return _NAME.fullmatch(name)["builder"]


def _unclaimed(shard: Shard, claimed: dict[bytes, int]) -> Shard:
    taken = [claimed.get(key.tobytes(), -1) >= needed for key, needed in zip(shard.keys, shard.needed, strict=True)]
    return shard.take(~np.array(taken, bool))
