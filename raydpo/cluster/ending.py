"""The end of a process that cannot go on, and has no caller to raise an error to."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from raydpo.errors import RaydpoError

__all__ = ["end_process", "say_last_words_by"]

WORDS_S = 2.0
"""Seconds to say why the process ends."""


def _print(error: RaydpoError) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)


_say: Callable[[RaydpoError], object] = _print


def say_last_words_by(say: Callable[[RaydpoError], object]) -> None:
    """Set what ``end_process`` does with its error. By default it is printed to stderr."""
    global _say
    _say = say


def end_process(error: RaydpoError) -> NoReturn:
    """Say why, and end this process at once, whatever its threads are doing. Ray takes that for a failure of the system."""
    thread = threading.Thread(target=_say, args=(error,), daemon=True)
    thread.start()
    thread.join(WORDS_S)
    os._exit(1)
