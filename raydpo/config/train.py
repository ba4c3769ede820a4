"""Sections ``score`` and ``train``: the reference pass, and the training of the policy (its objective: ``objective``)."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from raydpo.config.objective import ObjectiveConfig
from raydpo.config.section import Dtype, Float, Int, PathOrUri, Section, no_bool

__all__ = ["REDUCE_BUCKET", "ROUNDED_PIECE", "ScoreConfig", "TrainConfig"]

REDUCE_BUCKET = 50_000_000
"""Gradients that DeepSpeed collects before it reduces them. Its own 5e8 are 2 GB of each device in float32, whatever the
size of the model."""
ROUNDED_PIECE = 1 << 22
"""Elements that AdamW with bfloat16 moments computes at once. DeepSpeed hands all weights over as one flat tensor, and what
is computed in float32 would take more than the moments save."""


class ScoreConfig(Section):
    """The reference pass."""

    workers: Int = Field(1, ge=1)
    """Ray Data actors, one device each."""
    gpus_per_worker: Float | None = Field(None, ge=0)
    """GPUs of each actor, fractions too; null = 1 where the cluster has GPUs, else 0."""
    accelerator: str | None = None
    """Only on nodes with this kind of GPU, by Ray's name of it, such as A10G or H100; null = any."""
    labels: dict[str, str] = Field({})
    """Only on nodes with these Ray labels, such as {ray.io/market-type: spot}; a value may be in(a,b), !a or !in(a,b)."""
    tokens_per_batch: Literal["auto"] | Annotated[Int, Field(ge=1)] = "auto"
    """Token positions of one forward pass, each shared prefix counted once; auto = as many as fit, measured at start."""
    tokens_per_part: Int = Field(262144, ge=1)
    """Tokens scored between two commits: what a kill can cost at most, per actor."""
    dtype: Dtype | None = None
    """Precision of the reference; null = model.dtype."""
    sequence_parallel: Int = Field(1, ge=1)
    """Workers of one machine that compute each forward pass together, every one a part of the positions (DeepSpeed Ulysses,
    arXiv 2309.14509): for sequences that do not fit on one device. tokens_per_batch is still of one worker."""

    @model_validator(mode="after")
    def _check(self) -> ScoreConfig:
        _whole_groups(self.workers, self.sequence_parallel)
        _gpus_of_a_kind(self.accelerator, self.gpus_per_worker)
        if self.sequence_parallel > 1 and self.gpus_per_worker is not None and 0 < self.gpus_per_worker < 1:
            raise ValueError(f"gpus_per_worker {self.gpus_per_worker} is a fraction; sequence_parallel "
                             f"({self.sequence_parallel}) needs a whole GPU for each worker")
        return self


def _gpus_of_a_kind(accelerator: str | None, gpus_per_worker: float | None) -> None:
    if gpus_per_worker is not None and gpus_per_worker > 1 and gpus_per_worker != int(gpus_per_worker):
        raise ValueError(f"gpus_per_worker {gpus_per_worker:g} is neither a part of a GPU nor a whole number; Ray gives a "
                         f"worker 1, or {math.ceil(gpus_per_worker)}")
    if accelerator is not None and gpus_per_worker == 0:
        raise ValueError(f"accelerator {accelerator} has no effect on workers without GPUs; set gpus_per_worker to 1, or "
                         "accelerator to null")


def _whole_groups(workers: int, sequence_parallel: int) -> None:
    if workers % sequence_parallel:
        raise ValueError(f"workers ({workers}) is not a multiple of sequence_parallel ({sequence_parallel}), the workers "
                         "that compute together; set workers to "
                         f"{sequence_parallel * (workers // sequence_parallel + 1)}, or sequence_parallel to a divisor")


class ElasticWorkers(Section):
    """A number of workers that follows the cluster."""

    min: Int = Field(ge=1)
    """Fewest; with less the run waits."""
    max: Int = Field(ge=1)
    """Most."""

    @model_validator(mode="after")
    def _check(self) -> ElasticWorkers:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}")
        return self


