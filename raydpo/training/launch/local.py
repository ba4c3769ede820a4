"""Ray Train on a Ray that this command started: fewer processes to start before the first step.

Ray Train hands its environment variables to its controller and its workers in a runtime environment, which costs each of
these processes a second to start. It also asks an actor for more nodes, and there are none. Here the controller gets the
variables as an argument, and no nodes are asked for. Everything else is Ray Train's own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any

import ray
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup

__all__ = ["LocalTrainer"]


class _Scaling(FixedScalingPolicy):
    """A fixed number of workers, for which no autoscaler is asked."""

    def after_controller_start(self, *args: Any, **kwargs: Any) -> None:
        """Start no actor that talks to an autoscaler."""

    def _maybe_send_resource_request(self) -> None:
        """Request nothing."""


class _Workers(WorkerGroup):
    """Workers with the environment of the local Ray."""

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> Any:
        return custom_runtime_env


class _Controller(TrainController):
    """Ray Train's controller, which sets the environment variables itself."""

    worker_group_cls = _Workers

    def __init__(self, environment: Mapping[str, str], **given: Any) -> None:
        os.environ |= environment
        super().__init__(**given)


class LocalTrainer(TorchTrainer):
    """TorchTrainer for a fixed number of workers on this machine."""

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        given["scaling_policy"] = _Scaling(self.scaling_config)
        controller = ray.remote(num_cpus=0)(_Controller).remote(get_env_vars_to_propagate(), **given)
        if threading.current_thread() is threading.main_thread():
            self._register_sigint_handler(controller)
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())
