"""Ray from the outside: connect or start, what each stage may use, and what its errors really were."""

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
from raydpo.config.uri import shown
from raydpo.errors import ConfigError, RaydpoError
from raydpo.nodes import NODE_SHARE, grows_to, nodes_with

__all__ = ["Resources", "bfloat16_pays", "original_error", "over_actors", "resources_for", "session"]

WORKER_ENV = {
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else Ray Train repeats every print
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths stay what the user meant
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
OBJECT_STORE_BYTES = 1 << 30
"""Object store of a local Ray: token ids and log-probs are small; Ray's default of 30 % of memory is the models'."""
_NO_MEMORY = re.compile(r"running low on memory\..*?\(IP: ([^,)]+).*? was ([\d.]+GB) used / ([\d.]+GB) limit")
"""In what Ray 2.60 says of workers that it ended: the node, what was used there, and its limit."""


@dataclass(frozen=True)
class Resources:
    """What one stage asks of Ray: so many workers, each with one device and so many threads (None: Ray decides)."""

    workers: int
    gpus_per_worker: float
    threads: int | None
    fewest: int | None = None
    """Where the number of workers may vary, the smallest; ``workers`` is the largest then."""
    memory_share: float = 1.0
    """Part of its device's memory that belongs to one worker: workers share a CPU node, or a GPU by fractions."""
    together: int = 1
    """Workers that compute each forward pass together, ``sequence_parallel``."""
    accelerator: str | None = None
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What nodes must have."""
    on_one_machine: bool = False
    """Whether a team of such workers is one actor, and so on one machine."""

    @property
    def teams(self) -> int:
        """Groups of such workers."""
        return self.workers // self.together

    @property
    def bundle(self) -> dict[str, float]:
        """What one worker, or a team on one machine, takes of a node."""
        size = self.together if self.on_one_machine else 1
        return {"CPU": size} | ({"GPU": self.gpus_per_worker * size} if self.gpus_per_worker else {}) | (
            {f"accelerator_type:{self.accelerator}": NODE_SHARE} if self.accelerator else {})

    def asks(self) -> str:
        """``bundle`` and labels, for people."""
        parts = [f"{self.gpus_per_worker:g} {self.accelerator or 'GPU'}"] if self.gpus_per_worker else ["a CPU"]
        return " ".join([*parts, *(f"{key}={value}" for key, value in self.labels.items())])

    @property
    def device(self) -> Literal["cuda", "cpu"]:
        return "cuda" if self.gpus_per_worker else "cpu"


@contextlib.contextmanager
def session(config: Config) -> Iterator[None]:
    """Ray for the length of the block: the cluster at ``ray.address`` or $RAY_ADDRESS, else a local one of our own.

    A Ray that the calling program has already initialised is used and left running.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    address = config.ray.address or os.environ.get("RAY_ADDRESS")
    named = "ray.address" if config.ray.address else "$RAY_ADDRESS"
    if address and address.startswith(("http://", "https://")):
        raise ConfigError(f"{named} is {shown(address)}, the address of a job server, to which only 'raydpo submit' and "
                          "'raydpo jobs' speak; unset it to run here, and for those two put it into $RAY_API_SERVER_ADDRESS")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine unasked
    runtime_env = {"env_vars": WORKER_ENV}
    try:
        if address:
            ray.init(address=address, runtime_env=runtime_env, log_to_driver=False, logging_level="warning")
        else:
            # Logical CPUs only gate scheduling. Actors hold one each, and Ray Data's own tasks need some beside them, or
            # the job would wait for itself in silence.
            cpus = max(os.cpu_count() or 1, max(config.score.workers, config.train.most_workers) + 4)
            # Ray would start a process for each CPU ahead of any task, with another environment than ours: each takes
            # seconds of a core, and none is ever used.
            os.environ |= {"RAY_prestart_worker_first_driver": "0", "RAY_enable_worker_prestart": "0"}
            # "local", since a Ray that someone else has started on this machine would be joined otherwise.
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, runtime_env=runtime_env, log_to_driver=False,
                     logging_level="warning", object_store_memory=_object_store_bytes())
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ConfigError(f"cannot reach Ray at {named} {address!r}: {' '.join(str(error).split())[:300]}"
                          if address else f"cannot start a local Ray: {error}") from None
    except Exception as error:  # Ray says this one without a type
        if "timed out during startup" not in str(error):
            raise
        raise RaydpoError("a local Ray did not start in time: this machine has too much else to do; run it again, or on a "
                          "cluster (ray.address)") from None
    try:
        yield
    finally:
        ray.shutdown()


