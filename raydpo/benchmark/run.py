"""Runs what the benchmark measures, one process after another."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import pyarrow.parquet as pq

from raydpo.benchmark.compare import Measured, best_tries
from raydpo.benchmark.job import Job, Result, start
from raydpo.benchmark.product import NAME, config_of, run_verb
from raydpo.benchmark.watch import Watched
from raydpo.benchmark.workload import Workload
from raydpo.errors import ConfigError
from raydpo.terminal.console import Console

__all__ = ["BETAS", "PARTS", "Bench"]

PARTS = ("batches", "kernel", "train", "job", "sweep")
"""batches: TRL at several batch sizes. kernel: raydpo's scoring and steps without Ray. train: ``raydpo score``, then
``raydpo train`` on what it scored, then two steps of it again. job: ``raydpo run``, and TRL's whole process. sweep: ``raydpo
sweep`` over ``BETAS``, and TRL's runs."""
BETAS = (0.1, 0.03, 0.05, 0.2, 0.3)
"""Betas of a sweep. The first is that of all other trainings."""
TRY_STEPS = 3
"""Steps of TRL at each batch size. The first is not counted."""
AGAIN_STEPS = 2
"""Steps of the second ``raydpo train``, which shows how long a command takes to begin on a machine that knows the model."""


@dataclass(kw_only=True)
class Bench:
    """All settings of a benchmark, and what it has measured so far.

    Attributes:
        records: pairs of the largest workload; a smaller one is its beginning.
        most_steps, most_trl_steps: steps to take of each training; None = all.
        found: measurements by name. workloads: ``Workload.statistics`` by name. Both may hold those of earlier commands.
    """

    model: str
    records: Sequence[dict[str, Any]]
    work: Path
    device: Literal["cpu", "cuda"]
    dtype: str
    lora: int | None
    lr: float
    pairs_per_step: int
    max_length: int
    command: str
    most_steps: int | None
    most_trl_steps: int
    console: Console
    found: dict[str, Measured] = field(default_factory=dict)
    workloads: dict[str, Any] = field(default_factory=dict)

    def run(self, parts: Sequence[str], sizes: Sequence[int], orders: Sequence[str]) -> Iterator[Measured]:
        """Measure these parts of each workload; TRL's batch sizes only with the first one. Yields each measurement.

        Raises:
            ConfigError: if TRL's best batch size is needed and not known, or a workload of this name had other pairs.
            TrainError: if a process fails.
        """
        for size in sizes:
            for order in orders:
                place = self.work / f"{size}-{order}"
                work = Workload.write(self.records[:size], self.model, self.max_length, order, place)
                if self.workloads.setdefault(work.name, work.statistics()) != work.statistics():
                    raise ConfigError(
                        f"the {work.name} were others when the earlier parts were measured; give another --json"
                    )
                pq.write_table(work.table, place / "pairs.parquet")
                first = (size, order) == (sizes[0], orders[0])
                for part in parts:
                    if first or part != "batches":
                        yield from getattr(self, f"_{part}")(work, place)

    def _batches(self, work: Workload, place: Path) -> Iterator[Measured]:
        for key in [key for key, each in self.found.items() if each.what == "try"]:
            del self.found[key]
        steps = min(TRY_STEPS, len(work.rows) // self.pairs_per_step)
        sizes = [2**power for power in range(self.pairs_per_step.bit_length()) if self.pairs_per_step % 2**power == 0]
        for batch in sizes:
            yield self._trl("try", work, place, steps, batch=batch, reference_batch=batch)
        best = best_tries(each for each in self.found.values() if each.what == "try")[0].result.facts["batch"]
        yield self._trl("try", work, place, steps, batch=best, reference_batch=best, recompute=True)

    def _kernel(self, work: Workload, place: Path) -> Iterator[Measured]:
        for stage in ("score", "train"):
            job = self._task(f"kernel-{stage}", work, place, stage=stage, pairs=str(place / "pairs.parquet"))
            result, watched = self._started("kernel_side", job)
            if stage == "score":
                in_order = {
                    name: [getattr(result, name)[row] for row in work.rows] for name in ("ref_chosen", "ref_rejected")
                }
                result = dataclasses.replace(result, **in_order)
            yield self._measured("kernel", stage, work, result, watched)

    def _train(self, work: Workload, place: Path) -> Iterator[Measured]:
        yield self._raydpo("score", work, place / "train", fresh=True)
        yield self._raydpo("train", work, place / "train")
        # Its cache, and what the machine remembers of the model, stay.
        shutil.rmtree(place / "train" / NAME)
        yield self._raydpo("train", work, place / "train", what="train again", steps=AGAIN_STEPS)

    def _job(self, work: Workload, place: Path) -> Iterator[Measured]:
        yield self._raydpo("run", work, place / "run", fresh=True)
        yield self._whole_trl(work, place)

    def _sweep(self, work: Workload, place: Path) -> Iterator[Measured]:
        yield self._raydpo("sweep", work, place / "sweep", fresh=True)
        first = self.found.get(f"trl run, {work.name}")
        if first is None or not (place / "trl-cache").exists():
            first = self._whole_trl(work, place)
            yield first
        # TRL finds its reference log-probs again for the same pairs only.
        yield self._whole_trl(work, place, "again", beta=BETAS[1], steps=len(first.result.step_seconds))

    def _whole_trl(self, work: Workload, place: Path, what: str = "run", **settings: Any) -> Measured:
        """TRL's whole process at its fastest settings. ``again`` finds the reference log-probs of the run before."""
        tried = [each for each in self.found.values() if each.what == "try"]
        if not tried:
            raise ConfigError("TRL's fastest batch size is not known yet; run --parts batches first, into the same --json")
        cache = place / "trl-cache"
        if what == "run":
            shutil.rmtree(cache, ignore_errors=True)
        step, reference = (each.result.facts for each in best_tries(tried))
        steps = settings.pop("steps", min(self.most_trl_steps, len(work.rows) // self.pairs_per_step))
        settings |= {"batch": step["batch"], "recompute": step["recompute"], "reference_batch": reference["batch"]}
        return self._trl(what, work, place, steps, cache=str(cache), **settings)

    def _task(self, name: str, work: Workload, place: Path, **settings: Any) -> Job:
        """A job over all pairs, as far as ``most_steps`` goes."""
        same = ("model", "dtype", "lora", "pairs_per_step", "device", "lr")
        steps = len(work.rows) // self.pairs_per_step
        return Job(
            **{
                "name": name,
                "work": str(place),
                "pairs": str(work.in_order),
                "steps": min(steps, self.most_steps or steps),
                "shuffle": work.order == "shuffled",
                "beta": BETAS[0],
            }
            | {name: getattr(self, name) for name in same}
            | settings
        )

    def _raydpo(
        self, verb: Any, work: Workload, output: Path, *, what: str | None = None, fresh: bool = False, **settings: Any
    ) -> Measured:
        if fresh:
            shutil.rmtree(output, ignore_errors=True)
        what = what or verb
        self.console.say(f"  running raydpo {what}: {work.name}")
        job = self._task(verb, work, output, stage="train", **settings)
        config = config_of(job, work, output, self.max_length, BETAS if verb == "sweep" else ())
        result, watched, trials = run_verb(verb, config, work)
        return self._measured("raydpo", what, work, result, watched, trials)

    def _trl(self, what: str, work: Workload, place: Path, steps: int, **settings: Any) -> Measured:
        if self.lora is not None and not (place / "adapters.safetensors").exists():
            adapters = self._task("adapters", work, place, stage="adapters", pairs=str(place / "pairs.parquet"))
            self._started("kernel_side", adapters)
        job = self._task(f"trl-{what}", work, place, stage="cached", **({"steps": steps} | settings))
        about = f"{job.batch} x {job.pairs_per_step // job.batch}{', recomputed' if job.recompute else ''}, {steps} steps"
        result, watched = self._started("trl_side", job, about)
        return self._measured("trl", what, work, result, watched)

    def _started(self, module: str, job: Job, about: str = "") -> tuple[Result, Watched]:
        self.console.say(f"  running {job.name}: {Path(job.work).name}{about and f', {about}'}")
        return start(module, job)

    def _measured(
        self, side: Any, what: str, work: Workload, result: Result, watched: Watched, trials: Sequence[Result] = ()
    ) -> Measured:
        measured = Measured(
            side=side,
            what=what,
            pairs=len(work.rows),
            order=work.order,
            steps=len(work.rows) // self.pairs_per_step,
            pairs_per_step=self.pairs_per_step,
            command=self.command,
            date=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            seconds=watched.seconds,
            tree_bytes=watched.tree_bytes,
            load=watched.load,
            result=result,
            trials=list(trials),
        )
        steps = (measured.trials or [result])[0].step_seconds
        told = f", {median(steps[1:] or steps):.2f} s a step" if steps else ""
        told += f", reference pass {result.reference_seconds:.1f} s" if result.reference_seconds else ""
        self.console.say(f"    {watched.seconds:.1f} s{told}, {watched.tree_bytes / 2**30:.2f} GiB")
        self.found[measured.key] = measured
        return measured
