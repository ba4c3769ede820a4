"""The reference cache: immutable Parquet parts of (completion key -> per-token log-probs), one directory an identity.

    <cache>/<identity digest>/identity.json       what the directory is, for people; not authoritative
    <cache>/<identity digest>/parts/part-*.parquet
    <cache>/<identity digest>/unverified/         imported rows that nobody has scored again yet
    <cache>/<identity digest>/set-aside/          damaged and foreign files that a build has moved out of the way
    <cache>/<identity digest>/claims/             what builds are scoring at the moment, see ``claims``

A part counts if and only if its bytes have the checksum in its name and the identity inside it is the one asked for. There
is no manifest to corrupt and no lock: two builders at worst score a row twice. A reader takes the longest row, then the
first by order: compacted parts before others, each by name. Of unverified rows the one that was imported last answers, so
that a wrong import is put right by another one.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa

from raydpo.errors import CacheError, RaydpoError
from raydpo.local_copy import LocalCopy
from raydpo.reference.identity import ReferenceIdentity
from raydpo.reference.index import KeyIndex, as_bytes
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
from raydpo.storage import Storage, remove_stale_temporaries

__all__ = ["PARTS", "SET_ASIDE", "UNVERIFIED", "ReferenceCache"]

PARTS = "parts"
"""Folder of an identity with the parts that count."""
UNVERIFIED = "unverified"
"""Folder of imported parts that nothing has verified yet."""
SET_ASIDE = "set-aside"
"""Folder of files that are not used, such as damaged parts."""
MOST_LISTINGS = 10
"""A reader whose parts are compacted away lists them anew, so often at most."""


class ReferenceCache:
    """The log-probs of one reference.

    Args:
        storage: the cache's root, which may hold other identities too.
        identity: whose log-probs are wanted.
        unverified: whether imported rows that have not been verified count.

    Attributes:
        builder: stands in the names of the parts that are committed through this object.
        transformers: the versions that computed the parts that count, as of the last look.
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
        """Open the cache at ``uri`` for an identity, a prefix of its digest, or the only one there is.

        Raises:
            CacheError: if the choice is not unique.
        """
        storage = Storage(uri)
        if isinstance(identity, ReferenceIdentity):
            return cls(storage, identity, unverified=unverified)
        found = [one for one in cls.identities(storage) if one.digest.startswith(identity or "")]
        if len(found) != 1:
            wanted = f"that begin with {identity!r}" if identity else ""
            raise CacheError(f"the cache at {storage} holds {len(found)} identities {wanted}".rstrip() + (
                f" ({', '.join(one.digest for one in found)}); say which one" if found else
                "; build it with 'raydpo score'"))
        return cls(storage, found[0], unverified=unverified)

    @staticmethod
    def identities(storage: Storage) -> list[ReferenceIdentity]:
        """All identities of which the cache holds at least one readable part."""
        found = []
        for name in storage.list():
            paths = [f"{name}/{folder}/{part}" for folder in (PARTS, UNVERIFIED)
                     for part in storage.list(f"{name}/{folder}") if is_part(part)] if len(name) == 32 else ()
            for path in paths:
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
        """One sentence for each file that is not used, and why."""
        return list(self._problems.values()) + ([] if self._copies is None else list(self._copies.problems))

    # ---- writing

    def prepare(self, description: dict[str, object]) -> int:
        """Make the directory ready for a build: writable, described, free of what killed builders left half-written.

        Returns:
            Number of temporary files removed.
        """
        self.storage.probe()
        removed = remove_stale_temporaries(self.storage, self.directory)
        removed += remove_stale_temporaries(self.storage, f"{self.directory}/{PARTS}")
        if not self.storage.exists(f"{self.directory}/identity.json"):
            text = json.dumps({"identity": json.loads(self.identity.to_json())} | description, indent=2)
            self.storage.write(f"{self.directory}/identity.json", text.encode())
        if self._copies is not None:
            for folder in (PARTS, UNVERIFIED):
                self._copies.prune(f"{self.directory}/{folder}", set(self.storage.list(f"{self.directory}/{folder}")))
        return removed

    def description(self) -> dict[str, object]:
        """What identity.json says, for people; empty if it is gone or unreadable."""
        try:
            return json.loads(self.storage.read(f"{self.directory}/identity.json"))
        except (OSError, ValueError):
            return {}

    def commit(self, keys: Sequence[bytes], logps: Sequence[np.ndarray], provenance: dict[str, object]) -> str:
        """Write one part, whole or not at all, and return its name.

        Args:
            keys: one for each completion.
            logps: float32 [tokens] for each completion.

        Raises:
            CacheError: if a value is not a log-prob; nothing is written then.
        """
        tokens = np.array([len(values) for values in logps], np.int32)
        return self.commit_rows(pa.array([bytes(key) for key in keys], KEY_TYPE), tokens, ragged(logps), provenance)

    def commit_rows(self, keys: pa.Array, tokens: np.ndarray, values: pa.ListArray | np.ndarray,
                    provenance: dict[str, object], *, verified: bool = True) -> str:
        """The same from columns: list<float32> log-probs of each token, or float64 sums over so many tokens."""
        name, data = encode_part(self.identity, keys, tokens, values, provenance, builder=self.builder,
                                 time_ns=time.time_ns())
        self.storage.write(f"{self.directory}/{PARTS if verified else UNVERIFIED}/{name}", data)
        return name

    def set_aside(self) -> list[str]:
        """Move damaged files and parts of another identity out of the way of later readers; the names of those that could be
        moved.

        Their rows count as missing already. Nothing is deleted: ``raydpo cache gc`` does that.
        """
        moved = []
        for path in self._damaged:
            try:
                self.storage.move(path, f"{self.directory}/{SET_ASIDE}/{path.rsplit('/', 1)[-1]}")
                moved.append(path)
            except OSError:
                continue  # not ours to move, or another builder did it
        return moved

    # ---- reading

    def parts(self, folder: str = PARTS) -> list[PartInfo]:
        """What the footers of all readable parts of this identity say, in order of name; ``problems`` names the others.

        Superseded parts are among them. Their rows are not looked at.
        """
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
        """Which of the wanted completions are stored with at least so many tokens: bool [len(keys)].

        Args:
            skip: of the name of a part that is not known yet, whether it need not be looked at.
        """
        self.refresh(skip=skip)
        return self.locate(as_bytes(keys), tokens)[0] >= 0

    def lookup(self, keys: Sequence[bytes] | pa.Array) -> pa.Table:
        """Stored rows of the given completions, in their order: ``key``, ``tokens`` (0 if missing), ``logps`` (null if
        missing, else float32 of each token)."""
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
        """Each part that answers some of the completions, read once: which of them, the part, and their rows in it.

        Those that are not stored with so many tokens do not come up. What a compaction takes away on the way is found again
        in the part that replaced it.

        Args:
            keys: uint8 [completions, 16]. tokens: int32 [completions].

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
                    self._forget()  # gone or damaged meanwhile: look again for what is left
                    open_ = open_[np.isin(parts, numbers[numbers >= number])]
                    break
                yield open_[mine], part, rows[mine]
            else:
                return
        raise CacheError(f"the parts in {self.storage}/{self.directory} change faster than they can be read; wait until "
                         "compactions and gc are done")

    def locate(self, keys: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Number of the part and row in it that answers each completion with so many tokens, or -1, as of the last look:
        int32 [keys] both."""
        parts, rows = np.full(len(keys), -1, np.int32), np.full(len(keys), -1, np.int32)
        sums = exactly(keys, tokens)
        for index, wanted in ((self._imported, sums), (self._sums, sums), (self._tokens, keys)):  # the last one wins
            locators = index.find(wanted)
            found = np.flatnonzero(locators >= 0)
            found = found[index.tokens[locators[found]] >= tokens[found]]
            parts[found], rows[found] = index.part[locators[found]], index.row[locators[found]]
        return parts, rows

    def keys(self) -> pa.Array:
        """The distinct completions of which log-probs of tokens are stored."""
        self.refresh()
        keys = self._tokens.key_bytes()[self._tokens.winners()]
        return pa.FixedSizeBinaryArray.from_buffers(KEY_TYPE, len(keys), [None, pa.py_buffer(keys)])

    def scored_tokens(self) -> np.ndarray:
        """Tokens of each of ``keys``: int32 [keys]."""
        self.refresh()
        return self._tokens.tokens[self._tokens.winners()]

    def read(self, path: str) -> Part:
        """The part at ``path`` with its values.

        Raises:
            CacheError: if it does not count.
        """
        part = self._read(path, values=True)
        if part is None:
            raise CacheError(self._problems.get(path, f"part {path} is gone"))
        return part

    def paths(self) -> list[str]:
        """Of the parts that count, by number, as of the last look."""
        return list(self._paths)

    def superseded(self) -> np.ndarray:
        """Of each part by number, whether a compacted part took over its rows, as of the last look: bool [parts]."""
        return np.array([_short(path) in self._superseded for path in self._paths], bool)

    def winners(self) -> tuple[np.ndarray, np.ndarray]:
        """Number of the part and row in it that answers each distinct key, int [keys] both, as of the last look."""
        rows = self._tokens.winners()
        return self._tokens.part[rows], self._tokens.row[rows]

    def rows_passed_over(self) -> int:
        """Rows of tokens that do not answer because another row does, as of the last look."""
        return len(self._tokens.part) - len(self._tokens.winners())

    def stored_twice(self, builder: str, since: set[str]) -> int:
        """Completions that ``builder`` committed and others, too, in parts whose names are not in ``since``; as of the last
        look."""
        new = [number for number, path in enumerate(self._paths) if _short(path) not in since]
        mine = [number for number in new if builder_of(_short(self._paths[number])) == builder]
        if len(mine) == len(new):
            return 0
        theirs = KeyIndex()
        keys, parts = self._tokens.key_bytes(), self._tokens.part
        chosen = np.isin(parts, new) & ~np.isin(parts, mine)
        theirs.add(keys[chosen], self._tokens.tokens[chosen], 0)
        return int((theirs.find(keys[np.isin(parts, mine)]) >= 0).sum())

    def is_unverified(self, number: int) -> bool:
        """Whether this part was imported and nothing has verified it yet."""
        return _is_unverified(self._paths[number])

    def passed_over(self, *, by_verified: bool = False) -> list[str]:
        """Paths of the imported parts of which no row answers any more, because later imports or verified rows do; as of the
        last look. A cache that was opened without ``unverified`` knows of none.

        Args:
            by_verified: only those all of whose rows are answered by verified ones.
        """
        tokens, mine = self._imported.tokens, self._imported.part
        answering, _ = self.locate(exactly(self._imported.key_bytes(), tokens), tokens)  # mixed in twice is not mixed in
        needed = mine[np.isin(answering, mine)] if by_verified else answering
        return [self._paths[number] for number in sorted({*mine.tolist()} - {*needed.tolist()})]

    def holds_tokens(self, number: int) -> bool:
        """Whether this part is verified and has log-probs of tokens."""
        return number not in self._of_sums and f"/{PARTS}/" in self._paths[number]

    def reload(self) -> None:
        """Look at all parts anew."""
        self._forget()
        self.refresh()

    def refresh(self, *, skip: Callable[[str], bool] | None = None) -> None:
        """Take note of the parts that came and went since the last look."""
        listed = []
        for folder in (PARTS, UNVERIFIED) if self.unverified else (PARTS,):
            for name in self.storage.list(f"{self.directory}/{folder}"):
                if is_part(name):
                    listed.append(f"{self.directory}/{folder}/{name}")
                elif name.endswith(".parquet") and not name.startswith("."):
                    self._problems[f"{self.directory}/{folder}/{name}"] = (
                        f"{name} in {self.directory} is not named as raydpo names its parts; it is not used")
        imports = {path for path in listed if _is_unverified(path)}
        # An index prefers what it was given first, and a later import is to win.
        if not self._known <= set(listed) or (imports & self._known and imports - self._known):
            self._forget()
        fresh = [path for path in listed if path not in self._known and not (skip and skip(_short(path)))]
        compacted = [path for path in fresh if builder_of(_short(path)) == COMPACTED]
        parts = {path: part for path in compacted if (part := self._read(path, values=False)) is not None}
        self._superseded |= {name for part in parts.values() for name in part.info.supersedes}
        # Compacted parts first. What they superseded comes last: it answers only what nobody else does any more.
        ordered = sorted(fresh, key=lambda path: (_short(path) in self._superseded, path not in parts, path))
        for path in [*(path for path in ordered if path not in imports), *sorted(imports & set(fresh), reverse=True)]:
            part = parts.get(path) or (None if path in compacted else self._read(path, values=False))
            if part is not None:
                if part.info.per_token:
                    self._tokens.add(part.keys, part.tokens, len(self._paths))
                else:
                    index = self._imported if path in imports else self._sums
                    index.add(exactly(as_bytes(part.keys), part.tokens), part.tokens, len(self._paths))
                    self._of_sums.add(len(self._paths))
                self._paths.append(path)
                made = [one["of"] for one in part.info.provenance.get("parts", ())] or [part.info.provenance]
                self.transformers |= {one["transformers"] for one in made if "transformers" in one}
            self._known.add(path)  # not before: reading may raise, and the next look is to read it

    def _forget(self) -> None:
        self._known: set[str] = set()
        self._superseded: set[str] = set()
        self._paths: list[str] = []  # of the parts that count, by number
        self._tokens, self._sums, self._imported = KeyIndex(), KeyIndex(), KeyIndex()
        self._of_sums: set[int] = set()  # numbers of the parts in ``_sums`` and ``_imported``
        self.transformers: set[str] = set()
        self._problems: dict[str, str] = {}
        self._damaged: list[str] = []

    def _read(self, path: str, *, values: bool) -> Part | None:
        """A part, or None if it is gone, damaged, unreadable or another's; ``problems`` says which.

        Raises:
            RaydpoError: if the memory does not suffice.
        """
        name = _short(path)
        try:
            data = (self.storage.read(path) if self._copies is None else
                    self._copies.fetch(path, lambda data: digest_is_sound(name, data)))
            if not digest_is_sound(name, data):
                data = self.storage.read(path)  # one bad read over a network is no damage
            part = decode_part(name, data, values=values)
        except FileNotFoundError:
            return None
        except MemoryError as error:
            raise RaydpoError(f"the memory does not suffice to read part {name} in {self.storage}/{self.directory} "
                              f"({error}); it stays where it is. Give the process more memory, and run it again") from None
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
            f"({'; '.join(self.identity.differences(info.identity))}); it is not used")
        self._damaged.append(path)
        return False


def exactly(keys: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Keys of sums, uint8 [rows, 16]: a sum answers for its very number of tokens alone, which is therefore mixed in."""
    mixed = np.array(keys)
    mixed.view("<u4")[:, 3] ^= tokens.astype(np.uint32)
    return mixed


def _is_unverified(path: str) -> bool:
    return f"/{UNVERIFIED}/" in path


def _footer(storage: Storage, path: str) -> PartInfo:
    return storage.look_into(path, lambda stream: read_footer(_short(path), stream, stream.size()))


def _short(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _not_used(name: str, error: Exception) -> str:
    if isinstance(error, CacheError):
        return f"{error}; it is not used"
    return f"part {name} cannot be read ({error.strerror or error}) and is not used; its rows count as missing"
