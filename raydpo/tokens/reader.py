"""Read a source in pieces of raw lines or rows, of which each becomes a block of its tokenised set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from raydpo.config import SourceConfig
from raydpo.data.parse import Record
from raydpo.data.pieces import Piece, Sizes, pieces_of
from raydpo.data.records import read_records, records_of
from raydpo.data.rows import FIRST_RECORDS
from raydpo.tokens.block import Span

__all__ = ["PIECE_BYTES", "PIECE_SIZES", "Piece", "Reader", "Reading", "pieces", "records_of", "span_of"]

PIECE_BYTES = 2 << 20
"""Bytes of a piece, but for a longer line. It takes one core about half a second."""
PIECE_SIZES = Sizes(first=PIECE_BYTES // 8, most=PIECE_BYTES, lines=4096, first_lines=FIRST_RECORDS)
"""The first pieces are smaller, so that the first pairs are there soon and small files keep several cores busy."""
Reader = Callable[[SourceConfig], Iterator[Record]]
"""Yields the records of a source, such as ``read_records``."""


def pieces(source: SourceConfig, reader: Reader = read_records) -> Iterator[Piece]:
    """Yield the pieces of a source, in order. They hold every record, or the first ``limit``.

    Args:
        reader: yields the records of a source. Those of any other than ``read_records`` are in the pieces as it gives them,
            with columns mapped.

    Raises:
        DataError: if the source cannot be read.
    """
    if reader is read_records:
        yield from pieces_of(source, PIECE_SIZES)
        return
    records, start = reader(source), 0
    while content := tuple(islice(records, PIECE_SIZES.first_lines)):
        stop = start + len(content)
        yield Piece(0, "", start, stop, len(content), content[-1].row, content)
        start = stop


def span_of(piece: Piece) -> Span:
    """The span of the block of a piece."""
    return Span(piece.file, piece.start, piece.stop)


class Reading:
    """The pieces of a source that no block holds.

    Args:
        have: spans of the blocks that are there. They do not overlap.

    Attributes:
        ends: number of lines that were read of each file with records.
        records: records that were read.
        read: bytes of the source that were read, as they are stored.
        passed: bytes of those that blocks hold.
        cost: bytes of the piece at hand.
    """

    def __init__(self, source: SourceConfig, reader: Reader = read_records, have: Iterable[Span] = ()) -> None:
        self.ends: dict[int, int] = {}
        self.records = self.read = self.passed = self.cost = 0
        self._pieces = pieces(source, reader)
        self._have: dict[int, list[Span]] = {}
        for span in sorted(have):
            self._have.setdefault(span.file, []).append(span)

    def __iter__(self) -> Iterator[Piece]:
        for piece in self._pieces:
            self.ends[piece.file] = piece.stop
            self.records += piece.records
            size, self.read = piece.read - self.read, piece.read
            missing = list(self._missing(piece))
            self.cost = size // max(1, len(missing))
            if not missing:
                self.passed += size
            yield from missing

    def _missing(self, piece: Piece) -> Iterator[Piece]:
        """The parts of a piece that no block holds. Blocks of another release may be cut elsewhere."""
        have, start = self._have.get(piece.file, []), piece.start
        while have and have[0].stop <= piece.start:
            have.pop(0)
        for span in have:
            if span.start >= piece.stop:
                break
            if start < span.start:
                yield piece.part(start, span.start)
            start = min(span.stop, piece.stop)
        if start < piece.stop:
            yield piece.part(start, piece.stop)
