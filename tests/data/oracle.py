"""A second loader of pairs, one record after another with a Python object for each: what the other is compared with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpo.config import DataConfig, SourceConfig, source_name
from raydpo.data.keys import completion_key
from raydpo.data.messages import Malformed
from raydpo.data.preference import Preference, normalise
from raydpo.data.records import Record, read_records
from raydpo.data.remarks import SPELLED
from raydpo.data.scores import Compared, compared
from raydpo.data.split import prompt_digest, question_digest
from raydpo.data.spool import Spool, spooled
from raydpo.data.tally import DataReport, SourceReport
from raydpo.data.tokenise import TokenisedPair, Tokeniser
from raydpo.errors import DataError
from raydpo.storage.uri import redact

__all__ = ["held_out", "kept", "load_pairs"]

_IDS, _KEY = pa.list_(pa.int32()), pa.binary(16)
PAIR_SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),  # source:row, plus #n for further pairs of a record that ranks several completions
        ("source", pa.string()),
        ("weight", pa.float64()),  # weight of the source
        ("prompt_ids", _IDS),
        ("chosen_ids", _IDS),
        ("rejected_ids", _IDS),  # truncated, as scored and trained on
        ("chosen_key", _KEY),
        ("rejected_key", _KEY),  # keys.completion_key of the completions before truncation
        ("chosen_full", pa.int32()),
        ("rejected_full", pa.int32()),  # their tokens before truncation
    ]
)
"""Columns of a table of tokenised pairs."""
PAIR_WEIGHT = "pair_weight"
"""Additional column, float64, if ``data.weight_column`` is set."""
PAIR_MARGIN = "pair_margin"
"""Additional column, float64, if ``data.margin_column`` is set."""
_PROMPT = "prompt_digest"
"""A column while pairs are loaded: ``split.prompt_digest``."""
_QUESTION = "question_digest"
"""Likewise, ``split.question_digest``; only if pairs are held out."""
CHUNK = 1000
HELD_OUT = "held-out"
"""Source name of the pairs of ``data.eval.path``."""
Reader = Callable[[SourceConfig], Iterator[Record]]
_FEWEST_WITH_MORE = 3
"""Fewest columns of a record that can hold more than its pair."""
MOST_CHARACTERS, CHARACTERS_A_TOKEN = 1_000_000, 100
"""A pair is dropped before it is tokenised if it has more characters than the first and than the second for each token of
``max_length``. Tokenising 10 MB takes a byte-level tokenizer a minute, and of such a text hardly 1 % would be used."""
NULLS_ABSENT = (
    "warning: null fields inside {!r} read as absent, since Parquet and Arrow give each entry the fields of all others; if "
    "a null is meant, write that column as JSON text"
)
NO_ROOM, TOO_LONG, SAME = "prompt leaves no room", "longer than max_length", "identical after truncation"


@dataclass(frozen=True)
class PairSets:
    """Tables of ``PAIR_SCHEMA`` in memory-mapped files; ``eval`` is None if nothing is held out."""

    train: pa.Table
    eval: pa.Table | None
    report: DataReport


class _Place(NamedTuple):
    """Origin of a pair."""

    pair_id: str
    where: str
    row: int
    source: str
    scores: Compared | None = None  # of a record that is one pair


def load_pairs(
    config: DataConfig, tokeniser: Tokeniser, progress: Callable[[int], None] | None = None, reader: Reader = read_records
) -> PairSets:
    """Read, check, tokenise, truncate and split all preferences of a configuration.

    Args:
        progress: called from time to time with the number of records read so far.
        reader: yields the records of a source. A record may name another source that it counts as (``records.Record``).

    Raises:
        DataError: if a source cannot be read, more of it is malformed or dropped than allowed, or no pair is left.
        ModelError: if the tokenizer lacks the chat template or EOS token that the data need.
    """
    report, schema = (
        DataReport([], template_date=tokeniser.template.day if tokeniser.template.writes_date else None),
        _schema(config),
    )
    seen: set[bytes] = set()
    train, *others = [
        _load_source(source, source_name(source), config, tokeniser, report, seen, progress, reader)
        for source in config.train
    ]
    if others:
        train = spooled([train, *others], schema)
    held = None
    if config.eval is not None and config.eval.path is not None:
        held = _load_source(held_out_source(config), HELD_OUT, config, tokeniser, report, set(), progress, reader)
    elif config.eval is not None and config.eval.fraction is not None:
        mask = held_out(train[_PROMPT].to_pylist(), config.eval.fraction)
        train, held = _where(train, ~mask, schema), _where(train, mask, schema)
    if held is not None:
        trained_on = set(train[_QUESTION].to_pylist())
        report.leaked = sum(question in trained_on for question in held[_QUESTION].to_pylist())
    train, held = _thinned(train, config, report), None if held is None else _without_digests(held)
    for name, pairs, use in (("training", train, "learned"), ("held-out", held, "measured")):
        weighted = pairs is not None and pairs.num_rows and config.weight_column is not None
        if weighted and not pc.any(pc.greater(pairs[PAIR_WEIGHT], 0)).as_py():
            raise DataError(
                f"data.weight_column {config.weight_column!r} is 0 for all {pairs.num_rows:,} {name} pairs, so nothing "
                f"would be {use}; correct the weights, or drop data.weight_column"
            )
    return PairSets(train, held, report)


def _thinned(train: pa.Table, config: DataConfig, report: DataReport) -> pa.Table:
    """The training pairs that ``data.fraction`` keeps."""
    kept_rows = train
    if config.fraction != 1:
        kept_rows = _where(train, kept(train[_PROMPT].to_pylist(), config.fraction, config.fraction_seed), _schema(config))
        report.thinned = (kept_rows.num_rows, train.num_rows)
    return _without_digests(kept_rows)


def _without_digests(pairs: pa.Table) -> pa.Table:
    return pairs.drop_columns([name for name in (_PROMPT, _QUESTION) if name in pairs.column_names])


def held_out_source(config: DataConfig) -> SourceConfig:
    """``data.eval.path`` as a source."""
    columns = _common_columns(config) if config.eval.columns is None else config.eval.columns
    return SourceConfig(path=config.eval.path, split=config.eval.split, subset=config.eval.subset, columns=columns)


def _common_columns(config: DataConfig) -> dict[str, str]:
    """Column map of the training sources if they all have the same one, else none; used for a held-out file."""
    first, *others = (source.columns for source in config.train)
    return first if all(columns == first for columns in others) else {}


def _load_source(
    source: SourceConfig,
    name: str,
    config: DataConfig,
    tokeniser: Tokeniser,
    report: DataReport,
    seen: set[bytes],
    progress: Callable[[int], None] | None,
    reader: Reader,
) -> pa.Table:
    """All usable pairs of one source, columns as ``_schema``. Adds to ``report``, and to ``seen`` the keys of each pair."""
    account = SourceReport(name, redact(source.path))
    report.sources.append(account)
    merged_before = tokeniser.merged
    records, spool = reader(source), Spool(_schema(config))
    while chunk := list(islice(records, CHUNK)):
        spool.append(_load_chunk(chunk, source, config, tokeniser, account, seen))
        if progress is not None:
            progress(sum(each.records for each in report.sources))
    account.merged = tokeniser.merged - merged_before
    account.check(config)
    return spool.finish()


def _load_chunk(
    records: list[Record],
    source: SourceConfig,
    config: DataConfig,
    tokeniser: Tokeniser,
    account: SourceReport,
    seen: set[bytes],
) -> pa.Table:
    bad_rows: set[int] = set()
    numbers = _numbers(config)
    places, preferences = _normalised(records, account, bad_rows, numbers)
    _note_options(records, tokeniser.template.options - set(numbers.values()), account)
    places, preferences = _without_giants(places, preferences, config.max_length, account)
    read = account.repeats.taken_off(_for_template(preferences, bool(tokeniser.tokenizer.chat_template), account))
    rows: list[tuple[Any, ...]] = []
    for place, preference, (ids, remarks) in zip(places, preferences, tokeniser.encode_noted(read), strict=True):
        if config.special_tokens == "refuse" and any(remark.kind == SPELLED for remark in remarks):
            ids = Malformed("its text spells a special token")
        if isinstance(ids, Malformed):
            empty = preference.prompt == "" and str(ids) == "prompt has no tokens"
            account.malformed.add("prompt is empty" if empty else str(ids), place.where)
            bad_rows.add(place.row)
            continue
        account.pairs += 1
        account.remarks.add(remarks, place.where)
        used = _truncated(ids, config.max_length, config.truncation)
        if isinstance(used, str):
            account.dropped.add(used, place.where)
            continue
        keys = completion_key(ids.prompt, ids.chosen), completion_key(ids.prompt, ids.rejected)
        lengths = len(ids.chosen), len(ids.rejected)
        prompt = prompt_digest(preference.prompt), *([] if config.eval is None else [question_digest(preference.prompt)])
        rows.append((place.pair_id, place.source, source.weight, *used, *keys, *lengths, *preference.numbers, *prompt))
        if used is not ids:
            account.truncated += sum(len(short) < len(full) for short, full in zip(used, ids, strict=True))
        account.scores.add(place.scores, place.where)
        account.several_turns += preference.several_turns
        account.duplicates += (both := keys[0] + keys[1]) in seen
        seen.add(both)
    account.records += len(records)
    account.malformed_records += len(bad_rows)
    account.kept += len(rows)
    return _table(rows, _schema(config))


def _note_options(records: list[Record], options: frozenset[str], account: SourceReport) -> None:
    """Note columns that are called as a variable of the chat template is, and not given to it."""
    for record in records:
        if record.value is None or len(record.value) < _FEWEST_WITH_MORE:
            continue
        for name in record.value.keys() & options:
            if isinstance(value := record.value[name], (bool, int, float, str)) and len(str(value).split()) == 1:
                account.understood[
                    f"warning: {name!r} is not given to the chat template, which reads a variable of this name: write it "
                    "into a column chat_template_kwargs, or drop the column"
                ] += 1


def _without_giants(
    places: list[_Place], preferences: list[Preference], max_length: int, account: SourceReport
) -> tuple[list[_Place], list[Preference]]:
    """The pairs that are not too long to be tokenised. The others are counted as dropped."""
    limit = max(MOST_CHARACTERS, CHARACTERS_A_TOKEN * max_length)
    if all(preference.characters <= limit for preference in preferences):
        return places, preferences
    left = []
    for place, preference in zip(places, preferences, strict=True):
        if preference.characters <= limit:
            left.append((place, preference))
        else:
            account.pairs += 1
            account.dropped.add(f"text of more than {limit:,} characters", place.where)
    return [place for place, _ in left], [preference for _, preference in left]


def _table(rows: list[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    """A table of ``rows``, whose values are in the order of ``schema``."""
    columns = []
    for field, values in zip(schema, zip(*rows, strict=True) if rows else [()] * len(schema), strict=True):
        if field.type == _IDS:
            ends = np.cumsum([0, *map(len, values)], dtype=np.int64)
            ids = np.concatenate(values) if values else np.array([], np.int32)
            columns.append(pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(ids, pa.int32())))
        else:
            columns.append(pa.array(values, field.type))
    return pa.Table.from_arrays(columns, schema=schema)


def _for_template(preferences: list[Preference], template: bool, account: SourceReport) -> list[Preference]:
    """Transcripts as text for a tokenizer without a chat template."""
    if template or all(preference.texts is None for preference in preferences):
        return preferences
    found = []
    for preference in preferences:
        if preference.texts is not None:
            prompt, chosen, rejected = preference.texts
            preference = replace(preference, prompt=prompt, chosen=chosen, rejected=rejected)
            account.understood["Human/Assistant transcripts read as text, since the tokenizer has no chat template"] += 1
        found.append(preference)
    return found


def _numbers(config: DataConfig) -> dict[str, str]:
    """Our additional columns, and the record columns that they come from."""
    wanted = {PAIR_WEIGHT: config.weight_column, PAIR_MARGIN: config.margin_column}
    return {ours: theirs for ours, theirs in wanted.items() if theirs is not None}


def _odd_number(name: str, value: float) -> str | None:
    """A note about a weight or margin that is allowed, but may not be meant; the column's name goes into its braces."""
    if name == PAIR_WEIGHT and value == 0:
        return "{!r} (data.weight_column) is 0, so nothing is learned from these"
    if name == PAIR_MARGIN and value < 0:
        return (
            "warning: {!r} (data.margin_column) is below 0, so the loss lets the rejected answer be better by that much; "
            "swap the answers of these, or leave them out"
        )
    return None


