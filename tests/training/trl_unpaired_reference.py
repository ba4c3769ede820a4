"""Re-derives tests/training/trl_unpaired_reference.json: TRL's trainers on completions with labels, in file order, float32.

    python tests/training/trl_unpaired_reference.py

KTO and apo_zero_unpaired are those of TRL 1.16's ``KTOTrainer``. BCO is not in TRL 1.16: it is ``trl.experimental.bco`` of
TRL 1.13, whose wheel must be unpacked in a directory that the environment variable TRL_WITH_BCO names. Records for each case
the digest of the weights it started from and, for each step, loss, gradient norm and the figures that TRL logs; and at the
end the norm of each weight's change.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from trl_reference import BATCH, TRL

HERE = Path(__file__).parent
FILE = HERE / "trl_unpaired_reference.json"
STEPS, MAX_LENGTH = 6, 60
CASES: dict[str, dict[str, Any]] = {
    "kto": {"loss": "kto"},
    "kto-weights": {"loss": "kto", "desirable_weight": 0.7, "undesirable_weight": 1.3},
    "kto-messages": {"loss": "kto", "messages": True},
    "apo_zero": {"loss": "apo_zero", "desirable_weight": 0.7},
    "bco": {"loss": "bco"},
}


def records(messages: bool) -> list[dict[str, Any]]:
    """Records of TRL's unpaired format, about two of three desirable."""
    from tiny import preferences

    found = []
    for number, each in enumerate(preferences(STEPS * BATCH + 3)):
        label = number % 3 != 1
        prompt, completion = each["prompt"], each["chosen" if label else "rejected"]
        if messages:
            prompt = [{"role": "user", "content": prompt}]
            completion = [{"role": "assistant", "content": completion.strip()}]
        found.append({"prompt": prompt, "completion": completion, "label": label})
    return found


def moved(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """Norm of each weight's change."""
    return {name: float((after[name].detach().double() - before[name].double()).norm()) for name in before}


def max_length_of(loss: str) -> int:
    """BCO cuts completions by one token more than KTO does, so nothing is cut there."""
    return 512 if loss == "bco" else MAX_LENGTH


def trl_run(model_dir: Path, data_file: Path, out: Path, *, loss: str, **weights: float) -> dict[str, Any]:
    """Some steps of TRL in file order."""
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    more: dict[str, Any] = {}
    if loss == "bco":
        from trl.experimental.bco import BCOConfig as Settings
        from trl.experimental.bco import BCOTrainer as Trainer
    else:
        from trl import KTOConfig as Settings
        from trl import KTOTrainer as Trainer

        more = weights | {"loss_type": "apo_zero_unpaired" if loss == "apo_zero" else "kto"}
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    rows: list[dict[str, float]] = []

    class Log(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:
                rows.append({name: float(value) for name, value in logs.items() if name.split("/")[0] in WANTED})

    config = Settings(
        output_dir=str(out),
        max_steps=STEPS,
        max_length=max_length_of(loss),
        **TRL,
        train_sampling_strategy="sequential",
        **more,
    )
    dataset = load_dataset("json", data_files=str(data_file), split="train", cache_dir=str(out / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    if loss == "bco":
        tokenizer.bos_token = None  # which BCO would put before each prompt
    trainer = Trainer(
        model=model,
        ref_model=AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32) if loss == "bco" else None,
        args=config,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[Log()],
    )
    trainer.train()
    return {"steps": rows, "moved": moved(before, dict(trainer.model.named_parameters()))}


WANTED = {"loss", "grad_norm", "kl", "rewards", "logps", "delta"}


def main() -> None:
    sys.path.insert(0, str(HERE.parent))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if len(sys.argv) > 1:  # a process of its own for each case, since two releases of TRL are imported
        name, model_dir, scratch, answer = sys.argv[1:]
        settings = dict(CASES[name])
        data = Path(scratch) / f"{name}.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in records(settings.pop("messages", False))))
        import trl

        found = {"trl": trl.__version__} | trl_run(Path(model_dir), data, Path(scratch) / name, **settings)
        Path(answer).write_text(json.dumps(found))
        return
    import torch
    from tiny import make_model

    from raydpo.reference.identity import identify

    cases = {}
    with tempfile.TemporaryDirectory() as scratch:
        model_dir = make_model(Path(scratch) / "llama", "llama")
        for name, settings in CASES.items():
            answer, environment = Path(scratch) / "answer.json", dict(os.environ)
            if settings["loss"] == "bco":
                paths = [environment["TRL_WITH_BCO"], environment.get("PYTHONPATH", "")]
                environment |= {"PYTHONPATH": os.pathsep.join(paths), "TRL_EXPERIMENTAL_SILENCE": "1"}
            command = [sys.executable, __file__, name, str(model_dir), scratch, str(answer)]
            subprocess.run(command, check=True, env=environment)
            cases[name] = {"weights": identify(model_dir, "float32").weights} | json.loads(answer.read_text())
            print(name, [round(step["loss"], 6) for step in cases[name]["steps"]])
    FILE.write_text(json.dumps({"torch": torch.__version__, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
