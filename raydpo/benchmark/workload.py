"""The pairs that both sides compute, as token ids: of a data file, or random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydpo.config import DataConfig, SourceConfig
from raydpo.data.keys import completion_key
from raydpo.data.pairs import PAIR_SCHEMA, load_pairs
from raydpo.data.tokenise import Tokeniser, load_tokenizer
from raydpo.errors import DataError
from raydpo.estimate.plan import pair_groups

__all__ = ["IDS", "cut", "load", "of_file", "parts", "save", "statistics", "synthetic"]

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
"""Columns that both sides read."""
SPREAD = 0.25
"""Random lengths lie within this share of what is asked for: rows of equal length would need no padding."""


def of_file(path: str, pairs: int, model: str, max_length: int) -> pa.Table:
    """The first usable pairs of a preference file, tokenised as a run would: a table of ``data.pairs.PAIR_SCHEMA``.

    Raises:
        DataError: if the file cannot be read or holds fewer pairs.
        ModelError: if the model lacks a tokenizer, or its tokenizer what the data need.
    """
    tokeniser = Tokeniser(load_tokenizer(model))
    # Records may be malformed or too long, so a few more than pairs are read; all of them only if that is not enough.
    for limit in (pairs + 100, 4 * pairs + 1000, None):
        config = DataConfig(train=(SourceConfig(path=path, limit=limit),), max_length=max_length, max_dropped=1.0)
        found = load_pairs(config, tokeniser).train
        if found.num_rows >= pairs:
            return found.slice(0, pairs)
    raise DataError(f"{path} holds {found.num_rows} usable pairs, fewer than --pairs {pairs}")


def synthetic(pairs: int, length: int, ratio: tuple[int, int], vocabulary: int, seed: int) -> pa.Table:
    """Pairs of random tokens, the same for the same arguments.

    Args:
        length: tokens of prompt and one completion on average; each length varies by up to ``SPREAD``.
        ratio: of prompt to completion.
        vocabulary: token ids lie below it.
    """
    rng = np.random.default_rng((seed, length, *ratio))
    means = [length * part / sum(ratio) for part in (ratio[0], ratio[1], ratio[1])]
    sizes = np.maximum(1, np.round(rng.uniform(1 - SPREAD, 1 + SPREAD, (pairs, 3)) * means)).astype(int)
    rows = []
    for number, each in enumerate(sizes, 1):
        prompt, chosen, rejected = (rng.integers(0, vocabulary, size).astype(np.int32) for size in each)
        rows.append({"pair_id": f"random:{number}", "source": "random", "weight": 1.0, "prompt_ids": prompt,
                     "chosen_ids": chosen, "rejected_ids": rejected, "chosen_key": completion_key(prompt, chosen),
                     "rejected_key": completion_key(prompt, rejected), "chosen_full": each[1], "rejected_full": each[2]})
    return pa.Table.from_pylist(rows, schema=PAIR_SCHEMA)


def save(table: pa.Table, file: Path) -> None:
    """Write what ``load`` reads."""
    pq.write_table(table, file)


def load(file: str | Path) -> pa.Table:
    """The table as ``save`` left it, one chunk a column."""
    return pq.read_table(file).combine_chunks()


def parts(table: pa.Table, per_step: int) -> list[range]:
    """Row numbers of each step of an epoch, in file order."""
    return cut(range(table.num_rows), per_step)


def cut(rows: range, size: int) -> list[range]:
    """``rows`` in parts of ``size``, of which the last may be smaller."""
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def statistics(table: pa.Table, pairs_per_step: int) -> dict[str, Any]:
    """Counts over all pairs. ``positions``: token positions of a forward pass in each layout; padded with the rows of
    a step in one batch, each as wide as the longest of them."""
    _, shapes = pair_groups(table)
    in_steps = [list(rows) for rows in parts(table, pairs_per_step)]
    return {
        "pairs": table.num_rows, "prompt_tokens": int(shapes.prompt.sum()), "completion_tokens": int(shapes.tokens.sum()),
        "longest": int(shapes.longest.max()),
        "positions": {"padded": sum(int(shapes.rows[rows].sum() * shapes.longest[rows].max()) for rows in in_steps),
                      "packed": int(shapes.positions("packed").sum()), "tree": int(shapes.positions("tree").sum())},
    }
