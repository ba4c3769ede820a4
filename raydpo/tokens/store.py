"""Tokenised sets in a cache: one directory for each identity, beside the references.

    <cache>/sets/<digest>/set.json                   description for people; not authoritative
    <cache>/sets/<digest>/blocks/<name>.parquet      token ids
    <cache>/sets/<digest>/index/<name>-<...>.arrow   light columns of the same pairs, and their part of the report
    <cache>/sets/<digest>/complete-<checksum>.json   written last: the blocks that make up the set
    <cache>/sets/<digest>/set-aside/                 damaged and foreign files

A block counts if and only if both of its files are there and its index has the checksum in its name. Its tokens are checked
where they are decoded (``local``). There is no manifest that could be corrupted, and no lock: two processes that make one
set at worst make the same blocks, which have the same names. A set is used only if all blocks count that a sound
``complete-<checksum>.json`` names. Files are not flushed to the disk: what a power cut damages is noticed and made again.
"""

from __future__ import annotations

import contextlib
import json
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raydpo.data.rows import LIGHT_SCHEMA, Rows, light_schema, renumbered
from raydpo.data.select import SourceRows
from raydpo.data.tally import SourceReport
from raydpo.errors import CacheError
from raydpo.storage.content import checksum
from raydpo.storage.files import Storage, remove_stale_temporaries
from raydpo.storage.local_copy import LocalCopy
from raydpo.storage.memory import content_stamp, keep, last_start, recall
from raydpo.tokens.block import BlockInfo, DamagedBlock, Span, decode_index, decode_tokens, encode
from raydpo.tokens.identity import SetIdentity

__all__ = ["BLOCKS", "INDEX", "SETS", "SET_ASIDE", "Complete", "TokenSet"]

SETS = "sets"
"""Folder of a cache with its tokenised sets."""
BLOCKS = "blocks"
"""Folder of a set with the token ids of its blocks."""
INDEX = "index"
"""Folder of a set with the indices of its blocks."""
SET_ASIDE = "set-aside"
"""Folder of a set with files that are not used, such as damaged ones."""
_COMPLETE = "complete-"
_DESCRIPTION = "set.json"


@dataclass(frozen=True)
class Complete:
    """A set that is whole.

    Attributes:
        blocks: its blocks, in order of file and line.
        tokens: token ids of all of them.
        facts: what its maker found out about the source.
    """

    blocks: tuple[BlockInfo, ...]
    tokens: int
    facts: dict[str, Any]

    @property
    def pairs(self) -> int:
        return sum(block.pairs for block in self.blocks)