def _schema(config: DataConfig) -> pa.Schema:
    """Columns while pairs are loaded. ``spooled`` tables may have wider offsets."""
    more = [] if config.eval is None else [(_QUESTION, _KEY)]
    return pa.schema([*PAIR_SCHEMA, *((name, pa.float64()) for name in _numbers(config)), (_PROMPT, _KEY), *more])


def _normalised(
    records: list[Record], account: SourceReport, bad_rows: set[int], numbers: Mapping[str, str]
) -> tuple[list[_Place], list[Preference]]:
    places: list[_Place] = []
    preferences: list[Preference] = []
    columns = tuple(numbers.values())
    for record in records:
        if record.note is not None:
            account.files.append(record.note)
        try:
            if record.value is None:
                raise Malformed(record.problem or "unreadable")
            found = normalise(record.value, columns)
            if PAIR_WEIGHT in numbers and found[0].numbers[0] < 0:
                raise Malformed(f"{numbers[PAIR_WEIGHT]!r} is below 0")
        except Malformed as error:
            account.malformed.add(str(error), record.where)
            bad_rows.add(record.row)
            continue
        preferences += found
        if record.absent:
            account.understood.update(map(NULLS_ABSENT.format, record.absent))
        if found[0].notes:
            account.understood.update(found[0].notes)
        if found[0].unused:
            account.unused.update(found[0].unused)
        for name, value in zip(numbers, found[0].numbers, strict=True):
            if (note := _odd_number(name, value)) is not None:
                account.understood[note.format(numbers[name])] += 1
        scores = (
            compared(record.value) if len(found) == 1 and (len(record.value) > 3 or "prompt" not in record.value) else None
        )
        for number in range(len(found)):
            pair_id = f"{account.name}:{record.row}" + (f"#{number}" if number else "")
            places.append(_Place(pair_id, record.where, record.row, record.source or account.name, scores))
    return places, preferences


