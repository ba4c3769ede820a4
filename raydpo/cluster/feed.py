"""Hand blocks to Ray Data one by one, while others are still being made.

Ray Data takes its input as a list or from read tasks. Here a single read task, which needs no CPU, yields one block after
another. It gets them from an actor, which needs none either and holds the few blocks that the driver has made in advance.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import count
from typing import Any

import pyarrow as pa

__all__ = ["Feed"]

ASK_SECONDS = 10.0
"""How long the actor waits for a block before it answers that there is none yet."""
_NODE = "ray.io/node-id"
"""Ray's label of a node with its id."""


class Feed:
    """Blocks on their way from an iterator in this process to Ray Data.

    Args:
        blocks: blocks of one row each. The iterator runs in a thread of its own.
        ahead: most blocks that are made, but not done.

    Attributes:
        error: what the iterator raised; no block follows it.
    """

    def __init__(self, blocks: Iterable[pa.Table], ahead: int) -> None:
        import ray

        self.error: BaseException | None = None
        self._blocks, self._free, self._over = blocks, threading.Semaphore(ahead), threading.Event()
        # Beside the driver, so that no other machine can take them away.
        self._here = {_NODE: ray.get_runtime_context().get_node_id()}
        kind = ray.remote(num_cpus=0, max_concurrency=8, label_selector=self._here)(_Waiting)
        self._waiting = kind.remote(2 * ahead)
        self._thread = threading.Thread(target=self._fill, name="raydpo-feed", daemon=True)
        self._thread.start()

    def dataset(self) -> Any:
        """A Ray Data set of the blocks, each as it is."""
        import ray
        from ray.data.block import BlockMetadata

        waiting = self._waiting

        class Blocks(ray.data.Datasource):
            def estimate_inmemory_data_size(self) -> int | None:
                return None

            def get_read_tasks(self, parallelism: int, *args: Any, **options: Any) -> list[ray.data.ReadTask]:
                return [ray.data.ReadTask(partial(_taken, waiting), BlockMetadata(None, None, None, None))]

        # No CPU also keeps Ray Data from fusing the read task with the actors that follow, which would run all in one.
        return ray.data.read_datasource(
            Blocks(), concurrency=1, override_num_blocks=1, num_cpus=0, label_selector=self._here
        )

    def done(self) -> None:
        """Say that another block is done, so that the next one may be made."""
        self._free.release()

    def close(self) -> None:
        """Stop making blocks."""
        import ray

        self._over.set()
        self._free.release()
        with contextlib.suppress(Exception):  # Ray is gone
            ray.kill(self._waiting)

    def _fill(self) -> None:
        import ray

        number = 0
        try:
            for block in self._blocks:
                self._free.acquire()
                if self._over.is_set():
                    return
                ray.get(self._waiting.put.remote(number, block))
                number += 1
        except BaseException as error:  # raised in the thread that takes the results
            self.error = error
        finally:
            if not self._over.is_set():
                self._waiting.put.remote(number, None)


class _Waiting:
    """Actor with the blocks that were made and not read yet, and some that were.

    Args:
        kept: number of blocks that are kept.
    """

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._blocks: dict[int, pa.Table | None] = {}
        self._arrived = threading.Condition()

    def put(self, number: int, block: pa.Table | None) -> None:
        """Add a block; None = the end."""
        with self._arrived:
            self._blocks[number] = block
            self._blocks.pop(number - self._kept, None)
            self._arrived.notify_all()

    def get(self, number: int) -> tuple[bool, pa.Table | None]:
        """Whether there is a block of this number, or the end, and what it is.

        If the process of the read task dies, Ray runs the task again from the first block, and drops what it yields again.
        So any block serves in place of one that is no longer kept.
        """
        with self._arrived:
            there = self._arrived.wait_for(lambda: self._blocks and number <= max(self._blocks), ASK_SECONDS)
            return bool(there), self._blocks[max(number, min(self._blocks))] if there else None


def _taken(waiting: Any) -> Iterator[pa.Table]:
    import ray

    for number in count():
        there = False
        while not there:
            there, block = ray.get(waiting.get.remote(number))
        if block is None:
            return
        yield block
