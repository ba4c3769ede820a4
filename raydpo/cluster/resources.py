"""Workers, devices and threads that each stage requests from Ray."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raydpo.cluster.allocator import allocator_setting
from raydpo.cluster.nodes import NODE_SHARE, cores_of, grows_to, holds, nodes_with, usable_cores
from raydpo.config import Config
from raydpo.errors import ConfigError

__all__ = ["Resources", "bfloat16_is_faster", "dtypes", "resources_for"]


@dataclass(frozen=True)
class Resources:
    """Resources that one stage requests from Ray."""

    workers: int
    """Number of workers; the largest number if it may vary."""
    gpus_per_worker: float
    """GPUs of one worker, also a fraction; 0 = it computes on the CPU."""
    threads: int | None
    """CPU threads of one worker; None = unknown, since no node can hold one yet. A worker that trains then takes its share
    of the cores where it starts."""
    fewest: int | None = None
    """Smallest number of workers with which the stage starts; None = ``workers``."""
    memory_share: float = 1.0
    """Share of its device's memory that one worker may use, 0 to 1. It is below 1 where several workers use one CPU node or
    one GPU."""
    sequence: int = 1
    """Workers that compute each forward pass together, each a part of its positions (``sequence_parallel``)."""
    partition: int = 1
    """Workers whose memory holds the model together, each a part of every weight (``score.partition``); a multiple of
    ``sequence`` or 1."""
    offload: Literal["cpu"] | None = None
    """Where the weights are while they are not used; None = on the devices."""
    accelerator: str | None = None
    """Kind of GPU that nodes must have; None = any."""
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Ray labels that nodes must have."""
    on_one_machine: bool = False
    """Whether a team is a single actor. Its workers are then on one machine."""

    @property
    def together(self) -> int:
        """Workers of a team: a Ray Data actor in scoring."""
        return max(self.sequence, self.partition)

    @property
    def teams(self) -> int:
        """Number of teams."""
        return self.workers // self.together

    @property
    def replicas(self) -> int:
        """Workers of a team, or groups of ``sequence`` of them, that score micro-batches of their own."""
        return self.together // self.sequence

    @property
    def _size(self) -> int:
        """Number of workers whose resources Ray allocates together."""
        return self.together if self.on_one_machine else 1

    @property
    def bundle(self) -> dict[str, float]:
        """Ray resources of one worker; those of a whole team if it is ``on_one_machine``."""
        gpus = {"GPU": self.gpus_per_worker * self._size} if self.gpus_per_worker else {}
        kind = {f"accelerator_type:{self.accelerator}": NODE_SHARE} if self.accelerator else {}
        return {"CPU": self._size} | gpus | kind

    def asks(self) -> str:
        """Describe ``bundle`` and the labels, for messages."""
        gpus, size = self.gpus_per_worker * self._size, self._size
        said = [f"{gpus:g} {self.accelerator or 'GPU'}" if gpus else "a CPU" if size == 1 else f"{size} CPUs"]
        if max(gpus, size) > 1:
            said.append("on one machine")
        return " ".join([*said, *(f"{key}={value}" for key, value in self.labels.items())])

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with which a process that scores or trains must be started.

        torch reads the setting of its allocator when a GPU is first used, which Ray Train does before it calls the worker.
        vLLM's own memory pool refuses the setting, so workers that answer prompts are started without it.
        """
        return allocator_setting(os.environ) if self.gpus_per_worker else {}

    @property
    def device(self) -> Literal["cuda", "cpu"]:
        """Device of a worker, as torch names it."""
        return "cuda" if self.gpus_per_worker else "cpu"


def resources_for(stage: Literal["score", "train"], config: Config, at_once: int = 1) -> Resources:
    """Return the resources of a stage on the connected Ray cluster.

    Args:
        at_once: number of such stages that share the cluster.

    Raises:
        ConfigError: if the cluster cannot provide them (with ``ray.autoscaling``, only if it can never provide them), or
            ``train.optimizer`` does not run on them.
    """
    section = config.score if stage == "score" else config.train
    workers = config.score.workers if stage == "score" else config.train.most_workers
    fewest = workers if stage == "score" else config.train.fewest_workers
    nodes = nodes_with(section.accelerator, section.labels)
    where = f" of kind {section.accelerator}" if section.accelerator else ""
    where += f" with labels {dict(section.labels)}" if section.labels else ""
    if not nodes and not config.ray.autoscaling:
        raise ConfigError(
            f"the Ray cluster has no node{where}, which {stage}.accelerator and {stage}.labels ask for; drop "
            "them, or set ray.autoscaling=true if the cluster starts nodes on demand"
        )
    gpus = _gpus_per_worker(stage, config, nodes)
    if stage == "train":
        config.train.check_device("cuda" if gpus else "cpu")
    needs = f"{stage}.workers {fewest} x {stage}.gpus_per_worker {gpus:g} needs {gpus * fewest:g} GPUs{where}"
    _check_total("GPU", gpus * fewest, needs, f" ({stage}.gpus_per_worker=0 runs on the CPU)", config, nodes)
    partition, offload = (config.score.partition, config.score.offload) if stage == "score" else (1, None)
    parts = 1 if partition == "auto" else partition  # ``pipeline`` decides what is automatic before it scores
    together = max(section.sequence_parallel, parts)
    largest = max((node["Resources"].get("GPU", 0) for node in nodes), default=0)
    if stage == "score" and together > 1 and gpus * together > largest and not config.ray.autoscaling:
        field = "partition" if parts > 1 else "sequence_parallel"
        instead = (
            "; a reference that then does not fit is scored with score.offload=cpu, its weights in the host's memory, or "
            "with reference.quantization=4bit"
            if parts > 1
            else ""
        )
        raise ConfigError(
            f"score.{field} {together} needs one machine with {gpus * together:g} GPUs, but the largest of the Ray cluster "
            f"has {largest:g}, and a team does not span machines; set it to {largest // gpus:g} or lower{instead}; or set "
            "ray.autoscaling=true if the cluster starts larger nodes on demand"
        )
    needed = fewest + (2 if stage == "score" else 1)
    needs = f"{stage}.workers {fewest} needs {needed} CPUs of Ray (one each, and some more for Ray Data)"
    _check_total("CPU", needed, needs, "", config, nodes_with(None, {}))
    kind, labels = section.accelerator, dict(section.labels)
    team = {"sequence": section.sequence_parallel, "partition": parts, "offload": "cpu" if offload == "cpu" else None}
    made = Resources(
        workers, gpus, None, fewest, min(1.0, gpus), **team, accelerator=kind, labels=labels, on_one_machine=stage == "score"
    )
    if gpus:
        made = dataclasses.replace(made, threads=_threads_beside_gpus(made, workers * at_once, nodes))
    else:
        threads, on_one_node = _threads(workers * at_once, nodes)
        made = dataclasses.replace(made, threads=threads, memory_share=1 / on_one_node)
    if not config.ray.autoscaling:
        _check_places(stage, made, nodes, where)
    return made


def _threads(workers: int, nodes: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """Return the threads of each of ``workers`` workers without GPUs, and the largest number of them on one node.

    Workers on one node share its cores. More threads than cores would slow all of them down. All workers have equally many,
    so the node with the fewest cores for each decides. If no node can hold a worker yet, since the cluster starts them on
    demand, this machine stands for them.
    """
    holding = [node for node in nodes if node["Resources"].get("CPU", 0) >= 1]
    on_one_node = -(-workers // max(1, len(holding)))
    threads = [cores_of(node) // min(on_one_node, int(node["Resources"]["CPU"])) for node in holding]
    return max(1, min(threads, default=usable_cores() // on_one_node)), on_one_node


def _threads_beside_gpus(resources: Resources, workers: int, nodes: Sequence[dict[str, Any]]) -> int | None:
    """Return the threads of each of ``workers`` workers with GPUs: an even share of a node's cores, of the node with the
    fewest for each. None if no node can hold a worker yet.

    An optimizer on the host computes with them. Ray itself would give each worker one thread, since each requests one CPU;
    more CPUs might leave none for Ray Data on the same node.
    """
    places = [(node, holds(node["Resources"], resources.bundle) * resources._size) for node in nodes]
    # Ray Train fills a node before it uses the next one.
    return min((max(1, cores_of(node) // min(workers, here)) for node, here in places if here), default=None)


def _check_places(stage: str, resources: Resources, nodes: Sequence[dict[str, Any]], where: str) -> None:
    """Refuse workers that would wait without end, since no single node has what one of them needs.

    Scoring begins with one worker. Training needs the fewest that it may start with.
    """
    fit = sum(holds(node["Resources"], resources.bundle) for node in nodes)
    needed = 1 if stage == "score" else resources.fewest or resources.workers
    if fit < needed:
        also = f" and {resources.bundle['CPU']:g} CPU(s)" if resources.gpus_per_worker else ""
        raise ConfigError(
            f"{stage} needs places for {needed} worker(s), each {resources.asks()}{also}, but the Ray cluster's nodes"
            f"{where} have places for {fit}; lower {stage}.gpus_per_worker or {stage}.workers, or set "
            "ray.autoscaling=true if the cluster starts nodes on demand"
        )


def _gpus_per_worker(stage: str, config: Config, nodes: Sequence[dict[str, Any]]) -> float:
    section = config.score if stage == "score" else config.train
    if section.gpus_per_worker is not None:
        return section.gpus_per_worker
    if section.accelerator is not None or any(node["Resources"].get("GPU", 0) >= 1 for node in nodes):
        return 1.0
    coming = grows_to("GPU") if config.ray.autoscaling else 0
    if coming is None:
        raise ConfigError(
            f"{stage}.gpus_per_worker is null, and the cluster, which starts nodes on demand, has no GPU yet "
            f"to decide by; set {stage}.gpus_per_worker to 1, or to 0 for CPUs"
        )
    return 1.0 if coming >= 1 else 0.0


def _check_total(name: str, needed: float, needs: str, hint: str, config: Config, nodes: Sequence[dict[str, Any]]) -> None:
    """Refuse a request for more than the nodes have, or get by autoscaling. The message contains ``needs`` and ``hint``."""
    has = sum(node["Resources"].get(name, 0) for node in nodes)
    if needed <= has:
        return
    coming = grows_to(name)
    if not config.ray.autoscaling:
        known = coming is not None and coming >= needed
        why = ", since its autoscaler can add them" if known else " if it starts nodes on demand"
        raise ConfigError(f"{needs}, the Ray cluster has {has:g}; ask for fewer{hint}; or set ray.autoscaling=true{why}")
    if coming is not None and coming < needed:
        raise ConfigError(
            f"{needs}, the Ray cluster has {has:g}, and its autoscaler adds up to {coming:g} in all; ask for "
            f"fewer{hint}; or raise the limit of its node groups"
        )


def dtypes(config: Config) -> tuple[str, str]:
    """Precisions of the policy and of the reference. ``auto`` is the faster one on this Ray's machines."""
    policy, reference = config.model.dtype, config.score.dtype
    wished = policy, policy if reference is None else reference
    native = "bfloat16" if "auto" in wished and bfloat16_is_faster() else "float32"
    policy, reference = (native if wish == "auto" else wish for wish in wished)
    return policy, reference


def bfloat16_is_faster() -> bool:
    """Whether bfloat16 is the faster precision: the cluster has or gets GPUs, or this CPU has matrix units for it (AMX).

    AVX-512's bfloat16 instructions are not enough: scoring took 1.1 and training 1.4 times as long as in float32, since part
    of the computation stays in float32 (135M parameters).
    """
    import ray

    if ray.is_initialized() and max(ray.cluster_resources().get("GPU", 0), grows_to("GPU") or 0) >= 1:
        return True
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="ignore") as stream:
            flags = next((line.split() for line in stream if line.startswith("flags")), [])
    except OSError:
        return False
    return "amx_bf16" in flags
