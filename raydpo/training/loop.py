"""The training of one policy on one rank, from the first step to the last. No Ray in here."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from raydpo.config import TrainConfig
from raydpo.data.plan import BatchPlan, MicroBatch
from raydpo.data.shapes import POSITIONS_ONLY, Work
from raydpo.errors import DeviceMemoryError, TrainError
from raydpo.losses import preference_loss
from raydpo.model.budget import is_out_of_memory, used_memory
from raydpo.model.layout import Layout
from raydpo.prefetch import prefetch
from raydpo.training.checkpoint import load_checkpoint, save_checkpoint
from raydpo.training.engine import PolicyEngine, PolicySpec
from raydpo.training.evaluate import compare, evaluate, pair_logps
from raydpo.training.gate import expected_first_loss, gate_rows, judge
from raydpo.training.metrics import PairSums
from raydpo.training.pairs import TrainingPairs
from raydpo.training.sample import greedy_answers
from raydpo.training.schedule import learning_rate, warmup_steps

__all__ = ["Hooks", "Step", "TrainJob", "TrainSummary", "prepare_step", "train_policy", "train_step"]


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """What to train.

    Attributes:
        train: the settings.
        shuffle: ``data.shuffle``.
        policy: the policy as it starts.
        policy_identity: digest of its identity, at the precision of training.
        reference_identity: digest of the identity of the cached log-probs.
        starts_as_reference: whether the two are the same function but for rounding.
        coarser_dtype: the coarser of the two precisions.
        fingerprint: everything that the result depends on, by name; a checkpoint of another one is refused.
        work: what a position, an attended key and a predicted token cost, for even shares.
        tokens_per_batch: in place of ``train.tokens_per_batch``, after that has run out of memory.
        memory_share: part of its device's memory that belongs to one worker.
        sample_prompts: (text to show, token ids) of prompts to answer before and after.
    """

    train: TrainConfig
    shuffle: bool
    policy: PolicySpec
    policy_identity: str
    reference_identity: str
    starts_as_reference: bool
    coarser_dtype: str
    fingerprint: Mapping[str, Any]
    work: Work = POSITIONS_ONLY
    tokens_per_batch: int | None = None
    memory_share: float = 1.0
    sample_prompts: tuple[tuple[str, np.ndarray], ...] = ()
    sample_stop: tuple[int, ...] = ()


class Hooks(Protocol):
    """What the loop tells the outside. Rows are the same on every rank; all ranks call all hooks."""

    def begin(self, first_step: int, total_steps: int, facts: Mapping[str, Any]) -> None:
        """Training (re)starts after ``first_step`` finished steps."""

    def step(self, row: Mapping[str, float]) -> None:
        """A step is done."""

    def evaluated(self, row: Mapping[str, float]) -> None:
        """A held-out evaluation is done."""

    def checkpoint(self, directory: Path, step: int) -> None:
        """This rank's share of a checkpoint lies in ``directory``; return when it is safe."""

    def note(self, line: str) -> None:
        """Something to tell the user."""


@dataclass
class TrainSummary:
    """What a finished training knows of itself."""

    steps: int
    pairs: int
    seconds: float
    tokens_per_second: float
    tokens_per_batch: int = 0
    gate: str | None = None
    samples_before: list[list[int]] = field(default_factory=list)
    samples_after: list[list[int]] = field(default_factory=list)


