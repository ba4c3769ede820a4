"""Tell which actors have been silent for long, why actors died, and how far those are that load a large model.

Ray Data itself says none of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from raydpo import errors
from raydpo.cluster.ending import end_process, say_last_words_by
from raydpo.errors import ProcessLostError, RaydpoError
from raydpo.terminal.phases import Seldom

__all__ = ["QUIET_SECONDS", "Watched", "Worker", "deaths", "duration", "loading", "watching"]

QUIET_SECONDS = 600.0
"""Seconds without a sign of an actor until it is named, and until it is named again."""
RESTARTS = 3
"""How often an actor is started again, and how often a block is repeated, when a process dies."""
LOOK_SECONDS = 10.0
"""Seconds from one look at the actors' signs to the next."""
ENDING_SECONDS = 30.0
"""Longest time in seconds that is waited for actors to end. Ray Data lets go of them and does not wait."""
_NAMESPACE = b"raydpo"
_here: list[Watched] = []
"""The actor of this process, once it is being made."""


def loading(done: int, total: int) -> None:
    """Note how far this process is with loading a model, in bytes, if it is a watched actor. May be called often."""
    if _here:
        _here[0].loading(done, total)


class Watched:
    """An actor that notes in Ray's key-value store when it begins and ends its constructor and each call, and why it dies.

    An actor that raises ``ProcessLostError`` ends its process. Ray then starts the actor anew and repeats its calls. It does
    neither after other exceptions.

    Args:
        run: name that the actors of one execution share.
        actor: class of the actor.
        arguments: arguments of its constructor.

    Raises:
        RaydpoError: what ended the process of this actor before, if starting it anew does not help.
    """

    def __init__(self, run: str, actor: type, arguments: tuple[Any, ...]) -> None:
        import ray

        context = ray.get_runtime_context()
        self._key, self._host = f"{run}/{context.get_actor_id()}", ray.util.get_node_ip_address()
        self._lock, self._running, self._done = threading.Lock(), 0, 0
        before = _sign(self._key)  # of the process that was this actor before
        self._words: dict[str, str] = {}
        said = before.get("words", {})
        if said and said["kind"] != ProcessLostError.__name__:
            raise getattr(errors, said["kind"])(said["text"])
        self._deaths: list[str | None] = [*before["deaths"], said.get("text")] if before else []  # why, of each
        self._note(1, 0)
        say_last_words_by(self._say)
        self.loading = Seldom(lambda done, total: self._note(0, 0, [done, total] if done < total else None))
        _here[:] = [self]
        with self._ending():
            self._actor: Any = actor(*arguments)
        self._note(-1, 0)

    def __call__(self, block: Any) -> Any:
        self._note(1, 0)
        try:
            with self._ending():
                return self._actor(block)
        finally:
            self._note(-1, 1)

    def end(self) -> None:
        """Let go of the actor, which ends the processes that it started, and note that."""
        self._actor = None
        self._note(0, 0, ended=True)

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        try:
            yield
        except ProcessLostError as error:
            end_process(error)

    def _say(self, error: RaydpoError) -> None:
        with self._lock:
            self._words = {"kind": type(error).__name__, "text": str(error)}
        self._note(0, 0)

    def _note(self, began: int, done: int, loading: list[int] | None = None, *, ended: bool = False) -> None:
        from ray.experimental.internal_kv import _internal_kv_put

        with self._lock:
            self._running += began
            self._done += done
            state = {"host": self._host, "process": os.getpid(), "running": self._running, "done": self._done}
            state |= {"deaths": self._deaths} | ({"words": self._words} if self._words else {})
            state |= {} if loading is None else {"loading": loading}
            state |= {"ended": True} if ended else {}
        with contextlib.suppress(Exception):  # a sign that is lost must not end the work
            _internal_kv_put(self._key, json.dumps(state), namespace=_NAMESPACE)


class Worker:
    """A watched actor as Ray Data holds it: the actor ends when Ray Data lets go of this object.

    Args:
        run, actor, arguments: as of ``Watched``.
    """

    def __init__(self, run: str, actor: type, arguments: tuple[Any, ...]) -> None:
        self._watched: Watched | None = None
        self._watched = Watched(run, actor, arguments)

    def __call__(self, block: Any) -> Any:
        assert self._watched is not None
        return self._watched(block)

    def __del__(self) -> None:
        if self._watched is not None:
            self._watched.end()


