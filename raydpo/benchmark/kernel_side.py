"""The bare kernel: one process scores the reference, another trains, with the code of ``raydpo run`` but without Ray."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from raydpo.benchmark.job import Job, Result, StepRecord, now, side
from raydpo.data.plan import BatchPlan
from raydpo.estimate.work import pair_groups
from raydpo.losses import Objective, ObjectiveState
from raydpo.model.budget import MOST_SCORED, find_budget, probe_group, used_memory
from raydpo.model.layout import PromptGroup
from raydpo.model.partition import join_process_group
from raydpo.model.selfcheck import CHECK_ROWS
from raydpo.reference.identity import identify
from raydpo.reference.score import ReferenceSpec, Scorer
from raydpo.training.clock import StepClock
from raydpo.training.pairs import TrainingPairs
from raydpo.training.policy.deepspeed_engine import PolicyEngine
from raydpo.training.policy.engine import PolicySpec
from raydpo.training.step import Stepper
from raydpo.version import __version__


def score(job: Job, device: torch.device) -> Result:
    """Run the reference pass; write the pairs with their log-probs to ``job.scored``."""
    start = time.perf_counter()
    table = _load(job.pairs)
    groups, _ = pair_groups(table)
    spec = ReferenceSpec(path=job.model, adapter=None, identity=identify(job.model, job.dtype))
    # The budget is measured here and not in the scorer: measuring resets the peak that is reported below.
    scorer = Scorer(spec, device=job.device, tokens_per_batch=1, check_rows=groups[:CHECK_ROWS])
    peak = used_memory(device)
    scorer.tokens_per_batch = _budget(
        job,
        lambda: (
            find_budget(
                lambda tokens: scorer.model.score([probe_group(tokens, scorer.model.vocabulary)], device),
                device,
                most=MOST_SCORED,
            ).tokens
        ),
    )
    ready = now(device)
    scored = scorer.score(groups)
    seconds = now(device) - ready
    peak = max(peak, used_memory(device))
    for index, name in enumerate(("chosen", "rejected")):
        table = table.append_column(f"ref_{name}_logps", pa.array([row[index] for row in scored], pa.list_(pa.float32())))
    pq.write_table(table, job.scored)
    chosen, rejected = ([float(np.sum(row[index], dtype=np.float64)) for row in scored] for index in range(2))
    return Result(
        load_seconds=ready - start,
        reference_seconds=seconds,
        ref_chosen=chosen,
        ref_rejected=rejected,
        peak_bytes=peak,
        facts={"notes": scorer.notes} | scorer.provenance,
    )


def adapters(job: Job, device: torch.device) -> Result:
    """Only write the policy's adapters as they are before the first step, for TRL."""
    _engine(job, device, ())
    return Result()


def train(job: Job, device: torch.device) -> Result:
    """Train against the log-probs in ``job.scored``."""
    start = time.perf_counter()
    pairs, settings = TrainingPairs.of(_load(job.scored)), job.train
    engine = _engine(job, device, pairs.groups(range(min(CHECK_ROWS, len(pairs)))))
    peak = used_memory(device)
    budget = _budget(job, lambda: engine.find_budget().tokens)
    plan = BatchPlan(
        pairs.shapes_of,
        pairs.sources,
        pairs.weights,
        seed=settings.seed,
        pairs_per_step=job.pairs_per_step,
        tokens_per_batch=budget,
        world_size=1,
        shuffle=job.shuffle,
        epochs=1,
        steps=job.steps,
        layout=engine.module.method.layout,
    )

    record = StepRecord(device)
    load_seconds = now(device) - start
    rows, stepper = [], Stepper(settings, plan, pairs, engine, Objective(settings), StepClock(device), ObjectiveState())
    record.begin()
    for step in stepper.prepared():
        rows.append(stepper.take(step).row)
        for batch, layout in step.batches:
            record.add_pass(len(batch.pairs), layout.input_ids.numel())
        record.end_step()
    return Result(
        load_seconds=load_seconds,
        step_seconds=record.seconds,
        losses=[row["loss"] for row in rows],
        chosen_logps=[row["logps/chosen"] for row in rows],
        rejected_logps=[row["logps/rejected"] for row in rows],
        peak_bytes=max(peak, used_memory(device)),
        facts={
            "raydpo": __version__,
            "layout": engine.layout_line,
            "tokens_per_batch": budget,
        }
        | record.facts(engine.state.optimizer),
    )


def _load(file: str | Path) -> pa.Table:
    return pq.read_table(file).combine_chunks()


def _budget(job: Job, measure: Callable[[], int]) -> int:
    return measure() if job.tokens_per_batch == "auto" else job.tokens_per_batch


def _engine(job: Job, device: torch.device, check_rows: Sequence[PromptGroup]) -> PolicyEngine:
    """The policy before the first step. Its adapters and their configuration are written to ``job.work``."""
    spec = PolicySpec(path=job.model, dtype=job.dtype, lora=job.adapters)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    # One process needs no port.
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1, store=torch.distributed.HashStore()
    )
    join_process_group(device)
    engine = PolicyEngine(spec, job.train, device, check_rows)
    if job.lora is not None:
        save_file(engine.gather(), job.initial_adapters)
        engine.module.policy.peft_config["default"].save_pretrained(job.work)
    return engine


if __name__ == "__main__":
    stages = {"adapters": adapters, "score": score, "train": train}
    raise SystemExit(side(lambda job, device: stages[job.stage](job, device)))
