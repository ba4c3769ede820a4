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
from raydpo.data.lists import all_pairs, starts_of_table
from raydpo.data.pairs import PairSets
from raydpo.errors import DataError

__all__ = ["filter_pairs", "filtered_by_tokens", "kept_rows", "left_out", "pairs_to_keep"]


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


def filter_pairs(condition: PairFilter, pairs: pa.Table) -> tuple[pa.Table, str]:
    """The pairs that meet ``condition``, and a line for the user. Errors as of ``kept_rows``."""
    keep, line = kept_rows(condition, pairs)
    return pairs.filter(pa.array(keep)), line


def kept_rows(
    condition: PairFilter, pairs: pa.Table, ref_chosen: np.ndarray | None = None, ref_rejected: np.ndarray | None = None
) -> tuple[np.ndarray, str]:
    """Which rows of a table of pairs meet ``condition``, bool [rows], and a line for the user.

    A ranked list meets it if all pairs of a better and a worse completion do.

    Args:
        ref_chosen, ref_rejected: see ``data.facts.pair_facts``.

    Raises:
        DataError: if the condition has no value for some pair, or is true for none.
    """
    starts = starts_of_table(pairs)
    if starts is None:
        facts = pair_facts(pairs, ref_chosen, ref_rejected)
        keep = pairs_to_keep(condition, facts)
        return keep, left_out(condition, facts, keep)
    sizes, own = np.diff(starts), {"filtered": np.repeat(np.arange(len(starts) - 1), np.diff(starts))}
    if ref_chosen is not None and ref_rejected is not None:
        own |= {"filtered_chosen": ref_chosen, "filtered_rejected": ref_rejected}
    for name, values in own.items():
        pairs = pairs.append_column(name, pa.array(values))
    compared = all_pairs(pairs)
    sums = [compared[name].to_numpy() for name in list(own)[1:]]
    met = pairs_to_keep(condition, pair_facts(compared, *sums))
    keep = np.bincount(compared["filtered"].to_numpy(), ~met, minlength=len(sizes)) == 0
    if not keep.any():
        raise DataError(f"data.filter {condition.expression!r} leaves none of {len(keep):,} lists: in each, a pair fails it")
    return np.repeat(keep, sizes), left_out(condition, pairs.select(["source"]).take(pa.array(starts[:-1])), keep, "lists")


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
