"""Mailbox between workers and driver: events in one direction, the request to stop in the other."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

from raydpo.errors import RaydpoError

__all__ = ["Listener", "Mailbox", "listening", "start_mailbox"]

POLL_SECONDS = 0.3

Listener = Callable[[str, Any], None]
"""Called in the driver with (kind, content). Kinds: phase, begin, step, evaluated, note, as in ``TrainHooks``."""


class Mailbox:
    """Actor that carries the workers' events to the driver. ray.train.report is throttled, and meant for checkpoints."""

    def __init__(self) -> None:
        self._events: list[tuple[str, Any]] = []
        self._error: RaydpoError | None = None
        self._summary: dict[str, Any] | None = None
        self._tokens_per_batch: int | None = None
        self._attempt = 0
        self._memory_ran_out: tuple[int, bool] | None = None  # number of the attempt, and what ``back_off`` returned for it
        self._stop = self._stepped = self._tried_again = False

    def put(self, kind: str, content: Any) -> None:
        self._events.append((kind, content))
        if kind in ("begin", "step"):
            self._stepped = kind == "step"

    def drain(self) -> list[tuple[str, Any]]:
        events, self._events = self._events, []
        return events

    def fail(self, error: RaydpoError) -> None:
        self._error = self._error or error

    def error(self) -> RaydpoError | None:
        return self._error

    def enter(self) -> tuple[int, int | None] | None:
        """Register a new group of workers. Returns the number of its attempt, from 1, and the positions of a micro-batch if
        the configured number did not fit; None if an earlier error would only repeat, so that it must not start."""
        if self._error is not None:
            return None
        self._attempt += 1
        return self._attempt, self._tokens_per_batch

    def back_off(self, tokens_per_batch: int, attempt: int) -> bool:
        """Report that memory ran out in ``attempt``. Returns whether another attempt makes sense; ``enter`` gives it the new
        number of positions.

        A budget that has completed steps is tried a second time, because only with it the run repeats bit for bit. Then half
        of it is tried, once. If several ranks report the same attempt, the first report decides.
        """
        if self._memory_ran_out is None or self._memory_ran_out[0] != attempt:
            self._memory_ran_out = attempt, self._less(tokens_per_batch)
        return self._memory_ran_out[1]

    def _less(self, tokens_per_batch: int) -> bool:
        if self._tokens_per_batch is not None:
            return False
        if self._stepped and not self._tried_again:
            self._tried_again, self._stepped = True, False
            told = "did not fit in memory, though others of this run did; starting the workers again with the same"
        else:
            half = self._tokens_per_batch = max(1, tokens_per_batch // 2)
            told = (
                f"does not fit in memory; starting the workers again with {half}. "
                f"Set train.tokens_per_batch={half} to start with that"
            )
        self.put("note", f"warning: a micro-batch of {tokens_per_batch} positions {told}")
        return True

    def stop(self) -> None:
        self._stop = True

    def stop_requested(self) -> bool:
        return self._stop

    def finish(self, summary: dict[str, Any]) -> None:
        self._summary = summary

    def summary(self) -> dict[str, Any] | None:
        return self._summary


@contextlib.contextmanager
def listening(board: Any, listener: Listener) -> Any:
    """Pass the events of ``board`` to ``listener`` within the block."""
    import ray

    stop = threading.Event()

    def listen() -> None:
        while True:
            last = stop.wait(POLL_SECONDS)
            for kind, content in ray.get(board.drain.remote()):
                listener(kind, content)
            if last:
                return

    thread = threading.Thread(target=listen, name="raydpo-listener", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def start_mailbox() -> Any:
    """Start the actor ``Mailbox`` of a training."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # On the driver's node, and lost only with the driver; on another node it would be lost with a machine that only trains.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Mailbox).remote()
