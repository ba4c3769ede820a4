"""Drop pairs by their facts: ``data.filter``, an expression over ``data.facts``."""

from __future__ import annotations

import dataclasses
import difflib
import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpo.config import DataConfig
from raydpo.data.facts import FACTS, REFERENCE_FACTS, pair_facts
from raydpo.data.pairs import PairSets
from raydpo.errors import ConfigError, DataError

__all__ = ["PairFilter", "filtered_by_tokens"]


class PairFilter:
    """A condition that pairs must meet, such as ``chosen_tokens < 1024 and ref_margin > -20``.

    One SQL expression, parsed and evaluated by polars over the facts of the pairs only: ``and``, ``or``, ``not``,
    comparisons, ``between``, ``in (...)``, ``like``, arithmetic, ``abs``. It has no access to tables or files.

    Attributes:
        fields: the facts that it names.

    Raises:
        ConfigError: if it cannot be parsed, names an unknown fact, or is not true or false per pair.
    """

    def __init__(self, expression: str) -> None:
        import polars

        self.expression = expression
        try:
            self._condition = polars.sql_expr(expression)
        except polars.exceptions.PolarsError as error:
            raise self._wrong(_first_line(error)) from None
        self.fields = frozenset(self._condition.meta.root_names())
        for field in sorted(self.fields - FACTS.keys()):
            near = difflib.get_close_matches(field, FACTS, n=1, cutoff=0.5)
            raise self._wrong(f"there is no field {field!r}" + (f", did you mean {near[0]!r}?" if near else "") +
                              f" Fields: {', '.join(FACTS)}")
        if not self.fields:
            raise self._wrong(f"it names no field of a pair. Fields: {', '.join(FACTS)}")
        # Evaluate two made-up rows to learn the type of its result.
        schema = pa.schema([(name, kind) for name, (kind, _) in FACTS.items()])
        answer = self._evaluate(polars.from_arrow(pa.table([pa.array([_SAMPLES[kind]] * 2, kind) for kind in schema.types],
                                                           schema=schema)))
        if answer.dtype != polars.Boolean or len(answer) != 2:
            raise self._wrong("it does not give true or false for each pair" if len(answer) == 2 else
                              "it gives one value for all pairs; write a condition on each pair")

    @property
    def needs_reference(self) -> bool:
        """Whether it can be evaluated only after scoring."""
        return bool(self.fields & REFERENCE_FACTS)

    def keep(self, facts: pa.Table) -> np.ndarray:
        """Which pairs meet the condition, bool [pairs].

        Raises:
            DataError: if it has no value for some pair, or is true for none.
        """
        import polars

        answer = self._evaluate(polars.from_arrow(facts.select(sorted(self.fields))))
        if answer.null_count():
            row = answer.is_null().arg_max()
            raise DataError(f"data.filter {self.expression!r} is neither true nor false for {answer.null_count():,} pairs "
                            f"(first: {facts['pair_id'][row].as_py()}), because a field has no value there")
        keep = answer.to_numpy()
        if not keep.any():
            raise DataError(f"data.filter {self.expression!r} leaves none of {len(keep):,} pairs; relax it")
        return keep

    def apply(self, pairs: pa.Table, ref_chosen: np.ndarray | None = None,
              ref_rejected: np.ndarray | None = None) -> tuple[pa.Table, str]:
        """The pairs that meet the condition, and a line for the user.

        Args:
            ref_chosen, ref_rejected: see ``data.facts.pair_facts``.
        """
        facts = pair_facts(pairs, ref_chosen, ref_rejected)
        keep = self.keep(facts)
        return pairs.filter(pa.array(keep)), self.line(facts, keep)

    def line(self, facts: pa.Table, keep: np.ndarray) -> str:
        """What was left out, by source, as a line for the user."""
        counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(facts["source"]).to_pylist()}
        left = {entry["values"]: entry["counts"] for entry in
                pc.value_counts(facts["source"].filter(pa.array(~keep))).to_pylist()}
        sources = "; ".join(f"{source}: {left.get(source, 0):,} of {count:,}" for source, count in counts.items())
        return f"data.filter {self.expression!r}: {int((~keep).sum()):,} of {len(keep):,} pairs left out ({sources})"

    def _evaluate(self, frame):
        import polars

        try:
            return frame.select(self._condition).to_series()
        except polars.exceptions.PolarsError as error:
            raise self._wrong(_first_line(error)) from None

    def _wrong(self, why: str) -> ConfigError:
        return ConfigError(f"'data.filter' is {self.expression!r}: {why}")


def filtered_by_tokens(sets: PairSets, config: DataConfig) -> tuple[PairSets, str | None]:
    """``sets`` without the training pairs that ``config.filter`` excludes, if it needs no reference; and a line for the
    user."""
    condition = PairFilter(config.filter) if config.filter else None
    if condition is None or condition.needs_reference:
        return sets, None
    train, line = condition.apply(sets.train)
    return dataclasses.replace(sets, train=train), line


_SAMPLES = {pa.string(): "x", pa.int64(): 1, pa.float64(): -1.0, pa.bool_(): True}


def _first_line(error: Exception) -> str:
    return re.split(r"\n|Resolved plan", str(error))[0].strip()
