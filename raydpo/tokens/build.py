"""Make the tokenised set of a source, in this process or with actors on a Ray cluster.

Either way the source is cut in the same places (``reader``), and the rows of each piece depend on nothing but its records
and what the first records of the source decide. So blocks may be made in any order, again after a kill, or by two commands
at once: the set is the same. Only blocks that are missing are made.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs

from raydpo.config import DataConfig, SourceConfig, source_name
from raydpo.config.data import COMPRESSION_SUFFIXES
from raydpo.data.locate import data_files, hub_dataset, is_on_hub
from raydpo.data.parse import Record
from raydpo.data.records import no_records, read_records, records_of
from raydpo.data.rows import FIRST_RECORDS, RowMaker
from raydpo.data.tally import SourceReport
from raydpo.data.tokenise import Tokeniser, load_tokenizer, template_text
from raydpo.errors import DataError, FilesError
from raydpo.storage.files import Storage
from raydpo.storage.uri import redact
from raydpo.tokens.actors import Job, Makers
from raydpo.tokens.block import Span
from raydpo.tokens.identity import SetIdentity, files_of, tokenizer_facts
from raydpo.tokens.reader import PIECE_BYTES, Piece, Reader, Reading, pieces, span_of
from raydpo.tokens.store import Complete, TokenSet

__all__ = ["Made", "Progress", "Recipe", "make_set", "make_set_on_ray", "worth_ray"]

WORTH_BYTES = 48 << 20
"""JSON lines from which actors pay. One core tokenises 3 to 4 MB/s of HH-RLHF here. A Ray of our own takes 4 s to start on
two quiet cores, 12 s on busy ones, and the first block of an actor is there 6 s after it."""
PACKED = 4
"""Bytes of JSON lines that one byte of a compressed or Parquet file stands for, roughly."""


def worth_ray(source: SourceConfig) -> bool:
    """Whether a source is so large that actors make its set sooner than this process.

    Raises:
        DataError: if the source cannot be read.
    """
    if is_on_hub(source):
        return hub_dataset(source).data.nbytes >= WORTH_BYTES
    total = 0
    for file in data_files(source):
        packed = file.label.lower().endswith((*COMPRESSION_SUFFIXES, ".parquet"))
        total += (file.filesystem.get_file_info(file.path).size or 0) * (PACKED if packed else 1)
        if total >= WORTH_BYTES:
            return True
    return False


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What any process needs to make rows of a source. It can be pickled.

    Attributes:
        identity: of the set.
        directory: local directory of the tokenizer.
        chat_template: Jinja text in place of the tokenizer's own.
        find: gives the directory on the machine of an actor, from that on the driver's.
    """

    identity: SetIdentity
    directory: str
    chat_template: str | None = None
    template_date: date
    trust_remote_code: bool = False
    find: Callable[[str], str] = str

    @classmethod
    def of(cls, identity: SetIdentity, data: DataConfig, directory: str, **more: Any) -> Recipe:
        """The recipe of a set of ``data``.

        Args:
            more: ``trust_remote_code`` and ``find``.
        """
        text = None if data.chat_template is None else template_text(data.chat_template)
        return cls(identity=identity, directory=directory, chat_template=text, template_date=data.template_date, **more)

    def tokeniser(self) -> Tokeniser:
        """Load the tokenizer on this machine.

        Raises:
            FilesError: if there is none, or it is another one than where the set was identified.
        """
        directory = self.find(self.directory)
        tokeniser = Tokeniser(
            load_tokenizer(directory, chat_template=self.chat_template, trust_remote_code=self.trust_remote_code),
            self.template_date,
        )
        # Only these two of the settings decide what a tokenizer does.
        data = DataConfig(train="-", chat_template=self.chat_template, template_date=self.template_date)
        here, there = tokenizer_facts(directory, data, lambda: tokeniser), self.identity.tokenizer
        if here != there:
            names = ", ".join(name for name in {**there, **here} if here.get(name) != there.get(name))
            raise FilesError(
                f"the tokenizer in {directory} is another one here than where the run was started (they differ in: {names}"
                "); put the same files and package versions on every node"
            )
        return tokeniser

    def maker(self, tokeniser: Tokeniser) -> RowMaker:
        """A maker of the rows."""
        identity = self.identity
        return RowMaker(
            tokeniser,
            numbers=identity.numbers,
            special_tokens=identity.special_tokens,
            most_characters=identity.most_characters,
            marks=identity.marks,
            spans=identity.spans,
            lists=identity.ranked,
        )


