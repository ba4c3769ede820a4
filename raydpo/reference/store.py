"""The reference cache: immutable Parquet parts (completion key -> log-probs per token), one directory per identity.

    <cache>/<identity digest>/identity.json       description for people; not authoritative
    <cache>/<identity digest>/parts/part-*.parquet
    <cache>/<identity digest>/unverified/         imported rows that have not been scored again yet
    <cache>/<identity digest>/set-aside/          damaged and foreign files, moved here by a build
    <cache>/<identity digest>/claims/             what builds are scoring now, see ``claims``

A part counts if and only if its bytes have the checksum in its name and the identity in its metadata is the requested one.
There is no manifest that could be corrupted, and no lock: two builders at worst score a row twice. Of several rows for one
completion a reader takes the longest, then the first in order: compacted parts before others, each by name. Of unverified
rows the one imported last answers, so that a wrong import can be corrected by another one.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa

from raydpo.data.index import KeyIndex, as_bytes
from raydpo.errors import CacheError, RaydpoError
from raydpo.reference.identity import ReferenceIdentity
from raydpo.reference.part import (
    COMPACTED,
    KEY_TYPE,
    DamagedPart,
    Part,
    PartInfo,
    builder_of,
    decode_part,
    digest_is_sound,
    encode_part,
    is_part,
    ragged,
    read_footer,
)
from raydpo.storage.files import Storage, remove_stale_temporaries
from raydpo.storage.local_copy import LocalCopy
from raydpo.tokens.store import SETS

__all__ = ["PARTS", "SET_ASIDE", "UNVERIFIED", "ReferenceCache"]

PARTS = "parts"
"""Folder of an identity with the parts that count."""
UNVERIFIED = "unverified"
"""Folder of imported parts that are not verified yet."""
SET_ASIDE = "set-aside"
"""Folder of files that are not used, such as damaged parts."""
MOST_LISTINGS = 10
"""How often a reader lists the parts again after some of them were compacted away."""


class ReferenceCache:
    """The stored log-probs of one reference.

    Args:
        storage: root of the cache, which may hold other identities, too.
        identity: the reference.
        unverified: whether imported rows that are not verified count.

    Attributes:
        builder: tag in the names of the parts that are committed through this object.
        transformers: versions of transformers that computed the parts in use, as of the last refresh.
        fused: whether fused functions (``model.fused``) computed the parts in use: {True}, {False}, or both.
    """

    def __init__(self, storage: Storage, identity: ReferenceIdentity, *, unverified: bool = False) -> None:
        self.storage = storage
        self.identity = identity
        self.unverified = unverified
        self.builder = uuid.uuid4().hex[:8]
        self._copies = None if storage.is_local else LocalCopy(storage)
        self._forget()

    @classmethod
    def open(cls, uri: str, identity: ReferenceIdentity | str | None = None, *, unverified: bool = False) -> ReferenceCache:
        """Open the cache at ``uri``.

        Args:
            identity: an identity, a prefix of its digest, or None for the only one in the cache.

        Raises:
            CacheError: if the choice is not unique.
        """
        storage = Storage(uri)
        if isinstance(identity, ReferenceIdentity):
            return cls(storage, identity, unverified=unverified)
        found = [one for one in cls.identities(storage) if one.digest.startswith(identity or "")]
        if not found and not identity:
            only = ", only tokenised sets" if storage.list(SETS) else ""
            raise CacheError(f"the cache at {storage} holds no reference{only}; 'raydpo score' makes one")
        if len(found) != 1:
            wanted = f"that begin with {identity!r}" if identity else ""
            raise CacheError(
                f"the cache at {storage} holds {len(found)} identities {wanted}".rstrip()
                + (f" ({', '.join(one.digest for one in found)}); choose one" if found else "; build it with 'raydpo score'")
            )
        return cls(storage, found[0], unverified=unverified)

    @staticmethod
    def identities(storage: Storage) -> list[ReferenceIdentity]:
        """All identities of which the cache holds at least one readable part."""
        found = []
        for name in storage.list():
            folders = [f"{name}/{folder}" for folder in (PARTS, UNVERIFIED)] if len(name) == 32 else []
            for path in (f"{folder}/{part}" for folder in folders for part in storage.list(folder) if is_part(part)):
                try:
                    identity = _footer(storage, path).identity
                except (CacheError, OSError):
                    continue
                if identity.digest == name:
                    found.append(identity)
                    break
        return found

    @property
    def directory(self) -> str:
        return self.identity.digest

    @property
    def problems(self) -> list[str]:
        """One sentence for each file that is not used, with the reason."""
        return list(self._problems.values()) + ([] if self._copies is None else list(self._copies.problems))

    # ---- writing

    def prepare(self, description: dict[str, object]) -> None:
        """Make the directory ready for a build: check that it is writable, write identity.json, and delete temporary files
        of builders that were killed."""
        self.storage.probe()
        for folder in (self.directory, f"{self.directory}/{PARTS}"):
            remove_stale_temporaries(self.storage, folder)
        if not self.storage.exists(f"{self.directory}/identity.json"):
            text = json.dumps({"identity": json.loads(self.identity.to_json())} | description, indent=2)
            self.storage.write(f"{self.directory}/identity.json", text.encode())
        if self._copies is not None:
            for folder in (PARTS, UNVERIFIED):
                self._copies.prune(f"{self.directory}/{folder}", set(self.storage.list(f"{self.directory}/{folder}")))

    def description(self) -> dict[str, object]:
        """Content of identity.json, for people; empty if it is missing or unreadable."""
        try:
            return json.loads(self.storage.read(f"{self.directory}/identity.json"))
        except (OSError, ValueError):
            return {}

    def commit(self, keys: Sequence[bytes], logps: Sequence[np.ndarray], provenance: dict[str, object]) -> str:
        """Write one part, whole or not at all.

        Args:
            keys: one per completion.
            logps: float32 [tokens] per completion, nats.

        Returns:
            Name of the part.

        Raises:
            CacheError: if a value is not a log-prob; nothing is written then.
        """
        tokens = np.array([len(values) for values in logps], np.int32)
        return self.commit_rows(pa.array([bytes(key) for key in keys], KEY_TYPE), tokens, ragged(logps), provenance)

    def commit_rows(
        self,
        keys: pa.Array,
        tokens: np.ndarray,
        values: pa.ListArray | np.ndarray,
        provenance: dict[str, object],
        *,
        verified: bool = True,
    ) -> str:
        """``commit`` from columns. ``values``: log-probs per token, list<float32>, or sums of ``tokens`` tokens, float64."""
        name, data = encode_part(
            self.identity, keys, tokens, values, provenance, builder=self.builder, time_ns=time.time_ns()
        )
        self.storage.write(f"{self.directory}/{PARTS if verified else UNVERIFIED}/{name}", data)
        return name

    def set_aside(self) -> None:
        """Move damaged files and parts of another identity to the folder ``set-aside``, where readers do not look.

        Their rows count as missing already. Nothing is deleted: ``raydpo cache gc`` does that.
        """
        for path in self._damaged:
            with contextlib.suppress(OSError):  # we may not move it, or another builder did
                self.storage.move(path, f"{self.directory}/{SET_ASIDE}/{_short(path)}")

    # ---- reading

    def parts(self, folder: str = PARTS) -> list[PartInfo]:
        """Footers of all readable parts of this identity in order of name, superseded ones included. Rows are not read;
        ``problems`` names the parts that cannot be read."""
        infos = []
        for name in self.storage.list(f"{self.directory}/{folder}"):
            if is_part(name):
                path = f"{self.directory}/{folder}/{name}"
                try:
                    info = _footer(self.storage, path)
                except FileNotFoundError:
                    continue
                except (CacheError, OSError) as error:
                    self._problems[path] = _not_used(name, error)
                    continue
                if self._is_ours(path, info):
                    infos.append(info)
        return infos

    def covers(self, keys: pa.Array, tokens: np.ndarray, *, skip: Callable[[str], bool] | None = None) -> np.ndarray:
        """Which of the wanted completions are stored with at least ``tokens`` tokens: bool [keys].

        Args:
            skip: called with the name of a part that is not known yet; True = do not read it.
        """
        self.refresh(skip=skip)
        return self.locate(as_bytes(keys), tokens)[0] >= 0

    def lookup(self, keys: Sequence[bytes] | pa.Array) -> pa.Table:
        """Stored rows of the given completions, in their order.

        Returns:
            Table of ``key``, ``tokens`` (0 if missing) and ``logps`` (float32 per token, null if missing).
        """
        wanted = keys if isinstance(keys, pa.Array) else pa.array([bytes(key) for key in keys], KEY_TYPE)
        tokens, rows, count = np.zeros(len(wanted), np.int32), np.full(len(wanted), -1), 0
        chunks = [pa.array([], pa.list_(pa.float32()))]
        for places, part, found in self.answers(as_bytes(wanted), np.ones(len(wanted), np.int32)):
            if part.logps is not None:
                chunks.append(part.logps.take(pa.array(found)))
                tokens[places] = part.tokens[found]
                rows[places] = count + np.arange(len(places))
                count += len(places)
        logps = pa.concat_arrays(chunks).take(pa.array(rows, mask=rows < 0))
        return pa.table({"key": wanted, "tokens": pa.array(tokens), "logps": logps})

    def answers(self, keys: np.ndarray, tokens: np.ndarray) -> Iterator[tuple[np.ndarray, Part, np.ndarray]]:
        """Yield each part that answers some of the completions once, as (indices of the completions, part, their rows in
        it).

        Completions that are not stored with ``tokens`` tokens do not appear. If a compaction deletes parts meanwhile, their
        rows are found in the part that replaced them.

        Args:
            keys: uint8 [completions, 16].
            tokens: int32 [completions].

        Raises:
            CacheError: if parts vanish faster than they can be read.
        """
        open_ = np.arange(len(keys))
        for _ in range(MOST_LISTINGS):
            self.refresh()
            parts, rows = self.locate(keys[open_], tokens[open_])
            order = np.argsort(parts, kind="stable")[np.count_nonzero(parts < 0) :]
            numbers, starts = np.unique(parts[order], return_index=True)
            for number, (start, stop) in zip(numbers, pairwise([*starts, len(order)]), strict=True):
                mine = order[start:stop]
                part = self._read(self._paths[number], values=True)
                if part is None:
                    self._forget()  # deleted or damaged meanwhile: list the parts again for the rest
                    open_ = open_[np.isin(parts, numbers[numbers >= number])]
                    break
                yield open_[mine], part, rows[mine]
            else:
                return
        raise CacheError(
            f"the parts in {self.storage}/{self.directory} change faster than they can be read; wait until "
            "compactions and gc are done"
        )

    def locate(self, keys: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Part and row in it that answer each completion with at least ``tokens`` tokens, as of the last refresh, or -1:
        int32 [keys] each."""
        parts, rows = np.full(len(keys), -1, np.int32), np.full(len(keys), -1, np.int32)
        sums = exactly(keys, tokens)
        for index, wanted in ((self._imported, sums), (self._sums, sums), (self._tokens, keys)):  # the last one wins
            locators = index.find(wanted)
            found = np.flatnonzero(locators >= 0)
            found = found[index.tokens[locators[found]] >= tokens[found]]
            parts[found], rows[found] = index.part[locators[found]], index.row[locators[found]]
        return parts, rows

    def keys(self) -> pa.Array:
        """Distinct keys of the completions of which log-probs per token are stored."""
        self.refresh()
        keys = self._tokens.keys[self._tokens.winners]
        return pa.FixedSizeBinaryArray.from_buffers(KEY_TYPE, len(keys), [None, pa.py_buffer(keys)])

    def scored_tokens(self) -> np.ndarray:
        """Tokens stored of each of ``keys()``: int32 [keys]."""
        self.refresh()
        return self._tokens.tokens[self._tokens.winners]

    def read(self, path: str) -> Part:
        """The part at ``path`` with its values.

        Raises:
            CacheError: if it is not used.
        """
        part = self._read(path, values=True)
        if part is None:
            raise CacheError(self._problems.get(path, f"part {path} is gone"))
        return part

    def paths(self) -> list[str]:
        """Paths of the parts in use, by number, as of the last refresh."""
        return list(self._paths)

    def superseded(self) -> np.ndarray:
        """Whether a compacted part took over the rows of each part, by number, as of the last refresh: bool [parts]."""
        return np.array([_short(path) in self._superseded for path in self._paths], bool)

    def winners(self) -> tuple[np.ndarray, np.ndarray]:
        """Number of the part, and row in it, that answers each distinct key, as of the last refresh. Both int [keys]."""
        rows = self._tokens.winners
        return self._tokens.part[rows], self._tokens.row[rows]

    def rows_passed_over(self) -> int:
        """Number of rows per token that do not answer because another row does, as of the last refresh."""
        return len(self._tokens.part) - len(self._tokens.winners)

    def stored_twice(self, builder: str, since: set[str]) -> int:
        """Number of completions that ``builder`` and others committed in parts not in ``since``, as of the last refresh."""
        new = [number for number, path in enumerate(self._paths) if _short(path) not in since]
        mine = [number for number in new if builder_of(_short(self._paths[number])) == builder]
        if len(mine) == len(new):
            return 0
        theirs = KeyIndex()
        keys, parts = self._tokens.keys, self._tokens.part
        chosen = np.isin(parts, new) & ~np.isin(parts, mine)
        theirs.add((keys[chosen], self._tokens.tokens[chosen], 0))
        return int((theirs.find(keys[np.isin(parts, mine)]) >= 0).sum())

    def is_unverified(self, number: int) -> bool:
        """Whether this part was imported and is not verified yet."""
        return _is_unverified(self._paths[number])

    def passed_over(self, *, by_verified: bool = False) -> list[str]:
        """Paths of imported parts of which no row answers any more, because later imports or verified rows do, as of the
        last refresh. Empty for a cache opened without ``unverified``.

        Args:
            by_verified: only parts all of whose rows are answered by verified ones.
        """
        tokens, mine = self._imported.tokens, self._imported.part
        answering, _ = self.locate(exactly(self._imported.keys, tokens), tokens)  # mixing in twice restores the key
        needed = mine[np.isin(answering, mine)] if by_verified else answering
        return [self._paths[number] for number in sorted({*mine.tolist()} - {*needed.tolist()})]

    def holds_tokens(self, number: int) -> bool:
        """Whether this part is verified and has log-probs per token."""
        return number not in self._of_sums and f"/{PARTS}/" in self._paths[number]

    def reload(self) -> None:
        """Read all parts again."""
        self._forget()
        self.refresh()

    def refresh(self, *, skip: Callable[[str], bool] | None = None) -> None:
        """Take note of parts that were added or deleted since the last refresh. ``skip``: see ``covers``."""
        listed = []
        for folder in (PARTS, UNVERIFIED) if self.unverified else (PARTS,):
            for name in self.storage.list(f"{self.directory}/{folder}"):
                if is_part(name):
                    listed.append(f"{self.directory}/{folder}/{name}")
                elif name.endswith(".parquet") and not name.startswith("."):
                    self._problems[f"{self.directory}/{folder}/{name}"] = (
                        f"{name} in {self.directory} has no valid name of a part; it is not used"
                    )
        imports = {path for path in listed if _is_unverified(path)}
        # The index prefers rows added first, but a later import must win: start again.
        if not self._known <= set(listed) or (imports & self._known and imports - self._known):
            self._forget()
        fresh = [path for path in listed if path not in self._known and not (skip and skip(_short(path)))]
        compacted = [path for path in fresh if builder_of(_short(path)) == COMPACTED]
        parts = {path: part for path in compacted if (part := self._read(path, values=False)) is not None}
        self._superseded |= {name for part in parts.values() for name in part.info.supersedes}
        # Compacted parts first. Superseded parts come last: they answer only what no other part does.
        ordered = sorted(fresh, key=lambda path: (_short(path) in self._superseded, path not in parts, path))
        added: dict[KeyIndex, list[tuple[np.ndarray, np.ndarray, int]]]
        added = {index: [] for index in (self._tokens, self._sums, self._imported)}
        try:
            for path in [*(path for path in ordered if path not in imports), *sorted(imports & set(fresh), reverse=True)]:
                part = parts.get(path) or (None if path in compacted else self._read(path, values=False))
                if part is not None:
                    keys, number = as_bytes(part.keys), len(self._paths)
                    if part.info.per_token:
                        added[self._tokens].append((keys, part.tokens, number))
                    else:
                        index = self._imported if path in imports else self._sums
                        added[index].append((exactly(keys, part.tokens), part.tokens, number))
                        self._of_sums.add(number)
                    self._paths.append(path)
                    made = [one["of"] for one in part.info.provenance.get("parts", ())] or [part.info.provenance]
                    self.transformers |= {one["transformers"] for one in made if "transformers" in one}
                    self.fused |= {one["layout"].endswith(", fused") for one in made if "layout" in one}
                self._known.add(path)  # only now: reading may raise, and the next refresh must read this part again
        finally:
            for index, entries in added.items():
                index.add(*entries)

    def _forget(self) -> None:
        self._known: set[str] = set()
        self._superseded: set[str] = set()
        self._paths: list[str] = []  # of the parts in use, by number
        self._tokens, self._sums, self._imported = KeyIndex(), KeyIndex(), KeyIndex()
        self._of_sums: set[int] = set()  # numbers of the parts in ``_sums`` and ``_imported``
        self.transformers: set[str] = set()
        self.fused: set[bool] = set()
        self._problems: dict[str, str] = {}
        self._damaged: list[str] = []

    def _read(self, path: str, *, values: bool) -> Part | None:
        """A part, or None if it is missing, damaged, unreadable or of another identity; ``problems`` tells which.

        Raises:
            RaydpoError: if there is not enough memory.
        """
        name = _short(path)
        try:
            if self._copies is None:
                data = self.storage.read(path)
            else:
                data = self._copies.fetch(path, lambda data: digest_is_sound(name, data))
            if not digest_is_sound(name, data):
                data = self.storage.read(path)  # one bad read over a network does not prove damage
            part = decode_part(name, data, values=values)
        except FileNotFoundError:
            return None
        except MemoryError as error:
            raise RaydpoError(
                f"there is not enough memory to read part {name} in {self.storage}/{self.directory} "
                f"({error}); it stays where it is. Give the process more memory, and run it again"
            ) from None
        except (CacheError, OSError) as error:
            self._problems[path] = _not_used(name, error)
            if isinstance(error, DamagedPart):
                self._damaged.append(path)
            return None
        return part if self._is_ours(path, part.info) else None

    def _is_ours(self, path: str, info: PartInfo) -> bool:
        if info.identity == self.identity:
            return True
        self._problems[path] = (
            f"part {info.name} in {self.directory} was made by another reference, {info.identity.digest} "
            f"({'; '.join(self.identity.differences(info.identity))}); it is not used"
        )
        self._damaged.append(path)
        return False


def exactly(keys: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Keys for sums, uint8 [rows, 16]: mixed with the number of tokens, since a sum answers only for exactly that number."""
    mixed = np.array(keys)
    mixed.view("<u4")[:, 3] ^= tokens.astype(np.uint32)
    return mixed


def _is_unverified(path: str) -> bool:
    return f"/{UNVERIFIED}/" in path


def _footer(storage: Storage, path: str) -> PartInfo:
    return storage.look_into(path, lambda stream: read_footer(_short(path), stream, stream.size()))


def _short(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _not_used(name: str, error: CacheError | OSError) -> str:
    if isinstance(error, CacheError):
        return f"{error}; it is not used"
    return f"part {name} cannot be read ({error.strerror or error}) and is not used; its rows count as missing"
