"""Join pairs with the stored log-probs of the reference."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpo.data.index import as_bytes
from raydpo.errors import CacheMissError
from raydpo.reference.identity import QUANTIZED, ReferenceIdentity
from raydpo.reference.join import Joined, join
from raydpo.reference.store import UNVERIFIED, ReferenceCache

__all__ = ["join_reference", "reference_values"]

SIDES = ("chosen", "rejected")


def join_reference(table: pa.Table, cache: ReferenceCache, what: str) -> pa.Table:
    """Add the reference's values to ``table``, in memory-mapped files.

    Adds ``ref_chosen_logps`` and ``ref_rejected_logps`` (list<float32>, of the tokens in use; NaN where the cache holds only
    sums), and ``ref_chosen_sum`` and ``ref_rejected_sum`` (float64).

    Raises:
        CacheMissError: if the cache lacks rows, or has too few of their tokens. Says how many, of which sources, the first
            few, and the command that scores them.
    """
    joined = reference_values(table, cache)
    lacking = np.isnan(joined[0].sums) | np.isnan(joined[1].sums)
    if lacking.any():
        raise _miss(table, lacking, cache, what)
    for side, found in zip(SIDES, joined, strict=True):
        table = table.append_column(f"ref_{side}_logps", found.lists(0, table.num_rows))
        table = table.append_column(f"ref_{side}_sum", pa.array(found.sums))
    return table


def reference_values(
    table: pa.Table, cache: ReferenceCache, rows: np.ndarray | slice = slice(None)
) -> tuple[Joined, Joined]:
    """Cached values of the chosen and of the rejected completions of the pairs in ``rows``."""

    def values(side: str) -> Joined:
        needed = pc.list_value_length(table[f"{side}_ids"]).to_numpy().astype(np.int32)
        return join(cache, as_bytes(table[f"{side}_key"])[rows], needed[rows])

    return values("chosen"), values("rejected")


def _miss(table: pa.Table, lacking: np.ndarray, cache: ReferenceCache, what: str) -> CacheMissError:
    rows = table.filter(pa.array(lacking))
    sources = ", ".join(f"{entry['values']}: {entry['counts']}" for entry in pc.value_counts(rows["source"]).to_pylist())
    first = ", ".join(rows["pair_id"].slice(0, 3).to_pylist())
    parts = [
        f"reference log-probs are missing for {rows.num_rows} of {table.num_rows} {what} pairs ({sources}; first: "
        f"{first}) in {cache.storage}, identity {cache.identity.digest}"
    ]
    others = [other for other in cache.identities(cache.storage) if other != cache.identity]
    if rows.num_rows == table.num_rows and others:
        parts += [
            f"the cache holds identity {other.digest}, which is another reference "
            f"({'; '.join(cache.identity.differences(other))}){_as_it_is(cache.identity, other)}"
            for other in others[:3]
        ]
    imported = sum(part.rows for part in cache.parts(UNVERIFIED))
    if imported and not cache.unverified:
        parts.append(
            f"it holds {imported:,} imported rows that are not verified: run 'raydpo cache verify {cache.storage} "
            "--config CONFIG', or set cache.allow_unverified=true to train on them"
        )
    parts += cache.problems
    return CacheMissError("; ".join(parts) + ". Run 'raydpo score' (or 'raydpo run') with this configuration to fill it")


def _as_it_is(mine: ReferenceIdentity, other: ReferenceIdentity) -> str:
    """The settings that train against ``other``, if it differs only in the precision of the weights."""
    alike = dataclasses.replace(mine, quantisation=other.quantisation, dtype=other.dtype) == other
    if mine.quantisation == other.quantisation or not alike:
        return ""
    name = next((name for name, made in QUANTIZED.items() if made == other.quantisation), "none")
    settings = [f"reference.quantization={name}", "reference.allow_other_quantization=true"]
    if mine.dtype != other.dtype:
        settings.append(f"score.dtype={other.dtype}")
    return f"; to train against it anyway: {' '.join(settings)}"
