"""Measured memory of a training, to compare with an estimate: the peak of each rank above its memory before the model was
loaded."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from kernel import Record, train_here

STEPS = 2
"""The first step creates the optimizer's moments; the second is measured."""

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TOP_PAD_": "0",
}
"""Environment of the ranks: every tensor of 128 KiB or more is memory of its own, given back when it is freed. Else the C
library keeps freed blocks of up to 32 MiB, and the peak would measure its heap."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training to measure.

    Attributes:
        tokens: positions of a micro-batch (one pair), half of them in the prompt.
        micro_batches: micro-batches of each rank in a step.
        train, lora, policy: arguments of ``kernel.train_here``.
    """

    model: Path
    dtype: str = "float32"
    tokens: int = 512
    micro_batches: int = 2
    device: str = "cpu"
    train: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] | None = None
    policy: dict[str, Any] = field(default_factory=dict)

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of the prompt and of the two completions."""
        return self.tokens - self.tokens // 4 * 2, self.tokens // 4


def model_with_vocabulary(directory: Path, vocabulary: int, **sizes: Any) -> Path:
    """A random Llama whose vocabulary is larger than the tests' tokenizer."""
    import json

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    directory.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model("llama", **{"vocab_size": vocabulary, "max_position_embeddings": 8192} | sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(str(directory))
    assert json.loads((directory / "config.json").read_text())["vocab_size"] == vocabulary
    return directory


def random_pairs(count: int, prompt: int, completion: int, vocabulary: int = 200) -> pa.Table:
    """Pairs of random tokens without shared prefixes, with made-up reference log-probs."""
    from raydpo.data.keys import completion_key
    from raydpo.data.pairs import PAIR_SCHEMA

    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        ids = rng.integers(0, vocabulary, prompt).astype(np.int32)
        row = {"pair_id": f"random:{number}", "source": "random", "weight": 1.0, "prompt_ids": ids}
        for side in ("chosen", "rejected"):
            own = rng.integers(0, vocabulary, completion).astype(np.int32)
            row |= {f"{side}_ids": own, f"{side}_key": completion_key(ids, own), f"{side}_full": completion}
        rows.append(row)
    table = pa.table(
        [pa.array([row[name] for row in rows], PAIR_SCHEMA.field(name).type) for name in PAIR_SCHEMA.names],
        schema=PAIR_SCHEMA,
    )
    scores = pa.array([[-5.0] * completion] * count, pa.list_(pa.float32()))
    return table.append_column("ref_chosen_logps", scores).append_column("ref_rejected_logps", scores)


class Enough(Exception):
    """Hooks that run all steps and store no checkpoint."""


class Peak(Record):
    """Hooks that measure only the peak of the last step."""

    device = "cpu"

    def step(self, row: Any) -> None:
        import torch

        from raydpo.model.budget import reset_peak_memory

        super().step(row)
        if len(self.steps) == STEPS:
            raise Enough
        reset_peak_memory(torch.device(self.device))


def peaks(cases: list[Case], small: Path, scratch: Path) -> list[float]:
    """Peak bytes of each case's last step above the process's memory before it, libraries included. Runs on each rank.

    For a quantized model the mapped pages of its file are subtracted: the system drops them when it needs the memory.
    Frozen weights that are not quantized are these pages themselves.

    Args:
        small: a tiny model that each case trains first, so that libraries, their threads and buffers are not measured.
    """
    import os

    import torch

    torch.set_num_threads(1)  # fewer thread buffers
    world = int(os.environ["WORLD_SIZE"])
    found = []
    for number, case in enumerate(cases):
        _train(replace(case, model=small, tokens=64, micro_batches=1), world, scratch / f"{number}-small")
        before, mapped = _now(torch.device(case.device)), _mapped()
        peak = _train(case, world, scratch / str(number)) - before
        unused = _mapped() - mapped if case.device == "cpu" and "quantization" in case.policy else 0.0
        found.append(peak - unused)
    return found


def _train(case: Case, world: int, scratch: Path) -> float:
    pairs = case.micro_batches * world
    record = Peak()
    record.device = case.device
    with contextlib.suppress(Enough):
        train_here(
            random_pairs(pairs * STEPS, *case.lengths),
            case.model,
            scratch,
            dtype=case.dtype,
            device=case.device,
            lora=case.lora,
            policy=case.policy,
            starts_as_reference=False,
            record=record,
            shuffle=False,
            **{"pairs_per_step": pairs, "tokens_per_batch": case.tokens, "steps": STEPS} | case.train,
        )
    return record.steps[-1]["peak_memory_bytes"]


def _mapped() -> float:
    """Bytes of mapped files of this process that are in memory."""
    found = re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())
    return float(found[1]) * 1024 if found else 0.0


def _now(device: Any) -> float:
    import torch

    from raydpo.model.budget import reset_peak_memory, used_memory

    for _ in range(3):
        gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    reset_peak_memory(device)
    return used_memory(device)
