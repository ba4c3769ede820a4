"""Sections ``score`` and ``train``: scoring with the reference, and training of the policy. The loss is in ``objective``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from raydpo.config.objective import ObjectiveConfig
from raydpo.config.section import Dtype, Float, Int, PathOrUri, Section, no_bool
from raydpo.errors import ConfigError

__all__ = ["REDUCE_BUCKET", "ROUNDED_PIECE", "ScoreConfig", "TrainConfig"]

REDUCE_BUCKET = 50_000_000
"""Number of gradient elements that DeepSpeed reduces at once. Its default, 5e8, takes 2 GB of each device in float32 for any
model."""
ROUNDED_PIECE = 1 << 22
"""Number of elements that AdamW with a first moment in bfloat16 updates at once. DeepSpeed passes all weights as one flat
tensor; its float32 temporaries would take more memory than bfloat16 saves."""


COUNTED = 2**31 - 1
"""Most numbers that bitsandbytes updates at once: 0.50 gives their count to CUDA as a signed int of 32 bits
(``backends/cuda/ops.py``). More of them end the process, or leave most weights as they are, without an error."""


class ScoreConfig(Section):
    """Scoring of the pairs with the reference."""

    workers: Int = Field(default=1, ge=1)
    """Number of Ray Data actors, with one device each."""
    gpus_per_worker: Float | None = Field(default=None, ge=0)
    """GPUs of each actor: 1, a fraction, or 0 = the CPU; null = 1 if the cluster has GPUs, else 0."""
    accelerator: str | None = None
    """Kind of GPU that nodes must have, as Ray names it, such as A10G or H100; null = any."""
    labels: dict[str, str] = Field(default={})
    """Ray labels that nodes must have, such as {ray.io/market-type: spot}; a value may be in(a,b), !a or !in(a,b)."""
    tokens_per_batch: Literal["auto"] | Annotated[Int, Field(ge=1)] = "auto"
    """Token positions of one forward pass, shared prefixes counted once; auto = as many as fit, measured at start."""
    tokens_per_part: Int = Field(default=262144, ge=1)
    """Tokens scored between two commits: the most that an actor can lose if it is killed. A team (score.partition)
    scores as many for each of its workers; those that share positions count as one."""
    dtype: Dtype | None = None
    """Precision of the reference; null = model.dtype."""
    sequence_parallel: Int = Field(default=1, ge=1)
    """Number of workers on one machine that share each forward pass, each with a part of the positions (DeepSpeed Ulysses,
    arXiv 2309.14509): for sequences that do not fit on one device. tokens_per_batch remains that of one worker."""
    partition: Literal["auto"] | Annotated[Int, Field(ge=1)] = "auto"
    """Number of workers on one machine whose memory holds the reference together, each a part of every weight (ZeRO-3).
    auto = the fewest with which it fits, 1 if a single device holds it. The log-probs stay the same."""
    offload: Literal["auto", "cpu"] | None = "auto"
    """Keep the reference's weights in the host's memory (cpu) and copy each layer to the device when it is used. auto = only
    if the reference fits in no other way."""

    @model_validator(mode="after")
    def _check(self) -> ScoreConfig:
        _whole_groups(self.workers, self.sequence_parallel)
        if self.partition != "auto":
            _whole_groups(self.workers, self.partition, "partition")
            if self.partition > 1 and self.partition % self.sequence_parallel:
                raise ValueError(
                    f"partition ({self.partition}) is not a multiple of sequence_parallel ({self.sequence_parallel}), the "
                    "workers that share each forward pass; set one of them to a multiple or a divisor of the other"
                )
        _gpus_of_a_kind(self.accelerator, self.gpus_per_worker)
        for name in ("sequence_parallel", "partition"):
            size = getattr(self, name)
            if size not in (1, "auto") and self.gpus_per_worker is not None and 0 < self.gpus_per_worker < 1:
                raise ValueError(
                    f"gpus_per_worker {self.gpus_per_worker} is a fraction; {name} ({size}) needs a whole GPU for each "
                    "worker"
                )
        return self


def _gpus_of_a_kind(accelerator: str | None, gpus_per_worker: float | None) -> None:
    if gpus_per_worker is not None and gpus_per_worker > 1:
        raise ValueError(
            f"gpus_per_worker {gpus_per_worker:g} is more than the one GPU that a worker computes on; set it to 1, "
            "and workers to the number of GPUs"
        )
    if accelerator is not None and gpus_per_worker == 0:
        raise ValueError(
            f"accelerator {accelerator} has no effect on workers without GPUs; set gpus_per_worker to 1, or "
            "accelerator to null"
        )


def _whole_groups(workers: int, size: int, name: str = "sequence_parallel") -> None:
    if workers % size:
        raise ValueError(
            f"workers ({workers}) is not a multiple of {name} ({size}), the workers that compute together; set workers to "
            f"{size * (workers // size + 1)}, or {name} to a divisor"
        )


class ElasticWorkers(Section):
    """A number of workers that follows the size of the cluster."""

    min: Int = Field(ge=1)
    """Smallest number. The run waits until it has that many."""
    max: Int = Field(ge=1)
    """Largest number."""

    @model_validator(mode="after")
    def _check(self) -> ElasticWorkers:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}")
        return self


class TrainConfig(ObjectiveConfig):
    """The training of the policy."""

    workers: Annotated[Int, Field(ge=1)] | ElasticWorkers = 1
    """Number of Ray Train workers, with one device each. {min: 2, max: 8} starts with what the cluster has and follows its
    size; the pairs of each step stay the same."""
    gpus_per_worker: Float | None = Field(default=None, ge=0)
    """GPUs of each worker: 1, or 0 = the CPU; null = 1 if the cluster has GPUs, else 0. With a fraction such as 0.25, trials
    of a sweep with one worker each share a GPU."""
    accelerator: str | None = None
    """Kind of GPU that nodes must have, as score.accelerator."""
    labels: dict[str, str] = Field(default={})
    """Ray labels that nodes must have, as score.labels."""
    pairs_per_step: Int = Field(default=64, ge=1)
    """Number of pairs, or of ranked lists, in one optimizer step, over all workers."""
    tokens_per_batch: Literal["auto"] | Annotated[Int, Field(ge=1)] = "auto"
    """Token positions of one forward and backward pass of a worker, with each shared prefix counted once; auto = as many as
    fit, measured at start. Gradients are accumulated over the passes of a step."""
    sequence_parallel: Int = Field(default=1, ge=1)
    """Number of workers that share each micro-batch, each with a part of its positions (DeepSpeed Ulysses): for sequences
    that do not fit on one device. tokens_per_batch remains that of one worker. Fastest within one machine."""
    epochs: Int = Field(default=1, ge=1)
    """Number of passes over the data; contradicts steps."""
    steps: Int | None = Field(default=None, ge=1)
    """Number of optimizer steps, over as many epochs as that takes; null = set by epochs."""
    lr: Float = Field(default=5.0e-7, gt=0)
    """Peak learning rate. LoRA usually needs about 1e-5 to 5e-4."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay of the learning rate after warm-up."""
    warmup: Float = Field(default=0.1, ge=0)
    """Length of the warm-up: a share of all steps if below 1, else a number of steps."""
    weight_decay: Float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""
    clip: Float | None = Field(default=1.0, gt=0)
    """Largest global gradient norm; null = no clipping."""
    zero: Annotated[Literal[0, 1, 2, 3], BeforeValidator(no_bool)] = 2
    """DeepSpeed ZeRO stage."""
    overlap_communication: bool = False
    """Sum gradients over workers while the backward pass goes on, with ZeRO 1 and 2; ZeRO 3 always does. It takes a second
    bucket of 50 million gradients on each device. What it gains was not yet measured on a GPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory for about a third more compute."""
    offload_activations: bool = False
    """Keep what gradient_checkpointing still saves in the host's memory. This saves more GPU memory; each micro-batch then
    copies it to the host and back."""
    offload_optimizer: Literal["cpu"] | PathOrUri | None = None
    """Keep master weights and moments in the host's memory (cpu), or on a disk (path of an NVMe, ZeRO-3 only)."""
    offload_params: Literal["cpu"] | PathOrUri | None = None
    """Keep the weights in the host's memory (cpu) or on a disk (path) while they are not used; ZeRO-3 only."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """AdamW; with moments in 8 bits (arXiv 2110.02861), with moments paged to the host's memory when the GPU's is full, or
    both. The latter three come from bitsandbytes and need GPUs."""
    optimizer_states: Literal["float32", "bfloat16"] = "float32"
    """Precision of adamw's first moment. bfloat16 saves 2 bytes of the 8 that both moments take for each number that trains.
    The second moment is always float32: its changes of 1/1000 would be rounded away in bfloat16."""
    merge_adapter: bool = False
    """Also export the model with the adapters merged into it, as final/merged."""
    seed: Int = Field(default=0, ge=0, lt=2**63)
    """Seed for the order of the pairs and the initial values of adapters."""
    deterministic: bool = False
    """Use only kernels that give the same bits each time (torch.use_deterministic_algorithms), which are slower, and fail
    where there is none. CPUs repeat to the bit without it, GPUs to rounding. Not yet measured on a GPU."""
    checkpoint_every: Int = Field(default=100, ge=1)
    """Steps between checkpoints. There is always one after the last step."""
    checkpoint_minutes: Float | None = Field(default=None, gt=0)
    """Minutes between checkpoints, instead of checkpoint_every."""
    keep_checkpoints: Int = Field(default=2, ge=1)
    """Number of checkpoints to keep: the newest ones, or with keep_best the best ones and the newest."""
    keep_best: str | None = None
    """Metric of the held-out evaluations to choose checkpoints by, such as eval_loss or eval_rewards/accuracies. Each
    checkpoint has the value of the last evaluation before it. Lower is better for loss and chosen_fell, higher for
    accuracies and margins, of all pairs or of one source."""
    eval_every: Int = Field(default=50, ge=1)
    """Steps between held-out evaluations. There is always one before the first step and one after the last."""
    max_failures: Int = Field(default=3, ge=-1)
    """Number of restarts from the newest checkpoint after a worker died or hung; -1 = no limit."""
    max_preemptions: Int = Field(default=-1, ge=-1)
    """Number of restarts after a machine was preempted with notice, not counted as failures; -1 = no limit."""
    preemption_every: Int = Field(default=5, ge=1)
    """Steps between checks with Ray whether a machine of this run is about to be preempted."""
    collective_timeout: Float = Field(default=900.0, gt=0)
    """Seconds after which a worker that the others wait for counts as hung, and all workers are restarted."""
    max_skipped: Int = Field(default=3, ge=0)
    """Largest number of consecutive steps skipped because a loss or gradient is not finite; one more ends the run."""
    gate_pairs: Int = Field(default=12, ge=1)
    """Least number of pairs that the step-0 gate compares. All pairs of the first step are compared in its own forward pass.
    Beside them, those missing for this number are computed, and at least a third of it: half the most extreme pairs, half
    random ones.

    Other weights or tokens show in every pair. A change of a share f of the pairs escapes n random ones with (1 - f)^n."""
    sample_prompts: Int = Field(default=0, ge=0)
    """Number of held-out prompts that the policy answers (greedily) before and after training."""
    sample_tokens: Int = Field(default=64, ge=1)
    """Longest sample, in tokens. Needs sample_prompts."""

    @property
    def fewest_workers(self) -> int:
        """Smallest number of workers that the run starts with."""
        return self.workers.min if isinstance(self.workers, ElasticWorkers) else self.workers

    @property
    def most_workers(self) -> int:
        """Largest number of workers."""
        return self.workers.max if isinstance(self.workers, ElasticWorkers) else self.workers

    def check_device(self, device: str) -> None:
        """Check that the optimizer runs on workers whose ``device`` is ``cuda`` or ``cpu``.

        Raises:
            ConfigError: if it does not.
        """
        if self.optimizer != "adamw" and device != "cuda":
            raise ConfigError(
                f"train.optimizer {self.optimizer} runs on GPUs only, and training workers have none here; set "
                "train.optimizer=adamw, and train.optimizer_states=bfloat16 for a smaller first moment"
            )

    def check_numbers(self, numels: Sequence[int], workers: int) -> None:
        """Check that the optimizer can count the numbers that it updates at once.

        Args:
            numels: numbers of each parameter that trains.

        Raises:
            ConfigError: if it cannot.
        """
        # ZeRO-3 updates about 1e9 numbers at a time (DeepSpeed's sub_group_size), ZeRO 1 and 2 a rank's whole share.
        at_once = (max(numels, default=0), *[-(-sum(numels) // workers)] * 2, 0)[self.zero]
        if self.optimizer == "adamw" or at_once <= COUNTED:
            return
        other = f"0 or 3, train.workers to {-(-sum(numels) // COUNTED)} or more," if self.zero else "3"
        raise ConfigError(
            f"train.optimizer {self.optimizer} updates {at_once:,} numbers at once with train.zero {self.zero} on {workers} "
            f"worker(s), but bitsandbytes cannot count more than {COUNTED:,}. Set train.zero to "
            f"{other} or train.optimizer to adamw"
        )

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        _gpus_of_a_kind(self.accelerator, self.gpus_per_worker)
        if isinstance(self.workers, ElasticWorkers):
            if self.sequence_parallel > 1:
                raise ValueError(
                    f"sequence_parallel ({self.sequence_parallel}) needs a fixed number of workers, not "
                    f"{{min: {self.workers.min}, max: {self.workers.max}}}; set workers to a multiple of it"
                )
        else:
            _whole_groups(self.workers, self.sequence_parallel)
        if self.steps is not None and "epochs" in self.model_fields_set and self.epochs != 1:
            raise ValueError(f"steps ({self.steps}) and epochs ({self.epochs}) contradict each other; keep one")
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup {self.warmup} is neither a share below 1 nor a whole number of steps")
        # The resolved configuration of a run names every key, so the default is no contradiction.
        every = type(self).model_fields["checkpoint_every"].default
        if self.checkpoint_minutes is not None and self.checkpoint_every != every:
            raise ValueError(
                f"checkpoint_minutes ({self.checkpoint_minutes:g}) and checkpoint_every "
                f"({self.checkpoint_every}) contradict each other; keep one (checkpoint_minutes=null counts steps)"
            )
        if self.offload_params is not None and self.zero != 3:
            raise ValueError(
                f"offload_params ({self.offload_params}) needs partitioned weights; set zero to 3, not {self.zero}"
            )
        if self.overlap_communication and self.zero in (0, 3):
            why = "without ZeRO" if self.zero == 0 else "on ZeRO 3, which always overlaps"
            raise ValueError(f"overlap_communication has no effect {why}; drop it, or set zero to 1 or 2, not {self.zero}")
        if self.offload_optimizer is not None and self.zero == 0:
            raise ValueError(f"offload_optimizer ({self.offload_optimizer}) needs ZeRO; set zero to 1, 2 or 3, not 0")
        if self.offload_optimizer not in (None, "cpu") and self.zero != 3:
            raise ValueError(
                f"offload_optimizer to a disk ({self.offload_optimizer}) needs zero 3, not {self.zero}; cpu "
                "works with 1 and 2 too"
            )
        if self.offload_optimizer not in (None, "cpu") and self.optimizer_states != "float32":
            raise ValueError(
                f"optimizer_states {self.optimizer_states} cannot go to a disk, where DeepSpeed keeps moments as it keeps "
                f"weights; set it to float32, or offload_optimizer ({self.offload_optimizer}) to cpu"
            )
        if self.offload_activations and not self.gradient_checkpointing:
            raise ValueError("offload_activations has no effect without gradient_checkpointing; set that to true")
        if self.optimizer_states != "float32" and self.optimizer != "adamw":
            raise ValueError(f"optimizer_states {self.optimizer_states} has no effect on optimizer {self.optimizer}")
        if self.optimizer != "adamw" and self.offload_optimizer is not None:
            raise ValueError(
                f"optimizer {self.optimizer} keeps its moments on the GPU; drop offload_optimizer ({self.offload_optimizer})"
            )
        if self.gpus_per_worker is not None and 0 < self.gpus_per_worker < 1 and self.most_workers > 1:
            raise ValueError(
                f"gpus_per_worker {self.gpus_per_worker} is a fraction; NCCL needs a whole GPU for each of the "
                f"{self.most_workers} training workers. Set workers to 1, or gpus_per_worker to 1"
            )
        return self
