"""Nodes of the connected Ray cluster: which of them a stage may use, what fits on them, and what an autoscaler may add."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "NODE_SHARE",
    "cores_of",
    "grows_to",
    "holds",
    "never_comes",
    "nodes_with",
    "room_for",
    "selected",
    "usable_cores",
]

NODE_SHARE = 0.001
"""Amount of a node's resource ``accelerator_type:...`` that a worker requests. Ray itself requests the same amount."""


def nodes_with(accelerator: str | None, labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the live nodes with this kind of GPU and these labels, as ``ray.nodes()`` describes them."""
    import ray

    return [
        node
        for node in ray.nodes()
        if node["Alive"]
        and selected(node.get("Labels") or {}, labels)
        and (accelerator is None or f"accelerator_type:{accelerator}" in node["Resources"])
    ]


def selected(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node's labels match ``selector``, by Ray's rules: ``a``, ``!a``, ``in(a,b)``, ``!in(a,b)``."""
    for key, value in selector.items():
        bare = value.removeprefix("!")
        several = re.fullmatch(r"in\((.*)\)", bare)
        values = [one.strip() for one in several[1].split(",")] if several else [bare]
        if (labels.get(key) in values) == value.startswith("!"):
            return False
    return True


def holds(resources: Mapping[str, float], bundle: Mapping[str, float]) -> int:
    """Number of times that ``bundle`` fits into ``resources``."""
    return min((int(resources.get(name, 0) / amount + 1e-6) for name, amount in bundle.items() if amount), default=0)


def room_for(bundle: Mapping[str, float], accelerator: str | None, labels: Mapping[str, str]) -> int:
    """Number of times that ``bundle`` fits into the free resources of the nodes with this kind of GPU and these labels."""
    import ray

    free = ray._private.state.available_resources_per_node()
    return sum(holds(free.get(node["NodeID"], {}), bundle) for node in nodes_with(accelerator, labels))


def cores_of(node: Mapping[str, Any]) -> int:
    """Number of CPU cores, at least 1, on which workers on this node can compute: those that Ray reports. A local Ray may be
    started with other numbers than the machine has, so this machine is asked itself."""
    import ray

    if ray.is_initialized() and node.get("NodeID") == ray.get_runtime_context().get_node_id():
        return usable_cores()
    return max(1, int(node["Resources"].get("CPU", 0)))


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Number of CPU cores, at least 1, that this process may use: those that it is bound to, but no more than the CPU time
    that its container is granted. ``os.cpu_count()`` returns all cores of the machine instead.

    Args:
        cgroup: directory with the limits of the container, of version 1 or 2.
    """
    # Not on macOS and Windows.
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        if (limit := cgroup / "cpu.max").exists():
            quota, period = limit.read_text(encoding="ascii").split()
        else:
            quota, period = ((cgroup / f"cpu/cpu.cfs_{part}_us").read_text(encoding="ascii") for part in ("quota", "period"))
        granted = int(quota) / int(period)  # -1 or "max" is no limit
    except (OSError, ValueError, ZeroDivisionError):
        return bound
    return max(1, min(bound, int(granted))) if granted > 0 else bound


def grows_to(name: str) -> float | None:
    """Largest amount of a resource that the cluster's autoscaler allows; None without an autoscaler, or if unknown."""
    import ray

    try:
        most = ray._private.state.state.get_max_resources_from_cluster_config()
    except Exception:  # what Ray knows of its autoscaler differs by version and platform
        return None
    return None if most is None else float(most.get(name, 0))


def never_comes(bundle: Mapping[str, float], labels: Mapping[str, str]) -> tuple[int, bool]:
    """Ask the cluster's autoscaler whether it can never provide ``bundle`` on nodes with these labels.

    Returns:
        Number of the autoscaler's last look at the cluster (0 if unknown: only version 2 numbers them), and whether none of
        its node groups can hold the bundle.
    """
    import ray
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    try:
        told = GcsClient(ray.get_runtime_context().gcs_address).get_cluster_status()
        state = GetClusterStatusReply.FromString(told).autoscaling_state
        refused = any(
            dict(one.request.resources_bundle) == dict(bundle)
            and {label.label_key for each in one.request.label_selectors for label in each.label_constraints} == set(labels)
            for constraint in state.infeasible_cluster_resource_constraints
            for one in constraint.resource_requests
        )
        return state.last_seen_cluster_resource_state_version, refused
    except Exception:  # what Ray knows of its autoscaler differs by version and platform
        return 0, False
