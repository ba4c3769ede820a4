"""One process of the benchmark that is not a command of raydpo: its task, its result, and how it is started."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raydpo import errors
from raydpo.benchmark.watch import Watched, watch
from raydpo.config import LoraSettings, TrainConfig
from raydpo.errors import TrainError

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig

__all__ = ["Job", "Result", "Stage", "StepRecord", "environment", "now", "side", "start"]

Stage = Literal["adapters", "score", "train", "cached", "online"]
"""The kernel makes adapters, scores or trains. TRL trains with a reference that it computes before, or at every step."""
ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",  # the model is a local directory by now
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore",
}
_LEFT_OUT = ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR", "PYTHONDONTWRITEBYTECODE")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Task of one process.

    Attributes:
        name: beginning of the names of its files in ``work``.
        model: local directory.
        pairs: what the process reads: TRL a jsonl file of records, the kernel a Parquet file of ``data.pairs.PAIR_SCHEMA``.
        work: directory for files that one process leaves for another.
        lora: rank of the adapters, or None for full fine-tuning.
        steps: optimizer steps, all within one epoch.
        batch: pairs of one forward pass of TRL, which accumulates gradients over the passes of a step.
        reference_batch: pairs of one forward pass of TRL's reference pass.
        recompute: whether TRL recomputes activations in the backward pass (its gradient_checkpointing).
        warm: whether TRL scores one batch before the clock of its reference pass starts. raydpo, which measures its budget,
            does so always.
        cache: directory in which TRL keeps its reference log-probs; None = a new one.
        lr: learning rate, constant.
    """

    name: str
    stage: Stage
    model: str
    pairs: str
    work: str
    dtype: str
    lora: int | None
    pairs_per_step: int
    steps: int
    device: Literal["cpu", "cuda"]
    lr: float
    beta: float = 0.1
    shuffle: bool = False
    batch: int = 1
    reference_batch: int = 1
    recompute: bool = False
    warm: bool = False
    cache: str | None = None
    tokens_per_batch: int | Literal["auto"] = "auto"

    @property
    def adapters(self) -> LoraSettings | None:
        """The adapters; their output is scaled by 2 at any rank."""
        return None if self.lora is None else LoraSettings(r=self.lora, alpha=2.0 * self.lora)

    @property
    def train(self) -> TrainConfig:
        """Training settings of both sides. Clipping and ZeRO stage are raydpo's defaults."""
        return TrainConfig(
            pairs_per_step=self.pairs_per_step,
            steps=self.steps,
            tokens_per_batch=self.tokens_per_batch,
            lr=self.lr,
            beta=self.beta,
            schedule="constant",
            warmup=0.0,
        )

    @property
    def peft_config(self) -> PeftConfig | None:
        """Configuration of the adapters, which the kernel leaves in ``work``."""
        if self.lora is None:
            return None
        from peft import PeftConfig

        return PeftConfig.from_pretrained(self.work)

    @property
    def scored(self) -> Path:
        """The pairs with the reference's log-probs, which the kernel's scoring leaves for its training."""
        return Path(self.pairs).with_suffix(".scored.parquet")

    @property
    def initial_adapters(self) -> Path:
        """The policy's adapters before the first step. raydpo makes them from its seed; TRL starts from them, too."""
        return Path(self.work) / "adapters.safetensors"


@dataclass(kw_only=True)
class Result:
    """Measurements of one process: wall clock in seconds, memory in bytes, log-probs in nats.

    Attributes:
        load_seconds: from the imports until the first pass could begin.
        reference_seconds: reference pass over all its pairs, from token ids to log-probs; None if it made none.
        ref_chosen, ref_rejected: reference log-probs summed over each completion, in the order taken; None likewise.
        step_seconds: seconds of each step, measured from the end of the step before, so waiting for data counts.
        losses: loss of each step. chosen_logps, rejected_logps: the policy's summed log-probs, mean over the step's pairs.
        peak_bytes: peak of this process alone, or of the GPU.
        start_bytes: memory after the imports, before anything was loaded.
        facts: how the numbers were made; for a process that trained, also ``StepRecord.facts``.
    """

    load_seconds: float = 0.0
    reference_seconds: float | None = None
    ref_chosen: list[float] | None = None
    ref_rejected: list[float] | None = None
    step_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    chosen_logps: list[float] = field(default_factory=list)
    rejected_logps: list[float] = field(default_factory=list)
    peak_bytes: float = 0.0
    start_bytes: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


