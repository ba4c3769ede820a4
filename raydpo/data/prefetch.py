"""Prepare the next items in a background thread while the current one is being computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["prefetch"]

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")


def prefetch(items: Iterable[Item], prepare: Callable[[Item], Prepared], ahead: int = 2) -> Iterator[Prepared]:
    """``map(prepare, items)``, in order, computed by another thread up to ``ahead`` items in advance.

    An error of ``prepare`` is raised in place of its item.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="raydpo-prefetch") as pool:
        waiting: deque[Future[Prepared]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(prepare, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
