"""Computes how many trials fit on the connected Ray cluster at the same time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from raydpo.cluster.nodes import cores_of, nodes_with
from raydpo.cluster.resources import Resources, resources_for
from raydpo.config import Config
from raydpo.errors import ConfigError
from raydpo.sweeps.trials import Trial

__all__ = ["FreeNode", "places", "trials_at_once"]

ROUNDING = 1e-6
"""Tolerance for sums of fractions of a GPU: ten times 0.1 must count as 1."""


@dataclass(frozen=True)
class FreeNode:
    """Resources of one machine that Ray can allocate."""

    cpus: float
    gpus: float


def places(nodes: Iterable[FreeNode], workers: int, gpus_per_worker: float) -> int:
    """Compute how many trainings with ``workers`` workers each fit on ``nodes``.

    A worker needs one CPU and its GPUs on one node. A fraction of a GPU must be on one GPU. Workers of a training may be on
    different nodes. Drivers and controllers of trials reserve no resources, since waiting trials would then block them.
    """
    return sum(_workers_on(node, gpus_per_worker) for node in nodes) // workers


def _workers_on(node: FreeNode, gpus_per_worker: float) -> int:
    if not gpus_per_worker:
        return int(node.cpus)
    if gpus_per_worker < 1:
        on_gpus = int(node.gpus) * int(1 / gpus_per_worker + ROUNDING)
    else:
        on_gpus = int(node.gpus / gpus_per_worker + ROUNDING)
    return min(int(node.cpus), on_gpus)


def trials_at_once(config: Config, trials: Sequence[Trial]) -> int:
    """Return how many trials run in parallel: ``sweep.at_once``, or as many of the largest as fit.

    Trials with a varying number of workers count with the largest number. ``sweep.at_once`` may be as many as can start with
    the smallest.

    The number depends on the cluster and on all trials, including finished ones. On CPUs it decides the threads of a worker.
    If it changed when a sweep continues, the last bits of sums would change.

    Raises:
        ConfigError: if the cluster has no room for a trial, or not for ``sweep.at_once`` trials.
    """
    needs = [resources_for("train", trial.config) for trial in trials]
    room = [(need, _nodes_of(need)) for need in needs]
    fit = max(1, min(places(nodes, need.workers, need.gpus_per_worker) for need, nodes in room))
    starts = [(places(nodes, need.fewest or need.workers, need.gpus_per_worker), need) for need, nodes in room]
    held, need = min(starts, key=lambda one: one[0])
    wish = config.sweep.at_once
    if wish is not None and wish > max(1, held) and not config.ray.autoscaling:
        raise ConfigError(
            f"sweep.at_once is {wish}, but the cluster holds {held} trial(s) of {need.fewest or need.workers} worker(s) "
            f"with {need.gpus_per_worker:g} GPU(s) each{'' if held else ', so trials train one at a time'}; lower it, or "
            "leave it out"
        )
    return min(wish or fit, len(trials))


def _nodes_of(need: Resources) -> list[FreeNode]:
    """The nodes on which the workers of a training may be."""
    return [
        # A local Ray may be started with more CPUs than the machine has.
        FreeNode(
            node["Resources"].get("CPU", 0)
            if need.gpus_per_worker
            else min(node["Resources"].get("CPU", 0), cores_of(node)),
            node["Resources"].get("GPU", 0),
        )
        for node in nodes_with(need.accelerator, need.labels)
    ]
