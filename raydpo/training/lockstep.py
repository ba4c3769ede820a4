"""Several loops that ask for work to be done, one at a time, and get together what they ask for alike.

Each loop is a thread, but only one of all threads runs at any moment: a loop runs until it asks for something, then the next
one does, and when all have asked, the caller's thread does the work. So loops need no locks, meet other ranks in an order
that is the same on every rank, and the same run repeats.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Lockstep", "Request"]

PATIENCE = 10.0
"""Seconds for a loop to end that is no longer wanted."""


@dataclass(frozen=True)
class Request:
    """What a loop asks for.

    Attributes:
        kind: requests of a loop that is behind come first, then those of the smallest kind.
        key: those of a kind with equal keys are served together.
        content: for whoever serves it.
    """

    kind: int
    key: Hashable
    content: Any


class _AbandonedError(BaseException):
    """Unwinds a loop that will not be answered."""


class Lockstep:
    """Runs loops until all have ended.

    Args:
        count: number of loops.
        serve: gets the numbers of some loops and their requests, of one kind and key; returns their answers. What it raises,
            each of these loops raises.
        behind: how far a loop is. Only those that are furthest behind are served, so that loops which began at different
            points meet.
        before_turn: called with the number of a loop before it runs on.
        ends_all: whether an exception of one loop ends the others, too.
    """

    def __init__(self, count: int, serve: Callable[[list[int], list[Request]], Sequence[Any]],
                 behind: Callable[[int], int], before_turn: Callable[[int], None],
                 ends_all: Callable[[BaseException], bool] = lambda error: False) -> None:
        self._serve, self._behind, self._before_turn, self._ends_all = serve, behind, before_turn, ends_all
        self._turns = [threading.Semaphore(0) for _ in range(count)]
        self._back = threading.Semaphore(0)
        self._requests: dict[int, Request] = {}
        self._answers: dict[int, Any] = {}
        self._results: dict[int, Any] = {}
        self._abandoned = False

    @property
    def live(self) -> list[int]:
        """Loops that have not ended."""
        return [number for number in range(len(self._turns)) if number not in self._results]

    def ask(self, number: int, request: Request) -> Any:
        """Called by loop ``number`` in its own thread: the answer, once it is there."""
        if self._abandoned:
            raise _AbandonedError
        self._requests[number] = request
        self._back.release()
        self._turns[number].acquire()
        if self._abandoned:
            raise _AbandonedError
        answer = self._answers.pop(number)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def run(self, loops: Sequence[Callable[[], Any]]) -> list[Any]:
        """The result of each loop, or the exception that ended it.

        Raises:
            BaseException: of a loop, where it ends all.
        """
        threads = [threading.Thread(target=self._loop, args=(number, loop), name=f"raydpo-loop-{number}", daemon=True)
                   for number, loop in enumerate(loops)]
        try:
            for thread in threads:
                thread.start()
            for number in range(len(loops)):
                self._turn(number)
            while self._requests:
                members = self._next()
                requests = [self._requests.pop(number) for number in members]
                try:
                    answers = self._serve(members, requests)
                except Exception as error:
                    answers = [error] * len(members)
                for number, answer in zip(members, answers, strict=True):
                    self._answers[number] = answer
                    self._turn(number)
        finally:
            self._abandoned = True
            for number in self.live:  # after an interrupt or an error: let them clean up
                self._turns[number].release()
                threads[number].join(PATIENCE)
        return [self._results[number] for number in range(len(loops))]

    def _turn(self, number: int) -> None:
        self._before_turn(number)
        self._turns[number].release()
        self._back.acquire()
        result = self._results.get(number)
        if isinstance(result, BaseException) and self._ends_all(result):
            raise result

    def _next(self) -> list[int]:
        furthest = min(self._behind(number) for number in self._requests)
        late = [number for number in sorted(self._requests) if self._behind(number) == furthest]
        first = self._requests[min(late, key=lambda number: self._requests[number].kind)]
        return [number for number in late if (self._requests[number].kind, self._requests[number].key)
                == (first.kind, first.key)]

    def _loop(self, number: int, loop: Callable[[], Any]) -> None:
        self._turns[number].acquire()
        try:
            self._results[number] = loop()
        except _AbandonedError:
            return
        except BaseException as error:
            self._results[number] = error
        self._back.release()
