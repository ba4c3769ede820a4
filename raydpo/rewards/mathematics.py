"""The reward ``math``: 1 if the answer gives the right value of the prompt, else 0."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from raydpo.config.rewards import RewardConfig
from raydpo.errors import ConfigError
from raydpo.rewards.sources import answer_text

__all__ = ["Verifier", "check", "column", "make"]

START = 120.0
"""Seconds that the process of the verifier may take to import its libraries."""


def column(reward: RewardConfig) -> tuple[str, ...]:
    """Columns of the prompts that the reward reads: the right answer."""
    return (reward.column or "answer",)


def check(reward: RewardConfig) -> None:
    """Refuse the reward where math-verify is missing.

    Raises:
        ConfigError: naming the fix.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ConfigError("the reward math needs the package math-verify; install it with: pip install 'raydpo[rewards]'")


def make(reward: RewardConfig) -> Callable[..., list[Any]]:
    """Return the reward function, with TRL's interface.

    The column holds the right answer: a number, LaTeX with or without dollars, a solution with ``\\boxed{}`` or ``####``, a
    letter of a multiple choice, or a word. Null = the reward does not apply. An entry of the result is 1.0, 0.0, None, or an
    exception: the right answer cannot be read, or the verdict took more than ``seconds``. An answer without a value is 0.0.
    """
    (name,) = column(reward)
    verifier = Verifier(reward.seconds)

    def mathematics(
        completions: Sequence[Any], log_extra: Callable[[str, list[Any]], None] | None = None, **columns: Any
    ) -> list[Any]:
        results, read = [], []
        for completion, gold in zip(completions, columns[name], strict=True):
            text = answer_text(completion)
            result, part = (None, None) if gold is None else verifier.verdict(gold, text)
            results.append(result)
            read.append(part)
        if log_extra is not None:
            log_extra("read", read)
        return results

    return mathematics


class Verifier:
    """A process that compares answers with math-verify, and is replaced when one takes more than ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._left = b""

    def verdict(self, gold: Any, answer: str) -> tuple[float | Exception, str | None]:
        """The reward, or why there is none, and the part of the answer that was read."""
        try:
            process = self._process or self._start()
            assert process.stdin is not None
            process.stdin.write(json.dumps({"gold": gold, "answer": answer}).encode() + b"\n")
            process.stdin.flush()
            reply = self._reply(process, self.seconds)
        except TimeoutError:
            self.close()
            return TimeoutError(f"math-verify took more than {self.seconds:g} s for this answer"), None
        except (EOFError, OSError):
            status = self.close()
            return RuntimeError(f"the process of math-verify ended with status {status} on this answer"), None
        if "equal" in reply:
            return float(reply["equal"]), reply["read"]
        return ValueError(reply.get("gold_error") or reply["error"]), None

    def close(self) -> int | None:
        """End the process. Return its exit status."""
        process, self._process, self._left = self._process, None, b""
        if process is None:
            return None
        process.kill()
        with contextlib.suppress(OSError):
            process.communicate()
        return process.returncode

    def _start(self) -> subprocess.Popen[bytes]:
        # -S is not given: the packages lie in the virtual environment. The import path of this process may have been
        # extended, by Ray for instance.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "raydpo.rewards.equality"],  # -P: no module of the working directory
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        try:
            self._reply(self._process, START)
        except (TimeoutError, EOFError) as error:
            self.close()
            raise RuntimeError("the process of math-verify did not start; try: python -m raydpo.rewards.equality") from error
        return self._process

    def _reply(self, process: subprocess.Popen[bytes], seconds: float) -> dict[str, Any]:
        assert process.stdout is not None
        until = time.monotonic() + seconds
        while b"\n" not in self._left:
            if not select.select([process.stdout], [], [], max(until - time.monotonic(), 0))[0]:
                raise TimeoutError
            data = os.read(process.stdout.fileno(), 1 << 16)
            if not data:
                process.wait()
                raise EOFError
            self._left += data
        line, _, self._left = self._left.partition(b"\n")
        return json.loads(line)

    def __del__(self) -> None:
        self.close()
