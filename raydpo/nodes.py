"""The nodes of the Ray that is connected: which ones a stage may use, what fits on them, what an autoscaler may add."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["NODE_SHARE", "grows_to", "holds", "never_comes", "nodes_with", "room_for", "selected"]

NODE_SHARE = 0.001
"""Of the resource by which Ray marks a node's kind of accelerator; what Ray itself asks for."""


def nodes_with(accelerator: str | None, labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """The nodes that are there, of this kind and with these labels, as ``ray.nodes()`` tells of them."""
    import ray

    return [node for node in ray.nodes() if node["Alive"] and selected(node.get("Labels") or {}, labels)
            and (accelerator is None or f"accelerator_type:{accelerator}" in node["Resources"])]


def selected(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node's labels are what ``selector`` asks for, by Ray's rules: ``a``, ``!a``, ``in(a,b)``, ``!in(a,b)``."""
    for key, wish in selector.items():
        bare = wish.removeprefix("!")
        several = re.fullmatch(r"in\((.*)\)", bare)
        values = [value.strip() for value in several[1].split(",")] if several else [bare]
        if (labels.get(key) in values) == wish.startswith("!"):
            return False
    return True


def holds(resources: Mapping[str, float], bundle: Mapping[str, float]) -> int:
    """How many times ``bundle`` fits into ``resources``."""
    return min((int(resources.get(name, 0) / amount + 1e-6) for name, amount in bundle.items() if amount), default=0)


def room_for(bundle: Mapping[str, float], accelerator: str | None, labels: Mapping[str, str]) -> int:
    """How many times ``bundle`` fits into what nobody uses at the moment."""
    import ray

    free = ray._private.state.available_resources_per_node()
    return sum(holds(free.get(node["NodeID"], {}), bundle) for node in nodes_with(accelerator, labels))


def grows_to(name: str) -> float | None:
    """How much of a resource the cluster's autoscaler may bring in all; None where there is none, or it does not say."""
    import ray

    try:
        most = ray._private.state.state.get_max_resources_from_cluster_config()
    except Exception:  # what Ray knows of its autoscaler differs by version and platform
        return None
    return None if most is None else float(most.get(name, 0))


def never_comes(bundle: Mapping[str, float], labels: Mapping[str, str]) -> tuple[int, bool]:
    """What the cluster's autoscaler says of a wish for ``bundle`` on nodes with these labels: the number of its last look at
    the cluster (0 where it does not tell; only that of version 2 does), and whether no node of its groups could hold it."""
    import ray
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    try:
        told = GcsClient(ray.get_runtime_context().gcs_address).get_cluster_status()
        state = GetClusterStatusReply.FromString(told).autoscaling_state
        wishes = [wish.request for constraint in state.infeasible_cluster_resource_constraints
                  for wish in constraint.resource_requests]
        return state.last_seen_cluster_resource_state_version, any(
            dict(wish.resources_bundle) == dict(bundle) and {
                label.label_key for selector in wish.label_selectors for label in selector.label_constraints} == set(labels)
            for wish in wishes)
    except Exception:  # what Ray knows of its autoscaler differs by version and platform
        return 0, False
