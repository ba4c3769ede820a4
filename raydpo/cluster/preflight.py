"""Checks of storage, resources and nodes before anything is computed. Each problem is one sentence with its fix."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from raydpo.cluster.driver import TORCH_FACTS, driver_version, no_toolkit, why_no_gpu
from raydpo.cluster.nodes import grows_to, holds, nodes_with
from raydpo.cluster.resources import resources_for
from raydpo.cluster.waiting import check_reachable
from raydpo.config import Config
from raydpo.errors import ConfigError, RaydpoError, one_line
from raydpo.storage.files import Storage
from raydpo.terminal.console import Console
from raydpo.version import __version__

__all__ = ["check_cluster", "check_nodes", "missing_vllm", "workers_without_vllm"]

Stage = Literal["score", "train"]
PACKAGES = ("torch", "transformers", "deepspeed", "ray")
"""Packages whose versions must be the same on all nodes: with different ones a run fails, or computes other numbers."""
ANSWER_SECONDS = 120.0
"""Longest time in seconds for a node to start a process and answer."""


def check_cluster(
    config: Config,
    stages: Sequence[Stage],
    console: Console,
    models: Sequence[str | None] = (),
    pythons: Sequence[str] = (),
) -> None:
    """Check storage, resources and nodes, before data is read and devices are used.

    Args:
        models: models that the stages load, besides those of sections ``model`` and ``reference``.
        pythons: Pythons with vLLM that stage ``score`` starts.

    Raises:
        ConfigError: with a line for each problem.
    """
    problems: list[str] = []
    for key, uri in (("output", config.run_dir), *([("cache.uri", config.cache_uri)] if "score" in stages else [])):
        try:
            Storage(uri).probe()
        except RaydpoError as error:
            problems.append(f"{key!r} does not work: {error}")
    for stage in stages:
        try:
            resources = resources_for(stage, config)
            if config.ray.autoscaling:
                check_reachable(stage, resources)
        except ConfigError as error:
            problems.append(str(error))
    if config.ray.autoscaling and config.model.dtype == "auto" and not _gpus() and grows_to("GPU") is None:
        problems.append(
            "'model.dtype' is 'auto', and the cluster, which starts nodes on demand, has no GPU yet to "
            "decide by; set model.dtype to bfloat16 or float32"
        )
    if problems:
        raise ConfigError("\n".join(problems))
    check_nodes(config, stages, console, models, pythons)


def check_nodes(
    config: Config,
    stages: Sequence[Stage],
    console: Console,
    models: Sequence[str | None] = (),
    pythons: Sequence[str] = (),
) -> None:
    """Check every node that the stages may use: that torch finds its GPUs, that it has the packages of this node, sees the
    same storage and models, and has vLLM where ``pythons`` say.

    Args:
        models, pythons: as for ``check_cluster``.

    Raises:
        ConfigError: with a line for each problem.
    """
    import ray

    here = ray.get_runtime_context().get_node_id()
    others, gpus, disks, answering = {}, {}, {}, set()
    for stage in stages:
        needs = resources_for(stage, config)
        allowed = nodes_with(needs.accelerator, needs.labels)
        usable = {node["NodeID"]: node for node in allowed if holds(node["Resources"], needs.bundle)}
        others |= {node: told for node, told in usable.items() if node != here}
        if needs.device == "cuda":
            gpus |= {node: int(told["Resources"]["GPU"]) for node, told in usable.items()}
            disks |= dict.fromkeys(usable, _on_disk(config) if stage == "train" else None)
        if stage == "score" and pythons:
            answering |= set(usable)
    problems = [*_gpu_problems("this node", gpus[here], _torch_devices(), disks[here])] if here in gpus else []
    problems += _vllm_problems(pythons, "this node") if here in answering else []
    if not others:
        if problems:
            raise ConfigError("\n".join(problems))
        return
    paths = (config.model.path, config.model.adapter, config.reference.path, config.reference.adapter, *models)
    local = [str(Path(path).absolute()) for path in paths if path is not None and Path(path).is_dir()]
    places = {"output": Storage(config.run_dir), "cache.uri": Storage(config.cache_uri)}
    places = {key: storage for key, storage in places.items() if storage.is_local}
    marker = f".probe-{uuid.uuid4().hex}"
    marked = {}
    try:
        for key, storage in places.items():
            storage.write(marker, b"raydpo")
            marked[key] = storage.path(marker)
        answers = _ask(others, [*local, *marked.values()], gpus, dict.fromkeys(answering, pythons))
    except OSError as error:
        raise ConfigError(f"cannot write to {error.filename}: {error.strerror}; see output and cache.uri") from None
    finally:
        for key in marked:
            places[key].delete(marker)
    names = {path: f"model directory {path}" for path in local} | {
        path: f"what the driver wrote to {key!r} ({places[key]})" for key, path in marked.items()
    }
    for node, answer in answers.items():
        problems += _problems(_named(others[node]), answer, names, gpus.get(node, 0), disks.get(node))
    if problems:
        raise ConfigError("\n".join(problems))
    console.say(f"cluster: {len(others) + 1} nodes, with the same packages and storage")


def _on_disk(config: Config) -> tuple[str, str] | None:
    """A setting that offloads to a disk, and its value; None if none does."""
    settings = {name: getattr(config.train, name) for name in ("offload_optimizer", "offload_params")}
    return next(((f"train.{name}", where) for name, where in settings.items() if where not in (None, "cpu")), None)


def _gpus() -> float:
    import ray

    return ray.cluster_resources().get("GPU", 0)


def _look(paths: Sequence[str], gpus: bool = False, pythons: Sequence[str] = (), name: str = "") -> dict[str, Any]:
    """Return this node's package versions, its missing paths, if ``gpus``, the GPUs that torch finds, and problems of
    ``pythons``. Runs on each node, which messages call ``name``."""
    versions = {"raydpo": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "none"
    return {
        "versions": versions,
        "missing": [path for path in paths if not Path(path).exists()],
        "devices": _torch_devices() if gpus else None,
        "vllm": _vllm_problems(pythons, name),
    }


def _vllm_problems(pythons: Sequence[str], node: str) -> list[str]:
    return [problem for python in pythons if (problem := missing_vllm(python, node)) is not None]


def missing_vllm(python: str, node: str) -> str | None:
    """Look for vLLM in the environment of ``python`` on this machine, without importing it, which takes seconds.

    Args:
        node: name of this machine in the message.

    Returns:
        What is wrong, None if vLLM is there.
    """
    found = _absent_vllm(python)
    return found and (
        f"evaluate.engine is vllm, but on {node} {found}; make an environment with vLLM on each node that scores and set "
        "evaluate.vllm_python to its Python, or set evaluate.engine=transformers"
    )


def _absent_vllm(python: str) -> str | None:
    program = "import importlib.util; print('vllm:', importlib.util.find_spec('vllm') is not None)"
    try:
        ended = subprocess.run([python, "-I", "-c", program], capture_output=True, timeout=ANSWER_SECONDS * 0.8)
    except (OSError, subprocess.TimeoutExpired) as error:
        told = error.strerror if isinstance(error, OSError) else "it does not answer"
        return f"{python} cannot be started ({told})"
    reply = ended.stdout.decode(errors="replace").strip().splitlines()[-1:]
    if ended.returncode != 0:
        return f"{python} ended with status {ended.returncode}"
    if reply == ["vllm: True"]:
        return None
    if reply == ["vllm: False"]:
        return f"{python} has no package vllm"
    return f"{python} is no Python: it did not run the check, and ended with status 0"


def workers_without_vllm(config: Config, python: str) -> str | None:
    """Look for vLLM on each node that may score.

    Returns:
        What is wrong on the first node without it, as a part of a sentence; None if it is on all of them.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    needs = resources_for("score", config)
    look = ray.remote(num_cpus=0, max_retries=0)(_absent_vllm)
    for node in nodes_with(needs.accelerator, needs.labels):
        if holds(node["Resources"], needs.bundle):
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            try:
                found = ray.get(look.options(scheduling_strategy=there).remote(python), timeout=ANSWER_SECONDS)
            except ray.exceptions.RayError as error:
                found = f"the check for vLLM failed ({type(error).__name__})"
            if found is not None:
                return f"on {_named(node)} {found}"
    return None


