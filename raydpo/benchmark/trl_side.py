"""TRL's side: a script that trains with DPOTrainer as a user's would. It reads, tokenises, computes the reference's
log-probs, trains and saves. All of that is TRL's own code; this module takes times."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from safetensors.torch import load_file
from torch.utils.data import SequentialSampler
from transformers import AutoTokenizer, TrainerCallback, set_seed
from trl import DPOConfig, DPOTrainer

from raydpo.benchmark.job import Job, Result, StepRecord, now, side
from raydpo.errors import ModelError
from raydpo.model.budget import used_memory


class TimedTrainer(DPOTrainer):
    """DPOTrainer that keeps the order of the pairs, and records what it computed and when.

    Args:
        measured: number of the first pairs that are scored and trained on. All are read and tokenised.
        warm: whether to score one batch before the clock of the reference pass starts.
    """

    reference_seconds: float | None = None

    def __init__(self, record: StepRecord, measured: int, warm: bool, **settings: Any) -> None:
        self.record, self.measured, self.warm = record, measured, warm
        super().__init__(callbacks=[Clock(record)], **settings)

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return super()._prepare_dataset(dataset, *args, **kwargs).select(range(self.measured))

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        if self.warm:
            super()._precompute_ref_logps(dataset.select(range(min(batch_size, len(dataset)))), name, batch_size)
        start = now(self.accelerator.device)
        dataset = super()._precompute_ref_logps(dataset, name, batch_size)
        self.reference_seconds = now(self.accelerator.device) - start
        return dataset

    def _compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super()._compute_loss(model, inputs, *args, **kwargs)
        rows, width = inputs["input_ids"].shape
        self.record.add_pass(
            rows // 2,
            rows * width,
            loss.detach(),
            *(self._metrics["train"][f"logps/{name}"][-1] for name in ("chosen", "rejected")),
        )
        return loss


class Clock(TrainerCallback):
    """Callback that marks the start of training and the end of each step."""

    def __init__(self, record: StepRecord) -> None:
        self.record = record

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.record.begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.record.end_step()


def run(job: Job, device: torch.device) -> Result:
    """Train for ``job.steps`` and save; with stage ``cached``, after a reference pass over the pairs of these steps."""
    start = time.perf_counter()
    set_seed(job.train.seed)  # TRL finds its reference log-probs again only for equal adapters
    scratch = Path(job.work) / f"{job.name}-trl"
    shutil.rmtree(scratch, ignore_errors=True)  # an earlier run's reference log-probs would be found there
    dataset = Dataset.from_json(job.pairs, cache_dir=job.cache or str(scratch / "datasets"))
    record = StepRecord(device)
    trainer = TimedTrainer(
        record,
        measured=min(job.steps * job.pairs_per_step, len(dataset)),
        warm=job.warm,
        model=job.model,
        args=_settings(job, scratch),
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=job.peft_config,
    )
    if job.lora is not None:
        _set_adapters(trainer.model, job.initial_adapters)
    found = Result(
        load_seconds=now(device) - start - (trainer.reference_seconds or 0.0),
        reference_seconds=trainer.reference_seconds,
        facts={"trl": trl.__version__, "read_pairs": len(dataset)}
        | {name: getattr(job, name) for name in ("batch", "reference_batch", "recompute")},
    )
    if job.stage == "cached":
        found.ref_chosen, found.ref_rejected = (
            [float(value) for value in trainer.train_dataset[f"ref_{name}_logps"]] for name in ("chosen", "rejected")
        )
    trainer.train()
    found.step_seconds = record.seconds
    found.losses, found.chosen_logps, found.rejected_logps = record.means()
    found.facts |= record.facts(trainer.optimizer)
    found.peak_bytes = used_memory(device)
    trainer.save_model()
    return found


def _settings(job: Job, scratch: Path) -> DPOConfig:
    train = job.train
    return DPOConfig(
        output_dir=str(scratch / "output"),
        max_steps=job.steps,
        per_device_train_batch_size=job.batch,
        gradient_accumulation_steps=job.pairs_per_step // job.batch,
        beta=train.beta,
        learning_rate=train.lr,
        weight_decay=train.weight_decay,
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_grad_norm=train.clip or 0.0,
        optim="adamw_torch_fused",  # the fastest, as on raydpo's side, and TRL's default
        precompute_ref_log_probs=job.stage == "cached",
        precompute_ref_batch_size=job.reference_batch,
        max_length=None,  # all pairs fit, and TRL finds its reference log-probs again only without a limit
        model_init_kwargs={"dtype": job.dtype},
        bf16=False,  # bfloat16 weights as on raydpo's side, no autocast
        gradient_checkpointing=job.recompute,
        use_cpu=job.device == "cpu",
        dataloader_pin_memory=job.device == "cuda",
        save_strategy="no",  # the policy is saved once, after the last step
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=train.seed,
    )


def _set_adapters(model: torch.nn.Module, file: Path) -> None:
    """Copy the adapters in ``file`` into a PEFT model, by name.

    Raises:
        ModelError: if the two do not have the same adapters.
    """
    stored = load_file(file)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if stored.keys() != trainable.keys():
        odd = sorted(stored.keys() ^ trainable.keys())
        raise ModelError(
            f"the two sides adapt different modules: {len(odd)} tensors are on one side only, such as {', '.join(odd[:3])}"
        )
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(stored[name])


if __name__ == "__main__":
    raise SystemExit(side(run))
