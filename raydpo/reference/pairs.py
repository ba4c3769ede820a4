"""Join pairs with the stored log-probs of the reference."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpo.data.counting import RunColumns, all_count, weighted_sums
from raydpo.data.index import as_bytes
from raydpo.data.ragged import tokens_in_use
from raydpo.data.select import COUNT_COLUMNS
from raydpo.errors import CacheMissError
from raydpo.reference.identity import QUANTIZED, ReferenceIdentity
from raydpo.reference.join import Joined, join
from raydpo.reference.store import UNVERIFIED, ReferenceCache

__all__ = ["REFERENCE_COLUMNS", "SIDES", "join_reference", "place_reference", "reference_values"]

SIDES = ("chosen", "rejected")
"""The completions of a pair, in order."""
REFERENCE_COLUMNS = ("ref_chosen_place", "ref_rejected_place", "ref_known", "ref_chosen_sum", "ref_rejected_sum")
"""Columns that ``place_reference`` adds."""


def join_reference(table: pa.Table, cache: ReferenceCache, what: str) -> pa.Table:
    """Add the reference's values to ``table``, in memory-mapped files.

    Adds ``ref_chosen_logps`` and ``ref_rejected_logps`` (list_view<float32>, of the tokens in use; NaN where the cache holds
    only sums), and ``ref_chosen_sum`` and ``ref_rejected_sum`` (float64, nats; over the tokens that count, each with its
    weight).

    Raises:
        CacheMissError: if the cache lacks rows, or has too few of their tokens. Says how many, of which sources, the first
            few, and the command that scores them.
    """
    for side, found in zip(SIDES, _complete_values(table, cache, what), strict=True):
        table = table.append_column(f"ref_{side}_logps", found.lists(0, table.num_rows))
        table = table.append_column(f"ref_{side}_sum", pa.array(found.sums))
    return table


def place_reference(table: pa.Table, cache: ReferenceCache, what: str) -> tuple[pa.Table, list[np.ndarray]]:
    """Add to ``table`` the sums of the reference's log-probs, and where those of the tokens in use are.

    Adds ``ref_chosen_place`` and ``ref_rejected_place`` (int64), ``ref_known`` (uint8, 0 if of one of both completions only
    the sum is known), ``ref_chosen_sum`` and ``ref_rejected_sum`` (float64, nats; over the tokens that count, each with its
    weight).

    Returns:
        The table, and the log-probs: float32 arrays in memory-mapped files. Column ``ref_chosen_place`` counts from the
        beginning of the first array, with the second one following it.

    Raises:
        CacheMissError: as ``join_reference``.
    """
    chosen, rejected = _complete_values(table, cache, what)
    places = chosen.offsets[:-1], rejected.offsets[:-1] + len(chosen.values)
    added = (*places, (chosen.known & rejected.known).astype(np.uint8), chosen.sums, rejected.sums)
    for name, column in zip(REFERENCE_COLUMNS, added, strict=True):
        table = table.append_column(name, pa.array(column))
    return table, [chosen.values, rejected.values]


def _complete_values(table: pa.Table, cache: ReferenceCache, what: str) -> tuple[Joined, Joined]:
    """As ``reference_values``, if no value is missing; raises as ``join_reference``."""
    joined = reference_values(table, cache)
    lacking = np.isnan(joined[0].sums) | np.isnan(joined[1].sums)
    if lacking.any():
        raise _miss(table, lacking, cache, what)
    return joined


def reference_values(
    table: pa.Table, cache: ReferenceCache, rows: np.ndarray | slice = slice(None)
) -> tuple[Joined, Joined]:
    """Cached values of the chosen and of the rejected completions of the pairs in ``rows``. Their sums are over the tokens
    that count, each with its weight.

    Raises:
        CacheMissError: if not every token of a completion counts with weight 1, and only its sum is known.
    """
    masked = not all_count(table)

    def values(side: str) -> Joined:
        found = join(cache, as_bytes(table[f"{side}_key"])[rows], tokens_in_use(table, side)[rows])
        if not masked:
            return found
        counted = table.select(["pair_id", *COUNT_COLUMNS]).append_column(f"{side}_tokens", [tokens_in_use(table, side)])
        return _counted(found, counted.take(np.arange(table.num_rows)[rows]), side)

    return values("chosen"), values("rejected")


def _counted(found: Joined, table: pa.Table, side: str) -> Joined:
    """``found`` with sums over the tokens that count, of completions of ``table``."""
    sums = weighted_sums(found.values, found.offsets, table, side)
    whole = np.flatnonzero(~found.known & ~np.isnan(found.sums))
    if len(whole):
        of_whole = RunColumns(table, side).at(whole)
        partly = whole[of_whole.totals(of_whole.lengths * (of_whole.weights != 1)) > 0]
        if len(partly):
            raise CacheMissError(
                f"of {len(partly):,} {side} completions (first: {table['pair_id'][int(partly[0])].as_py()}) the cache holds "
                "only imported sums over all tokens, and by data.train_on or data.spans_column not all of them count. Count "
                "all of them (data.train_on=completion), or set cache.uri to a cache without these sums, which 'raydpo "
                "score' fills with the log-prob of each token"
            )
        sums[whole] = found.sums[whole]
    return dataclasses.replace(found, sums=sums)


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
