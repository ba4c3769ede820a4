"""Scoring and training without Ray: tokenised tables of tiny pairs, scored and trained in this process."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tiny import make_tokenizer, preferences

from raydpo.training.hooks import TrainHooks

MAX_LENGTH = 512


def tokenised(records: list[dict[str, str]], max_length: int = MAX_LENGTH) -> pa.Table:
    """Text records as rows of ``data.pairs.PAIR_SCHEMA``, in their order."""
    from raydpo.data.keys import completion_key
    from raydpo.data.pairs import PAIR_SCHEMA

    tokenizer = make_tokenizer()
    rows = []
    for number, record in enumerate(records, 1):
        prompt = np.array(tokenizer(record["prompt"])["input_ids"], np.int32)
        row = {"pair_id": f"tiny:{number}", "source": "tiny", "weight": 1.0, "prompt_ids": prompt}
        for side in ("chosen", "rejected"):
            ids = np.array(tokenizer(record[side])["input_ids"] + [tokenizer.eos_token_id], np.int32)
            row |= {
                f"{side}_ids": ids[: max_length - len(prompt)],
                f"{side}_key": completion_key(prompt, ids),
                f"{side}_full": len(ids),
            }
        rows.append(row)
    return pa.table(
        [pa.array([row[name] for row in rows], PAIR_SCHEMA.field(name).type) for name in PAIR_SCHEMA.names],
        schema=PAIR_SCHEMA,
    )


def weighted(table: pa.Table, weigh: Callable[[str, int, int], Sequence[float]]) -> pa.Table:
    """A table with ``data.select.COUNT_COLUMNS``.

    Args:
        weigh: takes side, row and the number of tokens; returns the weight of each token.
    """
    for side in ("chosen", "rejected"):
        starts, weights = [], []
        for row, ids in enumerate(table[f"{side}_ids"].to_pylist()):
            each = list(weigh(side, row, len(ids)))
            assert len(each) == len(ids)
            starts.append([at for at in range(len(each)) if at == 0 or each[at] != each[at - 1]])
            weights.append([each[at] for at in starts[-1]])
        table = table.append_column(f"{side}_starts", pa.array(starts, pa.list_(pa.int32())))
        table = table.append_column(f"{side}_weights", pa.array(weights, pa.list_(pa.float32())))
    return table


def with_reference(
    table: pa.Table,
    model: Path,
    dtype: str = "float32",
    tokens_per_batch: int = 4096,
    device: str = "cpu",
    adapter: Path | None = None,
    quantization: str | None = None,
) -> pa.Table:
    """``table`` with the reference log-probs of ``model``, scored in this process."""
    from raydpo.model.layout import PromptGroup
    from raydpo.reference.identity import identify
    from raydpo.reference.score import ReferenceSpec, Scorer

    spec = ReferenceSpec(
        path=str(model),
        adapter=None if adapter is None else str(adapter),
        quantization=quantization,
        identity=identify(model, dtype, adapter, quantization, max_length=MAX_LENGTH),
    )
    scorer = Scorer(spec, device=device, tokens_per_batch=tokens_per_batch)
    ids = {
        name: [np.array(row, np.int32) for row in table[name].to_pylist()]
        for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    }
    scored = scorer.score(
        [
            PromptGroup(*row[:1], row[1:])
            for row in zip(ids["prompt_ids"], ids["chosen_ids"], ids["rejected_ids"], strict=True)
        ]
    )
    for side, column in enumerate(("ref_chosen_logps", "ref_rejected_logps")):
        table = table.append_column(column, pa.array([row[side] for row in scored], pa.list_(pa.float32())))
    return table


@dataclass
class Record(TrainHooks):
    """Callbacks that record everything.

    Attributes:
        keep: directory in which checkpoints are stored, as ``step-<n>``.
        stop_after: request to stop after so many steps.
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    evals: list[dict[str, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checkpoints: dict[int, dict[str, float]] = field(default_factory=dict)
    keep: Path | None = None
    stop_after: int | None = None

    def step(self, row: Mapping[str, float]) -> None:
        self.steps.append(dict(row))

    def evaluated(self, row: Mapping[str, float]) -> None:
        self.evals.append(dict(row))

    def note(self, line: str) -> None:
        self.notes.append(line)

    def upload(self, directory: Path, step: int) -> None:
        if self.keep is not None:
            shutil.copytree(directory, self.keep / f"step-{step}", dirs_exist_ok=True)

    def register(self, step: int, metrics: Mapping[str, float], *, wait: bool) -> None:
        self.checkpoints[step] = dict(metrics)

    def stop_requested(self) -> bool:
        return self.stop_after is not None and len(self.steps) + 1 >= self.stop_after


def engine_here(
    model: Path,
    *,
    lora: dict[str, Any] | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    policy: dict[str, Any] | None = None,
    **train: Any,
) -> tuple[Any, Any, Any]:
    """The policy inside DeepSpeed, in this process and in the other ranks of its group: its spec, settings and engine."""
    import torch

    from raydpo.config import LoraSettings, TrainConfig
    from raydpo.model.partition import join_process_group
    from raydpo.reference.identity import identify
    from raydpo.training.policy.deepspeed_engine import PolicyEngine
    from raydpo.training.policy.engine import PolicySpec

    settings = TrainConfig(**{"lr": 1e-3, "pairs_per_step": 8, "tokens_per_batch": 1024} | train)
    spec = PolicySpec(
        path=str(model),
        dtype=dtype,
        lora=None if lora is None else LoraSettings(**lora),
        rope_length=identify(model, dtype, max_length=MAX_LENGTH).rope_length,
        **(policy or {}),
    )
    join_process_group(torch.device(device))
    return spec, settings, PolicyEngine(spec, settings, torch.device(device))


def train_here(
    table: pa.Table,
    model: Path,
    scratch: Path,
    *,
    lora: dict[str, Any] | None = None,
    dtype: str = "float32",
    shuffle: bool = True,
    checkpoint: Path | None = None,
    keep: Path | None = None,
    starts_as_reference: bool = True,
    held_out: pa.Table | None = None,
    device: str = "cpu",
    record: Record | None = None,
    policy: dict[str, Any] | None = None,
    reference_fused: frozenset[bool] = frozenset(),
    continued: Any = None,
    earlier: Path | None = None,
    **train: Any,
) -> Record:
    """Train in this process, and in the other ranks of its process group if there is one."""
    from raydpo.training.job import TrainJob
    from raydpo.training.pairs import TrainingPairs
    from raydpo.training.trainer import train_policy

    spec, settings, engine = engine_here(model, lora=lora, dtype=dtype, device=device, policy=policy, **train)
    job = TrainJob(
        train=settings,
        shuffle=shuffle,
        policy=spec,
        reference_identity="reference",
        starts_as_reference=starts_as_reference,
        coarser_dtype=dtype,
        reference_fused=reference_fused,
        fingerprint={"lr": settings.lr},
        continued=continued,
    )
    record = record or Record(keep=keep)
    record.summary = train_policy(
        job,
        TrainingPairs.of(table),
        None if held_out is None else TrainingPairs.of(held_out),
        engine,
        record,
        checkpoint,
        scratch,
        earlier,
    )
    record.engine = engine
    return record


def exact(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """Metrics that must be equal when a step is repeated: all but seconds, memory and the slowest rank."""
    return [
        {
            key: value
            for key, value in row.items()
            if not any(word in key for word in ("second", "time/", "memory", "slowest"))
        }
        for row in rows
    ]


def tiny_pairs(count: int = 33, seed: int = 0) -> pa.Table:
    return tokenised(preferences(count, seed))


def counting(table: pa.Table, weights_of: Any) -> pa.Table:
    """``table`` with the columns of ``select.COUNT_COLUMNS``, and so without sums of the reference.

    Args:
        weights_of: function from side, row and number of tokens in use to the weight of each token.
    """
    from raydpo.data.ragged import tokens_in_use

    for side in ("chosen", "rejected"):
        starts, weights = [], []
        for row, tokens in enumerate(tokens_in_use(table, side).tolist()):
            each = np.asarray(weights_of(side, row, tokens), np.float32)
            first = np.flatnonzero(np.diff(each, prepend=np.nan) != 0)
            starts.append(first.astype(np.int32))
            weights.append(each[first])
        table = table.append_column(f"{side}_starts", pa.array(starts, pa.list_(pa.int32())))
        table = table.append_column(f"{side}_weights", pa.array(weights, pa.list_(pa.float32())))
    return table


def part_of(side: str, row: int, tokens: int) -> np.ndarray:
    """Weights of which some are 0 and some fractions, in several runs; at least one is above 0."""
    random = np.random.default_rng([row, side == "chosen"])
    weights = np.repeat(random.choice([0, 1, 1, 0.25], tokens), 2)[:tokens]
    weights[random.integers(tokens)] = 1
    return weights


def unpaired(table: pa.Table) -> pa.Table:
    """Each completion of ``table`` in a row of its own, with a label: desirable if it was chosen."""
    from raydpo.data.select import LABEL

    rows = []
    for row in table.to_pylist():
        for side, other, label in (("chosen", "rejected", 1), ("rejected", "chosen", -1)):
            missing = {f"{other}_ids": [], f"{other}_key": bytes(16), f"{other}_full": 0}
            rows.append(row | missing | {"pair_id": f"{row['pair_id']}:{side}", LABEL: label})
    return pa.Table.from_pylist(rows, schema=table.schema.append(pa.field(LABEL, pa.int8())))
