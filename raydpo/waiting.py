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
    from ray.autoscaler.sdk import request_resources

    resources = resources_for("train", config)
    workers = resources.workers * trainings
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            request_resources(bundles=[dict(resources.bundle)] * workers,
                              bundle_label_selectors=[dict(resources.labels)] * workers)
            over.wait(ASK_SECONDS)

    asking = threading.Thread(target=ask, name="raydpo-ask", daemon=True)
    asking.start()
    try:
        yield
    finally:
        over.set()
        asking.join()
        request_resources(bundles=[])


def wait_for(stage: str, resources: Resources, console: Console) -> None:
    """Until the workers of a stage have a place, saying now and then what is missing and for how long.

    Scoring begins with the first actor that has one; a training needs all of its workers, or as many as it may begin with.
    """
    needed = 1 if stage == "score" else resources.fewest or resources.workers
    started = said = time.monotonic()
    while True:
        room = room_for(resources.bundle, resources.accelerator, resources.labels)
        if room >= needed:
            return
        now = time.monotonic()
        if now - said >= SAY_SECONDS:
            said = now
            console.say(f"  waiting {now - started:.0f} s for {needed - room} of {needed} {stage} worker(s), each "
                        f"{resources.asks()}; others use them, or their nodes are not there yet")
        time.sleep(1)
