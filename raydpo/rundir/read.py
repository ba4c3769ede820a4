"""Reads run and sweep directories. Files may be missing: a run may be unfinished, or hold nothing out."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import polars as pl
import yaml

from raydpo.config import ObjectiveConfig
from raydpo.config.counting import counting_texts
from raydpo.errors import ConfigError, RaydpoError, one_line
from raydpo.rundir.directory import CONFIG, EVAL, EVALUATION, LEDGER, METRICS, RUN, SUMMARY, SWEEP
from raydpo.storage.files import Storage
from raydpo.storage.uri import redacted

__all__ = ["RunRecord", "SweepRecord", "TrialRecord", "different_tokens", "is_sweep", "length_growth", "read_file"]

T = TypeVar("T")
RUN_FILES = (CONFIG, RUN, METRICS, EVAL, SUMMARY, EVALUATION)


@dataclass(frozen=True)
class RunRecord:
    """The content of a run directory. What is missing there is empty or None.

    Attributes:
        place: local path or URI, without secrets.
        config: the resolved configuration, without secrets; {} if there is none.
        steps: metrics.parquet, one row a step. evals: eval.parquet, one row an evaluation, names without ``eval_``.
        summary: summary.json, which only a finished run has. evaluation: evaluation.json, the result of ``raydpo eval``.
        held_out_digest: digest of the held-out pairs and of what counts in them; None if none are held out, or if it is not
            known.
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
            ConfigError: if it is not a run directory.
            RaydpoError: if one of its files is damaged, naming it.
        """
        if not any(storage.exists(name) for name in RUN_FILES):
            below = [name for name in storage.list() if storage.exists(f"{name}/{CONFIG}")]
            hint = f"; below it there are {', '.join(below[:5])}" if below else ""
            raise ConfigError(
                f"there is no run at {storage}: it holds none of {', '.join(RUN_FILES)}{hint}. Give the path "
                f"of a run's directory, <output>/<name>, or of one that holds {SWEEP} or {LEDGER}"
            )
        config = read_file(storage, CONFIG, yaml.safe_load) or {}
        evals = _table(storage, EVAL)
        summary = read_file(storage, SUMMARY, json.loads)
        name = (summary or {}).get("name") or config.get("name") or str(storage).rstrip("/").rsplit("/", 1)[-1]
        return cls(
            str(storage),
            str(name),
            redacted(config),
            _table(storage, METRICS),
            evals.rename({column: column.removeprefix("eval_") for column in evals.columns}),
            summary,
            read_file(storage, EVALUATION, json.loads),
            (read_file(storage, RUN, json.loads) or {}).get("held_out"),
        )

    @property
    def done(self) -> int:
        """Number of recorded steps."""
        return int(self.steps["step"][-1]) if self.steps.height else 0

    @property
    def sources(self) -> list[str]:
        """Names of the sources that metrics are split by; empty if there is one source."""
        tail = "/rewards/accuracies"
        columns = dict.fromkeys([*self.evals.columns, *self.steps.columns])
        return [column.removesuffix(tail) for column in columns if column.endswith(tail)]

    def held_out(self, name: str) -> tuple[float | None, float | None]:
        """Return a held-out metric at the first and at the last evaluation."""
        if name not in self.evals.columns or not self.evals.height:
            return None, None
        return self.evals[name][0], self.evals[name][-1]

    def setting(self, key: str) -> Any:
        """Return the value of a key such as ``train.beta``, None if it is not set."""
        tree: Any = self.config
        for part in key.split("."):
            tree = tree.get(part) if isinstance(tree, dict) else None
        return tree

    @property
    def counted(self) -> tuple[str | None, str | None]:
        """What counts in training pairs and in held-out pairs, in words; None if it is unknown, or nothing is held out."""
        data = self.config.get("data")
        return counting_texts(data) if data else (None, None)

    @property
    def objective(self) -> ObjectiveConfig | None:
        """The objective that was trained; None if it is unknown, or unknown to this version of raydpo."""
        train = self.config.get("train")
        if not train:
            return None
        try:
            return ObjectiveConfig(**{key: train[key] for key in ObjectiveConfig.model_fields if key in train})
        except ValueError:
            return None


@dataclass(frozen=True)
class TrialRecord:
    """One run of a sweep: its entry in sweep.json and its run directory, None if there is none yet."""

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
    """The content of a sweep directory. ``cache``: uri, identity and hit rates; may be empty."""

    place: str
    name: str
    parameters: list[str]
    cache: dict[str, Any]
    trials: list[TrialRecord]

    @classmethod
    def read(cls, storage: Storage) -> SweepRecord:
        """Read a sweep directory.

        Raises:
            RaydpoError: if one of its files is damaged, naming it.
        """
        tree = read_file(storage, SWEEP, json.loads)
        try:
            trials = [_trial(storage, entry) for entry in tree["trials"]]
            parameters, cache = list(tree.get("parameters") or ()), redacted(tree.get("cache") or {})
            return cls(str(storage), str(tree["name"]), parameters, cache, trials)
        except (KeyError, TypeError, AttributeError) as error:
            raise RaydpoError(
                f"{storage}/{SWEEP} is not a record of a sweep ({type(error).__name__}: {error}); "
                "run 'raydpo sweep' to write it again"
            ) from None


def different_tokens(measured: Iterable[tuple[str | None, str | None]]) -> list[str]:
    """What counts in held-out pairs, in words, if several runs are measured on different tokens; empty if on the same ones.

    Args:
        measured: of each run the digest of its held-out pairs, and what counts in them in words, None if unknown.
    """
    known = list(measured)
    digests = {digest for digest, _ in known}
    words = list(dict.fromkeys(each for _, each in known if each is not None))
    return [] if len(words) < 2 or (len(digests) == 1 and None not in digests) else words


def is_sweep(storage: Storage) -> bool:
    """Whether the directory holds a sweep."""
    return storage.exists(SWEEP)


def length_growth(evaluation: dict[str, Any]) -> dict[str, float | None] | None:
    """Return the growth of the answers' length from an evaluation: of sampled answers, or else of greedy ones."""
    modes = (evaluation.get("generation") or {}).get("modes") or {}
    return next((modes[mode]["length_growth"] for mode in ("sampled", "greedy") if modes.get(mode)), None)