def train_policy(job: TrainJob, pairs: TrainingPairs, held_out: TrainingPairs | None, engine: PolicyEngine, hooks: Hooks,
                 checkpoint: Path | None, scratch: Path) -> TrainSummary:
    """Train ``engine``'s policy to the last step.

    Args:
        checkpoint: directory of a checkpoint to continue from, or None to begin.
        scratch: local directory for checkpoints in the making.

    Raises:
        GateError: if the stored log-probs are not the starting policy's.
        TrainError: if a loss or gradient is not finite, or the checkpoint is of another run.
        DeviceMemoryError: if a micro-batch does not fit.
    """
    train = job.train
    summary = TrainSummary(0, 0, 0.0, 0.0)
    done = 0
    hooks.note(engine.layout_line)
    if checkpoint is not None:
        state = load_checkpoint(engine, checkpoint, job.fingerprint)
        done, summary = state.step, TrainSummary(**state.summary)
        if (state.world_size, state.zero) != (engine.world_size, engine.zero):
            hooks.note(f"the checkpoint of step {done} was made by {state.world_size} worker(s) under ZeRO {state.zero}, now "
                       f"{engine.world_size} under ZeRO {engine.zero} go on: the same pairs in every step, losses equal but "
                       "for the order of sums")
    # A resumed run keeps the budget it began with: the same micro-batches, hence the same bits.
    budget = summary.tokens_per_batch = _tokens_per_batch(job, engine, summary, hooks)
    plan = BatchPlan(pairs.shapes, pairs.sources, pairs.weights, seed=train.seed, pairs_per_step=train.pairs_per_step,
                     tokens_per_batch=budget, world_size=engine.world_size, shuffle=job.shuffle, epochs=train.epochs,
                     steps=train.steps, layout=engine.module.method.layout, work=job.work)
    hooks.begin(done, plan.total_steps, {"pairs": len(pairs), "steps_per_epoch": plan.steps_per_epoch,
                                         "world_size": engine.world_size,
                                         "held_out": 0 if held_out is None else len(held_out)})
    if checkpoint is None:
        summary.gate = _gate(job, plan, pairs, engine, hooks)
        if held_out is not None:
            hooks.evaluated({"step": 0} | evaluate(engine, held_out, train, budget))
        summary.samples_before = _samples(job, engine)

    start, tokens_before = time.perf_counter(), summary.tokens_per_second * summary.seconds
    seconds_before, tokens = summary.seconds, 0.0
    for step in prefetch(range(done, plan.total_steps), lambda number: prepare_step(number, plan, pairs, engine), ahead=1):
        row = train_step(step, plan, pairs, engine, train)
        done += 1
        tokens += row["tokens"]
        summary.steps, summary.pairs = done, summary.pairs + int(row["pairs"])
        summary.seconds = seconds_before + time.perf_counter() - start
        summary.tokens_per_second = (tokens_before + tokens) / summary.seconds
        if done == 1 and job.starts_as_reference:
            _check_first_loss(row["loss"], job, hooks)
        hooks.step({"step": done} | row)
        last = done == plan.total_steps
        if held_out is not None and (last or done % train.eval_every == 0):
            hooks.evaluated({"step": done} | evaluate(engine, held_out, train, budget))
        if last:
            summary.samples_after = _samples(job, engine)
        if last or done % train.checkpoint_every == 0:
            hooks.checkpoint(save_checkpoint(engine, scratch, done, job.fingerprint, summary), done)
    return summary


@dataclass(frozen=True)
class Step:
    """One optimizer step: its number from 0, the row numbers of its pairs on all ranks, this rank's micro-batches."""

    number: int
    rows: np.ndarray
    batches: list[tuple[MicroBatch, Layout]]


def prepare_step(number: int, plan: BatchPlan, pairs: TrainingPairs, engine: PolicyEngine) -> Step:
    """Lay out step ``number``, counted from 0; may run in another thread than the one that computes."""
    return Step(number, plan.pairs(number), [(batch, engine.lay_out(pairs.groups(batch.pairs)))
                                             for batch in plan.micro_batches(number, engine.rank)])


