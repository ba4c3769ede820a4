"""The process in which a reward function runs. It imports the function, and calls it for one request after another.

``process`` starts it and ends it. It imports no torch, no pyarrow and no Ray; the function may. The function runs in the
main thread, so SIGALRM works. What it prints goes to standard error; its standard input is empty.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import math
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, BinaryIO

from raydpo.errors import one_line
from raydpo.rewards.sources import PACKAGES, built_in_digest, imported, open_built_in, sources_digest

__all__ = ["ARGUMENTS", "HEADER", "NO_COLUMNS", "answer_to", "main", "read_message", "written"]

HEADER = 8
"""Bytes before each message: its length, big-endian."""
MOST_TEXT = 300
"""Characters of an exception's message that are kept."""
MOST_DETAIL = 2000
"""Characters of a logged value of an unknown type that are kept."""
MOST_REWARD = 1e100
"""Largest size of a reward. Weights are at most 1e6, so weighted sums of rewards, and their differences, are finite."""
ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""Arguments of reward functions beside the columns, as in TRL. No column can be named like them."""
NO_COLUMNS = ("prompt", "completion", *ARGUMENTS)
"""Columns that functions do not get; TRL leaves out the first two, too."""


def main() -> None:
    """Serve requests of the parent process until it closes the pipe."""
    requests, replies = os.dup(0), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    _end_with(requests, replies)
    sys.dont_write_bytecode = True  # two edits within a second look the same to Python's cache of compiled modules
    stream = os.fdopen(requests, "rb")
    opening = read_message(stream)
    if opening is None:
        return
    try:
        function, about = _opened(opening["reward"])
    except BaseException as error:  # a module may do anything when it is imported
        _send(replies, {"failed": _told(error)})
        return
    _send(replies, about)
    process = os.getpid()
    # One event loop for all calls, as in TRL: clients and locks of async functions belong to the loop that first used them.
    with asyncio.Runner() as loop:
        while (request := read_message(stream)) is not None:
            reply = answer_to(function, request, loop)
            if os.getpid() != process:
                os._exit(0)  # a process that the function has forked, and that came back; its reply would be another's
            signal.setitimer(signal.ITIMER_REAL, 0)  # an alarm that the function has left would end a later call
            with contextlib.suppress(Exception):  # the function may have closed or replaced it
                sys.stdout.flush()
            _send(replies, reply)


def _end_with(requests: int, replies: int) -> None:
    """Fork a process that waits until the parent has closed its end of ``requests``, or has died, and then ends this process
    with its children. Not even a function that hangs in C code outlives the parent."""
    group = os.getpid()
    if os.fork():
        return
    os.setsid()
    for descriptor in (replies, 0, 1, 2):
        os.close(descriptor)
    closed = select.poll()
    closed.register(requests, 0)  # 0 = hang-ups only
    closed.poll()
    with contextlib.suppress(OSError):
        os.killpg(group, signal.SIGKILL)
    os._exit(0)


def _opened(reward: Mapping[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function of a ``RewardConfig`` as plain data, and what the parent asks about it."""
    if ":" not in reward["use"]:
        from raydpo.config.rewards import RewardConfig  # a user's own function needs no pydantic

        made = RewardConfig.model_validate(reward)
        return open_built_in(made), {"digest": built_in_digest(reward["use"])}
    module, function = imported(reward["use"])
    try:
        kinds = [(one.name, one.kind.name, one.default is not one.empty) for one in _parameters(function)]
    except (TypeError, ValueError):  # a function of C code may not tell its parameters
        kinds = None
    return function, {"digest": sources_digest(module), "file": getattr(module, "__file__", None), "parameters": kinds}


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Parameters that the function itself takes. Those of a function that it wraps may be fewer."""
    return list(inspect.signature(function, follow_wrapped=False).parameters.values())


def answer_to(function: Callable[..., Any], request: Mapping[str, Any], loop: asyncio.Runner) -> dict[str, Any]:
    """Call the function for the answers of a request.

    Args:
        loop: runs what an async function returns.
        request: ``prompts`` as JSON texts, ``completions``, ``completion_ids``, ``columns`` as JSON objects, one entry for
            each answer; ``round`` and ``step``.

    Returns:
        Lists ``rewards`` (number or None), ``errors`` and ``details`` (text or None); or ``failed``, what the call raised.
    """
    try:
        prompts = [json.loads(prompt) for prompt in request["prompts"]]
        completions = [
            [{"role": "assistant", "content": text}] if isinstance(prompt, list) else text
            for prompt, text in zip(prompts, request["completions"], strict=True)
        ]
        rows = [json.loads(columns) for columns in request["columns"]]
        names = dict.fromkeys(name for row in rows for name in row if name not in NO_COLUMNS)
        count = len(prompts)  # the function may change its lists
        extra: dict[str, list[Any]] = {}
        metrics: dict[str, list[float]] = {}
        returned = function(
            prompts=prompts,
            completions=completions,
            completion_ids=request["completion_ids"],
            trainer_state=SimpleNamespace(global_step=request["step"], round=request["round"]),
            log_extra=lambda column, values: extra.setdefault(column, []).extend(values),
            log_metric=lambda name, value: metrics.setdefault(name, []).append(float(value)),
            **{name: [row.get(name) for row in rows] for name in names},
        )
        if inspect.isawaitable(returned):
            returned = loop.run(_awaited(returned))
        rewards, errors = _rewards(returned, count)
        details = _details(extra, metrics, count)
    except BaseException as error:  # a function may also raise SystemExit
        return {"failed": _told(error)}
    return {"rewards": rewards, "errors": errors, "details": details}


async def _awaited(returned: Any) -> Any:
    return await returned


def _rewards(returned: Any, count: int) -> tuple[list[float | None], list[str | None]]:
    """The reward of each answer, and what is wrong with those that are no numbers."""
    if isinstance(returned, (str, bytes, bytearray, Mapping)) or not hasattr(returned, "__iter__"):
        raise TypeError(f"returned a {type(returned).__name__}; expected a list of numbers, one for each answer")
    values = list(returned)
    if len(values) != count:
        raise ValueError(f"returned {len(values):,} values for {count:,} answer(s)")
    made = [_reward(value) for value in values]
    return [reward for reward, _ in made], [error for _, error in made]


def _reward(value: Any) -> tuple[float | None, str | None]:
    """A number as TRL takes it, which may also be a bool, an element of an array, or a tensor of one."""
    if value is None:
        return None, None
    if isinstance(value, Exception):  # a built-in function says so what failed on this answer alone
        return None, _told(value)
    try:
        if isinstance(value, (str, bytes, bytearray)):
            raise TypeError(f"returned {value[:40]!r}; expected a number or None")
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"returned {number}; expected a finite number, or None if the function does not apply")
        if abs(number) > MOST_REWARD:
            raise ValueError(f"returned {number:g}; expected a number from -{MOST_REWARD:g} to {MOST_REWARD:g}")
    except Exception as error:
        return None, _told(error)
    return number, None


def _details(extra: Mapping[str, list[Any]], metrics: Mapping[str, list[float]], count: int) -> list[str | None]:
    """What the function has logged about each answer, as JSON objects; and the mean of each metric of the call."""
    for column, values in extra.items():
        if len(values) != count:
            raise ValueError(f"log_extra({column!r}) was given {len(values):,} values for {count:,} answer(s)")
    shared = {name: _plain(math.fsum(values) / len(values)) for name, values in metrics.items()}
    if not extra and not shared:
        return [None] * count
    return [
        json.dumps(shared | {str(column): _plain(values[row]) for column, values in extra.items()}) for row in range(count)
    ]


def _plain(value: Any) -> Any:
    """``value`` as JSON can hold it."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if hasattr(value, "tolist"):  # NumPy's and torch's numbers and arrays
        with contextlib.suppress(Exception):
            plain = _plain(value.tolist())
            if len(json.dumps(plain)) <= MOST_DETAIL:
                return plain
    return str(value)[:MOST_DETAIL]


