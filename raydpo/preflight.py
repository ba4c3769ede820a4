"""Before anything is computed: would this cluster carry the run? Each problem is one sentence with its fix."""

from __future__ import annotations

import importlib.metadata
import platform
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import raydpo
from raydpo.config import Config
from raydpo.console import Console
from raydpo.errors import ConfigError, RaydpoError
from raydpo.nodes import grows_to, holds, nodes_with
from raydpo.ray_runtime import resources_for
from raydpo.storage import Storage

__all__ = ["check_cluster", "check_nodes"]

Stage = Literal["score", "train"]
PACKAGES = ("torch", "transformers", "deepspeed", "ray")
"""Other versions of these on another node fail, or compute other numbers."""
ANSWER_SECONDS = 120.0
"""For a node to start a process and answer."""


def check_cluster(config: Config, stages: Sequence[Stage], console: Console) -> None:
    """Look at storage, resources and nodes, before data is read and any device is held.

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
            resources_for(stage, config)
        except ConfigError as error:
            problems.append(str(error))
    if config.ray.autoscaling and config.model.dtype == "auto" and not _gpus() and grows_to("GPU") is None:
        problems.append("'model.dtype' is 'auto', and the cluster, which brings nodes on demand, has no GPU yet to decide "
                        "it by; set model.dtype to bfloat16 or float32")
    if problems:
        raise ConfigError("\n".join(problems))
    check_nodes(config, stages, console)


def check_nodes(config: Config, stages: Sequence[Stage], console: Console) -> None:
    """Every node that the stages may use, beside this one: the same packages, the same storage, the model.

    Raises:
        ConfigError: with a line for each problem.
    """
    import ray

    here = ray.get_runtime_context().get_node_id()
    others = {}
    for stage in stages:
        needs = resources_for(stage, config)
        others |= {node["NodeID"]: node for node in nodes_with(needs.accelerator, needs.labels)
                   if holds(node["Resources"], needs.bundle) and node["NodeID"] != here}
    if not others:
        return
    models = [str(Path(path).absolute()) for path in
              (config.model.path, config.model.adapter, config.reference.path, config.reference.adapter)
              if path is not None and Path(path).is_dir()]
    places = {key: storage for key, uri in (("output", config.run_dir), ("cache.uri", config.cache_uri))
              if (storage := Storage(uri)).is_local}
    marker = f".probe-{uuid.uuid4().hex}"
    marked = {}
    try:
        for key, storage in places.items():
            storage.write(marker, b"raydpo")
            marked[key] = storage.path(marker)
        answers = _ask(others, [*models, *marked.values()])
    except OSError as error:
        raise ConfigError(f"cannot write to {error.filename}: {error.strerror}; see output and cache.uri") from None
    finally:
        for key in marked:
            places[key].delete(marker)
    names = {path: f"model directory {path}" for path in models} | {
        path: f"what the driver wrote to {key!r} ({places[key]})" for key, path in marked.items()}
    problems = [problem for node, answer in answers.items() for problem in _problems(_named(others[node]), answer, names)]
    if problems:
        raise ConfigError("\n".join(problems))
    console.note(f"cluster: {len(others) + 1} nodes, with the same packages and storage")


def _gpus() -> float:
    import ray

    return ray.cluster_resources().get("GPU", 0)


def _look(paths: Sequence[str]) -> dict[str, Any]:
    """On a node: its versions, and which of the paths it lacks."""
    versions = {"raydpo": raydpo.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "none"
    return {"versions": versions, "missing": [path for path in paths if not Path(path).exists()]}


def _ask(nodes: dict[str, dict[str, Any]], paths: Sequence[str]) -> dict[str, Any]:
    """By node: what ``_look`` finds there, or the error that asking ended with."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0, max_retries=0)(_look)
    asked = {node: look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(list(paths))
             for node in nodes}
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER_SECONDS)
    answers: dict[str, Any] = {}
    for node, reference in asked.items():
        try:
            answers[node] = ray.get(reference, timeout=0)
        except Exception as error:  # a node without raydpo, one that is full, one that has just gone
            answers[node] = error
    return answers


def _problems(node: str, answer: Any, names: dict[str, str]) -> Iterator[str]:
    if isinstance(answer, Exception):
        said = str(answer).strip().splitlines()
        yield (f"{node} does not answer within {ANSWER_SECONDS:.0f} s, or cannot run raydpo ({type(answer).__name__}: "
               f"{said[-1][:200] if said else ''}); start all nodes from the same image, with raydpo installed")
        return
    ours = _look(())["versions"]
    for package, theirs in answer["versions"].items():
        if theirs != ours[package]:
            yield (f"{node} has {package} {theirs}, the driver's node {ours[package]}; start all nodes from the same image, "
                   "or install the same constraints.txt on each")
    for path in answer["missing"]:
        yield (f"{node} does not see {names[path]}; mount one file system there on all nodes under the same path, or use a "
               "URI (of models: a hub name)")


def _named(node: dict[str, Any]) -> str:
    return f"node {node['NodeManagerAddress']} ({node['NodeID'][:8]})"
