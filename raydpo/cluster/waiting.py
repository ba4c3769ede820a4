"""Request cluster resources early, and report what is missing while waiting for them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from raydpo.cluster.nodes import holds, never_comes, nodes_with, room_for
from raydpo.cluster.resources import Resources, resources_for
from raydpo.config import Config
from raydpo.errors import ConfigError
from raydpo.terminal.console import Console

__all__ = ["check_reachable", "request_nodes", "wait_for"]

ASK_SECONDS = 5.0
"""Seconds between requests. Each is repeated, since Ray keeps only the cluster's last request, and Ray Data sends its own
every 20 s."""
SAY_SECONDS = 15.0
"""Seconds between lines about what is missing."""
VERDICT_SECONDS = 20.0
"""Longest time, in seconds, to wait for the verdict of an autoscaler. It looks at the requests every 5 s."""
_REQUESTS: dict[object, tuple[Resources, int]] = {}
"""Open requests of this process, each with its number of places. All of them are sent together."""


@contextlib.contextmanager
def request_nodes(config: Config, *, wanted: bool = True, trainings: int = 1) -> Iterator[None]:
    """Within the block, request nodes for the training from an autoscaler, so that they start while the reference is scored.

    This is only a request: nothing is reserved, and scoring may use the same nodes. The request ends with the block, and the
    autoscaler then removes idle nodes. If this process is killed, the next request of Ray Data replaces it.

    Args:
        wanted: whether there is anything to train.
        trainings: number of trainings at the same time.
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
    with _requesting(resources, resources.workers * trainings):
        asking.start()
        try:
            yield
        finally:
            over.set()
            asking.join()


def check_reachable(stage: str, resources: Resources) -> None:
    """Ask the autoscaler whether it can provide a worker of a stage, if no node of the cluster can hold one.

    Raises:
        ConfigError: if no node group can hold one. The message has the line that such a group needs.
    """
    if any(holds(node["Resources"], resources.bundle) for node in nodes_with(resources.accelerator, resources.labels)):
        return
    with _requesting(resources, 1):
        first, _ = never_comes(resources.bundle, resources.labels)
        told: dict[int, bool] = {}  # verdict by number of the autoscaler's look
        started = asked = time.monotonic()
        while sum(told.values()) < 2:
            look, never = never_comes(resources.bundle, resources.labels)
            if look != first:
                told[look] = told.get(look, False) or never
            now = time.monotonic()
            # The autoscaler may have looked at the request of Ray Data instead of ours, so one look without a verdict proves
            # nothing.
            if not look or now - started > VERDICT_SECONDS or (len(told) > 3 and not any(told.values())):
                return
            if now - asked >= ASK_SECONDS:
                asked = now
                _ask()
            time.sleep(0.5)
    lines = []
    if resources.accelerator is not None:
        lines.append(f'resources: {{"accelerator_type:{resources.accelerator}": 1}}')
    if resources.labels:
        lines.append(f"labels: {{{', '.join(f'{key}: {value}' for key, value in resources.labels.items())}}}")
    fix = (
        f"add '{' and '.join(lines)}' to the group whose machines have it (a worker group of KubeRay, a node type of "
        f"Ray's launcher), or drop {stage}.accelerator and {stage}.labels"
        if lines
        else "ask for less, or add such a group"
    )
    raise ConfigError(
        f"no node group that the cluster's autoscaler knows has a place for a {stage} worker, which asks for "
        f"{resources.asks()}; {fix}"
    )


def wait_for(stage: str, resources: Resources, console: Console, *, autoscaling: bool = False) -> None:
    """Wait until the workers of a stage have a place, and print what is missing every ``SAY_SECONDS``.

    Scoring can begin with one worker; training needs all of them, or the fewest that it may begin with.

    Args:
        autoscaling: request places for all workers meanwhile. Ray itself requests them only once the stage has begun.
    """
    needed = 1 if stage == "score" else resources.fewest or resources.workers
    places = resources.teams if resources.on_one_machine else resources.workers
    started = said = asked = time.monotonic()
    with _requesting(resources, places) if autoscaling else contextlib.nullcontext():
        while (room := room_for(resources.bundle, resources.accelerator, resources.labels)) < needed:
            now = time.monotonic()
            if now - said >= SAY_SECONDS:
                said = now
                console.say(
                    f"  waiting {now - started:.0f} s for {needed - room} of {needed} {stage} worker(s), each "
                    f"{resources.asks()}; others use them, or their nodes are not there yet"
                )
            if autoscaling and now - asked >= ASK_SECONDS:
                asked = now
                _ask()
            time.sleep(1)


@contextlib.contextmanager
def _requesting(resources: Resources, places: int) -> Iterator[None]:
    """Within the block, request ``places`` from an autoscaler, together with the other requests of this process."""
    # Ray keeps a request until the next one, even if its process was killed. Ray Data's coordinator sends one regularly, but
    # it only starts with the first work of Ray Data or Ray Train.
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator

    get_or_create_autoscaling_coordinator()
    request = object()  # a key: trials of a sweep may request the same
    _REQUESTS[request] = (resources, places)
    _ask()
    try:
        yield
    finally:
        del _REQUESTS[request]
        _ask()


def _ask() -> None:
    from ray.autoscaler.sdk import request_resources

    requested = [resources for resources, places in list(_REQUESTS.values()) for _ in range(places)]
    request_resources(
        bundles=[dict(resources.bundle) for resources in requested],
        bundle_label_selectors=[dict(resources.labels) for resources in requested],
    )
