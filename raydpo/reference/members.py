"""Processes of a team on one machine: started here, told what to do through pipes, and asked why they ended.

Knows nothing of models: the first message to a process is an object whose ``join`` returns what later messages are given to.

No process is left alone. A member ends when the process that started it does, whatever the member is doing: a thread of it
reads the pipe, and on Linux the kernel kills it. A thread here notices when a member ends. If the main thread is then in a
collective that never returns, as with NCCL, that thread ends this process.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import queue
import select
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

__all__ = ["Members", "WithoutWordsError"]

CLOSE_S = 1.0
"""Seconds that a member has to end by itself before it is killed."""
WORDS_S = 3.0
"""Seconds to wait for the other members to end once one has: with gloo they fail within milliseconds."""
STUCK_S = 3.0
"""Seconds for the main thread to notice that a member has ended. gloo tells at once, NCCL never."""
_LENGTH = struct.Struct("<Q")
_READY = "ready"
_PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""


class WithoutWordsError(RuntimeError):
    """A member ended and did not say why."""


class Work(Protocol):
    """What a member does with each message after the first."""

    def score(self, message: Any) -> object: ...


class Setup(Protocol):
    """First message to a member."""

    def join(self) -> Work: ...


class Members:
    """Other processes of a team, which this process started. They are ranks 1, 2, ... of it.

    Args:
        count: number of processes.
        lost: called in another thread with what ``reasons`` returns if a member has ended within a block of ``working``, and
            the block is still not over ``STUCK_S`` later. It should end this process.

    Attributes:
        processes: one for each.

    Raises:
        OSError: if the machine cannot start a process.
    """

    def __init__(self, count: int, lost: Callable[[list[BaseException]], object]) -> None:
        self._lost = lost
        self._changed = threading.Condition()
        self._ready: set[int] = set()
        self._ended: dict[int, BaseException] = {}
        self._free = threading.Event()  # the main thread is not within ``working``
        self._free.set()
        self._closing = False
        started: queue.SimpleQueue[tuple[int, subprocess.Popen[bytes] | OSError]] = queue.SimpleQueue()
        for index in range(count):
            # The kernel kills a member when the thread that started it ends, so that thread stays until the member ends.
            threading.Thread(
                target=self._keep, args=(index, started), name=f"raydpo-member-{index + 1}", daemon=True
            ).start()
        found = dict(started.get() for _ in range(count))
        self.processes = [one for _, one in sorted(found.items()) if isinstance(one, subprocess.Popen)]
        if len(self.processes) < count:
            self.close()
            raise next(one for one in found.values() if isinstance(one, OSError))

    def tell(self, messages: Sequence[Any], patience: float) -> None:
        """Send each process its message.

        Raises:
            TimeoutError: if a process has not read it after ``patience`` seconds.
            WithoutWordsError, OSError: if a process has ended; ``reasons`` knows more.
        """
        written: dict[int, bytes] = {}  # the same message for all is encoded once
        for process, message in zip(self.processes, messages, strict=True):
            data = written.get(id(message)) or written.setdefault(id(message), pickle.dumps(message))
            _send(process, _LENGTH.pack(len(data)) + data, patience)

    def wait_until_ready(self, patience: float) -> None:
        """Wait until each process has read its first message, and so imported what it needs.

        Raises:
            TimeoutError: if one has not after ``patience`` seconds.
            WithoutWordsError: if one has ended; ``reasons`` knows more.
        """
        with self._changed:
            count = len(self.processes)
            self._changed.wait_for(lambda: self._ended or len(self._ready) == count, patience)
            self._refuse_ended()
            if late := sorted(set(range(count)) - self._ready):
                raise TimeoutError(f"process {late[0] + 1} has not started after {patience:.0f} s")

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Within the block this process computes together with the members.

        Raises:
            WithoutWordsError: if one of them has ended before.
        """
        self._free.clear()
        try:
            with self._changed:
                self._refuse_ended()
            yield
        finally:
            self._free.set()

    def reasons(self) -> list[BaseException]:
        """Why processes ended, of each that has ended or ends within ``WORDS_S``: the exception of a process, or
        ``WithoutWordsError``."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._ended) == len(self.processes), WORDS_S)
            return [error for _, error in sorted(self._ended.items())]

    def close(self) -> None:
        """End the processes."""
        self._closing = True
        for process in self.processes:
            with contextlib.suppress(OSError):
                process.stdin.close()
        with self._changed:
            for seconds in (CLOSE_S, 2 * CLOSE_S):
                if self._changed.wait_for(lambda: len(self._ended) >= len(self.processes), seconds):
                    return
                for process in self.processes:
                    process.kill()  # also one that is stopped

    def _refuse_ended(self) -> None:
        if self._ended:
            raise WithoutWordsError(f"process {min(self._ended) + 1} has ended")

    def _keep(self, index: int, started: queue.SimpleQueue[tuple[int, subprocess.Popen[bytes] | OSError]]) -> None:
        """Start a member, listen to it, and collect it when it has ended."""
        try:
            process = _start()
        except OSError as error:
            started.put((index, error))
            return
        started.put((index, process))
        pipe, words = io.BufferedReader(process.stdout), None
        with contextlib.suppress(Exception):  # the end of the pipe, or of half a word
            while True:
                said = pickle.load(pipe)
                if said == _READY:
                    with self._changed:
                        self._ready.add(index)
                        self._changed.notify_all()
                else:
                    words = said
        status = process.wait()
        with self._changed:
            self._ended[index] = WithoutWordsError(f"process {index + 1} {_how(status)}") if words is None else words
            self._changed.notify_all()
        if not self._free.wait(STUCK_S) and not self._closing:
            self._closing = True
            self._lost(self.reasons())


def _start() -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # each member would compile all of DeepSpeed's modules again
    process = subprocess.Popen(
        [sys.executable, "-m", "raydpo.reference.members", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        env=environment,
    )
    os.set_blocking(process.stdin.fileno(), False)
    return process


def _send(process: subprocess.Popen[bytes], data: bytes, patience: float) -> None:
    """Write ``data``, but do not wait for ever for a process that is stopped."""
    view, writable = memoryview(data), select.poll()
    writable.register(process.stdin, select.POLLOUT)
    while view:
        if not writable.poll(1000 * patience):
            raise TimeoutError(f"process {process.pid} has read nothing for {patience:.0f} s")
        view = view[process.stdin.write(view) or 0 :]


def _how(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-status).name
        why = {"SIGKILL": ", as the system does if memory is short", "SIGBUS": ", as a full /dev/shm causes"}.get(name, "")
        return f"was ended by {name}{why}"
    return f"was ended by signal {-status}"


def _member(parent: int) -> None:
    """Main function of a member. It ends with the process ``parent`` or when the pipe from it is closed."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process decides what Ctrl-C ends
    # Libraries can neither read from the pipes nor print into them.
    incoming, outgoing = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(incoming, messages), daemon=True).start()
    try:
        setup = pickle.loads(messages.get())
        _say(outgoing, _READY)
        work = setup.join()
        while True:
            work.score(pickle.loads(messages.get()))
    except BaseException as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # not every exception can be pickled
            error = RuntimeError(f"{type(error).__name__}: {error}")
        _say(outgoing, error)
    os._exit(1)  # a normal exit would wait for a collective that never ends


def _listen(pipe: io.BufferedReader, messages: queue.SimpleQueue[bytes]) -> None:
    """Read messages while the main thread computes. End this process at the end of the pipe."""
    try:
        while header := pipe.read(_LENGTH.size):
            (length,) = _LENGTH.unpack(header)
            data = pipe.read(length)
            if len(data) < length:
                break
            messages.put(data)
    finally:  # also without memory for an exception
        os._exit(0)


def _say(pipe: io.BufferedWriter, words: object) -> None:
    with contextlib.suppress(OSError):
        pickle.dump(words, pipe)
        pipe.flush()


if __name__ == "__main__":
    _member(int(sys.argv[1]))