def _told(error: BaseException) -> str:
    """``Type: message`` of an exception, on one line."""
    try:
        message = one_line(error, MOST_TEXT)
    except Exception:
        message = ""
    text = f"{type(error).__name__}: {message or 'no message'}{_place(error)}"
    return text.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair cannot be stored


def _place(error: BaseException) -> str:
    """File and line of the user's code where an exception was raised, in parentheses; empty if it is none of the working
    directory."""
    here, ours = (os.path.join(folder, "") for folder in (os.getcwd(), os.path.dirname(os.path.dirname(__file__))))
    with contextlib.suppress(Exception):
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            place = frame.filename
            if place.startswith(here) and not place.startswith(ours) and not set(PACKAGES) & set(place.split(os.sep)):
                return f" ({place.removeprefix(here)}:{frame.lineno})"
    return ""


# -- messages -------------------------------------------------------------------------------------------------------------


def written(message: Mapping[str, Any]) -> bytes:
    """A message as it goes through a pipe."""
    data = json.dumps(message).encode("ascii")
    return len(data).to_bytes(HEADER, "big") + data


def read_message(stream: BinaryIO) -> dict[str, Any] | None:
    """The next message; None at the end of the stream."""
    header = stream.read(HEADER)
    return json.loads(stream.read(int.from_bytes(header, "big"))) if len(header) == HEADER else None


def _send(descriptor: int, message: Mapping[str, Any]) -> None:
    data = memoryview(written(message))
    while data:
        data = data[os.write(descriptor, data) :]
