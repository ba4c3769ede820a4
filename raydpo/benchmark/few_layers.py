"""Speed of raydpo and TRL on one GPU at the sizes of Llama 3 8B, from random models of few layers.

All weights of an 8B model are too many to train on one GPU of 80 GB. So both sides compute two models of few layers, and the
time of all layers is extrapolated: t(32) = t(8) + 6 (t(8) - t(4)), since time grows linearly with layers. Both get the same
pairs, weights, adapters and optimizer. Each process is one of ``kernel_side`` or ``trl_side``; the fastest of TRL's batch
sizes counts.

``jobs/gpu_benchmark.sh`` installs what this needs and runs it.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq

from raydpo.benchmark.command import ADAPTER_LR, machine, versions, work_folder, writable_folder
from raydpo.benchmark.compare import BFLOAT16_LOSS, WARMUP
from raydpo.benchmark.job import Job, Result, start
from raydpo.benchmark.workload import SHAPES, Workload, random_records, write_random_llama
from raydpo.config import TrainConfig
from raydpo.data.simulate import amounts
from raydpo.errors import ConfigError, RaydpoError, one_line
from raydpo.estimate.cards import known_peak
from raydpo.estimate.plan import ADAPTERS, FORWARD, FULL, operations
from raydpo.model.cost import ModelCost
from raydpo.terminal.arguments import at_least
from raydpo.terminal.console import Console
from raydpo.terminal.guard import guarded

__all__ = ["main"]

Part = Literal["reference", "lora", "full"]
PARTS: dict[Part, tuple[str, tuple[float, float, float]]] = {
    "reference": ("reference pass", FORWARD),
    "lora": ("LoRA, rank 16", ADAPTERS),
    "full": ("full fine-tuning", FULL),
}
"""What is compared, and the factors of ``estimate.plan.operations`` for MFU."""
RANK = 16
BUDGETS = ("auto", 16384, 8192)
"""Positions of raydpo's micro-batches that are tried until one fits."""
LEAST_SECONDS = 20.0
"""A process is not started with less time left."""
SHORTEST = 60.0
"""Seconds in which something can be measured, start-up of this process included."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of models and pairs.

    Attributes:
        shape: configuration of the whole model. few: numbers of layers that are measured, and their largest.
        prompt, completion: mean tokens of a prompt and of each completion.
        steps: steps of each training; the first is not counted. All their pairs are scored.
        batches: pairs of a forward pass of TRL that are tried, the likeliest first.
    """

    shape: Mapping[str, Any]
    few: tuple[int, int]
    prompt: int
    completion: int
    pairs_per_step: int
    steps: int
    batches: tuple[int, ...]


LLAMA = Sizes(
    shape=SHAPES["random-8b"], few=(4, 8), prompt=1024, completion=512, pairs_per_step=16, steps=4, batches=(4, 8, 2, 16)
)
TINY = Sizes(
    shape={
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "hidden_size": 64, "head_dim": 16},
        **{"intermediate_size": 128, "num_hidden_layers": 32, "max_position_embeddings": 512},
    },
    few=(1, 2),
    prompt=16,
    completion=8,
    pairs_per_step=2,
    steps=2,
    batches=(1, 2),
)
"""For a CPU, where only the code is tried."""


@dataclass(kw_only=True)
class Run:
    """One process: what it did, and what it took.

    Attributes:
        part: what it trained; ``reference`` if it only scored.
        batch: pairs of a forward pass of TRL; positions of a micro-batch of raydpo, or ``auto``.
        reference_seconds: of its reference pass over all pairs, or None. step_seconds: of its steps.
        failed: why it has no times, such as too little memory.
    """

    side: Literal["raydpo", "trl"]
    part: Part
    layers: int
    batch: int | str
    reference_seconds: float | None = None
    step_seconds: list[float] = field(default_factory=list)
    first_loss: float | None = None
    peak_bytes: float = 0.0
    failed: str | None = None

    @property
    def step(self) -> float:
        """Median seconds of the steps that count; infinite if it failed."""
        return median(self.step_seconds[WARMUP:] or self.step_seconds) if self.step_seconds else float("inf")

    @property
    def scoring(self) -> float:
        """Seconds of the reference pass; infinite if there was none."""
        return self.reference_seconds or float("inf")


