"""What one process of the benchmark is to do, what it found, and how it is started."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import raydpo
from raydpo import errors
from raydpo.config import LoraSettings, TrainConfig
from raydpo.errors import ModelError, TrainError

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from torch import nn

__all__ = ["Job", "Result", "Stage", "StepRecord", "now", "set_adapters", "side", "start"]

Stage = Literal["score", "train", "cached", "online"]
"""raydpo's two processes, and the two ways in which the other side gets its reference."""
ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",  # the model is a directory by now; and nothing is reported to anyone
    "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore",
}
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Job:
    """One process's work.

    Attributes:
        model: local directory.
        workload: parquet file of ``workload.save``.
        work: directory for what processes hand on to one another.
        lora: rank of the adapters, or None for full fine-tuning.
        steps: optimizer steps, in file order, all within one epoch.
        tokens_per_batch: token positions of raydpo's micro-batches, or ``auto``.
        pairs_per_pass: pairs of a forward pass of the other side, which adds up gradients over the passes of a step.
        engine: what trains raydpo's policy: DeepSpeed as in a run, or torch alone.
        threads: of the CPU; None = as many as torch takes by itself, one for each physical core.
        lr: learning rate, constant.
    """

    stage: Stage
    model: str
    workload: str
    work: str
    dtype: str
    lora: int | None
    pairs_per_step: int
    steps: int
    tokens_per_batch: int | Literal["auto"]
    engine: Literal["deepspeed", "kernels"]
    device: Literal["cpu", "cuda"]
    threads: int | None
    lr: float
    pairs_per_pass: int

    @property
    def name(self) -> str:
        """Of its files in ``work``."""
        return f"{self.stage}-{self.pairs_per_pass}"

    @property
    def adapters(self) -> LoraSettings | None:
        """Output scale 2, as is usual, whatever the rank."""
        return None if self.lora is None else LoraSettings(r=self.lora, alpha=2.0 * self.lora)

    @property
    def train(self) -> TrainConfig:
        """raydpo's settings, which the other side is given too. Nothing but beta, clip and ZeRO stage is a default."""
        return TrainConfig(pairs_per_step=self.pairs_per_step, steps=self.steps, tokens_per_batch=self.tokens_per_batch,
                           lr=self.lr, schedule="constant", warmup=0.0)

    @property
    def peft_config(self) -> PeftConfig | None:
        """The configuration of the adapters that raydpo's second process made, which leaves it in ``work``."""
        if self.lora is None:
            return None
        from peft import PeftConfig

        return PeftConfig.from_pretrained(self.work)

    @property
    def scored(self) -> Path:
        """The workload with the reference's log-probs, as raydpo's first process leaves it for the second."""
        return Path(self.work) / "scored.parquet"

    @property
    def initial_adapters(self) -> Path:
        """The policy's adapters before the first step: raydpo makes them, the other side begins with them."""
        return Path(self.work) / "adapters.safetensors"


@dataclass(kw_only=True)
class Result:
    """What one process measured. Seconds are the wall clock's, memory is bytes at its peak, log-probs are nats.

    Attributes:
        load_seconds: until the first pass could begin, without the start of the interpreter.
        reference_seconds: of the pass over all pairs, from token ids to log-probs; None where the process made none.
        ref_chosen, ref_rejected: sums over each pair's completions, in file order; None likewise.
        step_seconds: from the end of the step before, so that waiting for data counts.
        losses: by step; chosen_logps, rejected_logps: the policy's sums, mean over the step's pairs.
        peak_bytes: of the whole process, or of the GPU.
        start_bytes: of it, before there was anything but imported modules.
        wall_seconds: from start to end of the process; filled in by who started it.
        facts: what made the numbers; of a process that trained, ``StepRecord.facts``, too.
    """

    load_seconds: float
    reference_seconds: float | None = None
    ref_chosen: list[float] | None = None
    ref_rejected: list[float] | None = None
    step_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    chosen_logps: list[float] = field(default_factory=list)
    rejected_logps: list[float] = field(default_factory=list)
    peak_bytes: float = 0.0
    start_bytes: float = 0.0
    wall_seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