class StepRecord:
    """Measures the time of steps and records what their forward passes computed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.begin()

    def begin(self) -> None:
        """Start the clock of the first step."""
        self.seconds: list[float] = []
        self._steps: list[list[_Pass]] = [[]]
        self._last = now(self.device)

    def add_pass(self, pairs: int, positions: int, *means: Any) -> None:
        """Record a forward pass with gradient.

        Args:
            pairs, positions: its pairs, and its token positions including padding.
            means: numbers (or tensors of one number) that are means over its pairs.
        """
        self._steps[-1].append((pairs, positions, means))

    def end_step(self) -> None:
        """Stop the clock of this step and start that of the next."""
        stamp = now(self.device)
        self.seconds.append(stamp - self._last)
        self._last = stamp
        self._steps.append([])

    def means(self) -> list[list[float]]:
        """Means of the numbers given to ``add_pass``, over the pairs of each step."""
        return [list(column) for column in zip(*map(_over_passes, self._steps[:-1]), strict=True)]

    def facts(self, optimizer: Any) -> dict[str, Any]:
        """Size of the forward passes, and whether the optimizer is torch's fused one."""
        passes = [each for step in self._steps for each in step]
        return {
            "forward_passes": len(passes),
            "pairs_per_pass": max(pairs for pairs, _, _ in passes),
            "positions": sum(positions for _, positions, _ in passes),
            "largest_pass": max(positions for _, positions, _ in passes),
            "fused": bool(optimizer.defaults.get("fused")),
        }


_Pass = tuple[int, int, tuple[Any, ...]]


def _over_passes(passes: Sequence[_Pass]) -> list[float]:
    total = sum(pairs for pairs, _, _ in passes)
    return [
        sum(pairs * float(mean) for (pairs, _, _), mean in zip(passes, column, strict=True)) / total
        for column in zip(*(means for _, _, means in passes), strict=True)
    ]


def now(device: torch.device) -> float:
    """Seconds of a monotonic clock, after the device has finished its queued work."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


def side(work: Callable[[Job, torch.device], Result]) -> int:
    """Main function of ``python -m MODULE JOB.json OUT.json``. Returns the exit status."""
    import torch

    from raydpo.model.budget import used_memory

    job, out = Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), Path(sys.argv[2])
    device = torch.device(job.device)
    start_bytes = used_memory(device)
    try:
        result = work(job, device)
    except errors.RaydpoError as error:
        out.write_text(json.dumps({"error": type(error).__name__, "message": error.message}), encoding="utf-8")
        return errors.exit_status(error)
    result.start_bytes = start_bytes
    result.facts |= {"threads": torch.get_num_threads()}
    out.write_text(json.dumps(dataclasses.asdict(result)), encoding="utf-8")
    return 0


def environment() -> dict[str, str]:
    """Environment of every process of either side. ``raydpo`` is importable in it wherever it is here, and starts a Ray of
    its own: a cluster may have reserved all its GPUs for the benchmark itself. Python may keep compiled modules: many
    images forbid it, and then every process compiles what it imports again."""
    paths = [str(Path(errors.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    kept = {name: value for name, value in os.environ.items() if name not in _LEFT_OUT}
    return kept | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def start(module: str, job: Job, limit: float | None = None) -> tuple[Result, Watched]:
    """Run ``job`` in a new process and wait for it.

    Args:
        module: name of a module of this package that calls ``side``.
        limit: seconds after which the process is killed; None = never.

    Raises:
        RaydpoError: what the process raised, or TrainError with the last lines of its log.
    """
    work = Path(job.work)
    asked, out, log = (work / f"{job.name}.{ending}" for ending in ("job.json", "json", "log"))
    asked.write_text(json.dumps(dataclasses.asdict(job)), encoding="utf-8")
    out.unlink(missing_ok=True)
    words = [sys.executable, "-m", f"raydpo.benchmark.{module}", str(asked), str(out)]
    found: dict[str, Any] = {}
    try:
        watched = watch(words, log, environment(), limit)
    except TrainError:
        found = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
        if "error" in found:
            raise getattr(errors, found["error"])(found["message"]) from None
        raise
    return Result(**json.loads(out.read_text(encoding="utf-8"))), watched
