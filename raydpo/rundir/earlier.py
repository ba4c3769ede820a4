"""An earlier run in the same run directory: return its result, continue it, refuse it, or rename it."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from raydpo.config import Config
from raydpo.errors import ConfigError
from raydpo.rundir.directory import BEGUN_BY, CONFIG, RUN, SCRATCH, RunDirectory
from raydpo.rundir.fingerprint import TRAINING_PAIRS, changed_settings, flatten_settings
from raydpo.rundir.pairs import changed_pairs
from raydpo.storage.files import Storage
from raydpo.terminal.console import Console

__all__ = ["begin_again", "changes_since", "finished_summary", "neutral_changes", "other_held_out"]


_ROUNDING = re.compile(
    r"model\.layout|train\.(zero|deterministic|tokens_per_batch|overlap_communication|gradient_checkpointing|offload_\w+)|"
    r"(score|train)\.(workers(\.\w+)?|gpus_per_worker|accelerator|sequence_parallel)|score\.tokens_per_batch"
)
"""Settings that change rounding, such as the order of sums, and nothing else."""


def finished_summary(storage: Storage, fingerprint: dict[str, Any], pairs: pa.Table) -> dict[str, Any] | None:
    """The summary of a finished run in this directory; None if there is no run, or it was interrupted.

    Args:
        pairs: the training pairs, rows of ``data.pairs.PAIR_SCHEMA``.

    Raises:
        ConfigError: if the run there would have another result; names the settings that differ.
    """
    if not storage.exists(RUN):
        return None
    changes = changes_since(storage, fingerprint, pairs)
    if changes:
        raise ConfigError(
            f"{storage} is a run with other settings ({'; '.join(changes)}). Give this one another name "
            "(name=...), or start again with --fresh, which renames the old one"
        )
    return RunDirectory(storage).summary()


def changes_since(
    storage: Storage, fingerprint: dict[str, Any], pairs: pa.Table, only: Collection[str] | None = None
) -> list[str]:
    """How the settings and pairs of a run differ from those of the run in ``storage``; empty if they do not.

    Args:
        only: keys of the fingerprint to compare; None = all.
    """
    both = [
        {key: value for key, value in each.items() if only is None or key in only}
        for each in (RunDirectory(storage).fingerprint() or {}, fingerprint)
    ]
    differ = both[0].get(TRAINING_PAIRS) != both[1].get(TRAINING_PAIRS)
    words = {TRAINING_PAIRS: f"data.train: {changed_pairs(storage, pairs)}"} if differ else {}
    return changed_settings(*both, words)


def neutral_changes(storage: Storage, config: Config) -> Iterator[str]:
    """Lines about settings that changed since the run started, and do not affect its result or only its rounding."""
    if not storage.exists(CONFIG):
        return
    earlier, now = (flatten_settings(yaml.safe_load(text)) for text in (storage.read(CONFIG), config.to_yaml()))
    before, after = (bool(settings.pop("model.fused", False)) for settings in (earlier, now))
    if before != after:
        yield (
            f"warning: model.fused has changed since this run started ({before} -> {after}), so every token rounds "
            f"differently from here on; set model.fused={str(before).lower()} to continue as it began, or use --fresh"
        )
    for rounds, what in ((False, "without effect on its result"), (True, "changing only rounding")):
        old, new = (
            {key: value for key, value in settings.items() if bool(_ROUNDING.fullmatch(key)) is rounds}
            for settings in (earlier, now)
        )
        if changes := changed_settings(old, new):
            yield f"changed since this run started, {what}: {'; '.join(changes)}"


def other_held_out(storage: Storage, digest: str | None) -> str | None:
    """A warning if a run measured other held-out pairs, or other tokens of them, than those with this digest; else None."""
    before = RunDirectory(storage).held_out()
    if None in (before, digest) or before == digest:
        return None
    return (
        f"the held-out figures of {storage} so far are of other held-out pairs, or of other tokens of them, than the "
        "settings say now; measure these with 'raydpo eval', or start again with --fresh"
    )


def begin_again(storage: Storage, console: Console, mark: str = RUN) -> None:
    """Apply --fresh, once in each job: rename the directory if it has a file ``mark``.

    A scheduler that repeats a job after the loss of a machine repeats the same command. The repeated command must then
    continue the run.
    """
    job, may_be_repeated = _job()
    if may_be_repeated and storage.exists(BEGUN_BY) and json.loads(storage.read(BEGUN_BY)) == job:
        console.say(
            f"--fresh: {storage} was started by an earlier attempt of this job ({job}) and continues; to start "
            "again, use --fresh in a new job, or give another name (name=...)"
        )
        return
    _set_aside(storage, console, mark)
    if job is not None:
        storage.write(BEGUN_BY, json.dumps(job).encode())


def _job() -> tuple[str | None, bool]:
    """An id that all attempts of this process's job share, or None without a job; and whether this attempt may be a
    repeated one."""
    environ = os.environ
    if job := environ.get("ANYSCALE_JOB_ID") or environ.get("SKYPILOT_TASK_ID"):
        return job, True
    ray_job = json.loads(environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    if submitted := (ray_job.get("metadata") or {}).get("job_submission_id"):
        # KubeRay gives each attempt of a RayJob its own id and cluster, both named after the RayJob plus five letters.
        name = submitted[:-6]
        rayjob = re.fullmatch(r"-[a-z0-9]{5}", submitted[-6:]) and environ.get("RAY_CLUSTER_NAME", "").startswith(f"{name}-")
        return (f"RayJob {name}" if rayjob else submitted), True
    if slurm := environ.get("SLURM_JOB_ID"):  # also set in an interactive shell, where each command is a new one
        return f"Slurm job {slurm}", int(environ.get("SLURM_RESTART_COUNT") or 0) > 0
    return None, False


def _set_aside(storage: Storage, console: Console, mark: str) -> None:
    """Rename the directory to ``NAME~1`` (or the next free number) if it has a file ``mark``."""
    if not storage.exists(mark):
        return
    if not storage.is_local:
        raise ConfigError(f"--fresh cannot rename {storage} on an object store; give the run another name (name=...)")
    path = Path(storage.root)
    candidates = (path.with_name(f"{path.name}~{number}") for number in itertools.count(1))
    aside = next(candidate for candidate in candidates if not candidate.exists())
    path.rename(aside)
    shutil.rmtree(aside / SCRATCH, ignore_errors=True)  # of a command that was killed
    console.say(f"the earlier run of this name is now {aside}")
