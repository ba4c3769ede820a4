"""The state of a sweep's trials, stored in sweep.json."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from typing import Any, Literal

from raydpo.config import Config, lower_is_better
from raydpo.rundir.directory import EVAL, METRICS, SWEEP, RunDirectory
from raydpo.rundir.records import finite, read_rows
from raydpo.storage.files import Storage
from raydpo.storage.uri import redact
from raydpo.sweeps.halving import best_first
from raydpo.sweeps.trials import Trial, parameters_of
from raydpo.version import __version__

__all__ = ["Ledger", "TrialStatus"]

Status = Literal["waiting", "running", "done", "stopped", "failed"]


@dataclass
class TrialStatus:
    """The state of one trial.

    Attributes:
        error: why it failed.
        steps: number of steps that its metrics record.
        seconds: wall time of these steps, including checkpoints and evaluations between them.
        eval: the last held-out evaluation, by metric.
        evaluation: the content of evaluation.json.
    """

    trial: Trial
    status: Status = "waiting"
    error: str | None = None
    steps: int = 0
    seconds: float = 0.0
    eval: dict[str, float] | None = None
    evaluation: dict[str, Any] | None = None

    def to_dict(self, parameters: list[str]) -> dict[str, Any]:
        """Return the entry of the trial in sweep.json."""
        trial, state = self.trial, {name: value for name, value in vars(self).items() if name != "trial"}
        settings = {key: trial.value(key) for key in parameters}
        return {"name": trial.name, "run_dir": redact(trial.config.run_dir), "settings": settings} | state

    def read(self) -> None:
        """Update the entry from the run directory."""
        storage = Storage(self.trial.config.run_dir)
        rows, evals = read_rows(storage, METRICS), read_rows(storage, EVAL)
        self.steps = int(rows[-1]["step"]) if rows else 0
        # Column ``seconds`` leaves out checkpoints and evaluations. Runs of earlier versions may have no other.
        self.seconds = sum(row.get("time/step") or row["seconds"] for row in rows)
        self.eval = evals[-1] if evals else None
        self.evaluation = RunDirectory(storage).evaluation()


class Ledger:
    """All trials of a sweep, in order. Each change of a status writes sweep.json.

    Args:
        same_pairs: whether all trials are measured on the same held-out pairs; otherwise none is the best.
    """

    def __init__(self, config: Config, trials: list[Trial], *, same_pairs: bool = True) -> None:
        self.config, self.same_pairs = config, same_pairs
        self.entries = {trial.name: TrialStatus(trial) for trial in trials}
        self.cache: dict[str, Any] = {"uri": redact(config.cache_uri), "identity": None, "hit_rates": []}
        self._storage = Storage(config.run_dir)
        self._lock = threading.Lock()

    def found_in_cache(self, identity: str, hit_rates: list[float | None]) -> None:
        """Store the identity of the reference and, for each trial, the share of its completions that the cache held before
        the reference pass, 0 to 1; None for a trial without a reference."""
        self.cache |= {"identity": identity, "hit_rates": hit_rates}

    def set(self, name: str, status: Status, error: str | None = None) -> None:
        """Change the status of a trial, and write sweep.json."""
        with self._lock:
            entry = self.entries[name]
            entry.status, entry.error = status, error
            entry.read()
            self._write()

    def best(self) -> list[TrialStatus]:
        """Return the trials with the best ``sweep.metric`` among those that are done: several only if they are equal."""
        metric = self.config.sweep.metric
        scores = {
            name: entry.eval[metric]
            for name, entry in self.entries.items()
            if entry.status == "done" and entry.eval and metric in entry.eval
        }
        if not scores or not self.same_pairs:
            return []
        first = scores[best_first(scores, lower_is_better=lower_is_better(metric))[0]]
        return [self.entries[name] for name, score in scores.items() if score == first]

    def to_dict(self) -> dict[str, Any]:
        """Return the content of sweep.json."""
        trials = [entry.trial for entry in self.entries.values()]
        parameters = parameters_of(trials)
        return {
            "raydpo": __version__,
            "name": self.config.run_name,
            "metric": self.config.sweep.metric,
            "parameters": parameters,
            "cache": self.cache,
            "trials": [entry.to_dict(parameters) for entry in self.entries.values()],
        }

    def write(self) -> None:
        with self._lock:
            self._write()

    def _write(self) -> None:
        self._storage.write(SWEEP, json.dumps(finite(self.to_dict()), indent=2, allow_nan=False).encode())
