"""Is a cache what it says? Every byte of its files, and a sample of its log-probs scored again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raydpo.errors import CacheError
from raydpo.reference.index import as_bytes
from raydpo.reference.join import join
from raydpo.reference.part import KEY_TYPE
from raydpo.reference.score import Scorer
from raydpo.reference.shards import Completion, plan_shards
from raydpo.reference.store import PARTS, UNVERIFIED, ReferenceCache

__all__ = ["SAMPLE", "TOLERANCES", "FilesReport", "ScoresReport", "promote", "verify_files", "verify_scores"]

SAMPLE = 256
"""Completions that are scored again unless the user says otherwise."""
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.1}
"""Largest accepted mean difference of a completion's tokens, nats, by the precision of the reference. Other batches, layouts
and devices stay an order of magnitude below; other weights or tokens lie far above."""
TOKENS_PER_BATCH = 16384


@dataclass(frozen=True)
class FilesReport:
    """Every part read from the first byte to the last.

    Attributes:
        parts, rows, bytes: of the sound ones, superseded and unverified ones too.
        twice: rows that readers pass over because another row answers for the same completion.
        problems: a sentence for each file that is not used.
    """

    parts: int
    rows: int
    bytes: int
    twice: int
    problems: tuple[str, ...]


def verify_files(cache: ReferenceCache) -> FilesReport:
    """Check the checksum, footer, identity and values of every part of the cache."""
    parts = rows = size = 0
    for folder in (PARTS, UNVERIFIED):
        for entry in cache.storage.entries(f"{cache.directory}/{folder}"):
            try:
                part = cache.read(f"{cache.directory}/{folder}/{entry.name}") if entry.name.endswith(".parquet") else None
            except CacheError:
                continue  # named in cache.problems
            if part is not None:
                parts, rows, size = parts + 1, rows + part.info.rows, size + entry.size
    problems = dict.fromkeys(cache.problems)
    cache.refresh()
    return FilesReport(parts, rows, size, cache.rows_passed_over(), tuple(problems | dict.fromkeys(cache.problems)))


@dataclass(frozen=True)
class ScoresReport:
    """Stored against newly computed log-probs; differences are absolute, in nats.

    Attributes:
        wanted, stored: completions of the data, and how many of them the cache holds.
        checked, tokens: completions scored again, and their tokens.
        sums_only: how many of the checked ones are stored as sums: their difference is that of the sum, by its tokens.
        quantiles: of the mean difference of a completion's tokens.
        worst: the completion with the largest mean difference: its name, key and mean, its most different token with both
            values.
        tolerance: of that mean.
    """

    wanted: int
    stored: int
    checked: int
    tokens: int
    sums_only: int
    quantiles: dict[str, float]
    worst: dict[str, Any]
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.checked > 0 and self.worst["mean"] <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"passed": self.passed}


def verify_scores(cache: ReferenceCache, wanted: Sequence[Completion], names: dict[bytes, str], scorer: Scorer, *,
                  sample: int | None, seed: int = 0, tolerance: float | None = None) -> ScoresReport:
    """Score a random sample of the stored completions again, or all of them.

    Args:
        wanted: completions of the data at hand: a cache holds keys, not tokens.
        names: of each key, for people.
        sample: how many at most; None = all.

    Raises:
        CacheError: if the cache holds none of them.
    """
    keys = pa.array([one.key for one in wanted], KEY_TYPE)
    stored = np.flatnonzero(cache.covers(keys, np.array([len(one.tokens) for one in wanted], np.int32)))
    if not len(stored):
        raise CacheError(f"the cache holds none of the {len(wanted):,} completions of this configuration, so none can be "
                         "scored again; give the configuration whose data it was built from")
    chosen = stored if sample is None else np.random.default_rng(seed).permutation(stored)[:sample]
    completions = [wanted[index] for index in chosen]
    gaps, worst = _gaps(cache, completions, scorer)
    quantiles = {name: float(np.quantile(gaps, share)) for name, share in
                 (("median", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))} | {"mean": float(gaps.mean())}
    key = bytes.fromhex(worst["key"])
    return ScoresReport(len(wanted), len(stored), len(completions), sum(len(one.tokens) for one in completions),
                        worst.pop("sums_only"), quantiles, {"name": names.get(key, "?")} | worst,
                        TOLERANCES[cache.identity.dtype] if tolerance is None else tolerance)


def _gaps(cache: ReferenceCache, completions: Sequence[Completion], scorer: Scorer) -> tuple[np.ndarray, dict[str, Any]]:
    """Mean absolute difference of each completion's tokens, and the worst one in detail."""
    gaps: list[float] = []
    worst: dict[str, Any] = {"mean": -1.0}
    sums_only = 0
    for shard in plan_shards(completions, 8 * TOKENS_PER_BATCH):
        scored = [values for group in scorer.score(shard.prompt_groups()) for values in group]
        tokens = np.array([len(one.tokens) for one in shard.completions], np.int32)
        keys = pa.array([one.key for one in shard.completions], KEY_TYPE)
        found = cache.lookup(keys)
        sums = join(cache, as_bytes(keys), tokens).sums
        for index, (one, live) in enumerate(zip(shard.completions, scored, strict=True)):
            row = found["logps"][index]
            if row.is_valid and len(row) >= len(live):
                values = row.values.to_numpy()[: len(live)]
                different = np.abs(values - live)
                mean, place = float(different.mean()), int(different.argmax())
                detail = {"token": place, "stored": float(values[place]), "live": float(live[place])}
            else:
                sums_only += 1
                live_sum = float(live.astype(np.float64).sum())
                mean = abs(float(sums[index]) - live_sum) / len(live)
                detail = {"token": None, "stored": float(sums[index]), "live": live_sum}
            gaps.append(mean)
            if not mean <= worst["mean"]:
                worst = {"key": one.key.hex(), "mean": mean, **detail}
    return np.array(gaps), worst | {"sums_only": sums_only}


def promote(cache: ReferenceCache, wanted: Sequence[Completion], report: ScoresReport) -> int:
    """Make the unverified rows of ``wanted``, which ``report`` has vouched for, count; how many there were.

    Killed half-way, nothing is lost and the rest is promoted the next time.
    """
    keys = pa.array([one.key for one in wanted], pa.binary())
    vouched = {"verified": {"checked": report.checked, "mean": report.quantiles["mean"], "max": report.quantiles["max"]}}
    promoted = 0
    for entry in cache.storage.entries(f"{cache.directory}/{UNVERIFIED}"):
        path = f"{cache.directory}/{UNVERIFIED}/{entry.name}"
        if not entry.name.endswith(".parquet"):
            continue
        part = cache.read(path)
        mine = np.flatnonzero(pa.compute.is_in(part.keys.cast(pa.binary()), value_set=keys).to_numpy(zero_copy_only=False))
        rows = pa.array(mine)
        if len(mine):
            values = part.sums[mine] if part.logps is None else part.logps.take(rows)
            cache.commit_rows(part.keys.take(rows), part.tokens[mine], values, part.info.provenance | vouched)
            promoted += len(mine)
        if len(mine) == part.info.rows:
            cache.storage.delete(path)
    cache.refresh()
    return promoted
