"""Handling of Ctrl-C and SIGTERM: the first signal ends a command in order, the second one at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["EXIT_INTERRUPTED", "interruptible", "sigterm_as_interrupt"]

EXIT_INTERRUPTED = 130
"""Exit status of a command that Ctrl-C or SIGTERM has stopped; the usual one of shells."""
_ONE_REQUEST = 1.0
"""Seconds within which signals are one request. ``timeout`` of GNU coreutils signals its command and then the process group
of it (src/timeout.c, ``cleanup``), so that the command gets the signal twice."""


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Make SIGTERM raise KeyboardInterrupt within the block, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _to_stderr(line: str) -> None:
    print(f"\n{line}", file=sys.stderr, flush=True)


def interruptible(act: Callable[[], Any], on_first: Callable[[], object], say: Callable[[str], object] = _to_stderr) -> bool:
    """Run ``act`` in a thread and handle signals in this one until it returns.

    The first SIGINT or SIGTERM calls ``on_first``, which must make ``act`` return. A further one, a second or more later,
    ends the process at once, with exit status 130. Only the main thread receives signals: in any other one ``act`` is just
    called.

    Args:
        say: called with a line when the first signal comes.

    Returns:
        Whether a signal came.

    Raises:
        BaseException: what ``act`` raised.
    """
    if threading.current_thread() is not threading.main_thread():
        act()
        return False
    failures: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            act()
        except BaseException as error:
            failures.append(error)
        finally:
            done.set()

    asked: float | None = None

    def handle(number: int, frame: object) -> None:
        nonlocal asked
        if asked is not None:
            if time.monotonic() - asked >= _ONE_REQUEST:
                os._exit(EXIT_INTERRUPTED)
            return
        asked = time.monotonic()
        say(f"{signal.Signals(number).name}: stopping after this step, with a checkpoint; again to stop at once")
        on_first()

    thread = threading.Thread(target=run, name="raydpo-act", daemon=True)
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        thread.start()
        while not done.wait(0.5):
            pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if failures:
        raise failures[0]
    return asked is not None
