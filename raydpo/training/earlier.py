"""What an earlier run of the same name left in the run directory: a result, a part of one, or something else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from raydpo.config import Config
from raydpo.console import Console
from raydpo.errors import ConfigError
from raydpo.storage import Storage
from raydpo.training.checkpoint import changed_settings

__all__ = ["earlier_result", "harmless_changes", "leaves", "set_aside"]


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
