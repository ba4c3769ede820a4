"""Command line of ``jobs/benchmark.py``: makes the pairs, runs one process after another, compares and reports."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import platform
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from raydpo.benchmark import workload
from raydpo.benchmark.compare import Measurement, disagreements, fastest, figures, ratios
from raydpo.benchmark.job import Job, Result, Stage, start
from raydpo.benchmark.tables import print_point
from raydpo.config import DataConfig, TrainConfig, is_hub_name
from raydpo.errors import ConfigError, TrainError
from raydpo.estimate.plan import pair_groups
from raydpo.estimate.rate import known_peak
from raydpo.model.cost import ModelCost
from raydpo.model.weights import check_weights
from raydpo.reference.identity import resolve_model
from raydpo.storage.uri import is_uri
from raydpo.submit.command import as_submit
from raydpo.terminal.console import Console
from raydpo.terminal.guard import guarded
from raydpo.version import __version__

__all__ = ["main"]

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
ADAPTER_LR = 1e-4
"""Learning rate with ``--lora``. Fresh adapters need a higher one than trained weights."""
PACKAGES = ("torch", "transformers", "peft", "trl", "deepspeed", "accelerate", "datasets", "numpy")
"""Packages whose versions are recorded."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report. Returns the exit status: 0 = both sides agree, 1 = failed or they differ, 2 = bad input."""
    args = _parser().parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    if args.dry_run:
        print(as_submit("benchmark", words))
        return 0
    args.command = shlex.join(["jobs/benchmark.py", *words])
    return guarded(lambda console: _run(args, console))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmark.py", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="PATH", help=f"model directory, hub name, or {' or '.join(workload.SHAPES)}")
    add("--data", metavar="FILE", help="preference file, as in data.train of a run")
    add("--synthetic", action="store_true", help="random pairs, for each length and each ratio")
    add("--lengths", type=_numbers, default="512,2048", metavar="N,N", help="tokens of a random row (default: %(default)s)")
    add(
        "--ratios",
        type=_ratios,
        default="1:4,1:1,4:1",
        metavar="P:C",
        help="its prompt to completion (default: %(default)s)",
    )
    add("--pairs", type=_positive, default=64, metavar="N", help="number of pairs (default: %(default)s)")
    add("--pairs-per-step", type=_positive, default=8, metavar="N", help="pairs of a step (default: %(default)s)")
    add("--steps", type=_positive, metavar="N", help="steps to take (default: all pairs once)")
    add("--warmup", type=int, default=1, metavar="N", help="first steps that are not counted (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="bf16", help="precision of weights and compute (default: %(default)s)")
    trained = parser.add_mutually_exclusive_group(required=True)
    trained.add_argument("--lora", type=_positive, metavar="R", help="train adapters of this rank")
    trained.add_argument("--full", action="store_true", help="train all weights")
    longest = DataConfig.model_fields["max_length"].default
    add("--max-length", type=_positive, default=longest, metavar="N", help="tokens of a row (default: %(default)s)")
    add("--tokens-per-batch", type=_budget, default="auto", metavar="N", help="positions of raydpo's micro-batches")
    tried = "pairs of a forward pass of TRL; the fastest is compared (default: 1, 2, 4 ... up to the step)"
    add("--baseline-batches", type=_numbers, metavar="N,N", help=tried)
    add("--skip-online", action="store_true", help="do not measure TRL with a reference scored at every step")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--threads", type=_positive, metavar="N", help="CPU threads of both sides (default: all physical cores)")
    add("--seed", type=int, default=0, help="seed of synthetic pairs and random weights (default: %(default)s)")
    add("--work", metavar="DIR", help="keep intermediate files and random models here")
    add("--json", metavar="OUT", help="write everything measured")
    add("--dry-run", action="store_true", help="print the command that submits this as a job of a Ray cluster")
    return parser


def _run(args: argparse.Namespace, console: Console) -> None:
    import torch

    if (args.data is None) == (not args.synthetic):
        raise ConfigError("give the pairs with one of --data FILE and --synthetic")
    _check_inputs(args, console)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device here; use --device cpu")
    per_epoch = -(-args.pairs // args.pairs_per_step)
    steps = args.steps or per_epoch
    if not 0 <= args.warmup < steps <= per_epoch:
        raise ConfigError(
            f"--warmup {args.warmup} and --steps {steps} do not fit: {args.pairs} pairs are {per_epoch} steps "
            f"of {args.pairs_per_step}, and at least one step must be counted"
        )
    batches = _batches(args, steps)
    for package in ("trl", "deepspeed"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"the benchmark needs the package {package!r}, which is not installed here; pip install 'raydpo[benchmark]'"
            )
    label = f"TRL {importlib.metadata.version('trl')}"
    record: dict[str, Any] = {
        "command": args.command,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "baseline": label,
        "device": _device_name(device),
        "versions": _versions(),
    }
    with _work(args.work) as work:
        model = _model(args, work, torch.device(device), console)
        job = Job(
            stage="score",
            model=model,
            workload="",
            work=str(work),
            dtype=DTYPES[args.dtype],
            lora=args.lora,
            pairs_per_step=args.pairs_per_step,
            steps=steps,
            tokens_per_batch=args.tokens_per_batch,
            device=device,
            threads=args.threads,
            lr=TrainConfig.model_fields["lr"].default if args.lora is None else ADAPTER_LR,
            pairs_per_pass=args.pairs_per_step,
        )
        # As given on the command line, without folders of this machine.
        given = {"model": args.model, "data": args.data, "warmup": args.warmup, "baseline_batches": batches}
        record["settings"] = dataclasses.asdict(job) | given | {"train": job.train.model_dump(mode="json")}
        for name in ("stage", "work", "workload", "pairs_per_pass"):
            del record["settings"][name]
        console.say(
            f"raydpo {__version__} against {label} on {record['device']}, {args.dtype}, "
            + ("all weights" if args.lora is None else f"adapters of rank {args.lora}")
        )
        points: list[dict[str, Any]] = []
        for facts, table in _workloads(args, model):
            job = dataclasses.replace(job, workload=str(work / "pairs.parquet"))
            pq.write_table(table, job.workload)
            about = {"baseline": label, "workload": facts | workload.statistics(table, args.pairs_per_step)}
            points.append(about | _measure(args, job, table, batches, console))
            print_point(points[-1], console)
            if args.json is not None:  # after each workload: the next may run out of memory
                found = record | ({"results": points} if args.synthetic else points[0])
                Path(args.json).parent.mkdir(parents=True, exist_ok=True)
                Path(args.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if args.json is not None:
        console.say(f"written: {args.json}")
    wrong = [f"{point['workload']['name']}: {problem}" for point in points for problem in point["problems"][:1]]
    if wrong:
        raise TrainError(f"the two sides compute different numbers, so their speeds are not compared: {'; '.join(wrong)}")


def _check_inputs(args: argparse.Namespace, console: Console) -> None:
    """Refuse a model or file that is not there, or not complete, before a process is started.

    Raises:
        ConfigError: naming the option.
    """
    if args.data is not None and not (is_uri(args.data) or is_hub_name(args.data) or Path(args.data).exists()):
        raise ConfigError(f"--data is {args.data!r}, but there is no such file; give a preference file, a URI or a hub name")
    if args.model in workload.SHAPES:
        return
    if not (is_hub_name(args.model) or Path(args.model).is_dir()):
        raise ConfigError(
            f"--model is {args.model!r}, but there is no such directory; give a model directory, a hub name "
            f"or {' or '.join(workload.SHAPES)}"
        )
    for line in check_weights(resolve_model(args.model)):
        console.warn(line)


def _measure(args: argparse.Namespace, job: Job, table: Any, batches: Sequence[int], console: Console) -> dict[str, Any]:
    """Run every process and combine what they measured. There are ratios only if the sides agree."""

    def stage(name: Stage, module: str, about: str, pairs_per_pass: int = job.pairs_per_pass) -> Result:
        console.say(f"  running {about}")
        return start(module, dataclasses.replace(job, stage=name, pairs_per_pass=pairs_per_pass))

    _, shapes = pair_groups(table)
    score = stage("score", "raydpo_side", "raydpo's reference pass")
    train = stage("train", "raydpo_side", "raydpo's training")
    about = {"cached": "reference computed before"} | ({} if args.skip_online else {"online": "reference at every step"})
    tried = {
        name: [stage(name, "trl_side", f"TRL, {what}, {size} pair(s) at a time", size) for size in batches]
        for name, what in about.items()
    }
    best = {name: fastest(results, args.warmup) for name, results in tried.items()}
    measured = Measurement(
        names=table["pair_id"].to_pylist(),
        shapes=shapes,
        score=score,
        train=train,
        **best,
        tried=tried,
        dtype=job.dtype,
        model=ModelCost.of(job.model),
        lora=job.lora is not None,
        peak=known_peak(_device_name(job.device)) if job.device == "cuda" and args.dtype == "bf16" else None,
        pairs_per_step=job.pairs_per_step,
        warmup=args.warmup,
    )
    problems, gaps = disagreements(measured)
    point = {"equal": not problems, "problems": problems, "gaps": gaps} | figures(measured)
    if not problems:
        for part, values in ratios(measured).items():
            point[part] |= values
    raw = {"raydpo_score": measured.score, "raydpo_train": measured.train} | best
    return point | {"raw": {name: dataclasses.asdict(result) for name, result in raw.items()}}


def _workloads(args: argparse.Namespace, model: str) -> Iterator[tuple[dict[str, Any], Any]]:
    if not args.synthetic:
        yield {"name": Path(args.data).stem}, workload.of_file(args.data, args.pairs, model, args.max_length)
        return
    vocabulary = ModelCost.of(model).vocabulary
    for length, (prompt, completion) in itertools.product(args.lengths, args.ratios):
        ratio = f"{prompt}:{completion}"
        table = workload.synthetic(args.pairs, length, (prompt, completion), vocabulary, args.seed)
        yield {"name": f"{length} at {ratio}", "length": length, "ratio": ratio}, table


def _batches(args: argparse.Namespace, steps: int) -> list[int]:
    """Pairs of one forward pass of TRL. Each size cuts every step into equal parts; otherwise the mean over the parts would
    not be the mean over the pairs."""
    last = args.pairs - (steps - 1) * args.pairs_per_step
    whole = [args.pairs_per_step] + ([last] if last < args.pairs_per_step else [])

    def fits(size: int) -> bool:
        return all(pairs % size == 0 or size > pairs for pairs in whole) and size <= args.pairs_per_step

    if args.baseline_batches is None:
        powers = (2**power for power in range(args.pairs_per_step.bit_length()))
        return sorted({size for size in (*powers, args.pairs_per_step) if fits(size)})
    odd = [size for size in args.baseline_batches if not fits(size)]
    if odd:
        raise ConfigError(
            f"--baseline-batches {odd[0]} does not divide steps of {' and '.join(map(str, whole))} pairs; "
            "give numbers that do, or other --pairs"
        )
    return sorted(set(args.baseline_batches))


def _model(args: argparse.Namespace, work: Path, device: Any, console: Console) -> str:
    if args.model not in workload.SHAPES:
        return resolve_model(args.model)
    console.say(f"writing {args.model}: a Llama of random bfloat16 weights")
    directory = work / f"{args.model}-{args.seed}"
    workload.write_random_llama(directory, workload.SHAPES[args.model], device, args.seed)
    return str(directory)


def _device_name(device: str) -> str:
    """Name of the GPU or the processor."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "raydpo": __version__}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@contextlib.contextmanager
def _work(directory: str | None) -> Iterator[Path]:
    """The given directory, or a temporary one. The temporary one is kept if a process failed, for its log."""
    work = Path(directory or tempfile.mkdtemp(prefix="raydpo-benchmark-")).absolute()
    work.mkdir(parents=True, exist_ok=True)
    keep = directory is not None
    try:
        yield work
    except TrainError:
        keep = True
        raise
    finally:
        if not keep:
            shutil.rmtree(work, ignore_errors=True)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _ratios(text: str) -> tuple[tuple[int, int], ...]:
    parts = [part.partition(":") for part in text.split(",")]
    return tuple((_positive(prompt), _positive(completion)) for prompt, _, completion in parts)


def _budget(text: str) -> int | str:
    return text if text == "auto" else _positive(text)


if __name__ == "__main__":
    sys.exit(main())