def _torch_devices() -> tuple[int, str, bool]:
    """Return the number of GPUs that torch finds on this node, why it finds no more, and whether CUDA's toolkit is there.
    Uses a new process, since Ray hides GPUs from this task."""
    program = (
        "import json, torch\nerror = ''\n"
        "try: torch.cuda.init()\nexcept Exception as caught: error = f'{type(caught).__name__}: {caught}'\n"
        "try: from torch.utils.cpp_extension import CUDA_HOME\nexcept ImportError: CUDA_HOME = None\n"
        f"print(json.dumps([0 if error else torch.cuda.device_count(), error, CUDA_HOME is not None, [{TORCH_FACTS}]]))"
    )
    hiding = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS * 0.8,
            env={key: value for key, value in os.environ.items() if key not in hiding},
        )
        count, error, toolkit, built = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        return 0, "torch does not start; install it anew", True
    return count, why_no_gpu(driver_version(), *built) + (f" ({one_line(error, 300)})" if error else ""), toolkit


def _gpu_problems(node: str, gpus: int, devices: tuple[int, str, bool], disk: tuple[str, str] | None) -> Iterator[str]:
    """Args: ``devices`` as of ``_torch_devices``, ``disk`` as of ``_on_disk``."""
    found, why, toolkit = devices
    if found < gpus:
        yield f"{node} has {gpus} GPU(s) in Ray, and torch finds {found}: {why}"
    elif disk is not None and not toolkit:
        yield f"{node}: {no_toolkit(*disk)}"


