"""Pairs of a source as token ids in full, with the few numbers of each by which a run selects and cuts them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa

from raydpo.data.tally import SourceReport

__all__ = ["HEAD_TOKENS", "LIGHT_SCHEMA", "PAIR_MARGIN", "PAIR_WEIGHT", "TOKEN_SCHEMA", "Rows", "TokenSource"]

_IDS, _KEY = pa.list_(pa.int32()), pa.binary(16)
HEAD_TOKENS = 24
"""Tokens of a prompt in column ``head``. Sorting by them brings nearly all prompts that share much next to each other."""
PAIR_WEIGHT = "pair_weight"
"""Additional light column, float64, if ``data.weight_column`` is set."""
PAIR_MARGIN = "pair_margin"
"""Additional light column, float64, if ``data.margin_column`` is set."""

TOKEN_SCHEMA = pa.schema([("prompt_ids", _IDS), ("chosen_ids", _IDS), ("rejected_ids", _IDS)])
"""Token ids of pairs before truncation."""
LIGHT_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),  # number of the record, from 1, counted through all files of the source
        ("number", pa.int32()),  # n of pair id source:row#n; 0 for the first pair of a record
        ("file", pa.int32()),  # index into Rows.labels
        ("line", pa.int64()),  # the record's place is label:line
        ("source", pa.int32()),  # index into Rows.sources of the source that it counts as; -1 = the source itself
        ("prompt_tokens", pa.int32()),
        ("chosen_tokens", pa.int32()),
        ("rejected_tokens", pa.int32()),  # before truncation; all three are 0 if the text was too long to be tokenised
        ("agree", pa.int32()),  # tokens that chosen and rejected have in common at their start
        ("highest", pa.int32()),  # highest token id of the three
        ("chosen_key", _KEY),
        ("rejected_key", _KEY),  # keys.completion_key of the completions before truncation
        ("prompt_digest", _KEY),
        ("question_digest", _KEY),  # split.prompt_digest and split.question_digest
        ("prompt_hash", pa.uint64()),
        ("chosen_hash", pa.uint64()),
        ("rejected_hash", pa.uint64()),  # facts.digests of the ids before truncation
        ("characters", pa.int64()),  # of the pair's text
        ("flags", pa.uint8()),  # bit 0: several turns
        ("head", pa.binary(64)),  # the prompt's first tokens after those that all prompts share; see ``head_of``
    ]
)
"""What is known of each pair without its tokens, in the order of records."""


@dataclass(frozen=True)
class Rows:
    """Pairs of successive records of one source.

    Attributes:
        light: columns of ``LIGHT_SCHEMA``, and the numbers of weight and margin columns.
        tokens: columns of ``TOKEN_SCHEMA`` of the same pairs.
        labels: files of the records, as messages name them.
        sources: names that ``light["source"]`` refers to.
        account: the part of the source's report that depends on no setting but those of reading: everything but kept,
            truncated, dropped and duplicates. Its name and path are empty.
    """

    light: pa.Table
    tokens: pa.Table
    labels: tuple[str, ...]
    sources: tuple[str, ...]
    account: SourceReport


class TokenSource(Protocol):
    """Where processes on any machine read the tokens of pairs. It can be pickled, and is then small, but for data in
    memory."""

    def rows(self, sets: np.ndarray, places: np.ndarray) -> Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Token ids of pairs before truncation: (prompt, chosen, rejected) of each, int32 arrays that must not be changed.

        Args:
            sets: number of the set of each pair, as in column ``set`` of a table of ``pairs.PAIR_SCHEMA``.
            places: its place in that set, as in column ``place``, int64 [pairs].
        """
        ...
