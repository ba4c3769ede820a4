"""Re-derives tests/training/trl_reference.json: TRL's DPOTrainer on tiny models, order pinned, float32, no dropout.

    python tests/training/trl_reference.py

Records for each case the digest of the weights it started from and, for each of eight steps, loss, gradient norm and the
policy's and the reference's log-probs of every pair.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FILE = HERE / "trl_reference.json"
STEPS, BATCH, BETA, LR = 8, 4, 0.1, 1e-3
TRL: dict[str, Any] = {
    "per_device_train_batch_size": BATCH,
    "beta": BETA,
    "learning_rate": LR,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "seed": 0,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
"""Settings of TRL's trainers, and those of raydpo that mean the same."""
RAYDPO: dict[str, Any] = {
    "shuffle": False,
    "pairs_per_step": BATCH,
    "lr": LR,
    "beta": BETA,
    "schedule": "constant",
    "warmup": 0.0,
}
LORA = {"r": 8, "alpha": 16}
CASES = [
    (architecture, lora, max_length)
    for architecture in ("llama", "qwen3")
    for lora in (False, True)
    for max_length in (512, 40)
]


def case_name(architecture: str, lora: bool, max_length: int) -> str:
    return f"{architecture}-{'lora' if lora else 'full'}-{max_length}"


def trl_run(model_dir: Path, data_file: Path, out: Path, *, lora: bool, max_length: int) -> list[dict[str, object]]:
    """Eight steps of TRL in file order."""
    import torch
    from datasets import load_dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from raydpo.config import LoraSettings
    from raydpo.model.load import add_lora

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    if lora:
        model = add_lora(model, LoraSettings(**LORA), seed=0)
    rows: list[dict[str, object]] = []

    class Pinned(DPOTrainer):
        def _get_train_sampler(self, *args, **kwargs):
            return SequentialSampler(self.train_dataset)

        def _compute_loss(self, model, inputs, return_outputs):
            loss = super()._compute_loss(model, inputs, return_outputs)
            with torch.no_grad():
                ids, mask = inputs["input_ids"], inputs["completion_mask"][:, 1:]
                logits = model(input_ids=ids, attention_mask=inputs["attention_mask"], use_cache=False).logits[:, :-1]
                tokens = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
                policy = (tokens * mask).sum(1).tolist()
                reference = [part.tolist() for part in self.compute_ref_log_probs(self.ref_model or self.model, inputs)]
            half = len(policy) // 2
            rows.append(
                {
                    "chosen_logps": policy[:half],
                    "rejected_logps": policy[half:],
                    "ref_chosen_logps": reference[0],
                    "ref_rejected_logps": reference[1],
                }
            )
            return loss

    class Log(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:
                rows[state.global_step - 1] |= {"loss": float(logs["loss"]), "grad_norm": float(logs["grad_norm"])}

    config = DPOConfig(
        output_dir=str(out),
        max_steps=STEPS,
        max_length=max_length,
        **TRL,
    )
    dataset = load_dataset("json", data_files=str(data_file), split="train", cache_dir=str(out / "cache"))
    Pinned(
        model=model,
        args=config,
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        callbacks=[Log()],
    ).train()
    return rows


def main() -> None:
    sys.path.insert(0, str(HERE.parent))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    import trl
    from tiny import make_model, preferences, write_preferences

    from raydpo.reference.identity import identify

    torch.set_num_threads(2)
    cases = {}
    with tempfile.TemporaryDirectory() as scratch:
        data_file = write_preferences(Path(scratch) / "pairs.jsonl", preferences(STEPS * BATCH + 8))
        for architecture, lora, max_length in CASES:
            model_dir = make_model(Path(scratch) / architecture, architecture)
            name = case_name(architecture, lora, max_length)
            cases[name] = {
                "weights": identify(model_dir, "float32").weights,
                "steps": trl_run(model_dir, data_file, Path(scratch) / name, lora=lora, max_length=max_length),
            }
            print(name, [round(step["loss"], 6) for step in cases[name]["steps"]])
    FILE.write_text(json.dumps({"trl": trl.__version__, "torch": torch.__version__, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