def _truncated(ids: TokenisedPair, max_length: int, truncation: str) -> TokenisedPair | str:
    """The used part of a pair, or why it is dropped. Each completion is cut by itself, as TRL does."""
    room = max_length - len(ids.prompt)
    if room <= 0:
        return NO_ROOM
    if truncation == "drop" and max(len(ids.chosen), len(ids.rejected)) > room:
        return TOO_LONG
    if max(len(ids.chosen), len(ids.rejected)) <= room:
        return ids
    used = TokenisedPair(ids.prompt, ids.chosen[:room], ids.rejected[:room])
    return SAME if np.array_equal(used.chosen, used.rejected) else used


def _where(table: pa.Table, mask: np.ndarray, schema: pa.Schema) -> pa.Table:
    """The rows where ``mask`` is true."""
    starts = range(0, table.num_rows, CHUNK)
    return spooled((table.slice(start, CHUNK).filter(pa.array(mask[start : start + CHUNK])) for start in starts), schema)


def held_out(digests: Sequence[bytes], fraction: float) -> np.ndarray:
    """Which pairs are held out, bool [pairs], given the ``prompt_digest`` of each.

    A prompt is held out if its digest, as a number in [0, 1), is below ``fraction``. So adding, removing or reordering data
    moves no prompt to the other side, and a prompt is never on both. If one side would be empty, the prompt with the lowest
    number is held out, or the one with the highest is trained on.

    Raises:
        DataError: if there is only one prompt.
    """
    places = {digest: int.from_bytes(digest[:8], "big") / 2**64 for digest in set(digests)}
    if len(places) < 2:
        raise DataError(
            f"data.eval.fraction {fraction:g} cannot split pairs that all have the same prompt; set "
            "data.eval.path instead, or remove data.eval"
        )
    ordered = sorted(places.values())
    # Between just above the lowest place and the highest, so that neither side is empty.
    bound = min(max(fraction, np.nextafter(ordered[0], 1)), ordered[-1])
    return np.array([places[digest] < bound for digest in digests], dtype=bool)


def kept(digests: Sequence[bytes], fraction: float, seed: int) -> np.ndarray:
    """Which pairs ``data.fraction`` keeps, bool [pairs], given the ``prompt_digest`` of each.

    Like ``held_out``, but a prompt's number in [0, 1) depends on its digest and the seed. So smaller fractions are subsets
    of larger ones, independent of what is held out. At least the prompt with the lowest number stays.
    """
    seeded = {"digest_size": 8, "salt": seed.to_bytes(16, "big"), "person": b"raydpo-thin-1"}
    hashes = {digest: hashlib.blake2b(digest, **seeded).digest() for digest in set(digests)}
    places = {digest: int.from_bytes(hashed, "big") / 2**64 for digest, hashed in hashes.items()}
    bound = max(fraction, np.nextafter(min(places.values()), 1)) if places else fraction
    return np.array([places[digest] < bound for digest in digests], dtype=bool)
