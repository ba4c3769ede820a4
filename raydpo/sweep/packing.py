"""How many trials train at the same time on the Ray cluster that is connected."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from raydpo.config import Config
from raydpo.errors import ConfigError
from raydpo.nodes import nodes_with
from raydpo.ray_runtime import resources_for
from raydpo.sweep.trials import Trial

__all__ = ["Node", "places", "trials_at_once"]

ROUNDING = 1e-6
"""Ten tenths of a GPU are one."""


@dataclass(frozen=True)
class Node:
    """What Ray may give away of one machine."""

    cpus: float
    gpus: float


def places(nodes: Iterable[Node], workers: int, gpus_per_worker: float) -> int:
    """How many trainings of so many workers ``nodes`` hold together.

    A worker takes a CPU and its GPUs of one node; a part of a GPU is of one GPU. Workers of a training may be on different
    nodes. What waits for them (drivers, controllers, boards) takes nothing, or trials would hold what others wait for.
    """
    return sum(_workers_on(node, gpus_per_worker) for node in nodes) // workers


def _workers_on(node: Node, gpus_per_worker: float) -> int:
    if not gpus_per_worker:
        return int(node.cpus)
    if gpus_per_worker < 1:
        on_gpus = int(node.gpus) * int(1 / gpus_per_worker + ROUNDING)
    else:
        on_gpus = int(node.gpus / gpus_per_worker + ROUNDING)
    return min(int(node.cpus), on_gpus)


def trials_at_once(config: Config, trials: Sequence[Trial]) -> int:
    """As many of ``trials`` as fit if each is as large as the largest; ``sweep.at_once`` where that is less.

    Depends on the cluster and the whole sweep, not on what is left of it: on CPUs the threads of a worker follow from it,
    and with them the last bits of its sums.

    Raises:
        ConfigError: if the cluster cannot hold a trial, or not as many as ``sweep.at_once`` wants.
    """
    import ray

    needs = [resources_for("train", trial.config) for trial in trials]
    workers, gpus = max(need.workers for need in needs), max(need.gpus_per_worker for need in needs)
    here = ray.get_runtime_context().get_node_id()
    nodes = []
    for node in nodes_with(config.train.accelerator, config.train.labels):
        cpus = node["Resources"].get("CPU", 0)
        # A Ray of our own counts more CPUs than there are, which train no faster.
        if not gpus and node["NodeID"] == here:
            cpus = min(cpus, os.cpu_count() or 1)
        nodes.append(Node(cpus, node["Resources"].get("GPU", 0)))
    fit, wish = max(1, places(nodes, workers, gpus)), config.sweep.at_once
    if wish is not None and wish > fit and not config.ray.autoscaling:
        raise ConfigError(f"sweep.at_once is {wish}, but the cluster holds {fit} trial(s) of {workers} worker(s) with "
                          f"{gpus:g} GPU(s) each; lower it, or leave it out")
    return min(wish or fit, len(trials))
