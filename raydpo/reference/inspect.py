"""Inspect a cache: list its references, describe one, or compare two."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa

from raydpo.reference.part import COMPACTED, PartInfo, builder_of
from raydpo.reference.store import PARTS, SET_ASIDE, UNVERIFIED, ReferenceCache
from raydpo.storage.files import Storage
from raydpo.storage.garbage import now

__all__ = ["describe", "difference", "identities"]


def identities(uri: str) -> list[dict[str, Any]]:
    """List the references in the cache at ``uri``.

    Returns:
        One dictionary per reference: identity, model, dtype, rows, bytes, parts, unverified rows, and the seconds since its
        newest part was written. Rows are counted as stored; a completion in two parts counts twice.

    """
    storage = Storage(uri)
    found = []
    time_there = None
    for identity in ReferenceCache.identities(storage):
        cache = ReferenceCache(storage, identity)
        parts = _current(cache.parts())
        newest = max(
            (entry.modified for folder in (PARTS, UNVERIFIED) for entry in storage.entries(f"{identity.digest}/{folder}")),
            default=0.0,
        )
        time_there = now(storage) if time_there is None else time_there
        found.append(
            {
                "identity": identity.digest,
                "model": str(cache.description().get("model", "?")),
                "dtype": identity.dtype,
                "rows": sum(part.rows for part in parts),
                "parts": len(parts),
                "bytes": sum(part.bytes for part in parts),
                "unverified_rows": sum(part.rows for part in cache.parts(UNVERIFIED)),
                "age_seconds": max(0.0, time_there - newest),
            }
        )
    return found


def describe(uri: str, identity: str | None) -> dict[str, Any]:
    """Describe one reference: identity by field, what made the parts, contents, lengths and log-probs.

    Args:
        identity: prefix of the identity's digest; None if there is only one.

    Raises:
        CacheError: if ``identity`` does not select exactly one reference.
    """
    cache = ReferenceCache.open(uri, identity)
    cache.refresh()
    infos = cache.parts()
    parts = _current(infos)
    tokens = cache.scored_tokens()
    size = sum(part.bytes for part in parts)
    description = {name: value for name, value in cache.description().items() if name != "identity"}
    return {
        "identity": {"digest": cache.identity.digest} | cache.identity.to_dict(),
        "made_by": description | {"provenance": _provenance(parts)},
        "contents": {
            "parts": len(parts),
            "superseded_parts": len(infos) - len(parts),
            "completions": len(tokens),
            "rows": sum(part.rows for part in parts),
            "tokens": int(tokens.sum()),
            "bytes": size,
            "bytes_per_token": size / max(1, int(tokens.sum())),
            "unverified_rows": sum(part.rows for part in cache.parts(UNVERIFIED)),
            "set_aside_files": len(cache.storage.entries(f"{cache.directory}/{SET_ASIDE}")),
        },
        "tokens_of_a_completion": _quantiles(tokens),
        "logps_per_token": _quantiles(_per_token(cache)),
        "problems": cache.problems,
    }


def difference(one: ReferenceCache, two: ReferenceCache) -> dict[str, Any]:
    """Compare two caches: the identity fields that differ, and the differences of values on completions that both hold.

    Differences are absolute, in nats per token, over the tokens that both have.
    """
    mine, theirs = dataclasses.asdict(one.identity), dataclasses.asdict(two.identity)
    fields = {name: [mine[name], theirs[name]] for name in mine if mine[name] != theirs[name]}
    keys, others = one.keys(), two.keys()
    common = keys.filter(pa.compute.is_in(keys.cast(pa.binary()), value_set=others.cast(pa.binary())))
    gaps, worst = [], {"key": None, "mean": 0.0}
    for start in range(0, len(common), 10_000):
        batch = common.slice(start, 10_000)
        rows = [cache.lookup(batch)["logps"] for cache in (one, two)]
        for key, left, right in zip(batch, *rows, strict=True):
            left, right = left.values.to_numpy(), right.values.to_numpy()
            shorter = min(len(left), len(right))
            gap = float(np.abs(left[:shorter] - right[:shorter]).mean())
            gaps.append(gap)
            if gap > worst["mean"] or worst["key"] is None:
                worst = {"key": key.as_py().hex(), "mean": gap}
    return {
        "fields": fields,
        "completions": [len(keys), len(others)],
        "common": len(common),
        "difference": _quantiles(np.array(gaps)),
        "worst": worst,
    }


def _current(parts: list[PartInfo]) -> list[PartInfo]:
    superseded = {name for part in parts if builder_of(part.name) == COMPACTED for name in part.supersedes}
    return [part for part in parts if part.name not in superseded]


def _provenance(parts: list[PartInfo]) -> list[dict[str, Any]]:
    """Number of parts by the hardware and software that made them."""
    counts: Counter[str] = Counter()
    for part in parts:
        for one in part.provenance.get("parts") or [{"count": 1, "of": part.provenance}]:
            counts[json.dumps(one["of"], sort_keys=True)] += one["count"]
    return [{"parts": count} | json.loads(text) for text, count in counts.most_common()]


def _per_token(cache: ReferenceCache) -> np.ndarray:
    """Mean log-prob per token of each stored row, nats."""
    means = []
    for path in cache.paths():
        part = cache.read(path)
        if part.logps is not None and len(part.keys):
            sums = np.add.reduceat(part.logps.values.to_numpy().astype(np.float64), part.logps.offsets.to_numpy()[:-1])
            means.append(sums / part.tokens)
    return np.concatenate(means) if means else np.empty(0)


def _quantiles(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    return {"mean": float(values.mean())} | {
        name: float(np.quantile(values, share))
        for name, share in (("least", 0.0), ("p10", 0.1), ("median", 0.5), ("p90", 0.9), ("p99", 0.99), ("most", 1.0))
    }
