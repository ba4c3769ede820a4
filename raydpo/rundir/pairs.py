"""The pairs that a run is trained on, stored so that a later call can say which of them have changed."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raydpo.rundir.directory import PAIRS
from raydpo.storage.files import Storage

if TYPE_CHECKING:
    import polars as pl

__all__ = ["changed_pairs", "pairs_record"]

NAMED = 3
"""Number of changed pairs that are named."""
_SIDES = ("chosen", "rejected")
_COUNTED = tuple(f"{side}_{what}" for side in _SIDES for what in ("starts", "weights"))
_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x27D4EB2F165667C5], np.uint64)
"""Odd factors, one for each half of a key, so that chosen and rejected cannot change places unseen."""


def pairs_record(pairs: pa.Table) -> bytes:
    """Return the content of training-pairs.parquet: digest, lengths in use, source and weight of each pair, and which tokens
    count, if not all of them do.

    Args:
        pairs: rows of ``data.pairs.PAIR_SCHEMA``. About 12 bytes are stored of each.
    """
    sink = io.BytesIO()
    options = {"use_dictionary": ["source"], "column_encoding": {"pair_id": "DELTA_BYTE_ARRAY"}}
    pq.write_table(_facts(pairs), sink, compression="zstd", **options)
    return sink.getvalue()


def changed_pairs(storage: Storage, pairs: pa.Table) -> str:
    """Say how ``pairs`` differ from those of the run in ``storage``, given that they do."""
    if not storage.exists(PAIRS):
        return (
            "the pairs are not those that it was trained on (which ones, this run does not tell); the data, the chat "
            "template, the tokenizer or a setting of section data has changed"
        )
    import polars as pl  # only a run that is refused needs it, and importing it takes a quarter of a second

    before, now = pl.read_parquet(io.BytesIO(storage.read(PAIRS))), pl.from_arrow(_facts(pairs))
    new = now.join(before, "answers", "anti")["pair_id"]
    gone = before.join(now, "answers", "anti")["pair_id"]
    replaced, added, removed = new.filter(new.is_in(gone.implode())), _without(new, gone), _without(gone, new)
    told = [
        _told(replaced, now.height, "is another one", "are other ones"),
        _told(added, now.height, "is new", "are new"),
        _told(removed, before.height, "is gone", "are gone"),
    ]
    if len(replaced) == now.height == before.height:
        told.append("the chat template or the tokenizer may have changed")
    if not any(told) and before.height == now.height and before["answers"].equals(now["answers"]):
        both = before.join(now, "pair_id", suffix=" now")
        names = [name for name in before.columns if f"{name} now" in both.columns and name not in _COUNTED]
        differ = pl.any_horizontal(pl.col(name).ne_missing(pl.col(f"{name} now")) for name in names)
        told.append(
            _told(both.filter(differ)["pair_id"], now.height, *["differ in length in use, source, weight or rank"] * 2)
        )
        other = now["pair_id"].filter(_counted(before) != _counted(now))
        told.append(_told(other, now.height, *["differ in the tokens that count"] * 2))
    if not any(told):
        told = [f"{before.height:,} pairs then and {now.height:,} now, in another order or with other weights"]
    return ", ".join(filter(None, told))


def _counted(pairs: pl.DataFrame) -> pl.Series:
    """Which tokens of each pair count, as a text that is equal for equal ones."""
    import polars as pl

    if _COUNTED[0] not in pairs.columns:  # all of them: one run from token 0 on with weight 1
        return pl.repeat("0.0;1.0;0.0;1.0", pairs.height, eager=True)
    texts = (pl.col(name).cast(pl.List(pl.Float64)).cast(pl.List(pl.String)).list.join(",") for name in _COUNTED)
    return pairs.select(pl.concat_str(texts, separator=";"))[_COUNTED[0]]


def _without(ids: pl.Series, others: pl.Series) -> pl.Series:
    return ids.filter(~ids.is_in(others.implode()))


def _told(ids: pl.Series, total: int, one: str, many: str) -> str:
    """``2 of 5 pairs are new (first: a:4, a:5)``; empty if there are none."""
    if not len(ids):
        return ""
    first = ", ".join(ids.head(NAMED)) + (", ..." if len(ids) > NAMED else "")
    return f"{len(ids):,} of {total:,} pairs {one if len(ids) == 1 else many} (first: {first})"


def _facts(pairs: pa.Table) -> pa.Table:
    columns = {
        "pair_id": pairs["pair_id"],
        "answers": _digests(pairs),
        **{f"{side}_tokens": pc.list_value_length(pairs[f"{side}_ids"]).cast(pa.int32()) for side in _SIDES},
        **{name: pairs[name] for name in ("source", "weight", *_numbers(pairs))},
    }
    columns |= {name: pairs[name] for name in _COUNTED if name in pairs.column_names}
    return pa.table(columns)


def _numbers(pairs: pa.Table) -> Sequence[str]:
    return [name for name in ("pair_weight", "pair_margin", "chosen_rank", "rejected_rank") if name in pairs.column_names]


def _digests(pairs: pa.Table) -> pa.Array:
    """64-bit digest of the keys of both answers, which are digests of the tokens of prompt and answer."""
    blocks = [np.empty(0, np.uint64)]
    for batch in pairs.select([f"{side}_key" for side in _SIDES]).to_batches():
        chosen, rejected = (_halves(column) for column in batch.columns)
        blocks.append((np.hstack([chosen, rejected]) * _MIX).sum(axis=1, dtype=np.uint64))
    return pa.array(np.concatenate(blocks))


def _halves(keys: pa.Array) -> np.ndarray:
    """A binary(16) array as uint64 [rows, 2]."""
    flat = np.frombuffer(keys.buffers()[1], np.uint64) if len(keys) else np.empty(0, np.uint64)
    return flat[2 * keys.offset : 2 * (keys.offset + len(keys))].reshape(-1, 2)
