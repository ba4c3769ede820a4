"""The tokenised data set: pairs in a table, the held-out ones apart, and an account of every record."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from raydpo.config import DataConfig, SourceConfig, source_name
from raydpo.data.keys import completion_key
from raydpo.data.preference import Malformed, normalise
from raydpo.data.records import Record, read_records
from raydpo.data.tokenise import TokenisedPair, Tokeniser
from raydpo.errors import DataError

__all__ = ["PAIR_SCHEMA", "DataReport", "PairSets", "SourceReport", "load_pairs"]

_IDS, _KEY = pa.list_(pa.int32()), pa.binary(16)
PAIR_SCHEMA = pa.schema([
    ("pair_id", pa.string()),  # source:row, and #n for the pairs of a record that ranks several completions
    ("source", pa.string()),
    ("weight", pa.float64()),  # of the source
    ("prompt_ids", _IDS), ("chosen_ids", _IDS), ("rejected_ids", _IDS),  # truncated: what is scored and trained on
    ("chosen_key", _KEY), ("rejected_key", _KEY),  # keys.completion_key, of the completions before truncation
    ("chosen_full", pa.int32()), ("rejected_full", pa.int32()),  # their tokens before truncation
])
CHUNK = 1000
FIRST_OFFENDERS = 3

NO_ROOM, TOO_LONG, SAME = "prompt leaves no room", "longer than max_length", "identical after truncation"


@dataclass
class SourceReport:
    """What became of every record of one source."""

    name: str
    records: int = 0
    pairs: int = 0
    kept: int = 0
    truncated: int = 0
    duplicates: int = 0
    merged: int = 0
    malformed: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    offenders: dict[str, list[str]] = field(default_factory=dict)

    def count_malformed(self, reason: str, where: str) -> None:
        self.malformed[reason] += 1
        first = self.offenders.setdefault(reason, [])
        if len(first) < FIRST_OFFENDERS:
            first.append(where)

    def reasons(self) -> str:
        """``reason: count (first places); ...``"""
        return "; ".join(f"{reason}: {count} ({', '.join(self.offenders[reason])}{', ...' if count > FIRST_OFFENDERS else ''})"
                         for reason, count in self.malformed.most_common())

    def lines(self) -> list[str]:
        lines = [f"data {self.name}: {self.records:,} records, {self.kept:,} pairs kept, {self.truncated:,} of them truncated"
                 + "".join(f", {count:,} dropped ({reason})" for reason, count in self.dropped.items())
                 + (f", {self.duplicates:,} exact duplicates" if self.duplicates else "")]
        if self.malformed:
            lines.append(f"warning: data {self.name}: {sum(self.malformed.values()):,} malformed records left out: "
                         f"{self.reasons()}")
        if self.merged:
            lines.append(f"warning: data {self.name}: in {self.merged:,} pairs the prompt alone is tokenised otherwise than "
                         "before its completion (tokens merge across the boundary, or the template renders it otherwise); "
                         "the completion starts where they part")
        return lines


@dataclass
class DataReport:
    """What became of every record, by source; and prompts that are on both sides of a given held-out file."""

    sources: list[SourceReport]
    leaked: int = 0

    def lines(self) -> list[str]:
        lines = [line for source in self.sources for line in source.lines()]
        if self.leaked:
            lines.append(f"warning: the prompts of {self.leaked:,} held-out pairs are also in the training data")
        return lines

    def to_dict(self) -> dict[str, Any]:
        return {"leaked": self.leaked, "sources": [vars(source) | {
            "malformed": dict(source.malformed), "dropped": dict(source.dropped)} for source in self.sources]}


@dataclass(frozen=True)
class PairSets:
    """Tables of ``PAIR_SCHEMA``; ``eval`` is None where nothing is held out."""

    train: pa.Table
    eval: pa.Table | None
    report: DataReport


def load_pairs(config: DataConfig, tokeniser: Tokeniser, progress: Callable[[int], None] | None = None) -> PairSets:
    """Read, check, tokenise, truncate and split all preferences of a configuration.

    Args:
        progress: called with the number of records read so far.

    Raises:
        DataError: if a source cannot be read, more of it is malformed or dropped than allowed, or no pair is left.
    """
    reports: list[SourceReport] = []
    rows: list[dict[str, Any]] = []
    for source in config.train:
        rows += _source_rows(source, source_name(source), config, tokeniser, reports, progress)
    held_out: list[dict[str, Any]] = []
    report = DataReport(reports)
    if config.eval is not None and config.eval.path is not None:
        source = SourceConfig(path=config.eval.path, split="test")
        held_out = _source_rows(source, "held-out", config, tokeniser, reports, progress)
        seen = {row["prompt_ids"].tobytes() for row in rows}
        report.leaked = sum(row["prompt_ids"].tobytes() in seen for row in held_out)
    elif config.eval is not None and config.eval.fraction is not None:
        rows, held_out = _split(rows, config.eval.fraction)
    return PairSets(_table(rows), _table(held_out) if held_out else None, report)


def _source_rows(source: SourceConfig, name: str, config: DataConfig, tokeniser: Tokeniser, reports: list[SourceReport],
                 progress: Callable[[int], None] | None) -> list[dict[str, Any]]:
    report = SourceReport(name)
    reports.append(report)
    merged_before, records, rows = tokeniser.merged, read_records(source), []
    while chunk := list(islice(records, CHUNK)):
        report.records += len(chunk)
        for pair_id, where, encoded in _encode(chunk, name, tokeniser, report):
            if isinstance(encoded, Malformed):
                report.count_malformed(str(encoded), where)
                continue
            report.pairs += 1
            row = _row(pair_id, source, name, encoded, config, report)
            if row is not None:
                rows.append(row)
        if progress is not None:
            progress(sum(one.records for one in reports))
    report.merged = tokeniser.merged - merged_before
    report.kept = len(rows)
    report.duplicates = len(rows) - len({(row["chosen_key"], row["rejected_key"]) for row in rows})
    _check_shares(report, config)
    return rows


def _encode(records: list[Record], name: str, tokeniser: Tokeniser,
            report: SourceReport) -> Iterator[tuple[str, str, TokenisedPair | Malformed]]:
    preferences, places = [], []
    for record in records:
        if record.value is None:
            report.count_malformed(record.problem or "unreadable", record.where)
            continue
        try:
            found = normalise(record.value)
        except Malformed as error:
            report.count_malformed(str(error), record.where)
            continue
        preferences += found
        places += [(f"{name}:{record.row}{f'#{index}' if len(found) > 1 else ''}", record.where)
                   for index in range(len(found))]
    for (pair_id, where), encoded in zip(places, tokeniser.encode(preferences), strict=True):
        yield pair_id, where, encoded


def _row(pair_id: str, source: SourceConfig, name: str, ids: TokenisedPair, config: DataConfig,
         report: SourceReport) -> dict[str, Any] | None:
    prompt, *completions = ids
    room = config.max_length - len(prompt)
    if room <= 0:
        report.dropped[NO_ROOM] += 1
        return None
    if config.truncation == "drop" and max(map(len, completions)) > room:
        report.dropped[TOO_LONG] += 1
        return None
    cut = [completion[:room] for completion in completions]
    if np.array_equal(*cut):
        report.dropped[SAME] += 1
        return None
    report.truncated += any(len(completion) > room for completion in completions)
    row = {"pair_id": pair_id, "source": name, "weight": source.weight, "prompt_ids": prompt}
    for side, completion, used in zip(("chosen", "rejected"), completions, cut, strict=True):
        row |= {f"{side}_ids": used, f"{side}_key": completion_key(prompt, completion), f"{side}_full": len(completion)}
    return row


def _check_shares(report: SourceReport, config: DataConfig) -> None:
    malformed, dropped = sum(report.malformed.values()), sum(report.dropped.values())
    if malformed > config.max_malformed * report.records:
        raise DataError(f"data {report.name}: {malformed:,} of {report.records:,} records are malformed, more than "
                        f"data.max_malformed ({config.max_malformed:g}) allows: {report.reasons()}")
    if dropped > config.max_dropped * max(1, report.pairs):
        reasons = "; ".join(f"{reason}: {count:,}" for reason, count in report.dropped.items())
        raise DataError(f"data {report.name}: {dropped:,} of {report.pairs:,} pairs would be dropped at data.max_length "
                        f"{config.max_length}, more than data.max_dropped ({config.max_dropped:g}) allows ({reasons}); "
                        "raise data.max_length, or data.max_dropped if that is meant")
    if not report.kept:
        raise DataError(f"data {report.name}: no pair is left of {report.records:,} records")


def _split(rows: list[dict[str, Any]], fraction: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Hold out by the content of the prompt alone, so that more data, another order or another seed move nothing."""
    places = {prompt: int.from_bytes(hashlib.blake2b(prompt, digest_size=8, person=b"raydpo-split-1").digest(), "big") / 2**64
              for prompt in {row["prompt_ids"].tobytes() for row in rows}}
    if len(places) < 2:
        raise DataError("data.eval.fraction cannot split pairs that all have one prompt; give data.eval.path instead")
    # A small set may have no prompt below the fraction, or all of them.
    ordered = sorted(places.values())
    bound = min(max(fraction, ordered[0]), ordered[-2])
    held_out = [row for row in rows if places[row["prompt_ids"].tobytes()] <= bound]
    return [row for row in rows if places[row["prompt_ids"].tobytes()] > bound], held_out


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.table([pa.array([row[column.name] for row in rows], column.type) for column in PAIR_SCHEMA],
                    schema=PAIR_SCHEMA)
