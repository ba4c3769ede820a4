"""Processes of a team on one machine: started here, told what to do through pipes, and asked why they ended.

Knows nothing of models: the first message to a process is an object whose ``join`` returns what later messages are given to.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, Protocol

__all__ = ["Members"]

LAST_WORDS_S = 10.0
"""Seconds to wait for the error message of a process that failed."""


class Work(Protocol):
    """What a member does with each message after the first."""

    def score(self, message: Any) -> object: ...


class Setup(Protocol):
    """First message to a member."""

    def join(self) -> Work: ...


class Members:
    """Other processes of a team, which this process started.

    Args:
        count: number of processes.

    Attributes:
        processes: one for each.
    """

    def __init__(self, count: int) -> None:
        self.processes = [_start() for _ in range(count)]

    def tell(self, messages: Sequence[Any]) -> None:
        """Send each process its message."""
        for process, message in zip(self.processes, messages, strict=True):
            pickle.dump(message, process.stdin)
            process.stdin.flush()

    def last_words(self) -> list[BaseException]:
        """Why processes ended, of each that has ended or ends within ``LAST_WORDS_S``."""
        return [said for process in self.processes if (said := _last_words(process)) is not None]

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            with contextlib.suppress(OSError):
                process.stdin.close()
        for process in self.processes:
            try:
                process.wait(LAST_WORDS_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _start() -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [sys.executable, "-m", "raydpo.reference.members"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )


def _last_words(process: subprocess.Popen) -> BaseException | None:
    try:
        process.wait(LAST_WORDS_S)
    except subprocess.TimeoutExpired:
        return None
    said = process.stdout.read()
    return pickle.loads(said) if said else RuntimeError(f"it ended with status {process.returncode}")


def _member() -> None:
    """Main function of a member. Ends when the pipe from the process that started it is closed."""
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keep what libraries print out of the pipe
    try:
        work = pickle.load(sys.stdin.buffer).join()
        while True:
            work.score(pickle.load(sys.stdin.buffer))
    except EOFError:
        pass
    except BaseException as error:
        try:
            words = pickle.dumps(error)
            pickle.loads(words)
        except Exception:  # not every exception can be pickled
            words = pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
        pipe.write(words)
        pipe.flush()
    os._exit(0)  # a normal exit would wait for a collective that never ends


if __name__ == "__main__":
    _member()
