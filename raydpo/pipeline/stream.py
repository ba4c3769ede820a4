"""Score pairs while they are tokenised: the first shards are scored seconds after the start."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import pairwise

import pyarrow as pa

from raydpo.config import Config
from raydpo.data.select import SourceRows, window
from raydpo.errors import RaydpoError
from raydpo.model.limits import check_limits
from raydpo.pipeline.tokenised import find_sets, limits_of, make_on_ray, wants_ray, writable
from raydpo.reference.shards import WINDOWS
from raydpo.terminal.console import Console
from raydpo.tokens.build import Progress
from raydpo.tokens.open import OpenSets, SourceSet

__all__ = ["Stream", "streams"]


def streams(config: Config) -> bool:
    """Whether the pairs of a configuration are scored while they are tokenised: a large source has no set yet, and which
    pairs are used does not depend on the whole of the data, as it does with a filter or ``data.fraction``."""
    return config.needs_reference and not config.data.filter and config.data.fraction == 1 and wants_ray(config)


class Stream:
    """Tokenised sets of a configuration that are made in another thread, within a Ray session.

    Use it as a context. Leaving it stops what is still being made.

    Attributes:
        light: for each set, its light rows as far as ``windows`` has come.
    """

    def __init__(self, config: Config, console: Console) -> None:
        self.config, self.console = config, console
        self.sets: OpenSets = writable(find_sets(config), config, console)
        self.light: list[pa.Table] = [pa.table({}) for _ in self.sets.every]
        self._changed = threading.Condition()
        self._contiguous = [0] * len(self.sets.every)
        self._whole = [each.stored.complete() is not None for each in self.sets.every]
        self._error: BaseException | None = None
        self._stopped = False
        self._told = ""
        self._thread = threading.Thread(target=self._make, name="tokenising", daemon=True)

    def __enter__(self) -> Stream:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def progress(self) -> str:
        """How far tokenising is, in a few words; empty once all is tokenised."""
        return self._told if not all(self._whole) else ""

    def windows(self) -> Iterator[pa.Table]:
        """Yield the pairs of each window of each set without their tokens, as soon as they are tokenised.

        Raises:
            DataError: if a source is refused.
            FilesError: if a model has no row for a token id, or no position for a token.
        """
        limits = limits_of(self.config)
        for number, each in enumerate(self.sets.every):
            for start, stop in pairwise([*WINDOWS, None]):
                rows = self._rows(number, each, stop)
                self.light[number] = rows.light
                if rows.light.num_rows > start:
                    table = window(self.config.data, rows, number, start, stop)
                    check_limits([table], limits)  # its warnings come with the whole data
                    if table.num_rows:
                        yield table
                if stop is None or rows.light.num_rows < stop:
                    break
            self.sets.check(each)

    def _rows(self, number: int, each: SourceSet, stop: int | None) -> SourceRows:
        """Light rows of a set, at least those with places below ``stop`` that it will have."""
        with self._changed:
            while not self._whole[number] and (stop is None or self._contiguous[number] < stop):
                if self._error is not None:
                    raise self._error
                if self._stopped:  # the thread that takes windows ends, too
                    raise RaydpoError("tokenising was stopped")
                self._changed.wait(timeout=1.0)
            whole = self._whole[number]
        if whole or stop is None:
            return each.rows()
        blocks = each.stored.first_blocks(stop)
        pairs = sum(block.pairs for block in blocks)
        if pairs < stop:
            raise RaydpoError(
                f"set {each.stored.digest} holds {pairs:,} pairs in order, but {stop:,} were made; run the command again"
            )
        return each.rows(blocks)

    def _make(self) -> None:
        try:
            for number, each in enumerate(self.sets.every):
                for line in self.sets.why(each) if not self._whole[number] else ():
                    self.console.say(line)
                if not self._whole[number] and each.stored.complete() is None:
                    for progress in make_on_ray(self.config, each, self.console, keep_free=self.config.score.workers):
                        self._take(number, each, progress)
                        if self._stopped:
                            return
                with self._changed:
                    self._whole[number] = True
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _take(self, number: int, each: SourceSet, progress: Progress) -> None:
        left = progress.seconds_left
        with self._changed:
            self._contiguous[number] = progress.contiguous
            rate = f"tokenising {each.name}: {progress.pairs:,} pairs, {progress.pairs_per_second:,.0f}/s"
            self._told = rate if left is None else f"{rate}, {left / 60:.0f} min left"
            self._changed.notify_all()
