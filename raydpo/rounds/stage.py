"""Files of the stages of rounds. The metadata of each file say what it was made from.

A stage is a function of its settings and the digests of its inputs. A file that was made from the same is read and never
made again. A file that was made from something else is refused, since later files were made from it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raydpo.errors import ConfigError, RaydpoError, one_line, some_of
from raydpo.rundir.fingerprint import changed_settings
from raydpo.storage.files import Storage
from raydpo.version import __version__

__all__ = ["NEUTRAL", "Content", "Made", "content_digest", "made_of", "refusal", "stage_table", "stored_table"]

SCHEMA_VERSION = 1
"""Version of the columns of ``rundir.rounds``."""
NEUTRAL = "rounds.count, rounds.stop, rounds.max_errors, workers, and the engine with its options may change"
"""What may change between two commands on the same rounds, for messages."""
_PREFIX = b"raydpo."


@dataclass(frozen=True)
class Content:
    """What a stage made.

    Attributes:
        failed: why the table is not final, None if it is.
        ahead: seconds in which the workers of the stage sampled for the next round.
    """

    table: pa.Table
    failed: str | None = None
    ahead: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Made:
    """What the file of a stage is made from.

    Attributes:
        stage: name of the stage. number: number of its round.
        settings: values of the settings that decide the content, by their keys.
        inputs: digests of what the stage reads, by name, such as ``policy`` (an identity) and ``samples``.
        seconds: how long the stage took. ahead: how long its workers sampled for the next round beside that.
        failed: why its content is not final, None if it is. These three are not compared.
    """

    stage: str
    number: int
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    seconds: float = 0.0
    ahead: float = 0.0
    failed: str | None = None

    @property
    def digest(self) -> str:
        """Digest of the stage's settings and inputs, 32 hexadecimal digits."""
        whole = [SCHEMA_VERSION, self.stage, self.number, dict(self.settings), dict(self.inputs)]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:32]

    def changes(self, now: Made) -> list[str]:
        """How settings and inputs differ from those of ``now``, as texts; empty if they do not."""
        return changed_settings({**self.settings, **self.inputs}, {**now.settings, **now.inputs})

    def metadata(self) -> dict[bytes, bytes]:
        """Metadata of the file."""
        told = {
            "schema": SCHEMA_VERSION,
            "version": __version__,
            "digest": self.digest,
            "made": json.dumps(dataclasses.asdict(self)),
        }
        return {_PREFIX + name.encode(): str(value).encode() for name, value in told.items()}


def made_of(storage: Storage, name: str) -> Made | None:
    """Return what a file was made from; None if there is no such file.

    Raises:
        RaydpoError: if the file is damaged, or no stage made it.
    """
    if not storage.exists(name):
        return None
    try:
        schema = storage.look_into(name, pq.read_schema)
        return Made(**json.loads((schema.metadata or {})[_PREFIX + b"made"]))
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise _damaged(storage, name, error) from None


def stage_table(
    storage: Storage,
    name: str,
    made: Made,
    schema: pa.Schema,
    make: Callable[[], Content],
    *,
    again: bool = False,
    note: Callable[[str], object] = lambda line: None,
) -> tuple[pa.Table, Made]:
    """Return the table of a stage: the stored one if it was made from the same, else a new one, which is then stored.

    Args:
        make: makes the table.
        again: whether a file that was made from something else is made again instead of refused. That is right as long as
            nothing expensive was made from it.
        note: called with a line if so.

    Returns:
        The table, and what its file says of it.

    Raises:
        ConfigError: if the file was made from something else.
        RaydpoError: if the file is damaged.
    """
    stored = made_of(storage, name)
    if stored is not None and stored.failed is None:
        if stored.digest == made.digest:
            return stored_table(storage, name), stored
        if not again:
            raise refusal(storage, [(name, stored.changes(made))])
        note(f"{name} is made again: {some_of(stored.changes(made), 2)}")
    began = time.monotonic()
    content = make()
    took = time.monotonic() - began - content.ahead
    ahead = max(content.ahead, 0.0 if stored is None else stored.ahead)  # what was sampled before is found in the cache
    made = dataclasses.replace(made, seconds=round(took, 2), ahead=round(ahead, 2), failed=content.failed)
    table = content.table.select(schema.names).cast(schema).replace_schema_metadata(made.metadata())
    storage.write(name, _encode(table))
    return stored_table(storage, name), made


def refusal(storage: Storage, changed: Sequence[tuple[str, Sequence[str]]]) -> ConfigError:
    """Return the error for files that were made with other settings.

    Args:
        changed: names of the files, and how their settings differ.
    """
    by_change: dict[str, list[str]] = {}
    for name, changes in changed:
        for change in changes:
            by_change.setdefault(change, []).append(name)
    told = "; ".join(
        f"{change} ({names[0]}{f' and {len(names) - 1:,} more files' if len(names) > 1 else ''})"
        for change, names in by_change.items()
    )
    return ConfigError(
        f"{storage} holds rounds with other settings: {told}. Give these ones another name (name=...), or start again with "
        f"--fresh, which renames the old ones; {NEUTRAL}"
    )


def content_digest(table: pa.Table, columns: Sequence[str]) -> str:
    """Digest of some columns of a table, 32 hexadecimal digits. Equal rows give equal digests, however they are stored."""
    digest = hashlib.sha256()
    for name in columns:
        digest.update(f"{name}\0".encode())
        for batch in table.select([name]).to_batches(max_chunksize=4096):
            values = [value.hex() if isinstance(value, bytes) else value for value in batch[0].to_pylist()]
            digest.update("".join(f"{json.dumps(value)}," for value in values).encode())
    return digest.hexdigest()[:32]


def _encode(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def stored_table(storage: Storage, name: str) -> pa.Table:
    """Return the table of a stored file, without what it was made from.

    Raises:
        RaydpoError: if the file is damaged.
    """
    try:
        table = pq.read_table(pa.BufferReader(storage.read(name)), page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(storage, name, error) from None
    return table.replace_schema_metadata(None)


def _damaged(storage: Storage, name: str, error: Exception) -> RaydpoError:
    return RaydpoError(
        f"{storage}/{name} is damaged ({one_line(error, 200) or type(error).__name__}); delete it, and the same command "
        "makes it again"
    )