def _trial(sweep: Storage, entry: dict[str, Any]) -> TrialRecord:
    """Read a trial. The place below the sweep directory comes first: the sweep may have been moved."""
    run = None
    for place in (f"{sweep.uri.rstrip('/')}/{entry['name']}", entry.get("run_dir")):
        if place and run is None:
            try:
                run = dataclasses.replace(RunRecord.read(Storage(place)), name=str(entry["name"]))
            except ConfigError:  # a waiting trial has no directory
                continue
    finite = {name: each for name, each in (entry.get("eval") or {}).items() if each is not None and math.isfinite(each)}
    scores = {name.removeprefix("eval_"): value for name, value in finite.items()}
    name, settings, status = str(entry["name"]), dict(entry.get("settings") or {}), str(entry.get("status", "?"))
    evaluation = (run and run.evaluation) or entry.get("evaluation")
    return TrialRecord(name, settings, status, entry.get("error"), entry.get("seconds"), scores, evaluation, run)


def read_file(storage: Storage, name: str, parse: Callable[[bytes], T]) -> T | None:
    """Return what ``parse`` makes of a file's bytes; None if there is no such file.

    Raises:
        RaydpoError: if ``parse`` raises ValueError, naming the file.
    """
    if not storage.exists(name):
        return None
    try:
        return parse(storage.read(name))
    except (ValueError, yaml.YAMLError, pl.exceptions.PolarsError) as error:
        raise RaydpoError(
            f"{storage}/{name} cannot be read ({one_line(error, 200)}); move it away to make the page without it"
        ) from None


def _table(storage: Storage, name: str) -> pl.DataFrame:
    table = read_file(storage, name, lambda data: pl.read_parquet(io.BytesIO(data)))
    if table is None:
        return pl.DataFrame({"step": []}, schema={"step": pl.Int64})
    floats = pl.col(pl.Float64)
    return table.with_columns(pl.when(floats.is_finite()).then(floats))  # a skipped step has no finite loss
