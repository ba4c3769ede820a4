"""Decides how the reference is put on the devices of the cluster that score it: ``score.partition`` and ``score.offload``.

Every command that fills the cache asks here, once it knows how many completions are missing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raydpo.cluster.nodes import nodes_with
from raydpo.cluster.resources import Resources, resources_for
from raydpo.config import Config
from raydpo.errors import ConfigError
from raydpo.estimate.cards import DEVICES, PER_MACHINE, is_card, known_memory, link_of
from raydpo.estimate.rate import stated_rates
from raydpo.model.cost import ModelCost
from raydpo.model.memory.anatomy import Anatomy, model_cost
from raydpo.model.memory.ledger import USABLE
from raydpo.model.memory.scoring import Links, ScoringRoom, adapter_bytes, choose_partition
from raydpo.model.partition import Partition
from raydpo.reference.score import ReferenceSpec
from raydpo.terminal.console import Console

__all__ = ["Placed", "check_alone", "place_here", "place_reference"]

SMALL = 2 * 2**30
"""Bytes of weights that every GPU holds."""
ANSWER_SECONDS = 120.0
"""Longest time in seconds for a node to start a process and answer."""


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Where the reference is scored.

    Attributes:
        config: the configuration, with ``score.partition`` and ``score.offload`` decided.
        resources: what stage ``score`` requests of Ray with it.
        lines, warnings: for the user, before something is scored.
        problem: why nothing can be scored. It does not matter where the cache lacks nothing.
    """

    config: Config
    resources: Resources
    lines: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    problem: ConfigError | None = None

    def tell(self, console: Console) -> None:
        """Say how the reference is placed.

        Raises:
            ConfigError: if it cannot be scored.
        """
        if self.problem is not None:
            raise self.problem
        for line in self.warnings:
            console.warn(line)
        for line in self.lines:
            console.say(line)


def place_reference(config: Config, spec: ReferenceSpec) -> Placed:
    """Decide for the connected Ray cluster.

    Raises:
        ConfigError: if the cluster cannot provide workers of any kind.
    """
    wish = config.score
    by_default = 1 if wish.partition == "auto" else wish.partition, None if wish.offload == "auto" else wish.offload
    plain = _decided(config, *by_default)
    resources = resources_for("score", plain)
    quick = Placed(config=plain, resources=resources)
    cost = model_cost(spec.path, spec.trust_remote_code)
    size = _model_bytes(spec)
    if resources.device == "cpu":
        return replace(quick, warnings=tuple(_on_cpus(config, resources, size)))
    untouched = wish.partition in ("auto", 1) and wish.offload in ("auto", None)
    if untouched and (size <= SMALL or _stored_quantized(spec)):
        return quick
    try:
        room = _room(config, resources, cost)
        if room is None:
            decided = wish.partition != "auto" or wish.offload == "cpu"
            return quick if decided else replace(quick, warnings=(_unknown(size, spec),))
        if untouched and size <= USABLE / 2 * room.device_bytes:
            return quick
        return _choose(config, spec, room)
    except ConfigError as error:
        return replace(quick, problem=error)


def check_alone(config: Config, spec: ReferenceSpec, doing: str) -> None:
    """Refuse work that each worker does with a whole model, if no GPU holds the model.

    Args:
        doing: the work, for the message.

    Raises:
        ConfigError: with what would do.
    """
    open_ = config.score.model_copy(update={"partition": "auto", "offload": "auto"})
    placed = place_reference(config.model_copy(update={"score": open_}), spec)
    if placed.problem is not None or placed.resources.partition > 1 or placed.resources.offload is not None:
        told = str(placed.problem) if placed.problem is not None else "; ".join(placed.lines)
        raise ConfigError(
            f"{doing} need the whole model on each GPU, and {spec.path} does not fit on one ({told}). Set "
            "model.quantization=4bit, or evaluate a model that was rounded or made smaller before"
        )