class TokenSet:
    """The tokenised set of one source.

    Args:
        storage: root of the cache.
        identity: the set's identity, or its digest alone, for reading.

    Attributes:
        digest: 32 hexadecimal digits that name the set.
        problems: one sentence for each file that is not used, with the reason.
    """

    def __init__(self, storage: Storage, identity: SetIdentity | str) -> None:
        self.storage = storage
        self.identity = None if isinstance(identity, str) else identity
        self.digest = identity if isinstance(identity, str) else identity.digest
        self.directory = f"{SETS}/{self.digest}"
        self._copies = None if storage.is_local else LocalCopy(storage)
        here = storage if self._copies is None else self._copies.local
        self._indices = here.path(f"{self.directory}/{INDEX}")
        self._problems: dict[str, str] = {}
        self._damaged: list[str] = []
        self._known: dict[str, Any] | None = None  # stamps of indices that are sound, by name

    @property
    def _memory(self) -> list[str]:
        """What this machine remembers the sound indices by. After a power cut files may hold something else under the same
        stamp, so they are read again."""
        return [self.storage.uri, self.digest, last_start()]

    @staticmethod
    def digests(storage: Storage) -> list[str]:
        """Digests of all sets in a cache, whole or not, in order."""
        return [name for name in storage.list(SETS) if len(name) == 32 and not name.startswith(".")]

    @staticmethod
    def nearest(storage: Storage, identity: SetIdentity) -> SetIdentity | None:
        """The identity of another set of the same path that differs in the fewest fields; None if there is none. For
        telling why a set has to be made."""
        found = []
        for digest in TokenSet.digests(storage):
            other = TokenSet(storage, digest).description()
            if other is not None and other.path == identity.path and digest != identity.digest:
                found.append((len(identity.differences(other)), digest, other))
        return min(found, key=lambda entry: entry[:2])[2] if found else None

    @property
    def problems(self) -> list[str]:
        return list(self._problems.values()) + ([] if self._copies is None else list(self._copies.problems))

    def description(self) -> SetIdentity | None:
        """The identity as the set's directory describes it, for people; None if that is missing or unreadable."""
        try:
            content = json.loads(self.storage.read(f"{self.directory}/{_DESCRIPTION}"))
            found = SetIdentity.from_dict(content["identity"], content["path"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return found if found.digest == self.digest else None

    # ---- writing

    def prepare(self) -> None:
        """Make the directory ready: describe the set, delete temporary files of killed processes, and move aside what is
        damaged.

        Raises:
            OSError, RaydpoError: if the cache cannot be written.
        """
        if self.identity is None:
            raise ValueError("a set is made from its identity, not from a digest")
        for folder in (self.directory, *(f"{self.directory}/{name}" for name in (BLOCKS, INDEX))):
            remove_stale_temporaries(self.storage, folder)
        if self.description() is None:
            content = {"path": self.identity.path, "identity": self.identity.to_dict()}
            self.storage.write(f"{self.directory}/{_DESCRIPTION}", json.dumps(content, indent=2).encode(), durable=False)
        if self._copies is not None:
            folder = f"{self.directory}/{INDEX}"
            self._copies.prune(folder, set(self.storage.list(folder)))
        self.set_aside()

    def commit(self, span: Span, rows: Rows) -> BlockInfo:
        """Write the pairs of ``span`` as one block. Killed before its end, it leaves no block that counts.

        Raises:
            OSError, RaydpoError: if the cache cannot be written, or the disk is full.
        """
        info, block, index = encode(rows, self.digest, span)
        self.storage.write(f"{self.directory}/{BLOCKS}/{info.file}", block, durable=False)
        self.storage.write(f"{self.directory}/{INDEX}/{info.index}", index, durable=False)
        return info

    def finish(self, facts: Mapping[str, Any], ends: Mapping[int, int] | None = None) -> Complete:
        """Declare the set whole: its blocks are those that count now.

        Args:
            facts: what its maker found out about the source, for JSON.
            ends: number of lines of each file that has any. Without it, a last block that is missing goes unnoticed.

        Raises:
            CacheError: if lines are missing, or are there that the source does not have.
        """
        blocks = self.blocks()
        reached: dict[int, int] = {}
        for block in blocks:
            before = reached.get(block.span.file, 0)
            if block.span.start != before:
                raise CacheError(self._lacks(block.span.file, before, block.span.start))
            reached[block.span.file] = block.span.stop
        for file in {*reached, *ends} if ends is not None else ():
            here, end = reached.get(file, 0), ends.get(file, 0)
            if here > end:
                raise CacheError(
                    f"the set {self.digest} in {self.storage} holds lines {end + 1:,} to {here:,} of file {file + 1}, which "
                    f"its source does not have; delete {self.storage}/{self.directory}, and run the command again"
                )
            if here < end:
                raise CacheError(self._lacks(file, here, end))
        light = self.light(blocks).light
        tokens = sum(int(pc.sum(light[f"{part}_tokens"]).as_py() or 0) for part in ("prompt", "chosen", "rejected"))
        whole = Complete(tuple(blocks), tokens, dict(facts))
        content = {"set": self.digest, "tokens": tokens, "facts": whole.facts, "blocks": [block.index for block in blocks]}
        data = json.dumps(content, indent=1).encode()
        self.storage.write(f"{self.directory}/{_COMPLETE}{checksum(data)}.json", data, durable=False)
        return whole

    def _lacks(self, file: int, start: int, stop: int) -> str:
        return (
            f"the set {self.digest} in {self.storage} lacks lines {start + 1:,} to {stop:,} of file {file + 1}; run the "
            "command again, which makes them"
        )

    def set_aside(self) -> None:
        """Move files that ``blocks`` and ``complete`` found damaged or foreign to the folder ``set-aside``. Nothing is
        deleted: ``raydpo cache gc`` does that."""
        for path in self._damaged:
            with contextlib.suppress(OSError):  # we may not move it, or another process did
                self.storage.move(path, f"{self.directory}/{SET_ASIDE}/{_short(path)}")
        self._damaged.clear()

    def discard(self, before: float | None = None) -> None:
        """Move indices of blocks aside, so that these do not count: they may be of another content than the identity.

        Args:
            before: only those that were written before this time, in seconds since 1970; None = all.
        """
        entries = self.storage.entries(f"{self.directory}/{INDEX}")
        old = {entry.name for entry in entries if before is None or entry.modified < before}
        self._damaged += [f"{self.directory}/{INDEX}/{block.index}" for block in self._listed() if block.index in old]
        self.set_aside()

    # ---- reading

    def blocks(self, *, check: bool = True) -> list[BlockInfo]:
        """The blocks that count now, in order of file and line. Of blocks that overlap, since a killed process cut the lines
        otherwise, those are given that hold the most lines.

        Args:
            check: False = take indices that are there for sound, without reading them.
        """
        listed = self._listed()
        return _without_overlaps(self._counting(listed) if check else listed)

    def first_blocks(self, pairs: int, *, check: bool = True) -> list[BlockInfo]:
        """The first blocks of a set that may still be being made, up to the one with which they hold ``pairs`` pairs, or to
        the first gap: blocks are finished in any order, so what lies behind a gap has no certain place yet.

        Args:
            check: as of ``blocks``.
        """
        found: list[BlockInfo] = []
        held, end = 0, (0, 0)  # end: file and line
        for block in self.blocks(check=check):
            if held >= pairs or block.span.start != (end[1] if block.span.file == end[0] else 0):
                break
            end = block.span.file, block.span.stop
            held += block.pairs
            found.append(block)
        return found

    def complete(self, *, check: bool = True) -> Complete | None:
        """The set if it is whole, else None; ``problems`` then says what is missing of one that was. ``check``: as of
        ``blocks``."""
        names = [name for name in self.storage.list(self.directory) if name.startswith(_COMPLETE)]
        if not names:
            return None
        listed = {block.index: block for block in self._listed()}
        for name in names:
            path = f"{self.directory}/{name}"
            try:
                content = self._read_complete(name)
            except FileNotFoundError:
                continue
            except (CacheError, OSError) as error:
                told = error if isinstance(error, CacheError) else error.strerror or error
                problem = f"{name} of set {self.digest} is not used: {told}"
                self._refuse(path, problem, aside=isinstance(error, DamagedBlock))
                continue
            wanted = content["blocks"]
            there = [listed[index] for index in wanted if index in listed]
            present = {block.index for block in (self._counting(there) if check else there)}
            if missing := [index for index in wanted if index not in present]:
                more = f" and of {len(missing) - 1:,} more" if len(missing) > 1 else ""
                problem = f"a file of block {missing[0]}{more} of set {self.digest} is missing or damaged; it is made again"
                self._refuse(path, problem, aside=True)
                continue
            if check:
                keep("indices", self._memory, self._known)
            return Complete(tuple(there), content["tokens"], content["facts"])
        return None

    def _read_complete(self, name: str) -> dict[str, Any]:
        """Content of a ``complete-<checksum>.json``."""
        data = self.storage.read(f"{self.directory}/{name}")
        if name != f"{_COMPLETE}{checksum(data)}.json":
            raise DamagedBlock(f"its {len(data):,} bytes are not those that were written")
        content = json.loads(data)
        if lacking := {"set", "tokens", "blocks", "facts"} - content.keys():
            raise CacheError(f"it lacks {', '.join(sorted(lacking))}, as if another version of raydpo had written it")
        if content["set"] != self.digest:
            raise DamagedBlock(f"it is of set {content['set']}")
        return content

    def tokens(self, block: BlockInfo) -> pa.Table:
        """Token ids of the pairs of a block, columns of ``TOKEN_SCHEMA``.

        Raises:
            DamagedBlock: if the block is gone or damaged. A damaged one is moved aside, so that it is made again.
            CacheError: if it cannot be read here.
        """
        path = f"{self.directory}/{BLOCKS}/{block.file}"
        again = "run the command again, which makes this block again"
        try:
            data = self.storage.read(path)
            if not block.is_sound(data):
                data = self.storage.read(path)  # one bad read over a network does not prove damage
            return decode_tokens(block, self.digest, data)
        except FileNotFoundError:
            raise DamagedBlock(f"block {block.name} of set {self.digest} in {self.storage} is gone; {again}") from None
        except DamagedBlock as error:
            self._refuse(path, str(error), aside=True)
            self.set_aside()
            raise DamagedBlock(f"in {self.storage}/{self.directory} {error}; it is set aside: {again}") from None
        except OSError as error:
            raise CacheError(
                f"block {block.name} in {self.storage}/{self.directory} cannot be read: {error.strerror or error}"
            ) from None

    def light(self, blocks: Sequence[BlockInfo] | None = None) -> SourceRows:
        """The rows of ``blocks`` without tokens, name and weight, in memory mapped from their indices: one chunk for each
        block that holds pairs.

        Args:
            blocks: blocks that count, in order; None = those of the whole set.

        Raises:
            CacheError: if the set is not whole, or an index cannot be read.
        """
        if blocks is None:
            whole = self.complete()
            if whole is None:
                raise CacheError(f"the set {self.digest} in {self.storage} is not complete; run the command again")
            blocks = whole.blocks
        tables: list[pa.Table] = []
        labels: dict[str, int] = {}
        sources: dict[str, int] = {}
        account = SourceReport("", "")
        for block in blocks:
            index = decode_index(block, self.digest, self._index_bytes(block))
            table = renumbered(index.light, "file", index.labels, labels)
            tables.append(renumbered(table, "source", index.sources, sources))
            account.merge(index.account)
        known = self.identity
        schema = LIGHT_SCHEMA if known is None else light_schema(known.numbers, marks=known.marks, lists=known.ranked)
        light = pa.concat_tables(tables) if tables else schema.empty_table()
        path = "" if known is None else known.path
        return SourceRows(light, None, tuple(labels), tuple(sources), account, name="", path=path, weight=1.0)

    def _listed(self) -> list[BlockInfo]:
        """Blocks of which both files are there."""
        stored = set(self.storage.list(f"{self.directory}/{BLOCKS}"))
        found = []
        for name in self.storage.list(f"{self.directory}/{INDEX}"):
            block = BlockInfo.of(name)
            if block is not None and block.file in stored:
                found.append(block)
            elif block is None and not name.startswith("."):
                problem = f"{name} in set {self.digest} is no index of a block; it is not used"
                self._refuse(f"{self.directory}/{INDEX}/{name}", problem, aside=True)
        return found

    def _counting(self, blocks: Sequence[BlockInfo]) -> list[BlockInfo]:
        """Those of ``blocks`` whose index is sound. An index that was read before is not read again until it changes."""
        if self._known is None:
            self._known = recall("indices", self._memory) or {}
        unknown = [block for block in blocks if self._known.get(block.index, 0) != self._stamp(block)]
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            sound = dict(zip(unknown, pool.map(self._is_sound, unknown), strict=True))
        stamps = {block.index: self._stamp(block) for block in unknown if sound[block]}
        # A remote index of which no copy can be kept is read each time.
        self._known.update({index: stamp for index, stamp in stamps.items() if stamp is not None})
        return [block for block in blocks if sound.get(block, True)]

    def _stamp(self, block: BlockInfo) -> list[int] | None:
        """What changes whenever the index on this machine does; None if there is none."""
        try:
            return content_stamp(self._place(block))
        except OSError:
            return None

    def _place(self, block: BlockInfo) -> str:
        """The index on this machine: itself, or its copy."""
        return f"{self._indices}/{block.index}"

    def _is_sound(self, block: BlockInfo) -> bool:
        path = f"{self.directory}/{INDEX}/{block.index}"
        try:
            data = self._index_bytes(block)
            if not block.index_is_sound(data):
                raise DamagedBlock(f"its {data.size:,} bytes are not those that were written")
            decode_index(block, self.digest, data)
        except FileNotFoundError:
            return False
        except (CacheError, OSError) as error:
            told = error if isinstance(error, CacheError) else error.strerror or error
            problem = f"index {block.index} of set {self.digest} is not used: {told}"
            self._refuse(path, problem, aside=isinstance(error, DamagedBlock))
            return False
        return True

    def _index_bytes(self, block: BlockInfo) -> pa.Buffer:
        """The bytes of an index, mapped from this machine's file. Those of a remote one are sound."""
        if self._copies is None:
            return _mapped(self._place(block))
        here = self._place(block)
        if self._known is not None and self._known.get(block.index, 0) == self._stamp(block):
            return _mapped(here)
        data = self._copies.fetch(f"{self.directory}/{INDEX}/{block.index}", block.index_is_sound)
        return _mapped(here) if os.path.isfile(here) else pa.py_buffer(data)

    def _refuse(self, path: str, problem: str, *, aside: bool) -> None:
        self._problems[path] = problem
        if aside and path not in self._damaged:
            self._damaged.append(path)


def _mapped(file: str) -> pa.Buffer:
    """Content of a local file, mapped."""
    with pa.memory_map(file) as stream:
        return stream.read_buffer()


def _without_overlaps(blocks: Sequence[BlockInfo]) -> list[BlockInfo]:
    """``blocks`` in order of file and line. Where some overlap, those that hold the most lines together stay."""
    ordered = sorted(blocks, key=lambda block: (block.span, block.index))
    if all(one.span.file != two.span.file or one.span.stop <= two.span.start for one, two in pairwise(ordered)):
        return ordered
    ordered.sort(key=lambda block: (block.span.file, block.span.stop))
    stops = [(block.span.file, block.span.stop) for block in ordered]
    # The most lines that the first n blocks hold, and whether the last of them is then used.
    most, used = [0], [False]
    for block in ordered:
        before = bisect_right(stops, (block.span.file, block.span.start), hi=len(most) - 1)
        lines = most[before] + block.span.stop - block.span.start
        used.append(lines > most[-1])
        most.append(max(lines, most[-1]))
    chosen, last = [], len(ordered)
    while last:
        block = ordered[last - 1]
        if used[last]:
            chosen.append(block)
            last = bisect_right(stops, (block.span.file, block.span.start), hi=last - 1)
        else:
            last -= 1
    return chosen[::-1]


def _short(path: str) -> str:
    return path.rsplit("/", 1)[-1]
