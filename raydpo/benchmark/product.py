"""raydpo's side: the commands that a user types, in processes of their own, with Ray; and what their run directories say."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from raydpo.benchmark.job import Job, Result, environment
from raydpo.benchmark.watch import Watched, watch
from raydpo.benchmark.workload import Workload
from raydpo.errors import TrainError
from raydpo.reference.part import part_time
from raydpo.rundir.directory import METRICS, SWEEP, RunDirectory
from raydpo.rundir.records import read_rows
from raydpo.storage.files import Storage

__all__ = ["NAME", "PHASES", "config_of", "parts_seconds", "run_verb"]

PHASES = {
    "read": "data ",
    "scoring asked": "scoring ",
    "scored": "cache: ",
    "training": "training: ",
    "first step": "first loss ",
}
"""Beginning of the printed line that ends each phase of a command."""
BUDGET = re.compile(r"tokens_per_batch: auto = (\d+) positions")
"""The line with the most positions of a forward pass."""
_PARTS = "cache/*/parts/*.parquet"
NAME = "benchmark"
"""Name of the run, and of the sweep."""


def config_of(job: Job, work: Workload, output: Path, max_length: int, betas: tuple[float, ...]) -> dict[str, Any]:
    """The configuration of a run of this job, as a user would write it; with a sweep over ``betas``, without held-out pairs,
    since TRL evaluates nothing either. What is not here has raydpo's defaults."""
    train = job.train.model_dump(mode="json", include={"pairs_per_step", "lr", "beta", "schedule", "warmup"})
    config: dict[str, Any] = {
        "name": NAME,
        "output": str(output),
        "model": {"path": job.model, "dtype": job.dtype},
        "data": {"train": str(work.file), "max_length": max_length, "shuffle": work.order == "shuffled"},
        "train": train | ({} if job.steps * job.pairs_per_step >= len(work.shapes) else {"steps": job.steps}),
    }
    if job.adapters is not None:
        config["model"]["lora"] = job.adapters.model_dump(mode="json", include={"r", "alpha"})
    if job.device == "cpu":
        config |= {"score": {"gpus_per_worker": 0}}
        config["train"]["gpus_per_worker"] = 0
    if betas:
        config["sweep"] = {"grid": {"train.beta": list(betas)}}
    return config


def run_verb(
    verb: Literal["score", "train", "run", "sweep"], config: Mapping[str, Any], work: Workload
) -> tuple[Result, Watched, list[Result]]:
    """Run ``raydpo VERB`` with this configuration and wait for its end.

    Returns:
        What it computed: ``reference_seconds`` if it scored, steps and losses if it trained one policy; what was seen from
        outside; and the trials of a sweep, in the order of their betas in the configuration.

    Raises:
        TrainError: if it fails.
    """
    output = Path(config["output"])
    output.mkdir(parents=True, exist_ok=True)
    file = output / f"{verb}.yaml"
    file.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
    before = set(output.glob(_PARTS))
    # What a machine remembers of a model begins empty with a new directory, and serves the next command in it.
    memory = environment() | {"XDG_CACHE_HOME": str(output / "machine")}
    watched = watch([sys.executable, "-m", "raydpo.cli", verb, str(file)], output / f"{verb}.log", memory)
    parts = set(output.glob(_PARTS)) - before
    found = Result(
        facts={"phases": {name: when for name, line in PHASES.items() if (when := watched.when(line)) is not None}}
    )
    if parts:
        found.reference_seconds = parts_seconds(sorted(parts), work.table)
        found.facts["parts"] = len(parts)
    budgets = [int(told[1]) for _, line in watched.lines if (told := BUDGET.search(line))]
    if budgets and verb in ("train", "run"):
        found.facts["largest_pass"] = budgets[-1]  # at most; scoring prints its own before
    trials = []
    if verb == "sweep":
        names = [each["name"] for each in json.loads((output / NAME / SWEEP).read_text(encoding="utf-8"))["trials"]]
        trials = [_trained(output / NAME / name / METRICS) for name in names]
        at_once = [line.rsplit("; ", 1)[1] for _, line in watched.lines if line.startswith("sweep: ") and " at once" in line]
        found.facts["at_once"] = int(at_once[0].split()[0])
    elif verb != "score":
        trained = _trained(output / NAME / METRICS)
        facts = found.facts | trained.facts
        found = replace(trained, reference_seconds=found.reference_seconds, facts=facts)
    return found, watched, trials


def _trained(metrics: Path) -> Result:
    storage = Storage(str(metrics.parent))
    rows, summary = read_rows(storage, metrics.name), RunDirectory(storage).summary()
    if not rows or summary is None:
        raise TrainError(f"{metrics.parent} holds no finished run")
    return Result(
        step_seconds=[row["seconds"] for row in rows],
        losses=[row["loss"] for row in rows],
        chosen_logps=[row["logps/chosen"] for row in rows],
        rejected_logps=[row["logps/rejected"] for row in rows],
        peak_bytes=max(row["peak_memory_bytes"] for row in rows),
        load_seconds=summary["load_seconds"],
        facts={"train_seconds": summary["train_seconds"], "startup_seconds": summary.get("startup_seconds") or {}},
    )


def parts_seconds(parts: list[Path], table: pa.Table) -> float | None:
    """Seconds of a reference pass, from when its parts were stored: from the first to the last, scaled up by the tokens of
    all parts to those of all but the first. So the start of the worker does not count. None with fewer than three parts."""
    if len(parts) < 3:
        return None
    columns = table.select(["prompt_ids", "chosen_ids", "rejected_ids", "chosen_key", "rejected_key"]).to_pydict()
    amounts = {}
    for prompt, chosen, rejected, one, other in zip(*columns.values(), strict=True):
        amounts |= {one: len(prompt) / 2 + len(chosen), other: len(prompt) / 2 + len(rejected)}
    stored = sorted(
        (part_time(part.name) / 1e9, sum(amounts[key] for key in pq.read_table(part, columns=["key"])["key"].to_pylist()))
        for part in parts
    )
    rest = sum(amount for _, amount in stored[1:])
    return (stored[-1][0] - stored[0][0]) * (rest + stored[0][1]) / rest