def place_here(config: Config, spec: ReferenceSpec) -> Partition:
    """Decide for this machine, where a command scores without Ray.

    Raises:
        ConfigError: if the reference cannot be scored here; it says what would do.
    """
    import torch

    wish, count = config.score, torch.cuda.device_count()
    offload = None if wish.offload == "auto" else wish.offload
    size = 1 if wish.partition == "auto" else wish.partition
    if not count or (size == 1 and offload is None and (_model_bytes(spec) <= SMALL or _stored_quantized(spec))):
        return Partition(size, offload)
    if size > count:
        raise ConfigError(
            f"score.partition {size} needs {size} GPUs, and this machine, which scores, has {count}; run the command on a "
            "machine that has them, or set score.partition=auto"
        )
    properties = [torch.cuda.get_device_properties(each) for each in range(count)]
    memory = min(float(each.total_memory) for each in properties)
    room = ScoringRoom(name=properties[0].name, device_bytes=memory, per_machine=count, host_bytes=_free_memory())
    workers = count if wish.partition == "auto" else wish.partition
    here = config.model_copy(update={"score": wish.model_copy(update={"workers": workers})})
    choice = choose_partition(Anatomy.of(spec.path, spec.trust_remote_code), here.score, room, **_asked_of(config, spec))
    return Partition(choice.partition, choice.offload)


def _model_bytes(spec: ReferenceSpec) -> int:
    """Bytes of the weights in the precision of scoring."""
    parameters = model_cost(spec.path, spec.trust_remote_code).parameters
    return parameters * {"float32": 4, "bfloat16": 2}[spec.identity.dtype]


def _stored_quantized(spec: ReferenceSpec) -> bool:
    """Whether the files hold quantized weights, such as FP8: their bytes are not known here, and a team refuses them."""
    config = json.loads((Path(spec.path) / "config.json").read_text(encoding="utf-8"))
    return bool({"quantization_config", "compression_config"} & config.keys())


def _asked_of(config: Config, spec: ReferenceSpec) -> dict[str, Any]:
    """What ``choose_partition`` must know of the reference and the data."""
    return {
        "dtype": spec.identity.dtype,
        "longest": config.data.max_length,
        "quantization": spec.quantization,
        "adapter_bytes": adapter_bytes(spec.adapter, spec.identity.dtype),
    }


def _choose(config: Config, spec: ReferenceSpec, room: ScoringRoom) -> Placed:
    asked, anatomy = _asked_of(config, spec), Anatomy.of(spec.path, spec.trust_remote_code)
    choice = choose_partition(anatomy, config.score, room, **asked)
    if choice.offload is not None:  # only then a machine's memory matters
        room = replace(room, host_bytes=_host_bytes(config))
        choice = choose_partition(anatomy, config.score, room, **asked)
    decided = _decided(config, choice.partition, choice.offload)
    lines = () if choice.simple else (choice.line,)
    return Placed(config=decided, resources=resources_for("score", decided), lines=lines)


def _decided(config: Config, partition: int, offload: str | None) -> Config:
    score = config.score.model_copy(update={"partition": partition, "offload": offload})
    return config.model_copy(update={"score": score})


def _on_cpus(config: Config, resources: Resources, size: int) -> Sequence[str]:
    """What to say of a reference that CPUs hold whole, as always."""
    nodes = nodes_with(config.score.accelerator, config.score.labels)
    memory = min((node["Resources"]["memory"] for node in nodes if "memory" in node["Resources"]), default=None)
    each = size / resources.partition
    if memory is None or each <= memory * resources.memory_share:
        return ()
    return (
        f"the reference takes {each / 2**30:,.1f} GiB in each of {round(1 / resources.memory_share)} worker(s) of a node, "
        f"and the smallest node has {memory / 2**30:,.1f} GiB for all; on CPUs nothing is decided automatically: set "
        "score.partition to the workers of a node, lower score.workers, or score on GPUs",
    )


def _unknown(size: int, spec: ReferenceSpec) -> str:
    return (
        "the cluster has no GPU yet, and score.accelerator names none whose memory is known, so score.partition is 1: each "
        f"GPU must hold the whole reference, {size / 1e9:,.1f} GB in {spec.identity.dtype}. Set score.accelerator, or "
        "score.partition and score.offload"
    )


