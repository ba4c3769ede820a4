"""Kill -9 at every line: run an act in a forked process and stop it before each line of given modules, one after another."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import ModuleType


def killed_at_every_line(act: Callable[[], object], modules: list[ModuleType], prepare: Callable[[], object],
                         check: Callable[[bool], object], stride: int = 1) -> int:
    """Run ``act`` again and again, each time in a new process that is killed before the next line of ``modules``.

    Args:
        prepare: called before each run, in this process. check: after it, with whether the act came to its end.
        stride: kills at every so many lines only.

    Returns:
        How many times the act was killed. The last run, which nothing kills, comes to its end.
    """
    for kills, line in enumerate(range(1, 1 << 20, stride)):
        prepare()
        ended = killed_once(act, modules, line)
        check(ended)
        if ended:
            return kills
    raise AssertionError


def killed_once(act: Callable[[], object], modules: list[ModuleType], line: int) -> bool:
    """Run ``act`` in a new process that is killed before it executes so many lines of ``modules``; whether it
    ended before."""
    child = os.fork()
    if not child:
        _run(act, {module.__file__ for module in modules}, line)
    _, status = os.waitpid(child, 0)
    ended = os.WIFEXITED(status)
    assert not ended or os.WEXITSTATUS(status) == 0, f"the act failed by itself: {status}"
    return ended


def _run(act: Callable[[], object], files: set[str], line: int) -> None:
    left = line

    def trace(frame, event, argument):
        nonlocal left
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    try:
        sys.settrace(trace)
        act()
        sys.settrace(None)
        os._exit(0)
    except BaseException as error:
        sys.settrace(None)
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
