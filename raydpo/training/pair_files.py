"""Pairs of a training as files: the driver writes them once, and the workers of every machine map them into memory."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from raydpo.data.index import as_bytes
from raydpo.data.ragged import Ragged
from raydpo.data.rows import TOKEN_SCHEMA, TokenSource
from raydpo.data.select import TokenTables
from raydpo.data.spool import room_for
from raydpo.errors import RaydpoError
from raydpo.reference.pairs import REFERENCE_COLUMNS, SIDES
from raydpo.rundir.directory import SCRATCH
from raydpo.storage.files import Storage
from raydpo.storage.local_copy import RemoteDirectory
from raydpo.training.pairs import TrainingPairs, pair_columns

__all__ = ["PairFiles", "PairFolder"]

_FOLDER = f"{SCRATCH}/pairs"
_PAIRS, _TOKENS, _LOGPS = "pairs.arrow", "tokens.arrow", "logps.float32"
_BATCH_ROWS, _BATCH_BYTES = 10_000, 1 << 24
"""Pairs whose tokens, and bytes of log-probs, that are written at once."""


@dataclass(frozen=True)
class PairFiles:
    """The files of a set of pairs, as seen from any machine of the cluster. It is small, however many pairs there are; with
    mismatched completions it holds 8 bytes for each (``mismatch.MismatchedTokens``).

    Attributes:
        place: directory that all machines see, or the remote one of which each machine makes a copy.
        sizes: bytes of each file.
        checksum: of the file that the others are read by.
        tokens: where the token ids are; None = in a file of their own.
    """

    place: str | RemoteDirectory
    sizes: Mapping[str, int]
    checksum: str
    tokens: TokenSource | None

    def open(self) -> TrainingPairs:
        """Map the files.

        Raises:
            RaydpoError: if one of them is missing, has another length or, for ``pairs.arrow``, another content than was
                written.
        """
        directory = Path(self.place if isinstance(self.place, str) else self.place.here())
        mapped = {name: _mapped(directory / name, size) for name, size in self.sizes.items()}
        found = _checksum(mapped[_PAIRS])
        if found != self.checksum:
            raise RaydpoError(f"{directory / _PAIRS} is damaged: its checksum is {found}, expected {self.checksum}. {_FIX}")
        tokens = self.tokens or TokenTables([[pa.ipc.open_file(mapped[_TOKENS]).read_all()]])
        logps = np.frombuffer(mapped[_LOGPS], np.float32) if _LOGPS in mapped else None
        return TrainingPairs(pa.ipc.open_file(mapped[_PAIRS]).get_batch(0), tokens, logps)


class PairFolder:
    """A place for files of pairs, within a ``with`` block, at whose end they are removed. Workers that still read them then
    keep them until they end.

    The files lie in the directory of the run. If that is at a URI, they lie in a local temporary directory, and are copied
    to the URI only if other machines have to read them.

    Args:
        storage: directory of the run or the sweep.
        one_machine: whether all workers run on this machine.
    """

    def __init__(self, storage: Storage, *, one_machine: bool) -> None:
        self._storage, self._upload = storage, not storage.is_local and not one_machine
        self._stack = contextlib.ExitStack()
        self._written: set[str] = set()
        self._values: dict[str, Path] = {}  # files of log-probs, by the completions that they are of

    def __enter__(self) -> PairFolder:
        return self

    @cached_property
    def _place(self) -> Path:
        """Where the files are written. It is made when the first are, so that what fails before leaves nothing."""
        if not self._storage.is_local:
            if self._upload:
                self._stack.callback(_remove_remote, self._storage)
            return Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="raydpo-")))
        self._storage.probe()
        place = Path(self._storage.path(_FOLDER))
        self._stack.callback(_remove, place)
        place.mkdir(parents=True, exist_ok=True)
        return place

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def write(
        self,
        table: pa.Table,
        logps: Sequence[np.ndarray] = (),
        tokens: TokenSource | None = None,
        *,
        prompts: bool = False,
    ) -> PairFiles:
        """Write the files of ``table``. Equal pairs share their files, and pairs of which other tokens count that of the
        log-probs. All log-probs in this folder must be of one reference.

        Args:
            table: rows of ``data.pairs.PAIR_SCHEMA``, and the columns that ``reference.pairs.place_reference`` adds.
            logps: the log-probs that those refer to.
            tokens: where workers find the tokens by columns ``set`` and ``place``; None = write the tokens, too.
            prompts: whether evaluations need to know which pairs have the same prompt.

        Raises:
            RaydpoError: if the disk has no room for them.
        """
        if tokens is None:
            table = table.drop_columns([name for name in ("set", "place") if name in table.column_names])
        with (
            room_for("the pairs of this training", str(self._place)),
            tempfile.TemporaryDirectory(dir=self._place, prefix=".new-") as new,
        ):
            whole = Path(new) / "pairs"
            whole.mkdir()
            columns = pair_columns(table, prompts=prompts)
            _write_batches(whole / _PAIRS, columns.schema, [columns])
            values = _name("", table, columns) if logps else ""
            if logps and not _linked(self._values.get(values), whole / _LOGPS):
                _write_values(whole / _LOGPS, logps)
            if tokens is None:
                _write_batches(whole / _TOKENS, TOKEN_SCHEMA, _token_batches(table))
            sizes = {path.name: path.stat().st_size for path in whole.iterdir()}
            checksum = _checksum(_mapped(whole / _PAIRS, sizes[_PAIRS]))
            name = _name(checksum, table)
            kept = self._place / name
            # What another command left may be damaged at its full length.
            if name not in self._written or {path.name: path.stat().st_size for path in kept.glob("*")} != sizes:
                shutil.rmtree(kept, ignore_errors=True)
                whole.rename(kept)
                self._written.add(name)
            self._values.setdefault(values, kept / _LOGPS)
        if not self._upload:
            return PairFiles(str(kept), sizes, checksum, tokens)
        remote = f"{_FOLDER}/{name}"
        if {entry.name: entry.size for entry in self._storage.entries(remote)} != sizes:
            self._storage.upload(kept, remote)
        return PairFiles(RemoteDirectory.now(self._storage, remote), sizes, checksum, tokens)


_FIX = (
    "Workers read the pairs of this training from it: run the command again, which writes it anew. If this machine does not "
    "see the directory that the command writes to, set output to a directory that all machines share, or to a URI"
)


def _mapped(path: Path, size: int) -> pa.Buffer:
    """The file's content without a copy.

    Raises:
        RaydpoError: if it is missing, or its length is not ``size``.
    """
    try:
        with open(path, "rb") as file:
            found = file.seek(0, 2)
            if found == size:
                # A private mapping: file systems in user space may refuse shared ones.
                return pa.py_buffer(mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ))
    except FileNotFoundError:
        raise RaydpoError(f"{path} is missing. {_FIX}") from None
    raise RaydpoError(f"{path} is damaged: it has {found:,} bytes, expected {size:,}. {_FIX}")


def _checksum(data: pa.Buffer) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _name(checksum: str, table: pa.Table, columns: pa.RecordBatch | None = None) -> str:
    """Digest of all that the files of ``table`` hold. Keys are digests of the tokens, and sums stand for log-probs.

    Args:
        columns: what ``pair_columns`` gives, for the digest of what the file of log-probs holds.
    """
    digest = hashlib.blake2b(checksum.encode(), digest_size=16)
    for name in () if columns is None else (*REFERENCE_COLUMNS[:3], *(f"{side}_tokens" for side in SIDES)):
        digest.update(columns[name].to_numpy())
    for side in ("chosen", "rejected"):
        for chunk in table[f"{side}_key"].chunks:
            digest.update(as_bytes(chunk))
    return digest.hexdigest()


def _write_batches(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    with pa.ipc.new_file(path, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def _token_batches(table: pa.Table) -> Iterator[pa.RecordBatch]:
    columns = [Ragged.of(table[name]) for name in TOKEN_SCHEMA.names]
    for start in range(0, table.num_rows, _BATCH_ROWS):
        stop = min(start + _BATCH_ROWS, table.num_rows)
        yield pa.RecordBatch.from_arrays([column.lists(start, stop) for column in columns], schema=TOKEN_SCHEMA)


def _linked(written: Path | None, path: Path) -> bool:
    """Make ``path`` another name of the file ``written``, if there is one and its file system can."""
    if written is None:
        return False
    try:
        os.link(written, path)
    except OSError:
        return False
    return True


def _write_values(path: Path, arrays: Sequence[np.ndarray]) -> None:
    with open(path, "wb") as file:
        for values in arrays:
            data = memoryview(np.ascontiguousarray(values)).cast("B")
            for start in range(0, len(data), _BATCH_BYTES):
                file.write(data[start : start + _BATCH_BYTES])


def _remove(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    with contextlib.suppress(OSError):  # workers may have left something beside it
        place.parent.rmdir()


def _remove_remote(storage: Storage) -> None:
    with contextlib.suppress(OSError, RaydpoError):  # what stays only takes space, and the result must not be lost
        storage.delete_directory(_FOLDER)
