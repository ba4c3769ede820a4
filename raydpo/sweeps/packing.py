"""Computes how many trials fit on the connected Ray cluster at the same time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from raydpo.cluster.nodes import nodes_with
from raydpo.cluster.resources import resources_for
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
    """Return how many trials run in parallel: as many of the largest as fit, at most ``sweep.at_once``.

    The number depends on the cluster and on all trials, including finished ones. On CPUs it decides the threads of a worker.
    If it changed when a sweep continues, the last bits of sums would change.

    Raises:
        ConfigError: if the cluster has no room for a trial, or not for ``sweep.at_once`` trials.
    """
    import ray

    needs = [resources_for("train", trial.config) for trial in trials]
    workers, gpus = max(need.workers for need in needs), max(need.gpus_per_worker for need in needs)
    here = ray.get_runtime_context().get_node_id()
    nodes = []
    for node in nodes_with(config.train.accelerator, config.train.labels):
        cpus = node["Resources"].get("CPU", 0)
        # A local Ray may be started with more CPUs than the machine has.
        if not gpus and node["NodeID"] == here:
            cpus = min(cpus, os.cpu_count() or 1)
        nodes.append(FreeNode(cpus, node["Resources"].get("GPU", 0)))
    fit, wish = max(1, places(nodes, workers, gpus)), config.sweep.at_once
    if wish is not None and wish > fit and not config.ray.autoscaling:
        raise ConfigError(
            f"sweep.at_once is {wish}, but the cluster holds {fit} trial(s) of {workers} worker(s) with "
            f"{gpus:g} GPU(s) each; lower it, or leave it out"
        )
    return min(wish or fit, len(trials))
