"""Looking into a cache: which references it holds, and one of them field by field."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import numpy as np

from raydpo.console import Console
from raydpo.errors import CacheError
from raydpo.reference.store import ReferenceCache
from raydpo.storage import Storage

__all__ = ["list_identities", "show_identity"]


def list_identities(uri: str, console: Console) -> None:
    """Print one line for each reference in the cache at ``uri``.

    Raises:
        CacheError: if there is none.
    """
    storage = Storage(uri)
    rows = []
    for identity in ReferenceCache.identities(storage):
        cache = ReferenceCache(storage, identity)
        parts = cache.parts()
        rows.append((identity.digest, str(_description(cache).get("model", "?")), identity.dtype,
                     f"{sum(part.rows for part in parts):,}", f"{len(parts):,}", f"{sum(part.bytes for part in parts):,}"))
    if not rows:
        raise CacheError(f"there is no reference cache at {uri}; 'raydpo score' makes one")
    console.table(uri, ("identity", "model", "dtype", "rows", "parts", "bytes"), rows)


def show_identity(uri: str, identity: str | None, console: Console) -> None:
    """Print identity, provenance and statistics of one reference.

    Raises:
        CacheError: if ``identity`` does not name exactly one.
    """
    cache = ReferenceCache.open(uri, identity)
    parts = cache.parts()
    tokens = cache.scored_tokens()
    fields = dataclasses.asdict(cache.identity)
    console.table("identity", ("", "value"), [("digest", cache.identity.digest),
                                              *((name, str(value)) for name, value in fields.items())])
    description = _description(cache)
    console.table("what made it", ("", "value"), [
        *((name, str(value)) for name, value in description.items() if name != "identity" and value is not None),
        *(("provenance", f"{count} part(s): {text}") for text, count in
          Counter(json.dumps(part.provenance) for part in parts).items())])
    size = sum(part.bytes for part in parts)
    console.table("contents", ("", "value"), [
        ("parts", f"{len(parts):,}"), ("rows", f"{len(tokens):,}"), ("tokens", f"{int(tokens.sum()):,}"),
        ("bytes", f"{size:,}"), ("bytes per token", f"{size / max(1, int(tokens.sum())):.2f}"),
        ("tokens of a completion", f"median {np.median(tokens):.0f}, longest {tokens.max()}")])
    for problem in cache.problems:
        console.warn(problem)


def _description(cache: ReferenceCache) -> dict[str, object]:
    name = f"{cache.directory}/identity.json"
    return json.loads(cache.storage.read(name)) if cache.storage.exists(name) else {}
