"""Import and export reference log-probs for other trainers, as Parquet of pairs with TRL's column names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raydpo.config import DataConfig, source_name
from raydpo.data.counting import all_count
from raydpo.data.index import as_bytes
from raydpo.data.ragged import Ragged, tokens_in_use
from raydpo.data.records import read_records
from raydpo.data.select import LABEL
from raydpo.errors import DataError
from raydpo.reference.part import HIGHEST, KEY_TYPE
from raydpo.reference.store import ReferenceCache
from raydpo.reference.verify import TOLERANCES, sum_tolerance

__all__ = ["COLUMN_NAMES", "ImportReport", "completion_name", "export_pairs", "import_sums"]

COLUMN_NAMES = (
    ("ref_chosen_logps", "ref_rejected_logps"),
    ("reference_chosen_logps", "reference_rejected_logps"),
    ("chosen_logps", "rejected_logps"),
    ("ref_logps", "ref_logps"),
)
"""Column names of sums in other trainers' data: TRL's, those of older trainers, those of open-instruct's cache, and that of
TRL's KTOTrainer for completions alone."""
_LABELS = {"label", "kto_tag"}
"""Columns that a record with one completion has, see ``data.labels``."""
EXPORT_ROWS = 4096


def export_pairs(joined: pa.Table, decode: Any, path: Path) -> int:
    """Write pairs with their reference log-probs as one Parquet file.

    Columns: ``pair_id``, ``source``; ``prompt``, ``chosen`` and ``rejected`` as text, with special tokens, as the model sees
    them; ``prompt_ids``, ``chosen_ids``, ``rejected_ids``; ``ref_chosen_logps`` and ``ref_rejected_logps``, sums over the
    completion in nats, which TRL's DPOTrainer accepts in place of a reference model; ``ref_*_token_logps``, one per token.

    If there are completions with labels, each completion is a row of its own, as TRL's KTOTrainer takes them; those of a
    pair are one desirable and one undesirable row. Columns: ``pair_id``, ``source``, ``prompt``, ``completion``, ``label``
    (true or false), ``prompt_ids``, ``completion_ids``, ``ref_logps``, ``ref_token_logps``.

    Args:
        joined: result of ``pairs.join_reference`` on pairs whose tokens all count, as they do for those trainers.
        decode: function from a list of rows of token ids to a list of texts.

    Returns:
        Number of rows.
    """
    joined = _unpaired(joined) if LABEL in joined.column_names else joined
    names = ["prompt", *(side for side in ("chosen", "rejected", "completion") if f"{side}_ids" in joined.column_names)]
    writer = None
    temporary = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        for start in range(0, joined.num_rows, EXPORT_ROWS):
            rows = joined.slice(start, EXPORT_ROWS)
            columns = {name: rows[name] for name in ("pair_id", "source", LABEL) if name in rows.column_names}
            for name in names:
                columns[name] = pa.array(decode(rows[f"{name}_ids"].to_pylist()), pa.string())
            columns |= {f"{name}_ids": _lists(rows[f"{name}_ids"]) for name in names}
            for side in names[1:]:
                ours = "ref" if side == "completion" else f"ref_{side}"
                columns[f"{ours}_logps"] = rows[f"ref_{side}_sum"]
                columns[f"{ours}_token_logps"] = _lists(rows[f"ref_{side}_logps"])
            table = pa.table(columns)
            writer = writer or pq.ParquetWriter(temporary, table.schema, compression="zstd")
            writer.write_table(table)
        if writer is not None:
            writer.close()
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return joined.num_rows


def _unpaired(joined: pa.Table) -> pa.Table:
    """Each completion in a row of its own, in the order of the pairs, with a true label if it is the chosen one."""
    parts, order = [], []
    for side, good in (("chosen", True), ("rejected", False)):
        rows = np.flatnonzero(tokens_in_use(joined, side))
        mine = joined.take(pa.array(rows))
        columns = {name: mine[name] for name in ("pair_id", "source")} | {"prompt_ids": _lists(mine["prompt_ids"])}
        columns |= {"completion_ids": _lists(mine[f"{side}_ids"]), LABEL: pa.repeat(good, len(rows))}
        columns |= {"ref_completion_sum": mine[f"ref_{side}_sum"], "ref_completion_logps": _lists(mine[f"ref_{side}_logps"])}
        parts.append(pa.table(columns))
        order.append(2 * rows + (not good))
    return pa.concat_tables(parts).take(pa.array(np.argsort(np.concatenate(order))))


def _lists(column: pa.ChunkedArray) -> pa.Array:
    """As the plain list type, which every reader of Parquet knows; datasets 5 does not read list views."""
    return Ragged.of(column).lists(0, len(column))


@dataclass(frozen=True)
class ImportReport:
    """Result of an import.

    Attributes:
        pairs: pairs whose sums were stored.
        rows: rows stored, two per pair, one per completion alone.
        without: pairs left out because they lack one of the values.
        contradicts: rows that differ from an earlier import by more than rounding.
    """

    pairs: int
    rows: int
    without: int
    columns: tuple[str, str]
    part: str
    contradicts: int


