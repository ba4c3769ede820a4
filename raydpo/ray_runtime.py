"""Ray from the outside: connect or start, what each stage may use, and what its errors really were."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raydpo import errors
from raydpo.config import Config
from raydpo.errors import ConfigError, RaydpoError

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

    @property
    def teams(self) -> int:
        """Groups of such workers."""
        return self.workers // self.together

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
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"cannot reach Ray at ray.address {address!r}: {' '.join(str(error).split())[:300]}"
                          if address else f"cannot start a local Ray: {error}") from None
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
    import ray

    section = config.score if stage == "score" else config.train
    workers = config.score.workers if stage == "score" else config.train.most_workers
    fewest = workers if stage == "score" else config.train.fewest_workers
    total = ray.cluster_resources()
    gpus = section.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if total.get("GPU", 0) >= 1 else 0.0
    if gpus * fewest > total.get("GPU", 0) and not config.ray.autoscaling:
        raise ConfigError(f"{stage}.workers {fewest} x {stage}.gpus_per_worker {gpus:g} needs "
                          f"{gpus * fewest:g} GPUs, the Ray cluster has {total.get('GPU', 0):g}; ask for fewer "
                          f"({stage}.gpus_per_worker=0 runs on the CPU), or set ray.autoscaling=true where nodes come on "
                          "demand")
    together = section.sequence_parallel
    largest = max((node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
    if stage == "score" and together > 1 and gpus * together > largest and not config.ray.autoscaling:
        raise ConfigError(f"score.sequence_parallel {together} needs one machine with {gpus * together:g} GPUs, the largest "
                          f"of the Ray cluster has {largest:g}; lower it, or set ray.autoscaling=true where nodes come on "
                          "demand")
    needed = fewest + (2 if stage == "score" else 1)
    if needed > total.get("CPU", 0) and not config.ray.autoscaling:
        raise ConfigError(f"{stage}.workers {fewest} needs {needed} CPUs of Ray (one each, and some beside them "
                          f"for Ray Data), the cluster has {total.get('CPU', 0):g}; the job would wait for ever")
    threads, memory_share = None, min(1.0, gpus) if gpus else 1.0
    if not gpus:
        # Workers of one node share its cores; more threads than cores is the usual slowness of CPU jobs.
        nodes = [node for node in ray.nodes() if node["Alive"]]
        on_one_node = -(-workers * at_once // max(1, len(nodes)))
        threads, memory_share = max(1, (os.cpu_count() or 1) // on_one_node), 1 / on_one_node
    return Resources(workers, gpus, threads, fewest, memory_share, together)


def bfloat16_pays() -> bool:
    """Whether bfloat16 pays here: the cluster has GPUs, or this processor has matrix units for it.

    AVX-512's bfloat16 products alone are not enough: with what must stay float32 beside them, scoring took 1.1 and training
    1.4 times as long as in float32 (135M parameters).
    """
    import ray

    if ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1:
        return True
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="ignore") as stream:
            flags = next((line.split() for line in stream if line.startswith("flags")), [])
    except OSError:
        return False
    return "amx_bf16" in flags


def over_actors(actor: type, arguments: tuple[Any, ...], blocks: Sequence[Any], actors: int, devices: int,
                gpus_per_device: float, doing: str, **more: Any) -> Iterator[dict[str, Any]]:
    """Rows that Ray Data actors make of Arrow blocks in the object store, one block a call.

    Args:
        arguments: of the actors' constructor.
        devices: of each actor, a CPU with its part of a GPU.
        doing: for messages, such as "scoring the reference".
        more: for ``map_batches``.

    Raises:
        RaydpoError: what an actor found wrong.
    """
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    dataset = ray.data.from_arrow_refs(list(blocks)).map_batches(
        actor, fn_constructor_args=arguments, batch_size=1, batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(blocks))),
        num_cpus=devices, num_gpus=gpus_per_device * devices,
        # Ray would otherwise restart an actor that a poisonous block kills for ever.
        max_restarts=3, max_task_retries=3, **more)
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
