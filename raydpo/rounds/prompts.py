"""The prompts of on-policy rounds: read and tokenised, divided into training and held-out ones, and into rounds."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpo.config import Config, SourceConfig, source_name
from raydpo.config.rounds import RoundsConfig
from raydpo.data.index import as_bytes, as_values
from raydpo.data.messages import Malformed
from raydpo.data.pairs import HELD_OUT
from raydpo.data.preference import PromptAlone, prompt_alone
from raydpo.data.records import Record, read_records
from raydpo.data.remarks import SPELLED, Remark
from raydpo.data.rows import CHARACTERS_A_TOKEN, MOST_CHARACTERS, NULLS_ABSENT
from raydpo.data.split import held_out, prompt_digest, question_digest
from raydpo.data.tally import SourceReport
from raydpo.data.tokenise import TokenisedPair, Tokeniser
from raydpo.errors import DataError
from raydpo.rewards.columns import as_json, other_columns
from raydpo.rewards.task import prompt_id
from raydpo.rundir.rounds import OUT, PROMPT_SCHEMA, TRAIN
from raydpo.storage.uri import redact
from raydpo.terminal.console import Console

__all__ = ["held_out_of", "read_prompts", "round_seed", "rows_of", "sampled_of", "slice_of"]

_CHUNK = 2000
"""Records that are tokenised at once."""
_DIGESTS = (("text_digest", pa.binary(16)), ("question", pa.binary(16)), ("where", pa.string()))
"""Further columns while prompts are read: ``split.prompt_digest``, ``split.question_digest``, and where the record is."""


class _PromptReport(SourceReport):
    """Report on one source of prompts."""

    unit = "prompts"

    def _kept(self) -> str:
        return f"{self.kept:,} prompt(s)"


def read_prompts(config: Config, tokeniser: Tokeniser, console: Console | None = None) -> pa.Table:
    """Read, check, tokenise and split the prompts of ``config.rounds``: rows of ``rundir.rounds.PROMPT_SCHEMA``.

    A prompt is tokenised as that of a pair, see ``Tokeniser.encode``. Records with the same token ids are one prompt, the
    first. A held-out prompt is never among the training prompts, also not with other white space or as a single message.

    Args:
        console: for what was found in the files.

    Raises:
        DataError: if a source cannot be read, more of it is malformed or dropped than allowed, or no prompt is left to
            train on or to hold out.
        ModelError: if the tokenizer lacks the chat template that the prompts need.
    """
    rounds, say = config.rounds, (lambda line: None) if console is None else console.say
    sources = [
        (source_name(source), source, TRAIN)
        for source in (SourceConfig(**given.model_dump(exclude_unset=True)) for given in rounds.prompts)
    ]
    if rounds.held_out.path is not None:
        maps = [source.columns for _, source, _ in sources]
        common = maps[0] if all(one == maps[0] for one in maps) else {}
        sources.append((HELD_OUT, SourceConfig(path=rounds.held_out.path, split="test", columns=common), OUT))
    count = None if console is None else console.counter("reading", "prompts")
    tables, done = [], 0
    for name, source, split in sources:
        told = None if count is None else (lambda records, before=done: count(before + records))
        table, report = _read(name, source, config, tokeniser, told)
        report.check(config.data)
        for line in report.lines():
            say(line)
        done += report.records
        tables.append(table.append_column("split", pa.repeat(pa.scalar(split), len(table))))
    found = _distinct(pa.concat_tables(tables), say)
    if rounds.held_out.fraction is not None:
        found = _with_fraction(found, rounds.held_out.fraction)
    found = _apart(found, say)
    trained = int(pc.sum(pc.equal(found["split"], TRAIN)).as_py() or 0)
    say(f"prompts: {trained:,} to train on, {len(found) - trained:,} held out")
    if not trained:
        raise DataError(
            f"no prompt is left to train on: all {len(found):,} are held out; add prompts to rounds.prompts, or correct "
            "rounds.held_out"
        )
    return found.select(PROMPT_SCHEMA.names).cast(PROMPT_SCHEMA).combine_chunks()


def _read(
    name: str, source: SourceConfig, config: Config, tokeniser: Tokeniser, count: Callable[[int], None] | None
) -> tuple[pa.Table, SourceReport]:
    """All usable prompts of one source, with ``_DIGESTS`` in place of ``split``, and the report on it."""
    report = _PromptReport(name, redact(source.path))
    reader = _Reader(config, tokeniser, report)
    records, batches = read_records(source), []
    while chunk := list(islice(records, _CHUNK)):
        batches.append(reader.batch(chunk))
        if count is not None:
            count(report.records)
    return pa.Table.from_batches(batches), report


class _Reader:
    """Makes rows of records of one source, and adds to the report."""

    def __init__(self, config: Config, tokeniser: Tokeniser, report: SourceReport) -> None:
        self.config, self.tokeniser, self.report = config, tokeniser, report
        self._most = max(MOST_CHARACTERS, CHARACTERS_A_TOKEN * config.data.max_length)

    def batch(self, records: Sequence[Record]) -> pa.RecordBatch:
        """The rows of the usable prompts of ``records``."""
        report = self.report
        report.records += len(records)
        asked: list[tuple[Record, PromptAlone]] = []
        for record in records:
            try:
                prompt = self._prompt(record)
            except Malformed as error:
                self._fault(record, str(error))
                continue
            if prompt.characters > self._most:
                report.pairs += 1
                report.dropped.add(f"text of more than {self._most:,} characters", record.where)
            else:
                asked.append((record, prompt))
        rows = []
        for (record, prompt), (ids, found) in zip(
            asked, self.tokeniser.encode_noted([prompt for _, prompt in asked]), strict=True
        ):
            if (row := self._row(record, prompt, ids, found)) is not None:
                rows.append(row)
        report.kept += len(rows)
        fields = [each for each in PROMPT_SCHEMA if each.name != "split"]
        schema = pa.schema([*fields, *(pa.field(*each) for each in _DIGESTS)])
        columns = list(zip(*rows, strict=True)) or [[] for _ in schema]
        return pa.RecordBatch.from_arrays(
            [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)], schema=schema
        )

    def _prompt(self, record: Record) -> PromptAlone:
        if record.note is not None:
            self.report.files.append(record.note)
        if record.value is None:
            raise Malformed(record.problem or "unreadable")
        prompt = prompt_alone(record.value)
        self.report.understood.update(prompt.notes)
        self.report.understood.update(map(NULLS_ABSENT.format, record.absent))
        return prompt

    def _fault(self, record: Record, why: str) -> None:
        self.report.malformed.add(why, record.where)
        self.report.malformed_records += 1

    def _row(
        self, record: Record, prompt: PromptAlone, ids: TokenisedPair | Malformed, found: Sequence[Remark]
    ) -> tuple[Any, ...] | None:
        """The row of a prompt, or None if it cannot be used."""
        report, rounds = self.report, self.config.rounds
        if isinstance(ids, Malformed):
            self._fault(record, str(ids))
            return None
        if self.config.data.special_tokens == "refuse" and any(remark.kind == SPELLED for remark in found):
            self._fault(record, "its text spells a special token")
            return None
        report.pairs += 1
        report.remarks.add(found, record.where)
        if len(ids.prompt) + rounds.sample.max_tokens > self.config.data.max_length:
            room = f"rounds.sample.max_tokens ({rounds.sample.max_tokens})"
            report.dropped.add(f"prompt leaves no room for an answer of {room}", record.where)
            return None
        others, changed = other_columns(record.value, prompt.columns)
        report.understood.update(changed)
        text = as_json(prompt.prompt, {})
        digests = prompt_digest(prompt.prompt), question_digest(prompt.prompt)
        return (prompt_id(ids.prompt), record.row, report.name, ids.prompt, text, others, *digests, record.where)


def _distinct(table: pa.Table, say: Callable[[str], None]) -> pa.Table:
    """The first row of each prompt; of one that is also held out, the held-out row."""
    keys, out = as_values(table["prompt_id"]), pc.equal(table["split"], OUT).to_numpy()
    order = np.lexsort((np.arange(len(table)), ~out))  # held-out rows first
    _, first, inverse = np.unique(keys[order], return_index=True, return_inverse=True)
    first, place = order[first], np.empty(len(table), np.int64)
    place[order] = inverse
    again = np.flatnonzero(first[place] != np.arange(len(table)))
    keep = np.sort(first)
    twice = again[out[again] == out[first[place[again]]]]
    if len(twice):
        columns = table["columns"]
        others = pc.not_equal(columns.take(pa.array(twice)), columns.take(pa.array(first[place[twice]])))
        differ = int(pc.sum(others).as_py() or 0)
        told = f"{len(twice):,} records repeat an earlier prompt, such as {table['where'][int(twice[0])].as_py()}"
        if differ:
            where = table["where"][int(twice[int(pc.index(others, True).as_py())])].as_py()
            say(
                f"warning: {told}; {differ:,} of them have other columns ({where}), which reward functions never see: the "
                "first record counts. Write each prompt once"
            )
        else:
            say(f"{told}; each prompt is used once")
    if len(again) > len(twice):
        say(f"{len(again) - len(twice):,} training prompts are also held out, and are not trained on")
    return table.take(pa.array(keep))


def _with_fraction(table: pa.Table, fraction: float) -> pa.Table:
    """The table with a share of the prompts held out."""
    digests = as_bytes(table["text_digest"])
    if not (digests != digests[:1]).any():
        raise DataError(
            f"rounds.held_out.fraction {fraction:g} cannot split {len(table)} distinct prompt; add prompts, or name "
            "held-out ones in rounds.held_out.path"
        )
    out = held_out(digests, fraction)
    place = table.column_names.index("split")
    return table.set_column(place, "split", pa.array(np.where(out, OUT, TRAIN)))


def _apart(table: pa.Table, say: Callable[[str], None]) -> pa.Table:
    """The table without training prompts that ask the same as a held-out one."""
    out = pc.equal(table["split"], OUT).to_numpy()
    asked = as_values(table["question"])
    same = np.isin(asked, asked[out]) & ~out
    if same.any():
        where = table["where"][int(np.flatnonzero(same)[0])].as_py()
        say(
            f"{int(same.sum()):,} training prompts, such as {where}, say the same as a held-out one with other white space "
            "or in another form, and are not trained on"
        )
    return table.filter(pa.array(~same)) if same.any() else table


# ---- prompts of a round


def rows_of(prompts: pa.Table, ids: pa.ChunkedArray) -> pa.Array:
    """Return the row number of the prompt with each id, int64 [ids].

    Raises:
        KeyError: if a prompt is not in the table.
    """
    places = {key: row for row, key in enumerate(prompts["prompt_id"].to_pylist())}
    return pa.array([places[key] for key in ids.to_pylist()], pa.int64())


def slice_of(prompts: pa.Table, rounds: RoundsConfig, number: int) -> np.ndarray:
    """Return the row numbers of the training prompts of round ``number``, from 1, int64 [prompts of the round].

    Their order depends on ``sample.seed`` and the ids of the prompts alone. Rounds take ``per_round`` prompts after each
    other; when all were used, they come again in the same order. A slice holds no prompt twice.
    """
    if number < 1:
        raise ValueError(f"rounds are numbered from 1, got {number}")
    ordered = _ordered(prompts, TRAIN, rounds.sample.seed)
    size = min(rounds.per_round, len(ordered))
    return ordered[((number - 1) * size + np.arange(size)) % max(len(ordered), 1)]


def sampled_of(prompts: pa.Table, rounds: RoundsConfig) -> np.ndarray:
    """Return the row numbers of the training prompts that some round samples, int64."""
    return _ordered(prompts, TRAIN, rounds.sample.seed)[: rounds.per_round * (1 if rounds.offline else rounds.count)]


def held_out_of(prompts: pa.Table, rounds: RoundsConfig) -> np.ndarray:
    """Return the row numbers of the held-out prompts to answer, at most ``measure.prompts``, int64.

    They depend on no seed, so that runs with different seeds are measured on the same prompts.
    """
    return _ordered(prompts, OUT, 0)[: rounds.measure.prompts]


def round_seed(seed: int, number: int) -> int:
    """Return the seed of the random numbers of a round, below 2^63. Every measurement uses that of round 0."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, number), digest_size=8, person=b"raydpo-round-s-1").digest()
    return int.from_bytes(digest, "little") >> 1


def _ordered(prompts: pa.Table, split: str, seed: int) -> np.ndarray:
    """The rows of a split by the digest of seed and prompt."""
    rows = np.flatnonzero(pc.equal(prompts["split"], split).to_numpy())
    seeded = hashlib.blake2b(struct.pack("<Q", seed), digest_size=16, person=b"raydpo-round-o-1")
    digests = []
    for key in as_values(prompts["prompt_id"])[rows].tolist():
        digest = seeded.copy()
        digest.update(key)
        digests.append(digest.digest())
    return rows[np.argsort(np.frombuffer(b"".join(digests), "V16"), kind="stable")]
