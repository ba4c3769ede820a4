"""Tables of tiny completions with labels: alone, or in pairs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from kernel import MAX_LENGTH, tiny_pairs, tokenised, with_reference

__all__ = ["labelled", "labelled_records", "mismatched", "scored", "sets_of"]


def labelled(labels: Sequence[int], seed: int = 0, records=None, max_length: int = MAX_LENGTH) -> pa.Table:
    """Rows of ``data.pairs.PAIR_SCHEMA`` with column ``label``: 0 is a pair, 1 and -1 keep only its chosen or rejected
    completion."""
    table = tiny_pairs(len(labels), seed) if records is None else tokenised(records, max_length)
    for side, gone in (("chosen", -1), ("rejected", 1)):
        empty = {"ids": [], "key": bytes(16), "full": 0}
        for name, nothing in empty.items():
            column = table[f"{side}_{name}"]
            values = [nothing if label == gone else value for label, value in zip(labels, column.to_pylist(), strict=True)]
            place = table.column_names.index(f"{side}_{name}")
            table = table.set_column(place, table.schema.field(f"{side}_{name}"), pa.array(values, column.type))
    return table.append_column("label", pa.array(np.array(labels, np.int8)))


def sets_of(table: pa.Table):
    """``table``, whose tokens are not cut, as ``select`` gives it."""
    from raydpo.data.select import PairSets, TokenTables
    from raydpo.data.tally import DataReport

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    tokens = TokenTables([[pa.table({name: table[name].combine_chunks() for name in names})]])
    table = table.append_column("set", pa.array(np.zeros(len(table), np.int16)))
    return PairSets(table.append_column("place", pa.array(np.arange(len(table)))), None, DataReport([]), tokens)


def mismatched(table: pa.Table, run: int, max_length: int = MAX_LENGTH) -> pa.Table:
    """``table``, whose tokens are not cut, with the mismatched completions of its rows that are alone."""
    from raydpo.data.mismatch import with_mismatched

    return with_mismatched(sets_of(table), run, max_length).train


def scored(table: pa.Table, model, **settings) -> pa.Table:
    """``kernel.with_reference`` of a table of which some sides have no tokens."""
    sides = [table[f"{side}_ids"].to_pylist() for side in ("chosen", "rejected")]
    one = [max(row, key=len) for row in zip(*sides, strict=True)]
    full = table
    for side, column in zip(("chosen", "rejected"), sides, strict=True):
        values = [mine or other for mine, other in zip(column, one, strict=True)]
        name = f"{side}_ids"
        full = full.set_column(full.column_names.index(name), name, pa.array(values, pa.list_(pa.int32())))
    found = with_reference(full, model, **settings)
    for side, column in zip(("chosen", "rejected"), sides, strict=True):
        values = [logps[: len(mine)] for mine, logps in zip(column, found[f"ref_{side}_logps"].to_pylist(), strict=True)]
        table = table.append_column(f"ref_{side}_logps", pa.array(values, pa.list_(pa.float32())))
    return table


def labelled_records(count: int, seed: int = 0) -> list[dict]:
    """Records of TRL's unpaired format: prompt, completion, label."""
    from tiny import preferences

    return [
        {"prompt": each["prompt"], "completion": each["chosen" if number % 3 else "rejected"], "label": bool(number % 3)}
        for number, each in enumerate(preferences(count, seed))
    ]