def _ask(
    nodes: dict[str, dict[str, Any]], paths: Sequence[str], gpus: Collection[str], pythons: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """The result of ``_look`` or its error, by id of the node. Nodes that have left the cluster are left out."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0, max_retries=0)(_look)
    asked = {
        node: look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            list(paths), node in gpus, pythons.get(node, ()), _named(told)
        )
        for node, told in nodes.items()
    }
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER_SECONDS)
    answers: dict[str, Any] = {}
    for node, reference in asked.items():
        try:
            answers[node] = ray.get(reference, timeout=0)
        except ray.exceptions.TaskUnschedulableError:  # an autoscaler has removed the node
            continue
        except Exception as error:  # a node without raydpo, a full one, a lost one
            answers[node] = error
    return answers


def _problems(node: str, answer: Any, names: dict[str, str], gpus: int, disk: tuple[str, str] | None) -> Iterator[str]:
    if isinstance(answer, Exception):
        said = str(answer).strip().splitlines()
        yield (
            f"{node} does not answer within {ANSWER_SECONDS:.0f} s, or cannot run raydpo ({type(answer).__name__}: "
            f"{said[-1][:200] if said else ''}); start all nodes from the same image, with raydpo installed"
        )
        return
    ours = _look(())["versions"]
    for package, theirs in answer["versions"].items():
        if theirs != ours[package]:
            yield (
                f"{node} has {package} {theirs}, the driver's node {ours[package]}; start all nodes from the same image, "
                "or install the same constraints.txt on each"
            )
    if answer["devices"] is not None:
        yield from _gpu_problems(node, gpus, answer["devices"], disk)
    yield from answer["vllm"]
    for path in answer["missing"]:
        yield (
            f"{node} does not see {names[path]}; mount one file system there on all nodes under the same path, or use a "
            "URI (of models: a hub name)"
        )


def _named(node: dict[str, Any]) -> str:
    return f"node {node['NodeManagerAddress']} ({node['NodeID'][:8]})"
