"""Tell which actors have been silent for long, and how far those are that load a large model.

Ray Data itself either says nothing or ends the execution.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from raydpo.terminal.phases import Seldom

__all__ = ["QUIET_SECONDS", "Watched", "duration", "loading", "watching"]

QUIET_SECONDS = 600.0
"""Seconds without a sign of an actor until it is named, and until it is named again."""
LOADING_SECONDS = 10.0
"""Seconds after which it is asked again how far actors are that load a model."""
_NAMESPACE = b"raydpo"
_here: list[Watched] = []
"""The actor of this process, once it is being made."""


def loading(done: int, total: int) -> None:
    """Note how far this process is with loading a model, in bytes, if it is a watched actor. May be called often."""
    if _here:
        _here[0].loading(done, total)


class Watched:
    """An actor that notes in Ray's key-value store when it begins and ends its constructor and each call.

    Args:
        run: name that the actors of one execution share.
        actor: class of the actor.
        arguments: arguments of its constructor.
    """

    def __init__(self, run: str, actor: type, arguments: tuple[Any, ...]) -> None:
        import ray

        context = ray.get_runtime_context()
        self._key, self._host = f"{run}/{context.get_actor_id()}", ray.util.get_node_ip_address()
        self._lock, self._running, self._done = threading.Lock(), 0, 0
        self._note(1, 0)
        self.loading = Seldom(lambda done, total: self._note(0, 0, [done, total] if done < total else None))
        _here[:] = [self]
        self._actor = actor(*arguments)
        self._note(-1, 0)

    def __call__(self, block: Any) -> Any:
        self._note(1, 0)
        try:
            return self._actor(block)
        finally:
            self._note(-1, 1)

    def _note(self, began: int, ended: int, loading: list[int] | None = None) -> None:
        from ray.experimental.internal_kv import _internal_kv_put

        with self._lock:
            self._running += began
            self._done += ended
            state = {"host": self._host, "process": os.getpid(), "running": self._running, "done": self._done}
            state |= {} if loading is None else {"loading": loading}
        with contextlib.suppress(Exception):  # a sign that is lost must not end the work
            _internal_kv_put(self._key, json.dumps(state), namespace=_NAMESPACE)


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
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(Exception):  # Ray is gone
            _internal_kv_del(run, del_by_prefix=True, namespace=_NAMESPACE)


def _watch(run: str, doing: str, tell: Callable[[str], None], over: threading.Event) -> None:
    signs: dict[bytes, bytes] = {}
    since = dict.fromkeys([b""], time.monotonic())  # of each actor's last sign; b"": of the first actor's start
    told: dict[bytes, float] = {}
    loaded = None
    while not over.wait(min(QUIET_SECONDS / 10, LOADING_SECONDS)):
        now = time.monotonic()
        with contextlib.suppress(Exception):  # the store does not answer: Ray itself will say so
            for key, sign in _signs(run).items():
                if signs.get(key) != sign:
                    signs[key], since[key] = sign, now
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


def _who(state: dict[str, Any]) -> str:
    if "host" not in state:
        return "no worker has started"
    at = f"block {state['done'] + 1:,} of its own" if state["done"] else "its start or first block"
    return f"process {state['process']} on {state['host']} has been at {at}"


def duration(seconds: float) -> str:
    """A time for messages."""
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
