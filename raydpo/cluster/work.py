"""Runs work on blocks of rows in Ray Data actors, and stores the result of each block in the cache.

The name of a stored result is a digest of everything that the result depends on. A block whose result is stored is not
computed again. A restarted evaluation, the next evaluation, and the evaluation of another policy against the same reference
read the stored results.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import chain
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydpo.cluster.actors import over_actors
from raydpo.cluster.resources import Resources
from raydpo.errors import RaydpoError, one_line
from raydpo.storage.files import Storage

__all__ = ["BlockTask", "TeamTask", "WholeTask", "do_work", "load", "store", "stored_name"]

FOLDER = "evaluation"
"""Folder of the results inside a cache."""
Done = tuple[str, float | None]
"""Name of a block that is stored, and the seconds that it took; None if they are unknown."""


class BlockTask(Protocol):
    """Work that an actor does on each block of rows. The object is sent to the actor, so it must be small.

    ``open`` loads the models in the actor. It must verify that they match ``identity``, since results are stored under it.
    """

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the result depends on besides the rows, as plain data for JSON."""

    def open(self, device: str) -> Callable[[pa.Table], pa.Table]:
        """Return a function that takes a block of rows and returns one row of results for each."""


@runtime_checkable
class TeamTask(BlockTask, Protocol):
    """Work that a team of processes can do if one device does not hold the models."""

    def open_team(self, resources: Resources) -> Callable[[pa.Table], pa.Table]:
        """As ``open``, but in a team of which this process is the first."""


@runtime_checkable
class WholeTask(Protocol):
    """Work that brings its own actors."""

    @property
    def identity(self) -> dict[str, Any]:
        """As of ``BlockTask``."""

    def run(self, blocks: Mapping[str, pa.Table], resources: Resources, doing: str) -> Iterator[tuple[str, pa.Table]]:
        """Yield the name of each block and its results, in any order, as soon as they are there."""


def do_work(
    work: BlockTask | WholeTask,
    tables: Sequence[pa.Table],
    storage: Storage,
    resources: Resources | int,
    *,
    block: int | Sequence[int],
    progress: Callable[[int, int], None],
    doing: str,
    warn: Callable[[str], None],
    again: Callable[[pa.Table], pa.Array] | None = None,
    spent: Callable[[int, float], None] = lambda place, seconds: None,
) -> list[pa.Table]:
    """Return the results of each table, in the order of its rows.

    Args:
        work: what the actors do.
        tables: tables with at least one row each; each is cut into blocks.
        storage: storage of the cache.
        resources: workers and devices of the actors; a number = that many threads of this process do the work, without Ray.
        block: number of rows that are computed and stored together, of all tables or of each.
        progress: called with (rows done, rows to do) at the start and after each block, unless all results are stored.
        doing: word for messages, such as "answering".
        warn: called with one sentence for each damaged result, which is computed again.
        again: says which rows of a stored result are computed again, such as those that failed: a boolean for each.
        spent: called for each block that is computed, with the place of its table in ``tables`` and the seconds that a
            worker took for it; not for blocks of a ``WholeTask``, whose seconds are unknown.

    Raises:
        RaydpoError: if an actor fails, or a stored result cannot be read. Finished blocks stay stored.
    """
    sizes = [block] * len(tables) if isinstance(block, int) else block
    blocks = [
        [rows.slice(start, size).combine_chunks() for start in range(0, rows.num_rows, size)]
        for rows, size in zip(tables, sizes, strict=True)
    ]
    names = [[stored_name(work.identity, one) for one in each] for each in blocks]
    by_name = dict(zip(chain(*names), chain(*blocks), strict=True))
    done = {name: load(storage, name, warn) for name in by_name}
    missing = {name: one for name, one in by_name.items() if done[name] is None}
    parts: dict[str, list[tuple[str, np.ndarray]]] = {}  # rows of a stored block that are computed again
    for name, result in done.items():
        if again is not None and result is not None and (rows := np.flatnonzero(again(result))).size:
            part = by_name[name].take(rows).combine_chunks()
            missing[of_part := stored_name(work.identity, part)] = part
            parts.setdefault(of_part, []).append((name, rows))
    if missing:
        table_of = {name: place for place, each in reversed([*enumerate(names)]) for name in each}
        finished, total = 0, sum(one.num_rows for one in missing.values())
        progress(0, total)
        do: Callable[..., Any] = _in_threads if isinstance(resources, int) else _on_ray
        if isinstance(work, WholeTask):
            do = _by_itself
        with contextlib.closing(do(work, missing, storage, resources, doing)) as finishing:
            for name, seconds in finishing:
                wrong = [f"{storage}/{name} was written but is not there"]
                result = load(storage, name, wrong.append)
                if result is None:
                    raise RaydpoError(f"{doing}: {wrong[-1]}; run it again")
                if name in done:
                    done[name] = result
                for whole, rows in parts.get(name, ()):
                    done[whole] = _replaced(done[whole], rows, result)
                    store(storage, whole, done[whole])
                finished += missing[name].num_rows
                progress(finished, total)
                if seconds is not None:
                    spent(table_of[parts[name][0][0] if name in parts else name], seconds)
    return [pa.concat_tables([done[name] for name in each]) for each in names]