class Bench:
    """Runs one process after another until the time is over.

    Attributes:
        deadline: on ``time.monotonic``. runs: all processes so far. notes: what was left out, and why.
    """

    def __init__(self, sizes: Sizes, work: Path, device: Literal["cpu", "cuda"], deadline: float, console: Console) -> None:
        self.sizes, self.work, self.device, self.deadline, self.console = sizes, work, device, deadline, console
        self.runs: list[Run] = []
        self.notes: list[str] = []
        self.workloads: dict[int, Workload] = {}

    def run(self) -> Iterator[Run]:
        """Measure everything, what matters most first. Yields each process when it has ended."""
        few, many = self.sizes.few
        trains, compares = self._has("deepspeed", "training"), self._has("trl", "TRL")
        for layers in self.sizes.few:
            yield from self._ours("reference", layers)
        parts: list[Part] = [] if not trains else ["lora", "full"] if self._has("peft", "LoRA") else ["full"]
        for part in parts:
            for layers in self.sizes.few:
                yield from self._ours(part, layers)
            if not compares:
                continue
            if part == "full" and not self.of("raydpo", "full", many):
                self.notes.append("TRL's full fine-tuning was not tried: raydpo's did not fit or had no time")
                continue
            for batch in self._batches(part):
                yield from self._trl(part, many, batch, batch)
            tried = self.of("trl", part, many)
            if tried:
                # The smaller model with the batch sizes that were fastest with the larger one.
                step, scoring = min(tried, key=lambda run: run.step), min(tried, key=lambda run: run.scoring)
                yield from self._trl(part, few, int(step.batch), int(scoring.batch))

    def of(self, side: str, part: Part, layers: int) -> list[Run]:
        """Processes that measured this."""
        wanted = [run for run in self.runs if (run.side, run.part, run.layers) == (side, part, layers)]
        return [run for run in wanted if run.failed is None]

    def _has(self, package: str, what: str) -> bool:
        if importlib.util.find_spec(package) is None:
            self.notes.append(f"{what} was skipped: the package {package} is not installed")
            return False
        return True

    def _batches(self, part: Part) -> Sequence[int]:
        """Batch sizes of TRL to try. Full fine-tuning is tried with the fastest one of LoRA, and half of it."""
        lora = self.of("trl", "lora", self.sizes.few[1])
        if part == "lora" or not lora:
            return self.sizes.batches
        best = int(min(lora, key=lambda run: run.step).batch)
        return tuple(dict.fromkeys((best, max(1, best // 2))))

    def _ours(self, part: Part, layers: int) -> Iterator[Run]:
        for budget in BUDGETS:
            job = self._job(f"raydpo-{part}", part, layers, tokens_per_batch=budget)
            stage = "score" if part == "reference" else "train"
            run = self._measure(Run(side="raydpo", part=part, layers=layers, batch=budget), "kernel_side", job, stage)
            if run is not None:
                yield run
            if run is None or run.failed is None:
                return

    def _trl(self, part: Part, layers: int, batch: int, reference_batch: int) -> Iterator[Run]:
        pairs = str(self._workload(layers).in_order)
        settings = {"batch": batch, "reference_batch": reference_batch, "pairs": pairs, "warm": True}
        job = self._job(f"trl-{part}-{batch}", part, layers, **settings)
        run = self._measure(Run(side="trl", part=part, layers=layers, batch=batch), "trl_side", job, "cached")
        if run is not None:
            yield run

    def _measure(self, run: Run, module: str, job: Job, stage: Any) -> Run | None:
        """Run a process and fill in ``run``; None if there is no time left."""
        left, what = self.deadline - time.monotonic(), f"{run.side}, {PARTS[run.part][0]}, {run.layers} layers, {run.batch}"
        if left < LEAST_SECONDS:
            self.notes.append(f"left out, for lack of time: {what}")
            return None
        try:
            result, _ = start(module, dataclasses.replace(job, stage=stage), limit=left)
        except RaydpoError as error:
            run.failed = one_line(error, 400)
            if "out of memory" in run.failed.lower():
                run.failed = "out of memory"
            result = Result()
        run.reference_seconds, run.step_seconds, run.peak_bytes = (
            result.reference_seconds,
            result.step_seconds,
            result.peak_bytes,
        )
        run.first_loss = result.losses[0] if result.losses else None
        self.runs.append(run)
        times = [f"step {run.step:.3f} s"] * bool(run.step_seconds)
        times += [f"reference pass {run.scoring:.3f} s"] * bool(run.reference_seconds)
        self.console.say(f"  {what}: {run.failed or ', '.join(times)}")
        return run

    def _job(self, name: str, part: Part, layers: int, **settings: Any) -> Job:
        work, sizes = self._workload(layers), self.sizes
        lora = RANK if part == "lora" else None
        return Job(
            **{
                "name": name,
                "stage": "train",
                "model": str(self._model(layers)),
                "pairs": str(work.file.with_name("pairs.parquet")),
                "work": str(work.file.parent),
                "dtype": "bfloat16",
                "lora": lora,
                "pairs_per_step": sizes.pairs_per_step,
                "steps": sizes.steps,
                "device": self.device,
                "lr": TrainConfig.model_fields["lr"].default if lora is None else ADAPTER_LR,
            }
            | settings
        )

    def _model(self, layers: int) -> Path:
        return self.work / f"{layers}-layers"

    def _workload(self, layers: int) -> Workload:
        """The pairs, for a model that is made now unless it is there."""
        if layers not in self.workloads:
            import torch

            model, sizes = self._model(layers), self.sizes
            self.console.say(f"  making a random model of {layers} layers")
            write_random_llama(model, {**sizes.shape, "num_hidden_layers": layers}, torch.device(self.device))
            count = sizes.pairs_per_step * sizes.steps
            records = random_records(count, sizes.prompt, sizes.completion, sizes.shape["vocab_size"])
            most = 2 * (sizes.prompt + sizes.completion)
            work = Workload.write(records, str(model), most, "file", self.work / f"{layers}-layers-work")
            pq.write_table(work.table, work.file.with_name("pairs.parquet"))
            self.workloads[layers] = work
        return self.workloads[layers]

    def rows(self, peak: float | None) -> list[dict[str, Any]]:
        """Rates of all layers: one row for each part and side that was measured with both numbers of layers.

        ``pairs_s`` are comparable. ``positions_s`` and ``mfu`` count what each side computes without padding: raydpo a
        prompt once for both completions, TRL twice.
        """
        many, sizes, rows = self.sizes.few[1], self.sizes, []
        for part, (name, factors) in PARTS.items():
            for side in ("raydpo", "trl"):
                # TRL scores in each training. Figures of one kind of training are not mixed with those of another.
                kinds: list[Part] = ["lora", "full"] if (side, part) == ("trl", "reference") else [part]
                measured = [times for kind in kinds if (times := self._seconds(side, kind, part)) is not None]
                if not measured:
                    continue
                seconds = min(measured, key=lambda times: list(times.values())[-1])
                whole, shapes = list(seconds.values())[-1], self.workloads[many].shapes
                amount = amounts([[row] for row in range(len(shapes))], shapes, "tree" if side == "raydpo" else "packed")
                pairs = len(shapes) if part == "reference" else sizes.pairs_per_step
                share = pairs / len(shapes)
                computed = share * operations(amount, self._cost(), factors)
                rows.append(
                    {
                        "part": part,
                        "name": name,
                        "side": side,
                        "seconds": seconds,
                        "pairs_s": pairs / whole,
                        "positions_s": share * float(amount[0]) / whole,
                        "mfu": None if peak is None else computed / whole / peak,
                        "peak_bytes": max(run.peak_bytes for kind in kinds for run in self.of(side, kind, many)),
                    }
                )
        return rows

    def _seconds(self, side: str, kind: Part, part: Part) -> dict[int, float] | None:
        """Seconds by number of layers, of all layers last; None unless both numbers of layers were measured."""
        found = {}
        for layers in self.sizes.few:
            times = [run.scoring if part == "reference" else run.step for run in self.of(side, kind, layers)]
            found[layers] = min(times, default=float("inf"))
        (few, low), (many, high) = found.items()
        if not np.isfinite([low, high]).all():
            return None
        whole = self.sizes.shape["num_hidden_layers"]
        return found | {whole: max(high, high + (whole - many) * (high - low) / (many - few))}

    def _cost(self) -> ModelCost:
        """Operations of the whole model, from those of the two that are there."""
        few, many = (ModelCost.of(self._model(layers)) for layers in self.sizes.few)
        layers = self.sizes.shape["num_hidden_layers"]
        more = (layers - many.layers) / (many.layers - few.layers)
        grown = {
            name: round(getattr(many, name) + more * (getattr(many, name) - getattr(few, name)))
            for name in ("parameters", "active")
        }
        return dataclasses.replace(many, layers=layers, **grown)

    def problems(self) -> list[str]:
        """Trainings of both sides whose first loss differs by more than rounding."""
        found = []
        for part in ("lora", "full"):
            for layers in self.sizes.few:
                ours, theirs = (
                    next((run.first_loss for run in self.of(side, part, layers)), None) for side in ("raydpo", "trl")
                )
                if ours is not None and theirs is not None and not abs(ours - theirs) <= BFLOAT16_LOSS:
                    found.append(f"{PARTS[part][0]}, {layers} layers: the first loss is {ours:.4f} and {theirs:.4f} (TRL)")
        return found


def markdown(record: Mapping[str, Any]) -> str:
    """The results as Markdown, with machine, versions and date."""
    settings, rows = record["settings"], record["rows"]
    few, many = settings["layers"]
    told = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    real = record["device"] == "cuda"
    lines = [
        f"**{settings['model']} on {record['machine']}**, {record['date'][:10]}; {told}",
        "",
        *([] if real else ["A trial of the code on a CPU with a tiny model: the figures say nothing about a GPU.", ""]),
        "| | side | pairs/s | times as fast | positions/s | MFU | seconds of "
        + f"{few}, {many}, {settings['whole']} layers |",
        "| --- " * 7 + "|",
    ]
    for row in rows:
        theirs = next((one for one in rows if (one["part"], one["side"]) == (row["part"], "trl")), None)
        ratio = f"{row['pairs_s'] / theirs['pairs_s']:.2f}" if theirs is not None and row["side"] == "raydpo" else ""
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        times = ", ".join(f"{seconds:.3g}" for seconds in row["seconds"].values())
        side = "raydpo" if row["side"] == "raydpo" else f"TRL {record['versions'].get('trl', '')}"
        lines.append(
            f"| {row['name']} | {side} | {row['pairs_s']:.3g} | {ratio} | {row['positions_s']:,.0f} | {mfu} | {times} |"
        )
    lines += [
        "",
        f"{settings['whole']} layers are extrapolated from {few} and {many}, for both sides alike. Random bfloat16 weights; "
        f"pairs of about {settings['prompt']} + {settings['completion']} + {settings['completion']} tokens, "
        f"{settings['pairs_per_step']} a step; AdamW's update counts. Positions and MFU count what each side computes "
        "without padding: raydpo a prompt once for both completions, TRL twice. TRL: precompute_ref_log_probs, the fastest "
        "of its batch sizes. Full fine-tuning: raydpo keeps master weights in float32, TRL bfloat16 weights only.",
        *(f"- {note}" for note in (*record["problems"], *record["notes"])),
        *(
            f"- {run['side']}, {run['part']}, {run['layers']} layers, {run['batch']}: {run['failed']}"
            for run in _failed(record)
        ),
    ]
    return "\n".join(lines) + "\n"


def _failed(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [run for run in record["runs"] if run["failed"]]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report. Returns the exit status: 0 = done, 1 = nothing measured or the sides differ, 2 = bad input."""
    parser = argparse.ArgumentParser(prog="gpu_benchmark.sh", description=__doc__)
    add = parser.add_argument
    add(
        "--out",
        metavar="DIR",
        default="build/gpu-benchmark",
        help="folder for result.json and result.md (default: %(default)s)",
    )
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: try the code, with --tiny")
    add("--tiny", action="store_true", help="a tiny model")
    add("--layers", metavar="N,N", help="numbers of layers to measure (default: 4,8); fewer fit a smaller GPU")
    least = at_least(SHORTEST, float)
    add("--seconds", type=least, default=840.0, help="start no process after this time (default: %(default)s)")
    add("--work", metavar="DIR", help="folder for models and logs (default: a temporary one)")
    args = parser.parse_args(argv)
    return guarded(lambda console: _run(args, console))


def _run(args: argparse.Namespace, console: Console) -> int:
    deadline = time.monotonic() + args.seconds
    sizes = TINY if args.tiny else LLAMA
    if args.layers is not None:
        sizes = dataclasses.replace(sizes, few=_layers(args.layers, sizes.shape["num_hidden_layers"]))
    if args.device == "cpu" and not args.tiny:
        raise ConfigError("--device cpu without --tiny would compute models at the sizes of Llama 3 8B; add --tiny")
    out = writable_folder("--out", args.out)
    if args.work is not None:
        writable_folder("--work", args.work)
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"torch {torch.__version__} finds no CUDA device; install a driver that is new enough for it, or try the code "
            "with --device cpu --tiny"
        )
    name = machine(args.device)
    record: dict[str, Any] = {
        "format": 1,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "device": args.device,
        "machine": name,
        "peak_flops": known_peak(name) if args.device == "cuda" else None,
        "versions": versions(),
        "settings": {
            "model": "tiny random model" if args.tiny else "Llama 3 8B, random weights",
            "layers": list(sizes.few),
            "whole": sizes.shape["num_hidden_layers"],
        }
        | {name: getattr(sizes, name) for name in ("prompt", "completion", "pairs_per_step", "steps")},
    }
    console.say(f"raydpo against TRL on {name}, at most {args.seconds:.0f} s; results: {out}")
    with work_folder(args.work) as work:
        bench = Bench(sizes, work, args.device, deadline, console)
        for _ in bench.run():
            _write(record, bench, out)
        _write(record, bench, out)
    print((out / "result.md").read_text(encoding="utf-8"))
    return 0 if record["rows"] and not record["problems"] else 1


def _layers(text: str, whole: int) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts) or not 0 < int(parts[0]) < int(parts[1]) <= whole:
        raise ConfigError(f"--layers {text}: expected two growing numbers of at most {whole} layers, such as 4,8")
    return int(parts[0]), int(parts[1])


def _write(record: dict[str, Any], bench: Bench, out: Path) -> None:
    """Write what was found so far, so that a lost machine leaves it."""
    record |= {"runs": [dataclasses.asdict(run) for run in bench.runs], "rows": bench.rows(record["peak_flops"])}
    record |= {"notes": bench.notes, "problems": bench.problems()}
    (out / "result.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (out / "result.md").write_text(markdown(record), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
