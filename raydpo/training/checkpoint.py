"""A checkpoint: DeepSpeed's shards, and beside them what raydpo must know to continue or to refuse."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydpo.errors import ConfigError, TrainError
from raydpo.training.engine import PolicyEngine

if TYPE_CHECKING:
    from raydpo.training.loop import TrainSummary

__all__ = ["CheckpointState", "changed_settings", "load_checkpoint", "save_checkpoint"]

_FILE = "raydpo.json"


@dataclass(frozen=True)
class CheckpointState:
    """Where a run stood: finished steps, and its summary so far."""

    step: int
    summary: dict[str, Any]


def save_checkpoint(engine: PolicyEngine, scratch: Path, step: int, fingerprint: Mapping[str, Any],
                    summary: TrainSummary) -> Path:
    """Write this rank's share of a checkpoint below ``scratch``, in place of the previous one, and return where."""
    directory = scratch / f"rank-{engine.rank}"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    engine.save(directory)
    if engine.rank == 0:
        state = {"step": step, "world_size": engine.world_size, "zero": engine.zero, "fingerprint": dict(fingerprint),
                 "summary": dataclasses.asdict(summary)}
        (directory / _FILE).write_text(json.dumps(state))
    return directory


def load_checkpoint(engine: PolicyEngine, directory: Path, fingerprint: Mapping[str, Any]) -> CheckpointState:
    """Continue from ``directory``.

    Raises:
        ConfigError: if it belongs to a run whose result would differ.
        TrainError: if it was made by another number of workers or another ZeRO stage.
    """
    try:
        state = json.loads((directory / _FILE).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise TrainError(f"the checkpoint in {directory} is incomplete: {error}") from None
    changes = changed_settings(state["fingerprint"], fingerprint)
    if changes:
        raise ConfigError(f"the checkpoint belongs to a run with other settings ({'; '.join(changes)})")
    for key, now in (("world_size", engine.world_size), ("zero", engine.zero)):
        if state[key] != now:
            name = {"world_size": "train.workers", "zero": "train.zero"}[key]
            raise TrainError(f"the checkpoint of step {state['step']} was made with {name} {state[key]}, this run has "
                             f"{now}; set {name}={state[key]} to continue it")
    engine.load(directory)
    return CheckpointState(state["step"], state["summary"])


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """``key: old -> new`` for everything that the result depends on and that differs."""
    # Through JSON, as the stored side has been.
    now = json.loads(json.dumps(dict(now)))
    return [f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in sorted({*before, *now})
            if before.get(key) != now.get(key)]
