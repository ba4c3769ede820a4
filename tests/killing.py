"""kill -9 at every line: run a function in a forked process and kill it before each line of given modules."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import ModuleType


def killed_at_every_line(
    act: Callable[[], object],
    modules: list[ModuleType],
    prepare: Callable[[], object],
    check: Callable[[bool], object],
    stride: int = 1,
) -> int:
    """Run ``act`` repeatedly, each time in a new process that is killed one line of ``modules`` later.

    Args:
        prepare: called before each run, in this process. check: called after it, with whether ``act`` finished.
        stride: lines from one kill to the next.

    Returns:
        Number of kills. The last run is not killed and finishes.
    """
    for kills, line in enumerate(range(1, 1 << 20, stride)):
        prepare()
        ended = killed_once(act, modules, line)
        check(ended)
        if ended:
            return kills
    raise AssertionError


def killed_once(act: Callable[[], object], modules: list[ModuleType], line: int) -> bool:
    """Run ``act`` in a new process that is killed before the given line of ``modules``. Returns whether it
    finished first."""
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