class TrainConfig(ObjectiveConfig):
    """The training of the policy."""

    workers: Annotated[Int, Field(ge=1)] | ElasticWorkers = 1
    """Ray Train workers, one device each. {min: 2, max: 8} starts with what the cluster has and follows it; the pairs of a
    step stay the same."""
    gpus_per_worker: Float | None = Field(None, ge=0)
    """GPUs of each worker; null = 1 where the cluster has GPUs, else 0. A part of one, such as 0.25, lets trials of a sweep
    with one worker each share a GPU."""
    accelerator: str | None = None
    """As score.accelerator, of the training workers."""
    labels: dict[str, str] = Field({})
    """As score.labels, of the training workers."""
    pairs_per_step: Int = Field(64, ge=1)
    """Pairs of one optimizer step, over all workers."""
    tokens_per_batch: Literal["auto"] | Annotated[Int, Field(ge=1)] = "auto"
    """Token positions of one forward and backward pass of a worker, each shared prefix counted once; auto = as many as fit,
    measured at start. Accumulation follows from it."""
    sequence_parallel: Int = Field(1, ge=1)
    """Workers that compute each micro-batch together, every one a part of its positions (DeepSpeed Ulysses): for sequences
    that do not fit on one device. tokens_per_batch is still of one worker. Best within a machine."""
    epochs: Int = Field(1, ge=1)
    """Passes over the data."""
    steps: Int | None = Field(None, ge=1)
    """Optimizer steps; null = as epochs say."""
    lr: Float = Field(5.0e-7, gt=0)
    """Peak learning rate. LoRA usually wants about 1e-5 to 5e-4."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay after warm-up."""
    warmup: Float = Field(0.1, ge=0)
    """Below 1 a share of all steps, else a number of steps."""
    weight_decay: Float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    clip: Float | None = Field(1.0, gt=0)
    """Largest global gradient norm; null = no clipping."""
    zero: Annotated[Literal[0, 1, 2, 3], BeforeValidator(no_bool)] = 2
    """DeepSpeed ZeRO stage."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    offload_activations: bool = False
    """Keep what gradient_checkpointing still saves in the host's memory: less again, at the price of two copies."""
    offload_optimizer: Literal["cpu"] | PathOrUri | None = None
    """Keep master weights and moments in the host's memory (cpu), or on a disk (an NVMe's path, ZeRO-3 only)."""
    offload_params: Literal["cpu"] | PathOrUri | None = None
    """Keep the weights themselves there too, between uses; ZeRO-3 only."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """AdamW; its moments in 8 bits (arXiv 2110.02861), in memory that is paged to the host under pressure, or both. The
    latter three are bitsandbytes' and need GPUs."""
    optimizer_states: Literal["float32", "bfloat16"] = "float32"
    """Precision of adamw's moments; bfloat16 halves them, and rounds."""
    merge_adapter: bool = False
    """Export adapters also merged into the model, as final/merged."""
    seed: Int = Field(0, ge=0)
    """Order of the pairs and initial values of adapters."""
    checkpoint_every: Int = Field(100, ge=1)
    """Steps between checkpoints. The last step is always one."""
    checkpoint_minutes: Float | None = Field(None, gt=0)
    """Minutes between checkpoints, in place of checkpoint_every."""
    keep_checkpoints: Int = Field(2, ge=1)
    """How many checkpoints stay: the newest, or with keep_best the best and the newest."""
    keep_best: str | None = None
    """A metric of the held-out evaluations, such as eval_loss or eval_rewards/accuracies, by which checkpoints are kept:
    the newest one when each was made. The least loss or chosen_fell is the best, of the whole or of one source; the
    greatest of accuracies and margins."""
    eval_every: Int = Field(50, ge=1)
    """Steps between held-out evaluations. There is always one before the first and one after the last step."""
    max_failures: Int = Field(3, ge=-1)
    """Restarts from the newest checkpoint after a worker died or hung; -1 = any number."""
    max_preemptions: Int = Field(-1, ge=-1)
    """Restarts after a machine was taken away with notice, counted apart from failures; -1 = any number."""
    preemption_every: Int = Field(5, ge=1)
    """Steps between questions to Ray whether a machine of this run is about to be taken away."""
    collective_timeout: Float = Field(900.0, gt=0)
    """Seconds after which a worker that the others wait for counts as hung, and the workers are started again."""
    max_skipped: Int = Field(3, ge=0)
    """Steps in a row that may be passed over because a loss or gradient is not finite; one more ends the run."""
    gate_pairs: Int = Field(32, ge=1)
    """Pairs that the step-0 gate scores again: those of the first step, the most extreme ones, and some at random."""
    sample_prompts: Int = Field(0, ge=0)
    """Held-out prompts answered greedily before and after training."""
    sample_tokens: Int = Field(64, ge=1)
    """Longest sample, in tokens."""

    @property
    def fewest_workers(self) -> int:
        """With which the run begins at the least."""
        return self.workers.min if isinstance(self.workers, ElasticWorkers) else self.workers

    @property
    def most_workers(self) -> int:
        """With which the run goes on at the most."""
        return self.workers.max if isinstance(self.workers, ElasticWorkers) else self.workers

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        _gpus_of_a_kind(self.accelerator, self.gpus_per_worker)
        if isinstance(self.workers, ElasticWorkers):
            if self.sequence_parallel > 1:
                raise ValueError(f"sequence_parallel ({self.sequence_parallel}) needs a fixed number of workers, not "
                                 f"{{min: {self.workers.min}, max: {self.workers.max}}}; set workers to a multiple of it")
        else:
            _whole_groups(self.workers, self.sequence_parallel)
        if self.steps is not None and "epochs" in self.model_fields_set and self.epochs != 1:
            raise ValueError(f"steps ({self.steps}) and epochs ({self.epochs}) contradict each other; keep one")
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup {self.warmup} is neither a share below 1 nor a whole number of steps")
        if self.checkpoint_minutes is not None and "checkpoint_every" in self.model_fields_set:
            raise ValueError(f"checkpoint_minutes ({self.checkpoint_minutes:g}) and checkpoint_every "
                             f"({self.checkpoint_every}) contradict each other; keep one")
        if self.offload_params is not None and self.zero != 3:
            raise ValueError(f"offload_params ({self.offload_params}) needs partitioned weights; set zero to 3, "
                             f"not {self.zero}")
        if self.offload_optimizer is not None and self.zero == 0:
            raise ValueError(f"offload_optimizer ({self.offload_optimizer}) needs ZeRO; set zero to 1, 2 or 3, "
                             "not 0")
        if self.offload_optimizer not in (None, "cpu") and self.zero != 3:
            raise ValueError(f"offload_optimizer to a disk ({self.offload_optimizer}) needs zero 3, not {self.zero}; cpu "
                             "works with 1 and 2 too")
        if self.offload_optimizer not in (None, "cpu") and self.optimizer_states != "float32":
            raise ValueError(f"optimizer_states {self.optimizer_states} cannot go to a disk, where DeepSpeed keeps moments "
                             f"as it keeps weights; set it to float32, or offload_optimizer "
                             f"({self.offload_optimizer}) to cpu")
        if self.offload_activations and not self.gradient_checkpointing:
            raise ValueError("offload_activations has no effect without gradient_checkpointing; set that to true")
        if self.optimizer_states != "float32" and self.optimizer != "adamw":
            raise ValueError(f"optimizer_states {self.optimizer_states} has no effect on optimizer {self.optimizer}")
        if self.optimizer != "adamw" and self.offload_optimizer is not None:
            raise ValueError(f"optimizer {self.optimizer} keeps its moments on the GPU; drop offload_optimizer "
                             f"({self.offload_optimizer})")
        if self.gpus_per_worker is not None and 0 < self.gpus_per_worker < 1 and self.most_workers > 1:
            raise ValueError(f"gpus_per_worker {self.gpus_per_worker} is a fraction; NCCL needs a whole GPU for each of the "
                             f"{self.most_workers} training workers. One worker may have a part of a GPU")
        return self
