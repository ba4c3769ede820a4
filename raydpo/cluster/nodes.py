"""Nodes of the connected Ray cluster: which of them a stage may use, what fits on them, and what an autoscaler may add."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["NODE_SHARE", "grows_to", "holds", "never_comes", "nodes_with", "room_for", "selected"]

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
