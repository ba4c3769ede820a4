"""Calls a reward function in a process of its own, with time limits. Whatever the function does costs only its answers."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from raydpo.config.rewards import RewardConfig, reward_name
from raydpo.errors import RaydpoError
from raydpo.rewards.call import HEADER, written

__all__ = ["RESULTS", "Caller", "FunctionProcess", "described"]

RESULTS = pa.schema([("reward", pa.float64()), ("error", pa.string()), ("details", pa.string()), ("seconds", pa.float64())])
"""What a function says of each answer: a reward, or null; what failed, as ``Type: message``; what it logged, as a JSON
object; its share of the seconds of the call."""
START_SECONDS = 300.0
"""Seconds in which a function's module is imported."""
_OWN = ("math", "code")
"""Built-in functions that limit the seconds of each answer themselves."""
OWN_LIMIT = 4.0
"""Seconds of the clock for one of their limit: a machine may be busy, and a process is replaced."""
HANGS = 3
"""Calls in a row beyond the time limit after which the other answers of a block are not tried alone, if none has ended."""
_LOOK = 0.1
"""Seconds between two looks at whether the process is alive: a child of it may keep its pipe open."""
_START = "import json, sys; sys.path[:] = json.loads(sys.argv.pop()); from raydpo.rewards.call import main; sys.exit(main())"


class _Slow(Exception):
    """A call took longer than its time limit."""


