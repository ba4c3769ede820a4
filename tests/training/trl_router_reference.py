"""Re-derives tests/training/trl_router_reference.json: TRL's DPOTrainer on a tiny mixture, in file order, float32.

    python tests/training/trl_router_reference.py

Records for each case the digest of the weights it started from; for each step loss, router loss and gradient norm; the
held-out router loss after the last one; and the norm of each weight's change.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from trl_reference import BATCH, TRL
from trl_unpaired_reference import moved

HERE = Path(__file__).parent
FILE = HERE / "trl_router_reference.json"
STEPS, HELD_OUT, MAX_LENGTH = 6, 6, 60
MODEL: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "initializer_range": 0.1,
    "router_aux_loss_coef": 0.2,
}
"""Weights large enough that the router prefers some experts, and a coefficient that shows in every figure."""
CASES: dict[str, dict[str, Any]] = {
    "own": {"router_aux_loss_coef": None},
    "none": {"router_aux_loss_coef": 0.0},
    "given": {"router_aux_loss_coef": 1.0},
    "lora": {"router_aux_loss_coef": 1.0, "lora": {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj", "o_proj"]}},
}


def make_mixture(directory: Path) -> Path:
    from tiny import make_model

    return make_model(directory, "qwen3_moe", **MODEL)


def write_pairs(folder: Path) -> tuple[Path, Path]:
    """Training and held-out pairs."""
    from tiny import preferences, write_preferences

    records = preferences(STEPS * BATCH + HELD_OUT)
    train = write_preferences(folder / "train.jsonl", records[: STEPS * BATCH])
    return train, write_preferences(folder / "held-out.jsonl", records[STEPS * BATCH :])


def trl_run(model_dir: Path, data: tuple[Path, Path], out: Path, *, coef: float | None, lora: Any) -> dict[str, Any]:
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from raydpo.config import LoraSettings
    from raydpo.model.load import add_lora

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    if lora:
        model = add_lora(model, LoraSettings(**lora), seed=0)
    before = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    rows: list[dict[str, float]] = []

    class Log(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:
                rows.append({name: float(logs[name]) for name in ("loss", "aux_loss", "grad_norm") if name in logs})

    config = DPOConfig(
        output_dir=str(out),
        max_steps=STEPS,
        max_length=MAX_LENGTH,
        per_device_eval_batch_size=HELD_OUT,
        router_aux_loss_coef=coef,
        train_sampling_strategy="sequential",
        **TRL,
    )
    train, held_out = (
        load_dataset("json", data_files=str(file), split="train", cache_dir=str(out / "cache")) for file in data
    )
    trainer = DPOTrainer(
        model=model,
        args=config,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        callbacks=[Log()],
    )
    trainer.train()
    found = trainer.evaluate()
    return {
        "steps": rows,
        "eval": {name: found[name] for name in ("eval_loss", "eval_aux_loss") if name in found},
        "moved": moved(before, dict(trainer.model.named_parameters())),
    }


def main() -> None:
    sys.path.insert(0, str(HERE.parent))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    import trl

    from raydpo.reference.identity import identify

    cases = {}
    with tempfile.TemporaryDirectory() as scratch:
        data, model_dir = write_pairs(Path(scratch)), make_mixture(Path(scratch) / "mixture")
        for name, case in CASES.items():
            settings = {"coef": case["router_aux_loss_coef"], "lora": case.get("lora")}
            found = trl_run(model_dir, data, Path(scratch) / name, **settings)
            cases[name] = {"weights": identify(model_dir, "float32").weights} | found
            print(name, found["steps"], found["eval"])
    FILE.write_text(json.dumps({"trl": trl.__version__, "torch": torch.__version__, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
