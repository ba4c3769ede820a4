"""The tokenised data set: tables of training and held-out pairs, and a report on every record."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from raydpo.config import DataConfig, SourceConfig, source_name
from raydpo.data.counting import needs_marks, train_on_of
from raydpo.data.messages import Malformed
from raydpo.data.records import Record, read_records
from raydpo.data.rows import (
    FIRST_RECORDS,
    PAIR_MARGIN,
    PAIR_WEIGHT,
    TOKEN_SCHEMA,
    RowMaker,
    light_schema,
    most_characters_of,
    preferences_of,
    renumbered,
)
from raydpo.data.select import PAIR_SCHEMA, PairSets, SourceRows, TokenTables, check_source, select
from raydpo.data.spool import Spool
from raydpo.data.tally import SourceReport
from raydpo.data.tokenise import Tokeniser
from raydpo.storage.uri import redact

__all__ = [
    "HELD_OUT",
    "PAIR_MARGIN",
    "PAIR_SCHEMA",
    "PAIR_WEIGHT",
    "PairSets",
    "check_first_records",
    "held_out_source",
    "load_pairs",
    "number_columns",
]

CHUNK = FIRST_RECORDS
"""Records that are tokenised at once."""
HELD_OUT = "held-out"
"""Source name of the pairs of ``data.eval.path``."""
Reader = Callable[[SourceConfig], Iterator[Record]]


def load_pairs(
    config: DataConfig, tokeniser: Tokeniser, progress: Callable[[int], None] | None = None, reader: Reader = read_records
) -> PairSets:
    """Read, check, tokenise, truncate and split all preferences of a configuration.

    Args:
        progress: called from time to time with the number of records read so far.
        reader: yields the records of a source. A record may name another source that it counts as (``records.Record``).

    Returns:
        Tables in memory-mapped files.

    Raises:
        DataError: if a source cannot be read, more of it is malformed or dropped than allowed, or no pair is left.
        ModelError: if the tokenizer lacks the chat template or EOS token that the data need.
    """
    loaded: list[SourceRows] = []

    def load(source: SourceConfig, name: str) -> SourceRows:
        before = sum(each.account.records for each in loaded)
        told = None if progress is None else lambda records: progress(before + records)
        loaded.append(_load_source(source, name, config, tokeniser, told, reader))
        check_source(config, loaded[-1])
        return loaded[-1]

    sources = [load(source, source_name(source)) for source in config.train]
    held = None
    if config.eval is not None and config.eval.path is not None:
        held = load(held_out_source(config), HELD_OUT)
    day = tokeniser.template.day if tokeniser.template.writes_date else None
    return select(config, sources, held, TokenTables([each.tokens or () for each in loaded]), template_date=day)


def check_first_records(source: SourceConfig, name: str, config: DataConfig, reader: Reader = read_records) -> int:
    """Read the first records of a source without a tokenizer. Returns how many of them are completions with a label.

    Raises:
        DataError: if the source cannot be read, all of these are malformed, or too many of a short source are.
    """
    account, numbers, labelled = SourceReport(name, redact(source.path)), number_columns(config), 0
    for record in islice(reader(source), FIRST_RECORDS):
        account.records += 1
        try:
            found = preferences_of(record, account, numbers, config.spans_column, lists=config.ranked == "lists")
            labelled += found[0].alone is not None
        except Malformed as error:
            account.malformed.add(str(error), record.where)
            account.malformed_records += 1
    account.kept = account.records - account.malformed_records
    if not account.kept or account.records < FIRST_RECORDS:
        account.check(config)
    return labelled


def held_out_source(config: DataConfig) -> SourceConfig:
    """``data.eval.path`` as a source."""
    columns = _common_columns(config) if config.eval.columns is None else config.eval.columns
    return SourceConfig(path=config.eval.path, split=config.eval.split, subset=config.eval.subset, columns=columns)


def _common_columns(config: DataConfig) -> dict[str, str]:
    """Column map of the training sources if they all have the same one, else none; used for a held-out file."""
    first, *others = (source.columns for source in config.train)
    return first if all(columns == first for columns in others) else {}


def number_columns(config: DataConfig) -> dict[str, str]:
    """Our additional columns, and the record columns that they come from."""
    wanted = {PAIR_WEIGHT: config.weight_column, PAIR_MARGIN: config.margin_column}
    return {ours: theirs for ours, theirs in wanted.items() if theirs is not None}


def _load_source(
    source: SourceConfig,
    name: str,
    config: DataConfig,
    tokeniser: Tokeniser,
    progress: Callable[[int], None] | None,
    reader: Reader,
) -> SourceRows:
    """All well-formed pairs of one source, in memory-mapped files."""
    numbers, account = number_columns(config), SourceReport(name, redact(source.path))
    maker = RowMaker(
        tokeniser,
        numbers=numbers,
        special_tokens=config.special_tokens,
        most_characters=most_characters_of(config.max_length),
        marks=(marks := needs_marks(config)),
        spans=config.spans_column,
        lists=(lists := config.ranked == "lists"),
    )
    light = Spool(light_schema(numbers, marks=marks, lists=lists))
    tokens, labels, sources = Spool(TOKEN_SCHEMA), dict[str, int](), dict[str, int]()
    records = reader(source)
    while chunk := list(islice(records, CHUNK)):
        if maker.head is None:
            maker = maker.decided(*maker.decide(chunk))
        rows = maker.make(chunk)
        account.merge(rows.account)
        light.append(renumbered(renumbered(rows.light, "file", rows.labels, labels), "source", rows.sources, sources))
        tokens.append(rows.tokens)
        if progress is not None:
            progress(account.records)
    table = light.finish()
    return SourceRows(
        table,
        [tokens.finish()],
        list(labels),
        list(sources),
        account,
        name,
        source.path,
        source.weight,
        train_on_of(config, None if name == HELD_OUT else source),
    )