@dataclass(frozen=True)
class Made:
    """What is known of a block that was made. Its rows are in the store.

    Attributes:
        account: the part of the source's report, as ``SourceReport.to_state`` gives it.
        present: columns of the file, of those that the source maps, that its records have.
    """

    span: Span
    pairs: int
    account: dict[str, Any]
    present: frozenset[str]


@dataclass(frozen=True)
class Progress:
    """How far a set is.

    Attributes:
        records: records of the source that are in blocks which this call made.
        pairs: pairs in all blocks, also those that were there.
        contiguous: the pairs with places ``0 <= place < contiguous`` are stored.
        pairs_per_second: pairs that this call makes a second, 0 at first.
        seconds_left: estimated time to the end; None if unknown.
        complete: the set, once it is whole.
    """

    records: int
    pairs: int
    contiguous: int
    pairs_per_second: float
    seconds_left: float | None
    complete: Complete | None = None


def make_set(
    token_set: TokenSet,
    source: SourceConfig,
    data: DataConfig,
    tokeniser: Tokeniser,
    *,
    progress: Callable[[int], None] | None = None,
    reader: Reader = read_records,
) -> Complete:
    """Make a set in this process.

    Args:
        token_set: the set of ``source`` and ``data``.
        progress: called from time to time with the number of records that were tokenised so far.
        reader: as of ``reader.pieces``.

    Raises:
        DataError: if the source cannot be read, is empty, lacks a mapped column or changed while it was read, or so much of
            it is malformed or lost that it is certain to be refused.
        FilesError: if the tokenizer lacks the chat template or EOS token that the data need.
        CacheError, OSError: if the cache cannot be written.
    """
    making = _Making(token_set, source, data, reader)
    maker = Recipe.of(making.identity, data, "").maker(tokeniser)
    first = {span_of(piece): _Parsed(piece, making.columns) for piece in making.first_pieces()}
    parsed = [each.records for each in first.values()]
    # The very list that is decided by is not tokenised again when its rows are made.
    making.decided = maker.decide(parsed[0] if len(parsed) == 1 else [record for records in parsed for record in records])
    maker = maker.decided(*making.decided)
    with making.guarded():
        for piece in making.reading:
            made = _make(token_set, maker, first.get(span_of(piece)) or _Parsed(piece, making.columns))
            making.add(made, making.reading.cost)
            if progress is not None:
                progress(making.records)
        return making.finish()


class _Parsed:
    """The records of a piece, and the columns of the file, of those that are mapped, that they have."""

    def __init__(self, piece: Piece, columns: Mapping[str, str]) -> None:
        present: dict[str, None] = {}
        self.span = span_of(piece)
        self.records: list[Record] = list(records_of(piece, columns, present))
        self.present = frozenset(present.keys() & set(columns.values()))


def _make(token_set: TokenSet, maker: RowMaker, parsed: _Parsed) -> Made:
    """Make and store the block of a piece."""
    rows = maker.make(parsed.records)
    token_set.commit(parsed.span, rows)
    return Made(parsed.span, rows.light.num_rows, rows.account.to_state(), parsed.present)


