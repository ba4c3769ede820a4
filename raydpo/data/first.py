"""The first pairs of a configuration, for commands that need no more of large sources."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from raydpo.config import DataConfig, SourceConfig, source_name
from raydpo.data.locate import data_files, hub_dataset, is_on_hub
from raydpo.data.pairs import HELD_OUT, PairSets, load_pairs
from raydpo.data.pieces import Piece
from raydpo.data.records import Record, read_records
from raydpo.data.tokenise import Tokeniser
from raydpo.errors import DataError

__all__ = ["FirstPairs", "Reading", "first_pairs"]

_DIGITS = 2
"""Digits of an estimated number of records."""


@dataclass(frozen=True)
class Reading:
    """How much of a source was read.

    Attributes:
        records: records that were read, the first ones.
        of_records: records of the source; estimated from the bytes of those that were read, unless all were.
    """

    records: int
    of_records: int

    @property
    def whole(self) -> bool:
        return self.records == self.of_records


@dataclass(frozen=True)
class FirstPairs:
    """The pairs of the first records of some sources, and all pairs of the others.

    Attributes:
        sets: these pairs. Their reports are of the records that were read.
        read: how much was read, by name of source; the held-out file is ``pairs.HELD_OUT``. Nothing if ``sets`` are stored.
        cpu_seconds: that reading and tokenising took, of one core; None if nothing had to be tokenised.
        problem: what of the configuration was not applied to so few records; None if all of it was.
    """

    sets: PairSets
    read: dict[str, Reading]
    cpu_seconds: float | None = None
    problem: str | None = None

    @property
    def whole(self) -> bool:
        """Whether these are all pairs of the configuration."""
        return all(each.whole for each in self.read.values())

    @property
    def scales(self) -> dict[str, float]:
        """Number of records for which each of those that were read stands, by name of source."""
        return {name: each.of_records / each.records for name, each in self.read.items()}

    def lines(self) -> list[str]:
        """What was read, for people; nothing if it was all."""
        told = _told(self.read)
        return [f"from {told}; what follows is estimated from these"] * bool(told) + [self.problem] * bool(self.problem)

    def to_dict(self) -> dict[str, dict[str, int]] | None:
        """The same for JSON, by source; None if all was read."""
        return None if self.whole else {name: vars(each).copy() for name, each in self.read.items()}


def first_pairs(
    config: DataConfig, tokeniser: Tokeniser, most_records: int, large: Callable[[SourceConfig], bool]
) -> FirstPairs:
    """Read and tokenise the first ``most_records`` records of each ``large`` source, and all of others.

    A prompt is held out, or left out of ``data.fraction``, as in the whole data, since its digest decides. ``data.filter``
    is not applied.

    Raises:
        DataError: as ``load_pairs``; says of which records, where they are not all.
    """
    started, read = time.process_time(), dict[str, Reading]()
    names = {id(source): source_name(source) for source in config.train}

    def reader(source: SourceConfig) -> Iterator[Record]:
        return _read(source, names.get(id(source), HELD_OUT), most_records if large(source) else None, read)

    problem = None
    try:
        sets = load_pairs(config, tokeniser, reader=reader)
    except DataError as error:
        if not (told := _told(read)):
            raise
        # The first records of a sorted file can all have one prompt.
        if config.eval is None or config.eval.fraction is None:
            raise DataError(f"in {told}: {error}") from None
        try:
            sets = load_pairs(config.model_copy(update={"eval": None}), tokeniser, reader=reader)
        except DataError:
            raise DataError(f"in {told}: {error}") from None
        problem = f"data.eval.fraction is not applied to so few records: {error}"
    return FirstPairs(sets, read, time.process_time() - started, problem)


def _read(source: SourceConfig, name: str, most: int | None, read: dict[str, Reading]) -> Iterator[Record]:
    """Yield the first ``most`` records of a source (None = all), and add to ``read`` how many these are."""
    counted = last = 0

    def watch(piece: Piece) -> None:
        nonlocal counted, last
        counted, last = counted + piece.records, piece.read

    records, count = read_records(source, watch), 0
    for record in islice(records, most):
        count += 1
        yield record
    if next(records, None) is None:
        read[name] = Reading(count, count)
        return
    if is_on_hub(source):
        estimated = hub_dataset(source).num_rows
    else:
        size = sum(file.filesystem.get_file_info(file.path).size for file in data_files(source))
        estimated = round(counted * size / max(1, last))
    limit = estimated if source.limit is None else min(source.limit, estimated)
    read[name] = Reading(count, max(count + 1, limit))


def _told(read: dict[str, Reading]) -> str:
    """``the first 20,000 of about 9,800,000 records of big``; empty if all was read."""
    return " and ".join(
        f"the first {each.records:,} of about {float(f'{each.of_records:.{_DIGITS}g}'):,.0f} records of {name}"
        for name, each in read.items()
        if not each.whole
    )