class StepRecord:
    """Takes the time of steps and keeps what their forward passes computed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.begin()

    def begin(self) -> None:
        """Training starts now."""
        self.seconds: list[float] = []
        self._steps: list[list[_Pass]] = [[]]
        self._last = now(self.device)

    def add_pass(self, pairs: int, positions: int, *means: Any) -> None:
        """A forward pass with gradient: its pairs, its token positions with all padding, and numbers (or tensors of one
        number) that are means over its pairs."""
        self._steps[-1].append((pairs, positions, means))

    def end_step(self) -> None:
        stamp = now(self.device)
        self.seconds.append(stamp - self._last)
        self._last = stamp
        self._steps.append([])

    def means(self) -> list[list[float]]:
        """Of each number that ``add_pass`` was given, its means over the pairs of each step."""
        return [list(column) for column in zip(*map(_over_passes, self._steps[:-1]), strict=True)]

    def facts(self, optimizer: Any) -> dict[str, Any]:
        """What a side computes at a time, and whether its optimizer is torch's fused one."""
        passes = [each for step in self._steps for each in step]
        return {"forward_passes": len(passes), "pairs_per_pass": max(pairs for pairs, _, _ in passes),
                "positions": sum(positions for _, positions, _ in passes),
                "largest_pass": max(positions for _, positions, _ in passes), "fused": bool(optimizer.defaults.get("fused"))}


_Pass = tuple[int, int, tuple[Any, ...]]


def _over_passes(passes: Sequence[_Pass]) -> list[float]:
    total = sum(pairs for pairs, _, _ in passes)
    return [sum(pairs * float(mean) for (pairs, _, _), mean in zip(passes, column, strict=True)) / total
            for column in zip(*(means for _, _, means in passes), strict=True)]


def now(device: torch.device) -> float:
    """The clock, once the device has done all it was given."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


def set_adapters(model: nn.Module, file: Path) -> None:
    """Give a PEFT model the adapters in ``file``, by name.

    Raises:
        ModelError: if the two do not have the same adapters.
    """
    import torch
    from safetensors.torch import load_file

    stored = load_file(file)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if stored.keys() != trainable.keys():
        odd = sorted(stored.keys() ^ trainable.keys())
        raise ModelError(f"the two sides adapt different modules: {', '.join(odd[:_SHOWN])} and {len(odd)} in all are on "
                         "one side alone")
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(stored[name])


def side(work: Callable[[Job, torch.device], Result]) -> int:
    """The main function of a side's module: ``python -m MODULE JOB.json OUT.json``. Returns the exit status."""
    import torch

    from raydpo.model.budget import used_memory

    job, out = Job(**json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2])
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    device = torch.device(job.device)
    start_bytes = used_memory(device)
    try:
        result = work(job, device)
    except errors.RaydpoError as error:
        out.write_text(json.dumps({"error": type(error).__name__, "message": error.message}))
        return errors.exit_status(error)
    result.start_bytes = start_bytes
    result.facts |= {"threads": torch.get_num_threads()}
    out.write_text(json.dumps(dataclasses.asdict(result)))
    return 0


def start(module: str, job: Job) -> Result:
    """Run ``job`` in a process of its own and wait for it.

    Args:
        module: name of a module of this package that calls ``side``.

    Raises:
        RaydpoError: what the process raised, or TrainError with its last words.
    """
    work = Path(job.work)
    asked, out, log = (work / f"{job.name}.{ending}" for ending in ("job.json", "json", "log"))
    asked.write_text(json.dumps(dataclasses.asdict(job)))
    out.unlink(missing_ok=True)
    paths = [str(Path(raydpo.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    threads = {} if job.threads is None else {"OMP_NUM_THREADS": str(job.threads)}
    # A cache of its own, or a second run would find TRL's reference pass done.
    environment = os.environ | ENVIRONMENT | threads | {"HF_DATASETS_CACHE": str(work / f"{job.name}.datasets"),
                                                        "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    begin = time.perf_counter()
    with open(log, "wb") as sink:
        status = subprocess.run([sys.executable, "-m", f"raydpo.benchmark.{module}", str(asked), str(out)],
                                stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=environment).returncode
    wall = time.perf_counter() - begin
    found = json.loads(out.read_text()) if out.is_file() else {}
    if "error" in found:
        raise getattr(errors, found["error"])(found["message"])
    if status or not found:
        words = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()][-_SHOWN:]
        raise TrainError(f"the process of {module} ({job.stage}) ended with status {status}: {' | '.join(words)[-600:]} "
                         f"(all it said is in {log})")
    return Result(**found | {"wall_seconds": wall})