class _Making:
    """A set while it is made: what is there, what is missing, and whether the source will be refused.

    Attributes:
        reading: the pieces that are missing.
        columns: the column map of the pieces' records.
        pairs: pairs in all blocks.
        made: pairs of the blocks that were made, and ``records`` theirs.
        decided: ``take_off`` and ``head``, see ``RowMaker.decide``.
    """

    def __init__(self, token_set: TokenSet, source: SourceConfig, data: DataConfig, reader: Reader) -> None:
        if token_set.identity is None:
            raise ValueError("a set is made from its identity, not from a digest")
        self.token_set, self.identity = token_set, token_set.identity
        self.source, self.data, self.reader = source, data, reader
        self.columns = source.columns if reader is read_records else {}
        self.decided: tuple[bool, int] | None = None
        self.pairs = self.made = self.records = 0
        self._size = sum(file.size for file in self.identity.files)
        self._exact: int | None = None  # records of the source, if they were counted
        self._lacking = set(self.columns.values())
        self._blocks: dict[tuple[int, int], tuple[int, int]] = {}  # last line and pairs by file and first line
        self._next, self._contiguous = (0, 0), 0
        self._totals = SourceReport("", "")
        self._faulty: list[tuple[Span, SourceReport]] = []
        self._done, self._started = 0, time.monotonic()
        token_set.blocks()  # finds what is damaged
        token_set.prepare()
        if (changed := _last_change(source)) is not None:
            # A process that was killed may have read another content, which has been replaced since.
            token_set.discard(before=changed)
        have = token_set.blocks()
        self.reading = Reading(source, reader, [block.span for block in have])
        for block in have:
            self._take(block.span, block.pairs)
        if have:
            self._tally(have[0].span, token_set.light(have).account)

    def first_pieces(self) -> list[Piece]:
        """The pieces with the first ``FIRST_RECORDS`` records of the source."""
        found: list[Piece] = []
        for piece in pieces(self.source, self.reader):
            found.append(piece)
            if sum(each.records for each in found) >= FIRST_RECORDS:
                break
        if not found:
            raise no_records(self.source)
        return found

    def begin(self) -> None:
        """Measure the rate from now on."""
        self._started = time.monotonic()

    def add(self, made: Made, cost: int) -> None:
        """Take in a block that was made.

        Args:
            cost: bytes of the source that were read for it, as they are stored.

        Raises:
            DataError: if the source is certain to be refused.
        """
        self._take(made.span, made.pairs)
        self.made += made.pairs
        self._done += cost
        self._lacking -= made.present
        account = SourceReport.from_state(made.account)
        self.records += account.records
        self._tally(made.span, account)
        self._refuse_early()

    def _take(self, span: Span, pairs: int) -> None:
        self._blocks[span.file, span.start] = span.stop, pairs
        self.pairs += pairs

    def _tally(self, span: Span, account: SourceReport) -> None:
        self._totals.records += account.records
        self._totals.pairs += account.pairs
        self._totals.malformed_records += account.malformed_records
        self._totals.remarks.merge(account.remarks)
        if account.malformed_records or account.remarks.lost:
            self._faulty.append((span, account))

    def progress(self, complete: Complete | None = None) -> Progress:
        """How far the set is."""
        seconds, left = time.monotonic() - self._started, None
        if complete is not None:
            left = 0.0
        elif self._size and self._done:
            left = max(0, self._size - self.reading.passed - self._done) * seconds / self._done
        rate = self.made / seconds if self.made else 0.0
        return Progress(self.records, self.pairs, self._advanced(), rate, left, complete)

    def _advanced(self) -> int:
        """The number of first pairs that are stored."""
        while True:
            file, line = self._next
            if self._next in self._blocks:
                stop, pairs = self._blocks[self._next]
                self._contiguous += pairs
                self._next = file, stop
                continue
            # A file has been read to its end once the next has begun.
            later = [each for each in self.reading.ends if each > file]
            if not later or line < self.reading.ends.get(file, 0):
                return self._contiguous
            self._next = later[0], 0

    def _refuse_early(self) -> None:
        """Refuse the source if it is certain that too much of it is malformed, or that its template loses too much, where
        records to come give no more pairs each than those so far."""
        if self._exact is None:
            if not self.reading.read:
                return
            expected = self.reading.records * max(self._size, self.reading.read) // self.reading.read
            if not self._too_bad(min(expected, self.source.limit or expected)):
                return
            self._exact = sum(piece.records for piece in pieces(self.source, self.reader))
        if self._too_bad(self._exact):
            self._account().check(self.data)

    def _too_bad(self, records: int) -> bool:
        totals = self._totals
        pairs = totals.pairs + max(0, records - totals.records) * -(-totals.pairs // max(1, totals.records))
        malformed = totals.malformed_records > self.data.max_malformed * records
        return malformed or totals.remarks.lost > self.data.max_lost * pairs

    def _account(self) -> SourceReport:
        """The report on faults in the blocks so far, as if no pair were dropped."""
        totals = self._totals
        account = SourceReport(
            source_name(self.source),
            redact(self.source.path),
            records=totals.records,
            malformed_records=totals.malformed_records,
            pairs=totals.pairs,
            kept=totals.pairs,
        )
        for _, part in sorted(self._faulty, key=lambda entry: entry[0]):
            account.malformed.merge(part.malformed)
            account.remarks.merge(part.remarks)
        return account

    def finish(self) -> Complete:
        """Declare the set whole.

        Raises:
            DataError: if the source is empty, lacks a mapped column, or is another one than when it was identified.
        """
        if not self.reading.records:
            raise no_records(self.source)
        if self._lacking:  # blocks that were there do not tell: look at all records, up to the error
            for _ in read_records(self.source):
                pass
        if self._changed():
            raise DataError(
                f"{redact(self.source.path)} changed while it was read; run the command again when it is written"
            )
        take_off, head = self.decided or (False, 0)
        facts = {"records": self.reading.records, "take_off": take_off, "head": head}
        return self.token_set.finish(facts, self.reading.ends)

    def _changed(self) -> bool:
        """Whether the source is another one than when it was identified, as far as its store tells."""
        now, before = files_of(self.source), self.identity.files
        return len(now) != len(before) or not all(one.is_still(other) for one, other in zip(before, now, strict=True))

    @contextlib.contextmanager
    def guarded(self, stop: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Keep no blocks where the making ends early and the source has changed meanwhile: should it come back as it was,
        blocks of its name must be its own.

        Args:
            stop: ends those who make blocks.
        """
        try:
            yield
        except BaseException:
            stop()
            try:
                changed = self._changed()
            except DataError:  # it is gone
                changed = True
            if changed:
                self.token_set.discard()
            raise


def _last_change(source: SourceConfig) -> float | None:
    """When a file of the source on this machine last changed, in seconds since 1970; None if there is none."""
    if is_on_hub(source):
        return None
    files = [Path(file.path) for file in data_files(source) if isinstance(file.filesystem, pafs.LocalFileSystem)]
    return max((file.stat().st_ctime for file in files), default=None)


def make_set_on_ray(
    pool: Makers,
    token_set: TokenSet,
    source: SourceConfig,
    data: DataConfig,
    recipe: Recipe,
    *,
    reader: Reader = read_records,
    tell: Callable[[str], None] = lambda line: None,
) -> Iterator[Progress]:
    """Make a set with actors, which also store the blocks. Only what is known of each comes back.

    Args:
        pool: the actors. They may serve one set after another.
        recipe: of ``token_set``.
        reader: as of ``reader.pieces``.
        tell: called from time to time with a line about an actor that has been at the same lines for long.

    Yields:
        How far the set is: after each block, and at least every second. The last has ``complete``.

    Raises:
        DataError, FilesError, CacheError, OSError: as ``make_set``.
        RaydpoError: if lines kill the process of each actor that has them, or no actor can start.
    """
    import ray

    doing = f"tokenising {redact(source.path)}"
    making = _Making(token_set, source, data, reader)
    order = _Order(token_set.storage.uri, recipe, making.columns)
    held = ray.put(order)
    first = making.first_pieces()
    decide = Job(_decide, (held, *map(ray.put, first)), about=_about(first[0]))
    for answer in pool.run(iter([decide]), doing, tell):
        if answer is not None:
            making.decided = answer[1]
        yield making.progress()
    making.begin()

    def jobs() -> Iterator[Job]:
        for piece in making.reading:
            size = len(piece.content) if isinstance(piece.content, bytes) else PIECE_BYTES
            arguments = held, ray.put(piece), making.decided
            yield Job(_make_block, arguments, size, _about(piece), making.reading.cost)

    with making.guarded(pool.close):
        for answer in pool.run(jobs(), doing, tell):
            if answer is not None:
                job, made = answer
                job.arguments = ()  # frees the piece
                making.add(made, job.tag)
            yield making.progress()
        whole = making.finish()
    yield making.progress(whole)


def _about(piece: Piece) -> str:
    return f"lines {piece.start + 1:,} to {piece.stop:,} of {piece.label or 'the source'}"


@dataclass(frozen=True)
class _Order:
    """What an actor is told of a set."""

    uri: str
    recipe: Recipe
    columns: Mapping[str, str]


def _decide(state: dict[Any, Any], order: _Order, *first: Piece) -> tuple[bool, int]:
    """``RowMaker.decide``, in an actor."""
    records = [record for piece in first for record in records_of(piece, order.columns)]
    return order.recipe.maker(_tokeniser(state, order.recipe)).decide(records)


def _make_block(state: dict[Any, Any], order: _Order, piece: Piece, decided: tuple[bool, int]) -> Made:
    """Make and store the block of a piece, in an actor."""
    recipe = order.recipe
    key = order.uri, recipe.identity.digest, decided
    if state.get("made for") != key:
        token_set = TokenSet(Storage(order.uri), recipe.identity)
        state |= {"made for": key, "maker": (token_set, recipe.maker(_tokeniser(state, recipe)).decided(*decided))}
    token_set, maker = state["maker"]
    return _make(token_set, maker, _Parsed(piece, order.columns))


def _tokeniser(state: dict[Any, Any], recipe: Recipe) -> Tokeniser:
    """The tokeniser of a recipe. It stays as long as the actor makes sets with the same."""
    key = json.dumps([recipe.directory, recipe.chat_template, str(recipe.template_date), recipe.identity.tokenizer])
    if state.get("tokeniser of") != key:
        state |= {"tokeniser of": key, "tokeniser": recipe.tokeniser()}
    return state["tokeniser"]
