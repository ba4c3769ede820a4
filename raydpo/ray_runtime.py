"""The Ray session of a verb: connect or start, resources of each stage, work on actors, and the origin of errors."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raydpo import errors
from raydpo.config import Config
from raydpo.errors import ConfigError, RaydpoError
from raydpo.nodes import NODE_SHARE, grows_to, nodes_with
from raydpo.storage.uri import shown

__all__ = ["Resources", "bfloat16_pays", "original_error", "over_actors", "resources_for", "session"]

WORKER_ENV = {
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # or Ray Train prints every line twice
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # or relative paths change their meaning
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
OBJECT_STORE_BYTES = 1 << 30
"""Object store of a local Ray. Token ids and log-probs are small; Ray's default, 30 % of memory, is left to the models."""
_NO_MEMORY = re.compile(r"running low on memory\..*?\(IP: ([^,)]+).*? was ([\d.]+GB) used / ([\d.]+GB) limit")
"""Ray 2.60's message when it kills workers for lack of memory: node, memory in use, limit."""


@dataclass(frozen=True)
class Resources:
    """Resources that one stage requests from Ray: workers with one device each, and CPU threads (None: Ray decides)."""

    workers: int
    gpus_per_worker: float
    threads: int | None
    fewest: int | None = None
    """Smallest number of workers if it may vary; ``workers`` is then the largest."""
    memory_share: float = 1.0
    """Share of its device's memory that one worker may use, 0 to 1. Workers share a CPU node, or a GPU by fractions."""
    together: int = 1
    """Workers of a team, which computes each forward pass together (``sequence_parallel``)."""
    accelerator: str | None = None
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Required kind of GPU and labels of the nodes."""
    on_one_machine: bool = False
    """Whether a team is one actor, and so on one machine."""

    @property
    def teams(self) -> int:
        """Number of teams."""
        return self.workers // self.together

    @property
    def bundle(self) -> dict[str, float]:
        """Ray resources of one worker; of one team if it is ``on_one_machine``."""
        size = self.together if self.on_one_machine else 1
        return {"CPU": size} | ({"GPU": self.gpus_per_worker * size} if self.gpus_per_worker else {}) | (
            {f"accelerator_type:{self.accelerator}": NODE_SHARE} if self.accelerator else {})

    def asks(self) -> str:
        """Describe the request of one worker, for messages."""
        parts = [f"{self.gpus_per_worker:g} {self.accelerator or 'GPU'}"] if self.gpus_per_worker else ["a CPU"]
        return " ".join([*parts, *(f"{key}={value}" for key, value in self.labels.items())])

    @property
    def device(self) -> Literal["cuda", "cpu"]:
        return "cuda" if self.gpus_per_worker else "cpu"


@contextlib.contextmanager
def session(config: Config) -> Iterator[None]:
    """Connect to Ray within the block: to the cluster at ``ray.address`` or $RAY_ADDRESS, else to a new local one.

    If the calling program has initialised Ray, that session is used and left running.

    Raises:
        ConfigError: if the cluster cannot be reached, or a local Ray cannot start.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    address = config.ray.address or os.environ.get("RAY_ADDRESS")
    named = "ray.address" if config.ray.address else "$RAY_ADDRESS"
    if address and address.startswith(("http://", "https://")):
        raise ConfigError(f"{named} is {shown(address)}, the address of a job server, which only 'raydpo submit' and "
                          "'raydpo jobs' use; unset it to run here, and set $RAY_API_SERVER_ADDRESS to it for those two")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    runtime_env = {"env_vars": WORKER_ENV}
    try:
        if address:
            ray.init(address=address, runtime_env=runtime_env, log_to_driver=False, logging_level="warning")
        else:
            # These CPUs only limit scheduling. Each actor holds one, and Ray Data's own tasks need some more, or they
            # would wait for the actors without end.
            cpus = max(os.cpu_count() or 1, max(config.score.workers, config.train.most_workers) + 4)
            # By default Ray starts a process for each CPU in advance, without our environment: each costs seconds of CPU
            # time, and none is used.
            os.environ |= {"RAY_prestart_worker_first_driver": "0", "RAY_enable_worker_prestart": "0"}
            # "local", or it would join a Ray that another user has started on this machine.
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, runtime_env=runtime_env, log_to_driver=False,
                     logging_level="warning", object_store_memory=_object_store_bytes())
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ConfigError(f"cannot reach Ray at {named} {address!r}: {' '.join(str(error).split())[:300]}"
                          if address else f"cannot start a local Ray: {error}") from None
    except Exception as error:  # Ray has no exception type for this one
        if "timed out during startup" not in str(error):
            raise
        raise RaydpoError("a local Ray did not start in time: this machine is too busy; run the command again, or use a "
                          "cluster (ray.address)") from None
    try:
        yield
    finally:
        ray.shutdown()


