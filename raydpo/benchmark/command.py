"""Command line of ``jobs/benchmark.py``: writes the pairs, runs one process after another, compares and reports."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from raydpo.benchmark import workload
from raydpo.benchmark.compare import Measured, figures
from raydpo.benchmark.run import BETAS, PARTS, Bench
from raydpo.benchmark.tables import how, markdown, summary_row, tables
from raydpo.config import DataConfig, TrainConfig, is_hub_name
from raydpo.errors import ConfigError, TrainError
from raydpo.model.cost import ModelCost
from raydpo.model.recall import processor
from raydpo.model.weights import check_weights
from raydpo.reference.identity import resolve_model
from raydpo.storage.uri import is_uri
from raydpo.submit.command import as_submit
from raydpo.terminal.console import Console
from raydpo.terminal.guard import guarded
from raydpo.version import __version__

__all__ = ["FORMAT", "machine", "main", "versions", "work_folder", "writable_folder"]

FORMAT = 2
"""Version of the file of results."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
ADAPTER_LR = 1e-4
"""Learning rate with ``--lora``. Fresh adapters need a higher one than trained weights."""
PACKAGES = ("torch", "transformers", "peft", "trl", "ray", "deepspeed", "accelerate", "datasets", "numpy")
"""Packages whose versions are recorded."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report. Returns the exit status: 0 = both sides agree, 1 = failed or they differ, 2 = bad input."""
    args = _parser().parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    if args.dry_run:
        print(as_submit("benchmark", words))
        return 0
    args.command = shlex.join(["jobs/benchmark.py", *words])
    return guarded(lambda console: _show(args, console) if args.show else _run(args, console))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmark.py", description=__doc__)
    add = parser.add_argument
    add("--model", metavar="PATH", help=f"model directory, hub name, or {' or '.join(workload.SHAPES)}")
    add("--data", metavar="FILE", help="preference file, as in data.train of a run")
    add("--random", type=_ratio, metavar="P:C", help="in its place random pairs: tokens of a prompt and of a completion")
    add("--pairs", type=_numbers, default="40", metavar="N,N", help="sizes of the job (default: %(default)s)")
    add("--orders", type=_some_of(workload.ORDERS), default="file", metavar="O,O", help="file, shuffled (default: file)")
    parts = f"what to run, of {', '.join(PARTS)} (default: %(default)s)"
    add("--parts", type=_some_of(PARTS), default="batches,kernel,train,job", metavar="P,P", help=parts)
    add("--pairs-per-step", type=_positive, default=8, metavar="N", help="pairs of a step (default: %(default)s)")
    limit = "steps to measure of each training of TRL; the rest is extrapolated (default: %(default)s)"
    add("--trl-steps", type=_positive, default=12, metavar="N", help=limit)
    add("--steps", type=_positive, metavar="N", help="the same for raydpo (default: all)")
    add("--dtype", choices=DTYPES, default="bf16", help="precision of weights and compute (default: %(default)s)")
    trained = parser.add_mutually_exclusive_group()
    trained.add_argument("--lora", type=_positive, metavar="R", help="train adapters of this rank")
    trained.add_argument("--full", action="store_true", help="train all weights")
    longest = DataConfig.model_fields["max_length"].default
    add("--max-length", type=_positive, default=longest, metavar="N", help="longest row, in tokens (default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--work", metavar="DIR", help="keep configurations, logs, run directories and random models here")
    add("--json", metavar="OUT", help="write everything measured, beside what an earlier command wrote there")
    add("--show", metavar="OUT", help="print the tables of such a file as Markdown, and measure nothing")
    add("--dry-run", action="store_true", help="print the command that submits this as a job of a Ray cluster")
    return parser


def _show(args: argparse.Namespace, console: Console) -> None:
    record = _stored(args.show)
    if record is None:
        raise ConfigError(f"--show is {args.show!r}, but there is no such file; --json writes one")
    print(markdown(record))
    print(summary_row(record))


