"""Resources that are not there yet: ask for them ahead of need, and say what is missing while waiting."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from raydpo.config import Config
from raydpo.console import Console
from raydpo.nodes import room_for
from raydpo.ray_runtime import Resources, resources_for

__all__ = ["coming_up", "wait_for"]

ASK_SECONDS = 5.0
"""Ray keeps one wish for the whole cluster, the last one, and Ray Data utters its own every 20 s."""
SAY_SECONDS = 15.0
_WISHES: dict[str, tuple[Resources, int]] = {}
"""What this process asks for, and for how many places, all of it at each time."""


@contextlib.contextmanager
def coming_up(config: Config, *, wanted: bool = True, trainings: int = 1) -> Iterator[None]:
    """Within the block an autoscaler brings the nodes of the training, or of so many at the same time, so that they start
    while the reference is scored.

    A wish only: nothing is held, and scoring may use the same nodes. It ends with the block, after which nodes that nobody
    uses are let go; if this process is killed, Ray Data's next wish takes its place.
    """
    if not config.ray.autoscaling or not wanted:
        yield
        return
    over = threading.Event()

    def ask() -> None:
        while not over.wait(ASK_SECONDS):
            _ask()

    asking = threading.Thread(target=ask, name="raydpo-ask", daemon=True)
    resources = resources_for("train", config)
    with _wishing("nodes of the training", resources, resources.workers * trainings):
        asking.start()
        try:
            yield
        finally:
            over.set()
            asking.join()


def wait_for(stage: str, resources: Resources, console: Console, *, autoscaling: bool = False) -> None:
    """Until the workers of a stage have a place, saying now and then what is missing and for how long.

    Scoring begins with the first actor that has one; a training needs all of its workers, or as many as it may begin with.

    Args:
        autoscaling: ask for places for all of them meanwhile. Nobody else does, since the stage has not begun.
    """
    needed = 1 if stage == "score" else resources.fewest or resources.workers
    places = resources.teams if resources.on_one_machine else resources.workers
    started = said = time.monotonic()
    wish: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if autoscaling:
        wish = _wishing(f"a place for each {stage} worker", resources, places)
    with wish:
        while (room := room_for(resources.bundle, resources.accelerator, resources.labels)) < needed:
            now = time.monotonic()
            if now - said >= SAY_SECONDS:
                said = now
                console.say(f"  waiting {now - started:.0f} s for {needed - room} of {needed} {stage} worker(s), each "
                            f"{resources.asks()}; others use them, or their nodes are not there yet")
                if autoscaling:
                    _ask()
            time.sleep(1)


@contextlib.contextmanager
def _wishing(name: str, resources: Resources, places: int) -> Iterator[None]:
    """Within the block an autoscaler is asked for so many places, beside what else this process wishes."""
    _WISHES[name] = (resources, places)
    _ask()
    try:
        yield
    finally:
        del _WISHES[name]
        _ask()


def _ask() -> None:
    from ray.autoscaler.sdk import request_resources

    wished = [resources for resources, places in list(_WISHES.values()) for _ in range(places)]
    request_resources(bundles=[dict(resources.bundle) for resources in wished],
                      bundle_label_selectors=[dict(resources.labels) for resources in wished])
