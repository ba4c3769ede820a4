"""Drop pairs by their facts: apply the condition ``data.filter`` to a table of pairs."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpo.config import DataConfig
from raydpo.config.filter import PairFilter
from raydpo.data.facts import pair_facts
from raydpo.data.lists import all_pairs, begins
from raydpo.data.pairs import PairSets
from raydpo.data.select import LIST_COLUMNS
from raydpo.errors import DataError

__all__ = ["filter_pairs", "filtered_by_tokens", "left_out", "pairs_to_keep"]


def pairs_to_keep(condition: PairFilter, facts: pa.Table) -> np.ndarray:
    """Which pairs meet ``condition``, bool [pairs].

    Args:
        facts: what ``data.facts.pair_facts`` returns.

    Raises:
        DataError: if the condition has no value for some pair, or is true for none.
    """
    import polars

    answer = condition.evaluate(polars.from_arrow(facts.select(sorted(condition.fields))))
    if answer.null_count():
        row = answer.is_null().arg_max()
        raise DataError(
            f"data.filter {condition.expression!r} is neither true nor false for {answer.null_count():,} pairs "
            f"(first: {facts['pair_id'][row].as_py()}), because a field has no value there"
        )
    keep = answer.to_numpy()
    if not keep.any():
        raise DataError(f"data.filter {condition.expression!r} leaves none of {len(keep):,} pairs")
    return keep


def filter_pairs(
    condition: PairFilter, pairs: pa.Table, ref_chosen: np.ndarray | None = None, ref_rejected: np.ndarray | None = None
) -> tuple[pa.Table, str]:
    """The pairs that meet ``condition``, and a line for the user.

    Args:
        ref_chosen, ref_rejected: see ``data.facts.pair_facts``.

    Raises:
        DataError: if the condition has no value for some pair, or is true for none.
    """
    if LIST_COLUMNS[0] in pairs.column_names:
        return _filter_lists(condition, pairs, ref_chosen, ref_rejected)
    facts = pair_facts(pairs, ref_chosen, ref_rejected)
    keep = pairs_to_keep(condition, facts)
    return pairs.filter(pa.array(keep)), left_out(condition, facts, keep)


def _filter_lists(
    condition: PairFilter, rows: pa.Table, ref_chosen: np.ndarray | None, ref_rejected: np.ndarray | None
) -> tuple[pa.Table, str]:
    """As ``filter_pairs``: the ranked lists of which all pairs of a better and a worse completion meet the condition."""
    numbers = rows.append_column("filtered_list", rows[LIST_COLUMNS[0]])
    if ref_chosen is not None and ref_rejected is not None:
        for name, sums in (("filtered_chosen", ref_chosen), ("filtered_rejected", ref_rejected)):
            numbers = numbers.append_column(name, pa.array(sums))
    pairs = all_pairs(numbers)
    sums = [pairs[name].to_numpy() for name in ("filtered_chosen", "filtered_rejected") if name in pairs.column_names]
    unmet = pairs["filtered_list"].filter(pa.array(~pairs_to_keep(condition, pair_facts(pairs, *sums))))
    keep = pc.invert(pc.is_in(rows[LIST_COLUMNS[0]], unmet.combine_chunks()))
    if not pc.any(keep).as_py():
        raise DataError(
            f"data.filter {condition.expression!r} leaves none of the lists whole: each has a pair that fails it"
        )
    begin = pa.array(begins(rows[LIST_COLUMNS[0]]))
    return rows.filter(keep), left_out(condition, rows.filter(begin), keep.filter(begin).to_numpy(), "lists")


def left_out(condition: PairFilter, facts: pa.Table, keep: np.ndarray, unit: str = "pairs") -> str:
    """How many pairs ``condition`` leaves out of each source, as a line for the user."""
    counts, left = _by_source(facts["source"]), _by_source(facts["source"].filter(pa.array(~keep)))
    sources = "; ".join(f"{source}: {left[source]:,} of {count:,}" for source, count in counts.items())
    return f"data.filter {condition.expression!r}: {int((~keep).sum()):,} of {len(keep):,} {unit} left out ({sources})"


def _by_source(sources: pa.ChunkedArray) -> Counter[str]:
    """Number of pairs by source, in order of their first pairs."""
    return Counter({entry["values"]: entry["counts"] for entry in pc.value_counts(sources).to_pylist()})


def filtered_by_tokens(sets: PairSets, config: DataConfig) -> tuple[PairSets, str | None]:
    """``sets`` after ``config.filter``, if that needs no reference; and a line for the user."""
    condition = PairFilter(config.filter) if config.filter else None
    if condition is None or condition.needs_reference:
        return sets, None
    train, line = filter_pairs(condition, sets.train)
    return dataclasses.replace(sets, train=train), line
