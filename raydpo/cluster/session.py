"""Connect to a Ray cluster, or start a local one."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping

from raydpo.cluster.nodes import usable_cores
from raydpo.config import Config
from raydpo.errors import ConfigError, RaydpoError, one_line
from raydpo.storage.uri import shown

__all__ = ["has_ray", "owns_ray", "session", "starts_own_ray"]

WORKER_ENV = {
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # otherwise Ray Train prints every line twice
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # otherwise relative paths change their meaning
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONUTF8": "1",  # libraries open files in the encoding of the locale, which may be ASCII
}
PATIENT_ENV = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
"""Threads of OpenMP that wait for each other soon give their core away. By default they spin, and where other processes need
the cores, such as other workers, most of a step is spinning. Without any spinning a process that is alone pays 7 % of a
training step and 30 % of generation; with 1,000 turns it pays 1 % and 8 % (guide/measurements.md)."""
ONE_NODE_ENV = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # no node is taken away from a Ray of our own
    "RAY_TRAIN_METRICS_ENABLED": "0",  # there is no dashboard to show them
}
"""What Ray Train need not do on a Ray of our own. It hands these variables to its controller."""
OBJECT_STORE_BYTES = 1 << 30
"""Object store of a local Ray. Token ids and log-probs are small; Ray's default, 30 % of memory, is left to the models."""


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
    address = _address(config)
    named = "ray.address" if config.ray.address else "$RAY_ADDRESS"
    if address and address.startswith(("http://", "https://")):
        raise ConfigError(
            f"{named} is {shown(address)}, the address of a job server, which only 'raydpo submit' and "
            "'raydpo jobs' use; unset it to run here, and set $RAY_API_SERVER_ADDRESS to it for those two"
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    common = {"log_to_driver": False, "logging_level": "warning"}
    try:
        if address:
            with _sigterm_kept():
                ray.init(address=address, runtime_env={"env_vars": _worker_env()}, **common)
        else:
            # These CPUs only limit scheduling. Each actor holds one. Ray Data's own tasks need some more; without them they
            # would never start.
            cpus = max(usable_cores(), max(config.score.workers, config.train.most_workers) + 4)
            # By default Ray starts a process for each CPU in advance, without our environment. Each costs seconds of CPU
            # time and is never used.
            os.environ |= {"RAY_prestart_worker_first_driver": "0", "RAY_enable_worker_prestart": "0"}
            # By default workers give way to every other process, so that each of Ray's own stops one of their threads, and
            # with it the step.
            os.environ.setdefault("RAY_worker_niceness", "0")
            # Without "local" it would join a Ray that another user has started on this machine.
            store = _object_store_bytes()
            # Workers inherit the environment of our Ray. A runtime environment would cost each of them half a second.
            with _environment(_worker_env()), _own_group(), _sigterm_kept():
                ray.init(address="local", num_cpus=cpus, include_dashboard=False, object_store_memory=store, **common)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ConfigError(
            f"cannot reach Ray at {named} {address!r}: {one_line(error, 300)}"
            if address
            else f"cannot start a local Ray: {error}"
        ) from None
    except Exception as error:  # Ray has no exception type for this one
        if "timed out during startup" not in str(error):
            raise
        raise RaydpoError(
            "a local Ray did not start in time: this machine is too busy; run the command again, or use a "
            "cluster (ray.address)"
        ) from None
    try:
        with contextlib.nullcontext() if address else _environment(ONE_NODE_ENV):
            yield
    finally:
        ray.shutdown()


def _worker_env() -> dict[str, str]:
    """Environment variables of workers. A waiting policy that the user has set stays."""
    own = {name: os.environ[name] for name in PATIENT_ENV if name in os.environ}
    return WORKER_ENV | (own or PATIENT_ENV)


def owns_ray() -> bool:
    """Whether this is a session of a local Ray that ``session`` started, and that ends with it."""
    return ONE_NODE_ENV.items() <= os.environ.items()


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables within the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Keep the program's own handler of SIGTERM. Ray replaces it by one that exits with status 15 at once, so that a command
    could not say how it ended."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _own_group() -> Iterator[None]:
    """Start each process of Ray within the block in a process group of its own. A signal to our group, as ``timeout`` of GNU
    coreutils and job control send it, would otherwise end Ray before its workers have written their checkpoint."""
    from ray._private import services

    popen = getattr(services, "ConsolePopen", None)  # a private class, which another release of Ray may not have
    if popen is None or sys.platform != "linux":  # elsewhere Ray ends its processes by their group
        yield
        return
    services.ConsolePopen = functools.partial(popen, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = popen


def starts_own_ray(config: Config) -> bool:
    """Whether ``session`` will start a local Ray: there is no cluster to connect to, and the program has no Ray yet."""
    return not has_ray() and not _address(config)


def has_ray() -> bool:
    """Whether this process is connected to a Ray."""
    ray = sys.modules.get("ray")  # a program that has a Ray has imported it
    return ray is not None and ray.is_initialized()


def _address(config: Config) -> str | None:
    return config.ray.address or os.environ.get("RAY_ADDRESS")


def _object_store_bytes() -> int:
    try:
        return min(OBJECT_STORE_BYTES, shutil.disk_usage("/dev/shm").free // 2)
    except OSError:
        return OBJECT_STORE_BYTES