def import_sums(
    config: DataConfig,
    pairs: pa.Table,
    cache: ReferenceCache,
    *,
    columns: tuple[str, str] | None = None,
    means: bool = False,
) -> ImportReport:
    """Store the sums in the records of ``config.train`` as unverified rows.

    Args:
        pairs: the pairs of these records, tokenised; each sum covers the tokens that the completion has there.
        columns: names of the columns with the chosen and the rejected sums; None = the first of ``COLUMN_NAMES`` that exist.
        means: the columns hold means over tokens, as length-normalised losses need, not sums.

    Raises:
        DataError: if the columns do not exist, or a value is not a log-prob; or if not every token counts, as of a sum that
            cannot be told.
    """
    if not all_count(pairs):
        raise DataError(
            "imported sums are over all tokens of a completion, but by data.train_on or data.spans_column not all of them "
            "count, and no training could use the sums; set data.train_on=completion and data.spans_column=null"
        )
    found, names = _sums_by_pair(config, columns)
    ids = pairs["pair_id"].to_pylist()
    values = np.array([found.get(pair_id, (np.nan, np.nan)) for pair_id in ids], np.float64).reshape(-1, 2)
    tokens = np.stack([tokens_in_use(pairs, side) for side in ("chosen", "rejected")], axis=1)
    there = (np.isfinite(values) | (tokens == 0)).all(axis=1)
    if names[0] == names[1]:  # one sum, which cannot be that of both completions of a pair
        there &= (tokens == 0).any(axis=1)
    if not there.any():
        raise DataError(
            f"no pair of the data has numbers in both {names[0]!r} and {names[1]!r}; name the columns with "
            "--chosen and --rejected"
        )
    rows, tokens = pairs.filter(pa.array(there)), tokens[there].T.ravel()
    filled = np.flatnonzero(tokens)  # all chosen completions, then all rejected ones
    keys = np.concatenate([as_bytes(rows[f"{side}_key"]) for side in ("chosen", "rejected")])[filled]
    tokens = tokens[filled]
    sums = values[there].T.ravel()[filled] * (tokens if means else 1)
    if sums.max() > HIGHEST:
        side, row = divmod(int(filled[sums.argmax()]), rows.num_rows)
        raise DataError(
            f"pair {rows['pair_id'][row].as_py()} has {sums.max():.6g} in {names[side]!r}; log-probs are "
            "negative. Does the column hold losses or rewards?"
        )
    tokens = tokens.astype(np.int32)
    contradicts = _contradicted(cache, keys, tokens, sums)
    provenance = {"imported": [one.path for one in config.train], "columns": list(names), "means": means}
    part = cache.commit_rows(
        pa.FixedSizeBinaryArray.from_buffers(KEY_TYPE, len(keys), [None, pa.py_buffer(keys)]),
        tokens,
        sums,
        provenance,
        verified=False,
    )
    return ImportReport(int(there.sum()), len(keys), int((~there).sum()), names, part, contradicts)


def _contradicted(cache: ReferenceCache, keys: np.ndarray, tokens: np.ndarray, sums: np.ndarray) -> int:
    """Number of ``sums`` that differ from earlier imports by more than rounding explains."""
    earlier = ReferenceCache(cache.storage, cache.identity, unverified=True)
    earlier.refresh()
    parts, rows = earlier.locate(keys, tokens)
    allowed = sum_tolerance(TOLERANCES[cache.identity.dtype], tokens)
    count = 0
    for number, path in enumerate(earlier.paths()):
        mine = np.flatnonzero(parts == number)
        if len(mine) and earlier.is_unverified(number):
            count += int((np.abs(earlier.read(path).sums[rows[mine]] - sums[mine]) > allowed[mine]).sum())
    return count


def _sums_by_pair(
    config: DataConfig, columns: tuple[str, str] | None
) -> tuple[dict[str, tuple[float, float]], tuple[str, str]]:
    """Both sums of each record that has them, by pair id; and the names of the two columns."""
    found: dict[str, tuple[float, float]] = {}
    present: dict[str, None] = {}
    for source in config.train:
        for record in read_records(source):
            if record.value is None:
                continue
            present |= dict.fromkeys(record.value)
            for names in [columns] if columns else COLUMN_NAMES:
                numbers = [value for name in names if isinstance(value := record.value.get(name), (int, float))]
                if len(numbers) == 2 or (numbers and not _LABELS.isdisjoint(record.value)):
                    columns = names
                    given = (record.value.get(name) for name in names)
                    found[f"{source_name(source)}:{record.row}"] = tuple(
                        float(value) if isinstance(value, (int, float)) else math.nan for value in given
                    )
                    break
    if columns is None or not found:
        wanted = " or ".join(
            " and ".join(map(repr, dict.fromkeys(names))) for names in ([columns] if columns else COLUMN_NAMES)
        )
        raise DataError(
            f"the records have no numbers in {wanted}; columns present: {', '.join(list(present)[:20])}. Name "
            "them with --chosen and --rejected"
        )
    return found, columns


def completion_name(tables: Sequence[pa.Table], key: bytes) -> str:
    """Display name of the completion with this key, the last if several have it; ``?`` if none has."""
    for table in reversed(tables):
        for side in ("rejected", "chosen"):
            rows = pc.indices_nonzero(pc.equal(table[f"{side}_key"], pa.scalar(key, KEY_TYPE)))
            if len(rows):
                return f"{table['pair_id'][rows[-1].as_py()]} {side}"
    return "?"