def train_step(step: Step, plan: BatchPlan, pairs: TrainingPairs, engine: PolicyEngine,
               train: TrainConfig) -> dict[str, float]:
    """One optimizer step; returns its metrics, averaged over the step's pairs on all ranks.

    Shapes: B = pairs of a micro-batch, N = its completion tokens.

    Raises:
        TrainError: if the loss or the gradient is not finite.
    """
    start = time.perf_counter()
    number, rows = step.number, step.rows
    sums = PairSums(pairs.source_names, engine.device)
    for index, (batch, layout) in enumerate(step.batches):
        with _explained_memory(plan.tokens_per_batch):
            logps_N = engine.logps(layout)
            logps = pair_logps(pairs, batch.pairs, logps_N)
            loss = preference_loss(train.loss, logps, beta=train.beta, label_smoothing=train.label_smoothing)  # [B]
            # The mean over the step's pairs, whichever rank and micro-batch they are in; a stand-in weighs nothing.
            share = loss.losses.sum() / len(rows) * batch.counts
            engine.backward(share.float(), last=index == len(step.batches) - 1)
        if batch.counts:
            sums.add(loss, logps, torch.from_numpy(pairs.sources[list(batch.pairs)]).long().to(engine.device))
    engine.sum_over_ranks(sums.values)
    metrics = sums.metrics()
    if not np.isfinite(metrics["loss"]):
        raise TrainError(f"the loss of step {number + 1} is {metrics['loss']}; its pairs are {_names(pairs, rows)}. The "
                         "weights were not updated. Lower train.lr, or look at these pairs with 'raydpo show'")
    rate = learning_rate(number, peak=train.lr, schedule=train.schedule, total_steps=plan.total_steps,
                         warmup=warmup_steps(train.warmup, plan.total_steps))
    grad_norm = engine.step(rate)
    if not np.isfinite(grad_norm):
        raise TrainError(f"the gradient norm of step {number + 1} is {grad_norm}; its pairs are {_names(pairs, rows)}. "
                         "Lower train.lr, or look at these pairs with 'raydpo show'")
    seconds = time.perf_counter() - start
    # Each prompt token of a pair counts once, however often it is computed.
    tokens = float((pairs.prompt_tokens[rows] + pairs.chosen_tokens[rows] + pairs.rejected_tokens[rows]).sum())
    return metrics | {"grad_norm": grad_norm, "learning_rate": rate, "epoch": (number + 1) / plan.steps_per_epoch,
                      "pairs": float(len(rows)), "tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds,
                      "pairs_per_second": len(rows) / seconds, "peak_memory_bytes": used_memory(engine.device)}


@contextlib.contextmanager
def _explained_memory(tokens_per_batch: int) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceMemoryError(f"{tokens_per_batch} token positions a micro-batch do not fit in memory: "
                                f"{str(error).splitlines()[0][:200]}. Set train.tokens_per_batch lower, or "
                                "train.gradient_checkpointing=true") from error


def _tokens_per_batch(job: TrainJob, engine: PolicyEngine, summary: TrainSummary, hooks: Hooks) -> int:
    if job.tokens_per_batch is not None:
        return job.tokens_per_batch
    if job.train.tokens_per_batch != "auto":
        return job.train.tokens_per_batch
    if summary.tokens_per_batch:
        return summary.tokens_per_batch
    budget = engine.find_budget(job.memory_share)
    hooks.note(budget.line())
    return budget.tokens


def _gate(job: TrainJob, plan: BatchPlan, pairs: TrainingPairs, engine: PolicyEngine, hooks: Hooks) -> str:
    if not job.starts_as_reference:
        line = ("step-0 gate: the policy starts from another model than the reference "
                f"{job.reference_identity}, so cached and live log-probs are not compared")
    else:
        rows = gate_rows(pairs, plan.pairs(0), count=job.train.gate_pairs, seed=job.train.seed)
        comparison = compare(engine, pairs, rows, plan.tokens_per_batch)
        line = judge(comparison, pairs, job.train, dtype=job.coarser_dtype, policy=job.policy_identity,
                     reference=job.reference_identity).line()
    hooks.note(line)
    return line


def _check_first_loss(loss: float, job: TrainJob, hooks: Hooks) -> None:
    expected = expected_first_loss(job.train)
    tolerance = max(1.0, abs(expected)) * (1e-5 if job.coarser_dtype == "float32" else 1e-3)
    gap = abs(loss - expected)
    line = f"first loss {loss:.6f}, {gap:.1e} from {expected:.6f}, the loss of a policy that is the reference"
    hooks.note(line if gap <= tolerance else f"warning: {line} (expected within {tolerance:.0e}): policy and reference "
               "round differently; score.dtype=float32 and model.dtype=float32 remove it")


def _samples(job: TrainJob, engine: PolicyEngine) -> list[list[int]]:
    return greedy_answers(engine, [prompt for _, prompt in job.sample_prompts], job.train.sample_tokens, job.sample_stop)


def _names(pairs: TrainingPairs, rows: Sequence[int]) -> str:
    names = [pairs.ids[int(row)].as_py() for row in rows[:5]]
    return ", ".join(names) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