def _room(config: Config, resources: Resources, cost: ModelCost) -> ScoringRoom | None:
    """The devices of the cluster, or None if it has none yet and their kind is unknown.

    Raises:
        ConfigError: if a node does not tell its memory.
    """
    nodes = [node for node in nodes_with(resources.accelerator, resources.labels) if node["Resources"].get("GPU", 0) > 0]
    kinds = {id(node): _kind(node) for node in nodes}
    if nodes:
        per_machine = max(int(node["Resources"]["GPU"]) for node in nodes)
        known = {id(node): known_memory(kinds[id(node)] or "") for node in nodes}
        strange = [node for node in nodes if known[id(node)] is None]
        memory = min([size for size in known.values() if size is not None] + (_asked(strange, "gpu") if strange else []))
        name = next(filter(None, kinds.values()), "GPU")
    else:
        name, per_machine = resources.accelerator or "", min(PER_MACHINE, config.score.workers)
        if (found := known_memory(name)) is None:
            return None
        memory = found
    if 0 < resources.gpus_per_worker < 1:  # several workers on a GPU: each has its share, and none a team
        memory, per_machine = memory * resources.gpus_per_worker, 1
    card = next((card for card in DEVICES if is_card(card, name) or card.removesuffix("B") == name), None)
    links = None
    if card is not None:
        kind, gather, host = link_of(card)
        links = Links(name=kind, gather=gather, host=host, seconds=cost.position_flops / stated_rates(card).score)
    return ScoringRoom(name=name, device_bytes=memory, per_machine=max(1, per_machine), links=links)


def _kind(node: dict[str, Any]) -> str | None:
    """Kind of the GPUs of a node, as Ray names it."""
    prefix = "accelerator_type:"
    return next((name.removeprefix(prefix) for name in node["Resources"] if name.startswith(prefix)), None)


def _host_bytes(config: Config) -> float | None:
    """Bytes of host memory that are free on the node with the fewest; None if the cluster has no GPU yet."""
    nodes = [
        node for node in nodes_with(config.score.accelerator, config.score.labels) if node["Resources"].get("GPU", 0) > 0
    ]
    return min(_asked(nodes, "host")) if nodes else None


def _asked(nodes: Sequence[dict[str, Any]], what: str) -> list[float]:
    """Bytes of the smallest GPU (``gpu``) of each node, or of its free host memory (``host``).

    Raises:
        ConfigError: if a node does not answer.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0, max_retries=0)(_gpu_memory if what == "gpu" else _free_memory)
    asked = [
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
        for node in nodes
    ]
    try:
        found = ray.get(asked, timeout=ANSWER_SECONDS)
    except Exception as error:  # a node that is full, lost, or without raydpo
        raise ConfigError(
            f"the nodes that score do not tell the memory of their {'GPUs' if what == 'gpu' else 'hosts'} "
            f"({type(error).__name__}), on which score.partition auto depends; set score.partition and score.offload"
        ) from None
    if lacking := [node for node, size in zip(nodes, found, strict=True) if not size]:
        raise ConfigError(
            f"torch finds no GPU on node {lacking[0].get('NodeManagerAddress', '?')}, on whose memory score.partition auto "
            "depends; set score.partition and score.offload, or look at 'raydpo doctor' there"
        )
    return found


def _gpu_memory() -> float:
    """Bytes of the smallest GPU of this machine; 0 if torch finds none. A new process asks, since Ray hides GPUs from this
    one."""
    program = (
        "import torch\ncount = torch.cuda.device_count()\n"
        "print(min((torch.cuda.get_device_properties(each).total_memory for each in range(count)), default=0))"
    )
    shown = {key: value for key, value in os.environ.items() if key not in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")}
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=ANSWER_SECONDS * 0.8, env=shown
        )
        return float(json.loads(done.stdout.splitlines()[-1]))
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        return 0.0


def _free_memory() -> float:
    import torch

    from raydpo.model.budget import free_memory

    return free_memory(torch.device("cpu"))