def resources_for(stage: Literal["score", "train"], config: Config, at_once: int = 1) -> Resources:
    """The resources of a stage on the Ray that is connected.

    Args:
        at_once: how many such stages share the cluster.

    Raises:
        ConfigError: if the cluster as it is cannot hold them, and why; unless ``ray.autoscaling`` says that it will grow.
    """
    section = config.score if stage == "score" else config.train
    workers = config.score.workers if stage == "score" else config.train.most_workers
    fewest = workers if stage == "score" else config.train.fewest_workers
    nodes = nodes_with(section.accelerator, section.labels)
    where = "".join([f" of kind {section.accelerator}" if section.accelerator else "",
                     f" with labels {dict(section.labels)}" if section.labels else ""])
    if not nodes and not config.ray.autoscaling:
        raise ConfigError(f"the Ray cluster has no node{where}, which {stage}.accelerator and {stage}.labels ask for; drop "
                          "them, or set ray.autoscaling=true where nodes come on demand")
    gpus = _gpus_per_worker(stage, config, nodes)
    _check_total("GPU", gpus * fewest, f"{stage}.workers {fewest} x {stage}.gpus_per_worker {gpus:g} needs "
                 f"{gpus * fewest:g} GPUs{where}", f" ({stage}.gpus_per_worker=0 runs on the CPU)", config, nodes)
    together = section.sequence_parallel
    largest = max((node["Resources"].get("GPU", 0) for node in nodes), default=0)
    if stage == "score" and together > 1 and gpus * together > largest and not config.ray.autoscaling:
        raise ConfigError(f"score.sequence_parallel {together} needs one machine with {gpus * together:g} GPUs, the largest "
                          f"of the Ray cluster has {largest:g}; lower it, or set ray.autoscaling=true where nodes come on "
                          "demand")
    needed = fewest + (2 if stage == "score" else 1)
    _check_total("CPU", needed, f"{stage}.workers {fewest} needs {needed} CPUs of Ray (one each, and some beside them for "
                 "Ray Data)", ", or the job would wait for ever", config,
                 nodes if not section.labels and section.accelerator is None else nodes_with(None, {}))
    threads, memory_share = None, min(1.0, gpus) if gpus else 1.0
    if not gpus:
        # Workers of one node share its cores; more threads than cores is the usual slowness of CPU jobs.
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
        raise ConfigError(f"{stage}.gpus_per_worker is null, and the cluster, which brings nodes on demand, has no GPU yet "
                          f"to decide it by; set {stage}.gpus_per_worker to 1, or to 0 for CPUs")
    return 1.0 if coming >= 1 else 0.0


def _check_total(name: str, needed: float, needs: str, hint: str, config: Config, nodes: Sequence[dict[str, Any]]) -> None:
    """
    Raises:
        ConfigError: if the nodes have less than is needed, and none will come.
    """
    has = sum(node["Resources"].get(name, 0) for node in nodes)
    if needed <= has:
        return
    coming = grows_to(name)
    if not config.ray.autoscaling:
        more = "set ray.autoscaling=true, since its autoscaler may bring them" if coming is not None and coming >= needed \
            else "set ray.autoscaling=true where nodes come on demand"
        raise ConfigError(f"{needs}, the Ray cluster has {has:g}; ask for fewer{hint}; or {more}")
    if coming is not None and coming < needed:
        raise ConfigError(f"{needs}, the Ray cluster has {has:g}, and its autoscaler brings {coming:g} at the most; ask for "
                          f"fewer{hint}; or raise the limit of its node groups")


def bfloat16_pays() -> bool:
    """Whether bfloat16 pays here: the cluster has GPUs or will, or this processor has matrix units for it.

    AVX-512's bfloat16 products alone are not enough: with what must stay float32 beside them, scoring took 1.1 and training
    1.4 times as long as in float32 (135M parameters).
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
    """Rows that Ray Data actors make of Arrow blocks in the object store, one block a call and one actor a team.

    Args:
        arguments: of the actors' constructor.
        doing: for messages, such as "scoring the reference".
        calls_at_once: of one actor, each in a thread of its own.

    Raises:
        RaydpoError: what an actor found wrong.
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
        # Ray would otherwise restart an actor that a poisonous block kills for ever. The arguments that it deprecates in
        # favour of named ones have these two among them, and no name for them.
        max_restarts=3, max_task_retries=3)
    try:
        yield from dataset.iter_rows()
    except RaydpoError:
        raise
    except Exception as error:
        raise original_error(error, doing) from error


def original_error(error: BaseException, doing: str) -> RaydpoError:
    """What a Ray exception is really about: our own error from a worker, or one sentence about theirs."""
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
        # Of an actor that failed while it was made, only the text of its error arrives.
        match = re.search(r"raydpo\.errors\.(\w+): (.+)", str(known))
        kind = getattr(errors, match[1], None) if match else None
        if isinstance(kind, type) and issubclass(kind, RaydpoError):
            return kind(match[2])
        # Many lines about Ray's settings follow, in which nothing of this is to be found.
        if memory := _NO_MEMORY.search(str(known)):
            node, used, limit = memory.groups()
            return RaydpoError(f"{doing} failed: node {node} ran low on memory ({used} of {limit} used, with all that runs "
                               "there), and Ray ended processes; have fewer workers on a node, fewer tokens_per_batch, or "
                               "more memory")
    # Ray adds empty exceptions of its own to the chain; the last one that says something is the origin.
    told = [(type(known).__name__, lines[-1].strip()) for known in seen
            if (lines := str(known).strip().splitlines()) and lines[-1].strip() != type(known).__name__]
    kind, line = told[-1] if told else (type(error).__name__, "no message")
    return RaydpoError(f"{doing} failed: {kind}: {line}")


def _object_store_bytes() -> int:
    try:
        return min(OBJECT_STORE_BYTES, shutil.disk_usage("/dev/shm").free // 2)
    except OSError:
        return OBJECT_STORE_BYTES