class FunctionProcess:
    """A process that has opened a reward function.

    Attributes:
        about: what it says of the function: ``digest``; of a user's own also ``file`` and ``parameters``, a list of
            (name, kind, has a default), or None if unknown.

    Raises:
        RaydpoError: if it cannot open the function.
    """

    def __init__(self, reward: RewardConfig) -> None:
        self.use = reward.use
        self.popen = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # its own group: it is ended with its children, and Ctrl-C does not reach it
            env={"OMP_NUM_THREADS": "1"} | os.environ,  # there are as many processes as cores
        )
        assert self.popen.stdin is not None and self.popen.stdout is not None
        self.pipes = (self.popen.stdin.fileno(), self.popen.stdout.fileno())
        for descriptor in self.pipes:
            os.set_blocking(descriptor, False)
        try:
            self.about = self.ask({"reward": reward.model_dump(mode="json")}, START_SECONDS)
        except _Slow:
            self.about = {"failed": f"TimeoutError: its import took more than {START_SECONDS:g} s"}
        except ChildProcessError as error:
            self.about = {"failed": f"while it was imported, {error}"}
        except BaseException:
            self.end()
            raise
        if "failed" in self.about:
            self.end()
            raise RaydpoError(f"the reward function {self.use} cannot be opened: {self.about['failed']}")

    def ask(self, message: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Send a message and return the reply.

        Raises:
            _Slow: after so many seconds.
            ChildProcessError: if the process ends.
        """
        todo, got, deadline = memoryview(written(message)), bytearray(), time.monotonic() + seconds
        requests, replies = self.pipes
        with selectors.DefaultSelector() as selector:
            selector.register(requests, selectors.EVENT_WRITE)
            selector.register(replies, selectors.EVENT_READ)
            while (left := deadline - time.monotonic()) > 0:
                ready = selector.select(min(left, _LOOK))
                if not ready and self.popen.poll() is not None:
                    raise self._ended()
                for key, _ in ready:
                    if key.fd == requests:
                        try:
                            todo = todo[os.write(requests, todo[: 1 << 16]) :]
                        except BrokenPipeError:
                            raise self._ended() from None
                        if not todo:
                            selector.unregister(requests)
                    else:
                        part = os.read(replies, 1 << 20)
                        if not part:
                            raise self._ended()
                        got += part
                        if len(got) >= HEADER and len(got) == HEADER + int.from_bytes(got[:HEADER], "big"):
                            return json.loads(bytes(got[HEADER:]))
        raise _Slow

    def _ended(self) -> ChildProcessError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(1)
        status = self.popen.returncode
        if status is None:
            return ChildProcessError("the process closed its pipe")
        if status < 0:
            return ChildProcessError(f"the process was ended by signal {signal.Signals(-status).name}")
        return ChildProcessError(f"the process ended with exit status {status}")

    def kill(self) -> None:
        """End the process and its children."""
        with contextlib.suppress(OSError):
            os.killpg(self.popen.pid, signal.SIGKILL)

    def end(self) -> None:
        """End the process and its children, and close the pipes. No other thread may wait for it."""
        self.kill()
        self.popen.wait()
        for stream in (self.popen.stdin, self.popen.stdout):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]


class Caller:
    """Scores blocks of answers with a function in a process of its own, which stays from block to block.

    A block on which the function raises, hangs, ends its process, or returns no list of the right length is tried again one
    answer at a time. So only the answers on which it fails alone are without a reward.

    Args:
        digest: digest that the function's source must have.

    Raises:
        RaydpoError: if the function cannot be opened, or has another source on this machine.
    """

    def __init__(self, reward: RewardConfig, digest: str, round: int, step: int) -> None:
        self.reward, self.digest, self.state = reward, digest, {"round": round, "step": step}
        self.hangs, self.closed = 0, False
        self.process: FunctionProcess | None = self._started()

    def _started(self) -> FunctionProcess:
        process = FunctionProcess(self.reward)
        if process.about["digest"] != self.digest:
            process.end()
            raise RaydpoError(
                f"the reward {reward_name(self.reward)} ({self.reward.use}) has another source on {os.uname().nodename} "
                "than where the command was started, or it was edited meanwhile; run the command again, with the same files "
                "on all machines"
            )
        return process

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Return a table of ``RESULTS`` for rows of ``task.ROWS``."""
        block = rows.to_pydict()
        found = self._call(block)
        if isinstance(found, str) and rows.num_rows == 1:
            found = [self._failed(found)]
        elif isinstance(found, str):
            found = self._one_by_one(block)
        return pa.Table.from_pylist(found, RESULTS)

    def _one_by_one(self, block: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
        """Results of answers that are each tried alone. If the function does not end on any, the others are not tried."""
        found: dict[int, dict[str, Any]] = {}
        ends = False  # whether a call for an answer of this block has ended in time
        for row in _spread(block["prompt"]):
            if found and not ends and self.hangs >= HANGS:
                limit = f"{self._seconds(1):g} s"
                found[row] = self._failed(
                    f"TimeoutError: not tried, since {self.hangs} calls in a row took more than {limit}"
                )
                continue
            start = time.monotonic()
            one = self._call({name: [values[row]] for name, values in block.items()})
            found[row] = self._failed(one, time.monotonic() - start) if isinstance(one, str) else one[0]
            ends = ends or self.hangs == 0
        if ends:
            self.hangs = 0
        return [found[row] for row in range(len(found))]

    def _call(self, block: Mapping[str, list[Any]]) -> list[dict[str, Any]] | str:
        """One result for each answer; or what failed."""
        if self.closed:
            raise RaydpoError("scoring was stopped")
        if self.process is None:
            self.process = self._started()
        request = {f"{name}s" if name in ("prompt", "completion") else name: values for name, values in block.items()}
        start, seconds = time.monotonic(), self._seconds(len(block["prompt"]))
        try:
            reply = self.process.ask(request | self.state, seconds)
        except _Slow:
            self._end()
            self.hangs += 1
            return f"TimeoutError: took more than {seconds:g} s"
        except (ChildProcessError, ValueError) as error:
            self._end()
            self.hangs = 0
            return f"{type(error).__name__}: {error}"
        self.hangs = 0
        if "failed" in reply:
            return str(reply["failed"])
        seconds = (time.monotonic() - start) / len(block["prompt"])
        columns = zip(reply["rewards"], reply["errors"], reply["details"], strict=True)
        return [{"reward": one, "error": error, "details": said, "seconds": seconds} for one, error, said in columns]

    @staticmethod
    def _failed(error: str, seconds: float = 0.0) -> dict[str, Any]:
        return {"reward": None, "error": error, "details": None, "seconds": seconds}

    def _seconds(self, answers: int) -> float:
        """Time limit of a call. Functions that end long answers themselves get the time to do so."""
        own = OWN_LIMIT * self.reward.seconds * answers if self.reward.use in _OWN else 0.0
        return self.reward.timeout + own

    def _end(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.end()

    def close(self) -> None:
        """End the process. Another thread that waits for it then raises a RaydpoError."""
        self.closed = True
        process = self.process
        if process is not None:
            process.kill()


def _spread(prompts: list[Any]) -> list[int]:
    """Places of answers in the order in which they are tried: the first to each prompt, then the second, and so on. A
    function that hangs on one answer to a prompt often hangs on all of them."""
    seen: collections.Counter[str] = collections.Counter()
    turns = []
    for prompt in prompts:
        turns.append(seen[prompt])
        seen[prompt] += 1
    return sorted(range(len(prompts)), key=turns.__getitem__)


def described(reward: RewardConfig) -> dict[str, Any]:
    """What a process says of a user's function; see ``FunctionProcess``.

    Raises:
        RaydpoError: if it cannot be opened.
    """
    process = FunctionProcess(reward)
    process.end()
    return process.about
