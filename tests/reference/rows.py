"""Made-up rows of log-probs, and the answers of a cache, for tests of the store."""

from __future__ import annotations

import numpy as np

from raydpo.reference.identity import ReferenceIdentity
from raydpo.reference.store import PARTS, ReferenceCache

ONE = ReferenceIdentity(weights="1" * 64, architecture="a" * 64, adapter=None, dtype="float32")
OTHER = ReferenceIdentity(weights="2" * 64, architecture="a" * 64, adapter=None, dtype="float32")


def rows(count, seed=0, tokens=None):
    rng = np.random.default_rng(seed)
    keys = [rng.bytes(16) for _ in range(count)]
    return keys, [-rng.random(tokens or rng.integers(1, 30)).astype(np.float32) for _ in keys]


def values(cache, keys):
    """The log-probs that the cache returns for each key, None if it has none."""
    return [None if row is None else np.array(row, np.float32) for row in cache.lookup(keys)["logps"].to_pylist()]


def same(found, wanted):
    return len(found) == len(wanted) and all(
        (one is None) == (two is None) and (one is None or np.array_equal(one, two))
        for one, two in zip(found, wanted, strict=True)
    )


def files(cache: ReferenceCache, folder: str = PARTS) -> list[str]:
    return [name for name in cache.storage.list(f"{cache.directory}/{folder}") if name.endswith(".parquet")]