def _replaced(result: pa.Table, rows: np.ndarray, by: pa.Table) -> pa.Table:
    """``result`` with other rows in the places ``rows``."""
    order = np.arange(result.num_rows)
    order[rows] = result.num_rows + np.arange(len(rows))
    return pa.concat_tables([result, by]).take(order).combine_chunks()


def _in_threads(work: BlockTask, blocks: dict[str, pa.Table], storage: Storage, threads: int, doing: str) -> Iterator[Done]:
    """As ``_on_ray``, in threads of this process. Each opens the work once; what it opens has a method ``close``."""
    acts: list[Any] = []
    mine, stopped = threading.local(), threading.Event()

    def act(name: str) -> Done:
        if not hasattr(mine, "act"):
            mine.act = work.open("cpu")
            acts.append(mine.act)
            if stopped.is_set():
                mine.act.close()
        began = time.perf_counter()
        store(storage, name, mine.act(blocks[name]))
        return name, time.perf_counter() - began

    with ThreadPoolExecutor(min(threads, len(blocks)), thread_name_prefix=doing.replace(" ", "-")) as pool:
        try:
            for done in as_completed([pool.submit(act, name) for name in blocks]):
                yield done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            stopped.set()
            for each in acts:
                each.close()


def _by_itself(
    work: WholeTask, blocks: dict[str, pa.Table], storage: Storage, resources: Resources, doing: str
) -> Iterator[Done]:
    """As ``_on_ray``, by the work's own actors."""
    for name, result in work.run(blocks, resources, doing):
        store(storage, name, result)
        yield name, None


def _on_ray(
    work: BlockTask, blocks: dict[str, pa.Table], storage: Storage, resources: Resources, doing: str
) -> Iterator[Done]:
    """Yield the name of each block when it is stored, and the seconds that it took."""
    encoded = ((name, pa.array([_encode(one)], pa.large_binary())) for name, one in blocks.items())
    tables = (pa.table({"name": [name], "rows": rows}) for name, rows in encoded)
    divided = isinstance(work, TeamTask) and (resources.partition > 1 or resources.offload is not None)
    kept = {"sequence": 1} if divided else {"sequence": 1, "partition": 1, "offload": None}
    resources = dataclasses.replace(resources, **kept)
    for row in over_actors(_Actor, (work, storage.uri, resources), tables, resources, doing):
        yield row["name"], row["seconds"]


class _Actor:
    """A Ray Data actor. Each call computes one block and stores it before it returns its name."""

    def __init__(self, work: BlockTask, uri: str, resources: Resources) -> None:
        self.threads = resources.threads
        self._set_threads()
        self.storage = Storage(uri)
        divided = resources.partition > 1 or resources.offload is not None
        self.act = work.open_team(resources) if divided else work.open(resources.device)

    def _set_threads(self) -> None:
        if self.threads is not None:
            import torch  # takes seconds, and reward functions need none

            torch.set_num_threads(self.threads)

    def __call__(self, block: pa.Table) -> pa.Table:
        self._set_threads()  # OpenMP sets its threads for each calling thread
        name, began = block["name"][0].as_py(), time.perf_counter()
        store(self.storage, name, self.act(pq.read_table(pa.BufferReader(block["rows"][0].as_buffer()))))
        return pa.table({"name": [name], "seconds": [time.perf_counter() - began]})


def stored_name(identity: dict[str, Any], rows: pa.Table) -> str:
    """Return the name under which the result of ``rows`` is stored: a digest of its inputs."""
    digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16, person=b"raydpo-work-1")
    digest.update(json.dumps(rows.to_pydict(), sort_keys=True).encode())
    return f"{FOLDER}/{digest.hexdigest()}.parquet"


def load(storage: Storage, name: str, warn: Callable[[str], None]) -> pa.Table | None:
    """Load a stored result; None if there is none or it is damaged.

    Args:
        warn: called with one sentence if the result is damaged.

    Raises:
        RaydpoError: if the file is there but cannot be read.
    """
    try:
        data = storage.read(name)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RaydpoError(
            f"cannot read the stored result {storage}/{name}: {error.strerror or one_line(error)}. Make it readable; or "
            "delete it, and it is computed again"
        ) from None
    try:
        return pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        warn(f"the stored result {storage}/{name} is damaged and is computed again ({one_line(error, 200)})")
        return None


def store(storage: Storage, name: str, result: pa.Table) -> None:
    """Store a result."""
    storage.write(name, _encode(result))


def _encode(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()
