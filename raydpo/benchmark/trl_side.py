"""TRL's side: DPOTrainer on the same token ids, in file order; everything else is TRL's own code."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from safetensors.torch import load_file
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer

from raydpo.benchmark import workload
from raydpo.benchmark.job import Job, Result, StepRecord, now, side
from raydpo.errors import ModelError
from raydpo.model.budget import used_memory


class PinnedTrainer(DPOTrainer):
    """DPOTrainer that takes token ids as they are, keeps their order, and records what it computed and when."""

    reference_seconds: float | None = None

    def __init__(self, record: StepRecord, **settings: Any) -> None:
        self.record = record
        super().__init__(callbacks=[Clock(record)], **settings)

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Dataset:
        start = now(self.accelerator.device)
        dataset = super()._precompute_ref_logps(*args, **kwargs)
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
    """Train for ``job.steps``; with stage ``cached``, after a reference pass."""
    start = time.perf_counter()
    scratch = Path(job.work) / job.name
    dataset = Dataset.from_parquet(job.workload, columns=list(workload.IDS), cache_dir=str(scratch / "datasets"))
    record = StepRecord(device)
    trainer = PinnedTrainer(
        record,
        model=job.model,
        args=_settings(job, scratch),
        train_dataset=dataset,
        processing_class=_tokenizer(),
        peft_config=job.peft_config,
    )
    if job.lora is not None:
        _set_adapters(trainer.model, job.initial_adapters)
    found = Result(
        load_seconds=now(device) - start - (trainer.reference_seconds or 0.0),
        reference_seconds=trainer.reference_seconds,
        facts={"trl": trl.__version__},
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
    return found


def _settings(job: Job, scratch: Path) -> DPOConfig:
    train = job.train
    return DPOConfig(
        output_dir=str(scratch),
        max_steps=job.steps,
        per_device_train_batch_size=job.pairs_per_pass,
        gradient_accumulation_steps=job.pairs_per_step // job.pairs_per_pass,
        beta=train.beta,
        learning_rate=train.lr,
        weight_decay=train.weight_decay,
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_grad_norm=train.clip or 0.0,
        optim="adamw_torch_fused",  # as on raydpo's side, and TRL's default
        precompute_ref_log_probs=job.stage == "cached",
        precompute_ref_batch_size=job.pairs_per_pass,
        max_length=None,  # the rows are already cut
        model_init_kwargs={"dtype": job.dtype},
        bf16=False,  # bfloat16 weights as on raydpo's side, no autocast
        gradient_checkpointing=False,
        use_cpu=job.device == "cpu",
        dataloader_pin_memory=job.device == "cuda",
        save_strategy="no",
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


def _tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose only token is the padding token. Padded positions are masked, so any id is right."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>")), pad_token="<pad>", eos_token="<pad>"
    )


if __name__ == "__main__":
    raise SystemExit(side(run))