def _run(args: argparse.Namespace, console: Console) -> None:
    _check(args, console)
    for option, folder in (("--json", args.json and Path(args.json).parent), ("--work", args.work)):
        if folder is not None:
            writable_folder(option, folder)
    import torch

    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device here; use --device cpu")
    for package in ("trl", "deepspeed"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"the benchmark needs the package {package!r}, which is not installed here; pip install 'raydpo[benchmark]'"
            )
    record: dict[str, Any] = {
        "format": FORMAT,
        "baseline": f"TRL {importlib.metadata.version('trl')}",
        "machine": machine(device),
        "versions": versions(),
        # As given on the command line, without folders of this machine.
        "settings": {
            name: getattr(args, name) for name in ("model", "data", "random", "pairs_per_step", "lora", "max_length")
        }
        | {"dtype": DTYPES[args.dtype], "lr": _lr(args), "betas": BETAS},
        "workloads": {},
        "measured": {},
    }
    record = _continued(args.json, json.loads(json.dumps(record)))
    with work_folder(args.work) as work:
        if args.model in workload.SHAPES:
            console.say(f"writing {args.model}: a Llama of random bfloat16 weights")
            model = str(work / args.model)
            workload.write_random_llama(Path(model), workload.SHAPES[args.model], torch.device(device))
        else:
            model = resolve_model(args.model)
        if args.random:
            records = workload.random_records(max(args.pairs), *args.random, ModelCost.of(model).vocabulary)
        else:
            records = workload.usable_records(args.data, max(args.pairs), model, args.max_length)
        console.say(f"raydpo {__version__} against {record['baseline']} on {record['machine']}")
        bench = Bench(
            model=model,
            records=records,
            work=work,
            device=device,
            dtype=DTYPES[args.dtype],
            lora=args.lora,
            lr=_lr(args),
            pairs_per_step=args.pairs_per_step,
            max_length=args.max_length,
            command=args.command,
            most_steps=args.steps,
            most_trl_steps=args.trl_steps,
            found={key: Measured.read(each) for key, each in record["measured"].items()},
            workloads=record["workloads"],
            console=console,
        )
        for _ in bench.run(args.parts, args.pairs, args.orders):
            # After each process: the next may run out of memory.
            record["measured"] = {key: dataclasses.asdict(each) for key, each in bench.found.items()}
            record["figures"] = figures(bench.found, bench.workloads, exact=args.dtype == "fp32")
            record["how"] = how(record)
            if args.json is not None:
                Path(args.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for table in tables(record):
        console.table(table.title, table.columns, table.rows)
        console.say(table.remark)
    for line in record["how"]:
        console.say(line)
    if args.json is not None:
        console.say(f"written: {args.json}")
    if problems := record["figures"]["problems"]:
        raise TrainError(f"the sides compute different numbers, so their speeds are not compared: {'; '.join(problems[:3])}")


def _check(args: argparse.Namespace, console: Console) -> None:
    """Refuse a model or file that is not there, or not complete, and sizes that do not fit, before a process is started.

    Raises:
        ConfigError: naming the option.
    """
    if args.model is None or (args.lora is None and not args.full):
        raise ConfigError("give the model with --model, and what to train with --lora R or --full")
    if (args.data is None) == (args.random is None):
        raise ConfigError("give the pairs with one of --data FILE and --random P:C")
    if args.random and args.model not in workload.SHAPES:
        raise ConfigError(f"--random needs a model of random weights, {' or '.join(workload.SHAPES)}, for its words")
    one = args.pairs_per_step
    if odd := [pairs for pairs in args.pairs if pairs % one or pairs < 2 * one]:
        raise ConfigError(
            f"--pairs {odd[0]} is not two or more whole steps of {one} pairs: the first step is not counted, and TRL cuts "
            "each step into equal batches; give multiples of --pairs-per-step"
        )
    if args.data is not None and not (is_uri(args.data) or is_hub_name(args.data) or Path(args.data).exists()):
        raise ConfigError(f"--data is {args.data!r}, but there is no such file; give a preference file, a URI or a hub name")
    if args.model in workload.SHAPES:
        if args.data is not None:
            raise ConfigError(f"{args.model} has a tokenizer of made-up words; give it pairs with --random P:C, not --data")
        return
    if not (is_hub_name(args.model) or Path(args.model).is_dir()):
        raise ConfigError(
            f"--model is {args.model!r}, but there is no such directory; give a model directory, a hub name "
            f"or {' or '.join(workload.SHAPES)}"
        )
    for line in check_weights(resolve_model(args.model)):
        console.warn(line)


def _stored(path: str | None) -> dict[str, Any] | None:
    if path is None or not Path(path).exists():
        return None
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as results of the benchmark: {error}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ConfigError(f"{path} holds no results of this version of the benchmark; give another file")
    return record


def _continued(path: str | None, record: dict[str, Any]) -> dict[str, Any]:
    """The record that an earlier command wrote to ``path``, if there is one; else ``record``.

    Raises:
        ConfigError: if it was measured otherwise.
    """
    earlier = _stored(path)
    if earlier is None:
        return record
    for name in ("machine", "versions", "settings"):
        if earlier[name] != record[name]:
            raise ConfigError(
                f"{path} was measured with other {name} ({earlier[name]}) than this command would be ({record[name]}); "
                "parts of one comparison need the same. Give --json another file"
            )
    return record | {name: earlier[name] for name in ("workloads", "measured")}


def _lr(args: argparse.Namespace) -> float:
    return TrainConfig.model_fields["lr"].default if args.lora is None else ADAPTER_LR


def machine(device: str) -> str:
    """Name of the GPU or the processor, number of its cores, memory."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    memory = ""
    with contextlib.suppress(OSError):
        total = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text(encoding="utf-8"))
        memory = f", {int(total[1]) / 2**20:.0f} GiB" if total else ""
    return f"{processor()}, {os.cpu_count()} cores{memory}"


def versions() -> dict[str, str]:
    """Versions of Python, of raydpo, and of those of ``PACKAGES`` that are installed."""
    found = {"python": platform.python_version(), "raydpo": __version__}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@contextlib.contextmanager
def work_folder(directory: str | None) -> Iterator[Path]:
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


def writable_folder(option: str, folder: str | Path) -> Path:
    """Make a folder and try to write there, before anything is measured.

    Raises:
        ConfigError: naming the option, if that fails.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{option}: {folder} cannot be written ({error.strerror}); name a folder that can") from None
    return Path(folder)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _numbers(text: str) -> list[int]:
    return sorted({_positive(part) for part in text.split(",")})


def _ratio(text: str) -> tuple[int, int]:
    prompt, _, completion = text.partition(":")
    return _positive(prompt), _positive(completion)


def _some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Type of an option: some of ``known``, separated by commas, in the order of ``known``."""

    def read(text: str) -> list[str]:
        given = text.split(",")
        if odd := [word for word in given if word not in known]:
            raise argparse.ArgumentTypeError(f"{odd[0]!r} is none of {', '.join(known)}")
        return [word for word in known if word in given]

    return read


if __name__ == "__main__":
    sys.exit(main())