def resources_for(stage: Literal["score", "train"], config: Config, at_once: int = 1) -> Resources:
    """Resources of a stage on the connected Ray cluster.

    Args:
        at_once: number of such stages that share the cluster.

    Raises:
        ConfigError: if the cluster cannot provide them, unless it grows (``ray.autoscaling``).
    """
    section = config.score if stage == "score" else config.train
    workers = config.score.workers if stage == "score" else config.train.most_workers
    fewest = workers if stage == "score" else config.train.fewest_workers
    nodes = nodes_with(section.accelerator, section.labels)
    where = "".join([f" of kind {section.accelerator}" if section.accelerator else "",
                     f" with labels {dict(section.labels)}" if section.labels else ""])
    if not nodes and not config.ray.autoscaling:
        raise ConfigError(f"the Ray cluster has no node{where}, which {stage}.accelerator and {stage}.labels ask for; drop "
                          "them, or set ray.autoscaling=true if the cluster starts nodes on demand")
    gpus = _gpus_per_worker(stage, config, nodes)
    _check_total("GPU", gpus * fewest, f"{stage}.workers {fewest} x {stage}.gpus_per_worker {gpus:g} needs "
                 f"{gpus * fewest:g} GPUs{where}", f" ({stage}.gpus_per_worker=0 runs on the CPU)", config, nodes)
    together = section.sequence_parallel
    largest = max((node["Resources"].get("GPU", 0) for node in nodes), default=0)
    if stage == "score" and together > 1 and gpus * together > largest and not config.ray.autoscaling:
        raise ConfigError(f"score.sequence_parallel {together} needs one machine with {gpus * together:g} GPUs, but the "
                          f"largest of the Ray cluster has {largest:g}; lower it, or set ray.autoscaling=true if the "
                          "cluster starts nodes on demand")
    needed = fewest + (2 if stage == "score" else 1)
    _check_total("CPU", needed, f"{stage}.workers {fewest} needs {needed} CPUs of Ray (one each, and some more for "
                 "Ray Data)", "", config,
                 nodes if not section.labels and section.accelerator is None else nodes_with(None, {}))
    threads, memory_share = None, min(1.0, gpus) if gpus else 1.0
    if not gpus:
        # Workers of one node share its cores. More threads than cores would slow all of them down.
        on_one_node = -(-workers * at_once // max(1, len(nodes)))
        threads, memory_share = max(1, (os.cpu_count() or 1) // on_one_node), 1 / on_one_node
    return Resources(workers, gpus, threads, fewest, memory_share, together, section.accelerator, dict(section.labels),
                     on_one_machine=stage == "score")


def _gpus_per_worker(stage: str, config: Config, nodes: Sequence[dict[str, Any]]) -> float:
    section = config.score if stage == "score" else config.train
    if section.gpus_per_worker is not None:
        return section.gpus_per_worker
    if section.accelerator is not None or any(node["Resources"].get("GPU", 0) >= 1 for node in nodes):
        return 1.0
    coming = grows_to("GPU") if config.ray.autoscaling else 0
    if coming is None:
        raise ConfigError(f"{stage}.gpus_per_worker is null, and the cluster, which starts nodes on demand, has no GPU yet "
                          f"to decide by; set {stage}.gpus_per_worker to 1, or to 0 for CPUs")
    return 1.0 if coming >= 1 else 0.0


def _check_total(name: str, needed: float, needs: str, hint: str, config: Config, nodes: Sequence[dict[str, Any]]) -> None:
    """Check that the nodes have enough of a resource, or can get it by autoscaling.

    Raises:
        ConfigError: with ``needs`` and ``hint`` in the message, if not.
    """
    has = sum(node["Resources"].get(name, 0) for node in nodes)
    if needed <= has:
        return
    coming = grows_to(name)
    if not config.ray.autoscaling:
        more = "set ray.autoscaling=true, since its autoscaler can add them" if coming is not None and coming >= needed \
            else "set ray.autoscaling=true if it starts nodes on demand"
        raise ConfigError(f"{needs}, the Ray cluster has {has:g}; ask for fewer{hint}; or {more}")
    if coming is not None and coming < needed:
        raise ConfigError(f"{needs}, the Ray cluster has {has:g}, and its autoscaler adds up to {coming:g} in all; ask for "
                          f"fewer{hint}; or raise the limit of its node groups")


def bfloat16_pays() -> bool:
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


def over_actors(actor: type, arguments: tuple[Any, ...], blocks: Sequence[Any], resources: Resources, doing: str,
                calls_at_once: int = 1) -> Iterator[dict[str, Any]]:
    """Process Arrow blocks of the object store with Ray Data actors, one block a call and one actor a team.

    Args:
        arguments: arguments of the actors' constructor.
        doing: what is done, for messages, such as "scoring the reference".
        calls_at_once: concurrent calls of one actor, each in its own thread.

    Yields:
        The rows that the actors return.

    Raises:
        RaydpoError: if an actor fails.
    """
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    dataset = ray.data.from_arrow_refs(list(blocks)).map_batches(
        actor, fn_constructor_args=arguments, batch_size=1, batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(resources.teams, len(blocks)),
                                           max_concurrent_calls_per_actor=calls_at_once),
        num_cpus=resources.together, num_gpus=resources.gpus_per_worker * resources.together,
        accelerator_type=resources.accelerator, label_selector=dict(resources.labels) or None,
        # By default Ray restarts an actor without limit, also one that a bad block kills each time.
        # Ray deprecates passing these two here, but has no named arguments for them yet.
        max_restarts=3, max_task_retries=3)
    try:
        yield from dataset.iter_rows()
    except RaydpoError:
        raise
    except Exception as error:
        raise original_error(error, doing) from error


def original_error(error: BaseException, doing: str) -> RaydpoError:
    """The error behind a Ray exception: raydpo's own if a worker raised one, else one sentence about its cause."""
    seen: list[BaseException] = []
    todo: list[BaseException | None] = [error]
    while todo:
        current = todo.pop(0)
        if current is None or any(current is known for known in seen):
            continue
        if isinstance(current, RaydpoError):
            return current
        seen.append(current)
        todo += [getattr(current, "cause", None), current.__cause__, *getattr(current, "worker_failures", {}).values()]
    for known in seen:
        # If the constructor of an actor fails, only the text of its error arrives.
        match = re.search(r"raydpo\.errors\.(\w+): (.+)", str(known))
        kind = getattr(errors, match[1], None) if match else None
        if isinstance(kind, type) and issubclass(kind, RaydpoError):
            return kind(match[2])
        # The rest of this message is about settings of Ray, and does not help.
        if memory := _NO_MEMORY.search(str(known)):
            node, used, limit = memory.groups()
            return RaydpoError(f"{doing} failed: node {node} ran low on memory ({used} of {limit} used by all that runs "
                               "there), and Ray killed workers; use fewer workers on a node, fewer tokens_per_batch, or "
                               "more memory")
    # Ray adds exceptions without a message to the chain. The last one with a message is the origin.
    told = [(type(known).__name__, lines[-1].strip()) for known in seen
            if (lines := str(known).strip().splitlines()) and lines[-1].strip() != type(known).__name__]
    kind, line = told[-1] if told else (type(error).__name__, "no message")
    return RaydpoError(f"{doing} failed: {kind}: {line}")


def _object_store_bytes() -> int:
    try:
        return min(OBJECT_STORE_BYTES, shutil.disk_usage("/dev/shm").free // 2)
    except OSError:
        return OBJECT_STORE_BYTES
