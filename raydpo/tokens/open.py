"""The tokenised sets of a configuration's sources: found in the cache, and opened as tables of pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path

from raydpo.config import DataConfig, SourceConfig, source_name
from raydpo.data.counting import train_on_of
from raydpo.data.pairs import HELD_OUT, held_out_source
from raydpo.data.select import PairSets, SourceRows, check_source, select
from raydpo.data.tokenise import Tokeniser
from raydpo.storage.files import Storage
from raydpo.tokens.block import BlockInfo
from raydpo.tokens.identity import SetIdentity
from raydpo.tokens.local import StoredTokens
from raydpo.tokens.store import TokenSet

__all__ = ["OpenSets", "SourceSet"]


@dataclass(frozen=True)
class SourceSet:
    """A source and its tokenised set, which may be missing.

    Attributes:
        name: the source's name in counts and metrics.
        train_on: which tokens of its completions count, as ``counting.train_on_of`` gives them.
    """

    source: SourceConfig
    name: str
    stored: TokenSet
    train_on: Mapping[str, float]

    def rows(self, blocks: Sequence[BlockInfo] | None = None) -> SourceRows:
        """Light rows of the pairs in ``blocks``, or of the whole set.

        Raises:
            CacheError: if the set is not whole, or a file of it cannot be read.
        """
        return dataclasses.replace(
            self.stored.light(blocks),
            name=self.name,
            path=self.source.path,
            weight=self.source.weight,
            train_on=self.train_on,
        )


class OpenSets:
    """The sets of all sources of section ``data``, in order, that of ``data.eval.path`` last.

    Args:
        storage: root of the cache that holds them.
        directory: local directory of the tokenizer.
        load: gives the tokeniser of ``directory`` and ``data``.
        trust_remote_code: as of ``SetIdentity.of``.

    Attributes:
        every: the sources and their sets.

    Raises:
        DataError: if a source cannot be read.
        FilesError: if there is no tokenizer.
    """

    def __init__(
        self,
        data: DataConfig,
        storage: Storage,
        directory: str | Path,
        load: Callable[[], Tokeniser],
        *,
        trust_remote_code: bool = False,
    ) -> None:
        self.data, self.storage = data, storage
        named = [(source, source_name(source), train_on_of(data, source)) for source in data.train]
        if data.eval is not None and data.eval.path is not None:
            named.append((held_out_source(data), HELD_OUT, train_on_of(data, None)))
        self.every = []
        for source, name, train_on in named:
            identity = SetIdentity.of(source, data, directory, load, trust_remote_code=trust_remote_code)
            self.every.append(SourceSet(source, name, TokenSet(storage, identity), train_on))

    @cached_property
    def tokens(self) -> StoredTokens:
        """Where processes on any machine read the tokens."""
        return StoredTokens(self.storage.uri, [each.stored.digest for each in self.every])

    def missing(self) -> Iterator[SourceSet]:
        """The sets that are not whole. Each is looked at when its turn comes, since two sources may share one."""
        return (each for each in self.every if each.stored.complete() is None)

    def why(self, each: SourceSet) -> list[str]:
        """What the user is told of a set that has to be made: what is damaged, or, if the cache does not have this set at
        all, what made a set of the same path another one."""
        told = [*each.stored.problems]
        identity = each.stored.identity
        if identity is None or each.stored.description() is not None:  # begun or damaged: no setting is the reason
            return told
        other = TokenSet.nearest(self.storage, identity)
        if other is not None:
            changes = "; ".join(identity.differences(other)[:3])
            told.append(f"data {each.name}: tokenised anew, not read from set {other.digest[:12]} of this cache: {changes}")
        return told

    def check(self, each: SourceSet) -> None:
        """Refuse a source as ``select`` does.

        Raises:
            DataError: if more of it is malformed or dropped than allowed, or no pair is left.
        """
        check_source(self.data, each.rows())

    @property
    def _day(self) -> date | None:
        """The day that the chat template writes; None if it writes none."""
        identity = self.every[0].stored.identity
        day = None if identity is None else identity.tokenizer["template_date"]
        return None if day is None else date.fromisoformat(day)

    def select(self) -> PairSets:
        """Tables of the pairs of all sets, which are whole.

        Raises:
            DataError: as ``data.select.select``.
            CacheError: if a file of a set is damaged, which the next command makes again.
        """
        rows = [
            dataclasses.replace(each.rows(), tokens=self.tokens.tables(number)) for number, each in enumerate(self.every)
        ]
        sources, held = rows[: len(self.data.train)], rows[len(self.data.train) :]
        return select(self.data, sources, held[0] if held else None, self.tokens, template_date=self._day)
