"""What run and sweep directories hold, whatever of it is there: a run may still be going, or have nothing held out."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import polars as pl
import yaml

from raydpo.config import ObjectiveConfig
from raydpo.errors import ConfigError, RaydpoError
from raydpo.storage import Storage, redact
from raydpo.sweep.trials import FILE as SWEEP_FILE

__all__ = ["RunRecord", "SweepRecord", "Trial", "is_sweep", "leaves"]

T = TypeVar("T")
RUN_FILES = ("config.yaml", "run.json", "metrics.parquet", "eval.parquet", "summary.json", "evaluation.json")


@dataclass(frozen=True)
class RunRecord:
    """A run directory. What it does not hold is empty or None.

    Attributes:
        place: local path or URI, without secrets.
        config: the resolved configuration, without secrets; {} if there is none.
        steps: metrics.parquet, a row a step. evals: eval.parquet, a row an evaluation, names without ``eval_``.
        summary: summary.json, which only a finished run has. evaluation: evaluation.json, what ``raydpo eval`` found.
        held_out_digest: of the held-out pairs that it is measured on; None where none are held out, or it is not known.
    """

    place: str
    name: str
    config: dict[str, Any]
    steps: pl.DataFrame
    evals: pl.DataFrame
    summary: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    held_out_digest: str | None = None

    @classmethod
    def read(cls, storage: Storage) -> RunRecord:
        """Read a run directory.

        Raises:
            ConfigError: if it is none.
            RaydpoError: if one of its files is damaged, naming it.
        """
        if not any(storage.exists(name) for name in RUN_FILES):
            below = [name for name in storage.list() if storage.exists(f"{name}/config.yaml")]
            hint = f"; below it there are {', '.join(below[:5])}" if below else ""
            raise ConfigError(f"there is no run at {storage}: it holds none of {', '.join(RUN_FILES)}{hint}. Give the path "
                              f"of a run directory, <output>/<name>, or of a sweep's, which holds {SWEEP_FILE}")
        config = _read(storage, "config.yaml", yaml.safe_load) or {}
        evals = _table(storage, "eval.parquet")
        name = config.get("name") or str(storage).rstrip("/").rsplit("/", 1)[-1]
        return cls(str(storage), str(name), _without_secrets(config), _table(storage, "metrics.parquet"),
                   evals.rename({column: column.removeprefix("eval_") for column in evals.columns}),
                   _read(storage, "summary.json", json.loads), _read(storage, "evaluation.json", json.loads),
                   (_read(storage, "run.json", json.loads) or {}).get("held_out"))

    @property
    def done(self) -> int:
        """Steps that are recorded."""
        return int(self.steps["step"][-1]) if self.steps.height else 0

    @property
    def sources(self) -> list[str]:
        """Names of the sources that held-out or training metrics are split by; none where there is one source."""
        names = dict.fromkeys(column.removesuffix("/rewards/accuracies") for table in (self.evals, self.steps)
                              for column in table.columns if column.endswith("/rewards/accuracies"))
        return list(names)

    def held_out(self, name: str) -> tuple[float | None, float | None]:
        """A held-out metric at the first evaluation and at the last."""
        if name not in self.evals.columns or not self.evals.height:
            return None, None
        return self.evals[name][0], self.evals[name][-1]

    def setting(self, key: str) -> Any:
        """The value of a key such as ``train.beta``, None where it is not set."""
        tree: Any = self.config
        for part in key.split("."):
            tree = tree.get(part) if isinstance(tree, dict) else None
        return tree


    @property
    def objective(self) -> ObjectiveConfig | None:
        """The objective that was trained; None where that is not known, or not to this version of raydpo."""
        train = self.config.get("train") or {}
        try:
            return ObjectiveConfig(**{key: train[key] for key in ObjectiveConfig.model_fields if key in train}) if train \
                else None
        except ValueError:
            return None


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: its entry in sweep.json, and its run directory, None if that is not there (yet)."""

    name: str
    settings: dict[str, Any]
    status: str
    error: str | None
    seconds: float | None
    eval: dict[str, float]
    evaluation: dict[str, Any] | None
    run: RunRecord | None


@dataclass(frozen=True)
class SweepRecord:
    """A sweep directory. ``cache``: uri, identity and hit rates, {} where it is not said."""

    place: str
    name: str
    parameters: list[str]
    cache: dict[str, Any]
    trials: list[Trial]

    @classmethod
    def read(cls, storage: Storage) -> SweepRecord:
        """Read a sweep directory.

        Raises:
            RaydpoError: if one of its files is damaged, naming it.
        """
        tree = _read(storage, SWEEP_FILE, json.loads)
        try:
            trials = [_trial(storage, entry) for entry in tree["trials"]]
            return cls(str(storage), str(tree["name"]), list(tree.get("parameters") or ()),
                       _without_secrets(tree.get("cache") or {}), trials)
        except (KeyError, TypeError, AttributeError) as error:
            raise RaydpoError(f"{storage}/{SWEEP_FILE} is no record of a sweep ({type(error).__name__}: {error}); "
                              "'raydpo sweep' writes it again") from None


def is_sweep(storage: Storage) -> bool:
    """Whether the directory is a sweep's."""
    return storage.exists(SWEEP_FILE)


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a nested configuration by their keys, such as ``train.beta``; ``data.train.0.path`` in a list."""
    found: dict[str, Any] = {}
    for name, below in tree.items():
        if isinstance(below, list) and below and isinstance(below[0], dict):
            below = {str(index): each for index, each in enumerate(below)}
        found |= leaves(below, f"{prefix}{name}.") if isinstance(below, dict) and below else {f"{prefix}{name}": below}
    return found


def _trial(sweep: Storage, entry: dict[str, Any]) -> Trial:
    """The sweep's own directory comes first: it may have been moved since."""
    run = None
    for place in (f"{sweep.uri.rstrip('/')}/{entry['name']}", entry.get("run_dir")):
        if place and run is None:
            try:
                run = dataclasses.replace(RunRecord.read(Storage(place)), name=str(entry["name"]))
            except ConfigError:  # a trial that waits has no directory
                continue
    scores = {name.removeprefix("eval_"): value for name, value in (entry.get("eval") or {}).items()
              if value is not None and math.isfinite(value)}
    return Trial(str(entry["name"]), dict(entry.get("settings") or {}), str(entry.get("status", "?")), entry.get("error"),
                 entry.get("seconds"), scores, (run and run.evaluation) or entry.get("evaluation"), run)


def _read(storage: Storage, name: str, parse: Callable[[bytes], T]) -> T | None:
    if not storage.exists(name):
        return None
    try:
        return parse(storage.read(name))
    except (ValueError, yaml.YAMLError, pl.exceptions.PolarsError) as error:
        raise RaydpoError(f"{storage}/{name} cannot be read ({' '.join(str(error).split())[:200]}); set it aside, and the "
                          "page is made without it") from None


def _table(storage: Storage, name: str) -> pl.DataFrame:
    table = _read(storage, name, lambda data: pl.read_parquet(io.BytesIO(data)))
    if table is None:
        return pl.DataFrame({"step": []}, schema={"step": pl.Int64})
    floats = pl.col(pl.Float64)
    return table.with_columns(pl.when(floats.is_finite()).then(floats))  # a step that was not taken has no loss to draw


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_secrets(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_without_secrets(below) for below in value]
    return redact(value) if isinstance(value, str) else value
