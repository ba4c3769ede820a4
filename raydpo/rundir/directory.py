"""Names of the files and folders in the directory of a run or a sweep, and what its JSON files say.

A run directory is ``<output>/<name>``. Stored runs depend on these names: they never change.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raydpo.storage.files import Storage

__all__ = [
    "AUDIT_JSON",
    "AUDIT_PAGE",
    "BEGUN_BY",
    "CACHE_HITS",
    "CHECKPOINTS",
    "CONFIG",
    "DRIVER_LOG",
    "EVAL",
    "EVALUATION",
    "FINAL",
    "LEDGER",
    "METRICS",
    "PAIRS",
    "PROMPTS",
    "REPORT",
    "ROUND",
    "ROUNDS",
    "ROUND_HELD_OUT",
    "ROUND_PAIRS",
    "RUN",
    "SAMPLES",
    "SCORES",
    "SCRATCH",
    "SUMMARY",
    "SWEEP",
    "TENSORBOARD",
    "TRAIN",
    "RunDirectory",
    "round_folder",
]

CONFIG = "config.yaml"
"""The resolved configuration."""
RUN = "run.json"
"""Written before the first step: the settings that decide the result, and the digest of the held-out pairs."""
PAIRS = "training-pairs.parquet"
"""Written with run.json: what identifies each training pair, see ``rundir.pairs``. Earlier versions did not write it."""
METRICS = "metrics.parquet"
"""One row per step."""
EVAL = "eval.parquet"
"""One row per evaluation on held-out pairs."""
SUMMARY = "summary.json"
"""Written when a training has finished."""
EVALUATION = "evaluation.json"
"""Written by ``raydpo eval``."""
AUDIT_JSON = "audit.json"
"""The figures of the audit."""
AUDIT_PAGE = "audit.html"
"""The audit as a page."""
REPORT = "report.html"
"""The page of a run, a sweep or rounds."""
SWEEP = "sweep.json"
"""The record of a sweep: its trials and their state."""
BEGUN_BY = "begun-by.json"
"""The job that began this run with --fresh."""
FINAL = "final"
"""Folder of the exported policy."""
CACHE_HITS = "cache-hits.json"
"""In a round: how many of the completions of its pairs the cache held before its training began to score the others, and the
seconds of both."""
CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints, in Ray Train's layout."""
TENSORBOARD = "tensorboard"
"""Folder of TensorBoard's event files."""
DRIVER_LOG = "logs/driver.log"
"""Output of libraries in the driver process; a run at a URI has none."""
LEDGER = "rounds.json"
"""State of every round and stage. It is made anew from the files of the rounds, which alone decide what is done."""
PROMPTS = "prompts.parquet"
"""All prompts, training and held out."""
ROUNDS = "rounds.parquet"
"""The figures of each round, one row each. Round 0 is the measurement before the first round."""
ROUND = "round.json"
"""The figures of one round, in its folder. Written last: a round without it is not over."""
SAMPLES = "samples.parquet"
"""Answers of the policy with which a round begins."""
SCORES = "scores.parquet"
"""Rewards of these answers, in the same order."""
ROUND_PAIRS = "pairs.parquet"
"""Pairs that the round trains on: ``data.select.PAIR_SCHEMA`` and further columns."""
ROUND_HELD_OUT = "held_out.parquet"
"""Answers of the trained policy to held-out prompts, with their rewards."""
TRAIN = "train"
"""Run directory of a round's training, in its folder."""
SCRATCH = ".scratch"
"""Folder that exists while a run trains: the pairs, and a folder for each worker."""


@dataclass(frozen=True)
class RunDirectory:
    """The JSON files of a run directory. Each method returns None if its file does not exist (yet)."""

    storage: Storage

    def fingerprint(self) -> dict[str, Any] | None:
        """The settings that decide the result, as the run began with them."""
        run = self._read(RUN)
        return None if run is None else run["fingerprint"]

    def held_out(self) -> str | None:
        """Digest of the held-out pairs; None also if nothing is held out, or the run is of an earlier version."""
        return (self._read(RUN) or {}).get("held_out")

    def summary(self) -> dict[str, Any] | None:
        """What the finished run reports."""
        return self._read(SUMMARY)

    def evaluation(self) -> dict[str, Any] | None:
        """What ``raydpo eval`` measured."""
        return self._read(EVALUATION)

    def _read(self, name: str) -> Any:
        return json.loads(self.storage.read(name)) if self.storage.exists(name) else None


def round_folder(number: int) -> str:
    """Name of the folder of a round, below the directory of the rounds. Round 0 has the measurement before the first."""
    return f"round-{number:03d}"
