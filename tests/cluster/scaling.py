"""Machines that Ray's autoscaler (version 2) would start for a stage, from its configuration and scheduler."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import ClusterResourceConstraint
from ray.core.generated.common_pb2 import LabelSelectorOperator

from raydpo.cluster.resources import Resources


def machines_for(config: dict[str, Any], asked: Resources) -> dict[str, int]:
    """Number of machines of each type for all workers of a stage; empty if no type has what they request.

    Args:
        config: of a launcher's file, or as Ray converts a RayCluster.
    """
    types = AutoscalingConfig(config, skip_content_hash=True)
    selector = [[(key, LabelSelectorOperator.LABEL_OPERATOR_IN, [value]) for key, value in asked.labels.items()]]
    wish = ResourceRequestUtil.make(asked.bundle, label_selectors=selector if asked.labels else None)
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=types.get_node_type_configs(),
            max_num_nodes=types.get_max_num_worker_nodes(),
            cluster_resource_constraints=[
                ClusterResourceConstraint(resource_requests=ResourceRequestUtil.group_by_count([wish] * asked.workers))
            ],
        )
    )
    came = Counter({launch.instance_type: launch.count for launch in reply.to_launch})
    came.pop(types.get_head_node_type(), None)  # which is there already
    return dict(came)