@contextlib.contextmanager
def watching(run: str, doing: str, tell: Callable[[str], None]) -> Iterator[None]:
    """Within the block, tell from time to time which actors are silent, and how far those are that load a large model.

    Args:
        run: name that the actors were given.
        doing: what the actors do, for messages.
        tell: called with one line, from another thread.
    """
    from ray.experimental.internal_kv import _internal_kv_del

    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(run, doing, tell, over), name="raydpo-watch", daemon=True)
    thread.start()
    try:
        yield
        _await_end(run)
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(Exception):  # Ray is gone
            _internal_kv_del(run, del_by_prefix=True, namespace=_NAMESPACE)


def _await_end(run: str) -> None:
    """Wait until the actors of an execution and what they started have ended, but not longer than ``ENDING_SECONDS``. The
    next stage needs their memory."""
    until = time.monotonic() + ENDING_SECONDS
    with contextlib.suppress(Exception):  # Ray is gone
        while time.monotonic() < until and not all(map(_has_ended, map(json.loads, _signs(run).values()))):
            time.sleep(0.05)


def _has_ended(state: dict[str, Any]) -> bool:
    """Whether an actor has ended. One that is still in its start is killed by Ray, and notes nothing."""
    return state.get("ended", False) or (state["running"] > 0 and not state["done"])


def deaths(run: str) -> dict[str, str]:
    """How often the actors of an execution died and why, by actor id, for those that are dead now; a part of a sentence."""
    told: dict[str, str] = {}
    signs: dict[bytes, bytes] = {}
    with contextlib.suppress(Exception):  # Ray is gone
        signs = _signs(run)
    for key, sign in signs.items():
        state = json.loads(sign)
        times = len(state["deaths"]) + 1  # the last one is not followed by a start that would count it
        why = _why(state.get("words", {}).get("text"))
        often = "once" if times == 1 else f"{times} times, the last time"
        told[key.decode().rpartition("/")[2]] = f"the worker on {state['host']} died {often} {why}"
    return told


def _why(words: str | None) -> str:
    return f"because {words}" if words else "without a word, as if killed: memory may be short there; run it again"


def _watch(run: str, doing: str, tell: Callable[[str], None], over: threading.Event) -> None:
    signs: dict[bytes, bytes] = {}
    since = dict.fromkeys([b""], time.monotonic())  # of each actor's last sign; b"": of the first actor's start
    told: dict[bytes, float] = {}
    loaded = None
    died: dict[bytes, int] = {}  # deaths that were told
    while True:
        ended = over.wait(min(LOOK_SECONDS, QUIET_SECONDS / 10))
        now = time.monotonic()
        with contextlib.suppress(Exception):  # the store does not answer: Ray itself will say so
            for key, sign in _signs(run).items():
                if signs.get(key) != sign:
                    signs[key], since[key] = sign, now
        for key, sign in signs.items():
            state = json.loads(sign)
            for words in state["deaths"][died.get(key, 0) :]:
                died[key] = died.get(key, 0) + 1
                why = _why(words).removesuffix("; run it again")
                again = f"it was started again, {died[key]} of {RESTARTS} times"
                tell(f"warning: {doing}: the worker on {state['host']} died {why}; {again}")
        if ended:
            return
        if (line := _loaded(signs.values())) not in {None, loaded}:
            loaded = line
            tell(f"{doing}: {line}")
        for key, start in since.items():
            if now - max(start, told.get(key, start)) < QUIET_SECONDS or (not key and signs):
                continue
            state = json.loads(signs[key]) if key else {"running": 1}
            if state["running"]:
                told[key] = now
                tell(f"{doing}: {_who(state)} for {duration(now - start)}")


def _signs(run: str) -> dict[bytes, bytes]:
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_list

    found = {key: _internal_kv_get(key, namespace=_NAMESPACE) for key in _internal_kv_list(run, namespace=_NAMESPACE)}
    return {key: sign for key, sign in found.items() if sign is not None}


def _loaded(signs: Iterable[bytes]) -> str | None:
    """How far the actors are that load a large model."""
    parts = [state["loading"] for state in map(json.loads, signs) if "loading" in state]
    if not parts:
        return None
    done, total = map(sum, zip(*parts, strict=True))
    by = f" by {len(parts)} workers" if len(parts) > 1 else ""
    return f"loading the model: {done / 1e9:,.0f} of {total / 1e9:,.0f} GB read{by}"


def _sign(key: str) -> dict[str, Any]:
    from ray.experimental.internal_kv import _internal_kv_get

    with contextlib.suppress(Exception):
        if (sign := _internal_kv_get(key, namespace=_NAMESPACE)) is not None:
            return json.loads(sign)
    return {}


def _who(state: dict[str, Any]) -> str:
    if "host" not in state:
        return "no worker has started"
    at = f"block {state['done'] + 1:,} of its own" if state["done"] else "its start or first block"
    return f"process {state['process']} on {state['host']} has been at {at}"


def duration(seconds: float) -> str:
    """A time for messages."""
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
