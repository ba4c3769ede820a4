"""What an earlier run of the same name left in the run directory: a result, a part of one, or something else."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from raydpo.config import Config
from raydpo.console import Console
from raydpo.errors import ConfigError
from raydpo.storage import Storage
from raydpo.training.checkpoint import changed_settings

__all__ = ["begin_again", "earlier_result", "harmless_changes", "leaves", "set_aside"]

BEGUN_BY = "begun-by.json"
"""In a run directory that --fresh began: the job that did."""


def earlier_result(storage: Storage, fingerprint: dict[str, Any]) -> dict[str, Any] | None:
    """The summary of a finished run of this name, None if it is new or interrupted.

    Raises:
        ConfigError: if a run of this name exists whose result would differ, with the list of differences.
    """
    if not storage.exists("run.json"):
        return None
    earlier = json.loads(storage.read("run.json"))["fingerprint"]
    changes = changed_settings(earlier, fingerprint)
    if changes:
        raise ConfigError(f"{storage} is a run with other settings ({'; '.join(changes)}). Give this one another name "
                          "(name=...), or begin again with --fresh, which sets the old one aside")
    return json.loads(storage.read("summary.json")) if storage.exists("summary.json") else None


def harmless_changes(storage: Storage, config: Config) -> Iterator[str]:
    """A line about settings that differ from those the run began with, and do not change its result."""
    if not storage.exists("config.yaml"):
        return
    earlier, now = (leaves(yaml.safe_load(text)) for text in (storage.read("config.yaml"), config.to_yaml()))
    changes = changed_settings(earlier, now)
    if changes:
        yield f"changed since this run began, without effect on its result: {'; '.join(changes)}"


def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The values of a nested configuration by their keys, such as ``train.beta``."""
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {key: value for name, below in tree.items() for key, value in leaves(below, f"{prefix}{name}.").items()}


def begin_again(storage: Storage, console: Console, mark: str = "run.json") -> None:
    """What --fresh asks for: ``set_aside``, once in each job. Whatever repeats a job after the loss of a machine repeats its
    command, too, and must continue what the first attempt began."""
    job, may_be_repeated = _job()
    if may_be_repeated and storage.exists(BEGUN_BY) and json.loads(storage.read(BEGUN_BY)) == job:
        console.say(f"--fresh: {storage} was begun by an earlier attempt of this job ({job}), and goes on; to begin again "
                    "all the same, take --fresh to a new job, or give another name (name=...)")
        return
    set_aside(storage, console, mark)
    if job is not None:
        storage.write(BEGUN_BY, json.dumps(job).encode())


def _job() -> tuple[str | None, bool]:
    """What all attempts of the job that this process belongs to have in common, None where there is no job; and whether the
    attempt may be a repeated one."""
    told = os.environ
    if job := told.get("ANYSCALE_JOB_ID") or told.get("SKYPILOT_TASK_ID"):
        return job, True
    submitted = (json.loads(told.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("metadata") or {}).get("job_submission_id")
    if submitted:
        # KubeRay gives each attempt of a RayJob an id and a cluster of its own, both of the RayJob's name and five letters.
        name = submitted[:-6]
        rayjob = re.fullmatch(r"-[a-z0-9]{5}", submitted[-6:]) and told.get("RAY_CLUSTER_NAME", "").startswith(f"{name}-")
        return (f"RayJob {name}" if rayjob else submitted), True
    if slurm := told.get("SLURM_JOB_ID"):  # also that of a shell in which someone types one command after another
        return f"Slurm job {slurm}", int(told.get("SLURM_RESTART_COUNT") or 0) > 0
    return None, False


def set_aside(storage: Storage, console: Console, mark: str = "run.json") -> None:
    """Rename the directory of an earlier run, or of whatever else has a file ``mark``."""
    if not storage.exists(mark):
        return
    if not storage.is_local:
        raise ConfigError(f"--fresh cannot rename {storage} on an object store; give the run another name (name=...)")
    path = Path(storage.root)
    aside = next(candidate for number in range(1, 1 << 20)
                 if not (candidate := path.with_name(f"{path.name}~{number}")).exists())
    path.rename(aside)
    console.say(f"the earlier run of this name is now {aside}")
