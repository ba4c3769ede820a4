"""The training of one policy on one rank, from the first step to the last. No Ray in here."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from raydpo.config import TrainConfig
from raydpo.data.plan import BatchPlan
from raydpo.data.shapes import POSITIONS_ONLY, Work
from raydpo.errors import ConfigError, TrainError
from raydpo.losses import Memory, Objective
from raydpo.prefetch import prefetch
from raydpo.training.checkpoint import load_checkpoint
from raydpo.training.clock import StepClock
from raydpo.training.engine import PolicyEngine, PolicySpec
from raydpo.training.evaluate import compare, evaluate
from raydpo.training.gate import expected_first_loss, gate_rows, judge
from raydpo.training.hooks import Hooks
from raydpo.training.pairs import TrainingPairs
from raydpo.training.preemption import PreemptionGuard
from raydpo.training.sample import greedy_answers
from raydpo.training.saver import CheckpointSaver
from raydpo.training.step import Wishes, prepare_step, train_step
from raydpo.training.watch import TrainingWatch

__all__ = ["TrainJob", "TrainSummary", "train_policy"]


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
        stop_after: stop after this step, with a checkpoint; None = train to the end.
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
    stop_after: int | None = None
    sample_prompts: tuple[tuple[str, np.ndarray], ...] = ()
    sample_stop: tuple[int, ...] = ()


@dataclass
class TrainSummary:
    """What a training knows of itself; kept in its checkpoints.

    Attributes:
        seconds: of training, over all its sessions.
        load_seconds, load_bytes: see ``engine.PolicyEngine``, of the newest session.
        interrupted: whether someone stopped it before its last step.
        skipped: steps not taken because a loss or gradient was not finite.
        checkpoint_seconds: for which training stood still for checkpoints.
        checkpoint_bytes: size of the newest, over all workers.
        scores: the newest evaluation.
        warned: kinds of warnings given.
        memory: what the objective knows of the steps so far, see ``losses.Memory``.
    """

    steps: int
    pairs: int
    seconds: float
    tokens_per_second: float
    tokens_per_batch: int = 0
    gate: str | None = None
    load_seconds: float = 0.0
    load_bytes: float = 0.0
    interrupted: bool = False
    skipped: int = 0
    skipped_in_a_row: int = 0
    checkpoint_seconds: float = 0.0
    checkpoint_bytes: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    warned: list[str] = field(default_factory=list)
    memory: dict[str, float] = field(default_factory=dict)
    samples_before: list[list[int]] = field(default_factory=list)
    samples_after: list[list[int]] = field(default_factory=list)


def train_policy(job: TrainJob, pairs: TrainingPairs, held_out: TrainingPairs | None, engine: PolicyEngine, hooks: Hooks,
                 checkpoint: Path | None, scratch: Path) -> TrainSummary:
    """Train ``engine``'s policy to the last step, or until ``hooks`` wants it to stop; there is a checkpoint then.

    Args:
        checkpoint: directory of a checkpoint to continue from, or None to begin.
        scratch: local directory for checkpoints in the making.

    Raises:
        ConfigError: if the checkpoint is of a run with other settings, ``train.keep_best`` names no metric, or the objective
            asks for log-probs of tokens where only sums are known.
        GateError: if the stored log-probs are not the starting policy's.
        TrainError: if too many losses or gradients in a row are not finite, if the last checkpoint cannot be stored, or
            the one to begin from is of another run.
        DeviceMemoryError: if a micro-batch does not fit.
    """
    train, objective = job.train, Objective(job.train)
    for each in (pairs, held_out):
        _check_tokens(each, train)
    summary = TrainSummary(0, 0, 0.0, 0.0)
    hooks.note(engine.layout_line)
    if checkpoint is not None:
        state = load_checkpoint(engine, checkpoint, job.fingerprint)
        summary = TrainSummary(**state.summary)
        if (state.world_size, state.zero) != (engine.world_size, engine.zero):
            hooks.note(f"the checkpoint of step {state.step} was made by {state.world_size} worker(s) under ZeRO "
                       f"{state.zero}, now {engine.world_size} under ZeRO {engine.zero} go on: the same "
                       "pairs in every step, losses equal but for the order of sums")
    summary.load_seconds, summary.load_bytes = engine.load_seconds, engine.load_bytes
    hooks.note(f"policy loaded in {engine.load_seconds:.1f} s{', in shares' if engine.zero == 3 else ''}; at most "
               f"{engine.load_bytes / 1e9:.2f} GB of host memory a worker")
    # A resumed run keeps the budget it began with: the same micro-batches, hence the same bits.
    summary.tokens_per_batch = _tokens_per_batch(job, engine, summary, hooks)
    budget = summary.tokens_per_batch * engine.sequence_parallel
    plan = BatchPlan(pairs.shapes, pairs.sources, pairs.weights, seed=train.seed, pairs_per_step=train.pairs_per_step,
                     tokens_per_batch=budget, world_size=engine.replicas, shuffle=job.shuffle, epochs=train.epochs,
                     steps=train.steps, layout=engine.module.method.layout, work=job.work)
    hooks.begin(summary.steps, plan.total_steps, {"pairs": len(pairs), "steps_per_epoch": plan.steps_per_epoch,
                                                  "world_size": engine.world_size,
                                                  "held_out": 0 if held_out is None else len(held_out)})
    if checkpoint is None:
        summary.gate = _gate(job, plan, pairs, engine, objective, hooks)
        if held_out is not None:
            _evaluate(0, engine, held_out, job, plan, objective, summary, hooks)
        summary.samples_before = _samples(job, engine)
    saver = CheckpointSaver(engine, hooks, scratch, job.fingerprint)
    try:
        _train_steps(job, plan, pairs, held_out, engine, objective, hooks, saver, summary)
    finally:
        saver.close()
    return summary


def _train_steps(job: TrainJob, plan: BatchPlan, pairs: TrainingPairs, held_out: TrainingPairs | None, engine: PolicyEngine,
                 objective: Objective, hooks: Hooks, saver: CheckpointSaver, summary: TrainSummary) -> None:
    train, clock, watch = job.train, StepClock(engine.device), TrainingWatch(summary.warned)
    guard = PreemptionGuard(engine, hooks, train.preemption_every)
    start, before = time.perf_counter(), dataclasses.replace(summary)
    tokens = 0.0
    steps = iter(prefetch(range(summary.steps, plan.total_steps), lambda number: prepare_step(number, plan, pairs, engine),
                          ahead=1))
    while summary.steps < plan.total_steps:
        with clock.phase("data"):
            step = next(steps)
        minutes = train.checkpoint_minutes
        wishes = Wishes(stop=hooks.stop_requested(), storing=saver.busy,
                        checkpoint=engine.rank == 0 and minutes is not None and saver.minutes_since >= minutes)
        result = train_step(step, plan, pairs, engine, train, objective, Memory(**summary.memory), clock, wishes)
        row, summary.memory = result.row, dataclasses.asdict(result.memory)
        done = summary.steps = step.number + 1
        tokens += row["tokens"]
        summary.pairs += int(row["pairs"])
        summary.seconds = before.seconds + time.perf_counter() - start
        summary.tokens_per_second = (before.tokens_per_second * before.seconds + tokens) / summary.seconds
        # WPO's weights are of the policy: nothing beforehand tells them.
        if done == 1 and job.starts_as_reference and pairs.has_reference and not (result.skipped or train.use_weighting):
            expected = expected_first_loss(objective, pairs, step.rows, train.beta_at(0, plan.total_steps))
            _check_first_loss(row["loss"], expected, job, hooks)
        hooks.step({"step": done} | row)
        for line in watch.look(done, row):
            hooks.note(line)
        _count_skipped(result.skipped, summary, train, saver, hooks)

        with clock.phase("checkpoint"):
            saver.settle(all_stored=not result.storing)
        last = done == plan.total_steps
        if held_out is not None and (last or done % train.eval_every == 0):
            with clock.phase("evaluation"):
                _evaluate(done, engine, held_out, job, plan, objective, summary, hooks)
        if last:
            summary.samples_after = _samples(job, engine)
        notice = guard.ask(done, row["time/step"], saver.last_seconds)
        stop = (result.stop or done == job.stop_after) and not last
        due = result.checkpoint or (minutes is None and done % train.checkpoint_every == 0)
        with clock.phase("checkpoint"):
            if last or stop or due or notice:
                metrics = summary.scores | {"loss": row["loss"]}
                if last or stop:
                    saver.save_last(done, summary, metrics)
                elif notice:
                    saver.save(done, summary, metrics)
                else:
                    saver.begin(done, summary, metrics)
            summary.checkpoint_seconds = before.checkpoint_seconds + saver.seconds
            summary.checkpoint_bytes = saver.bytes or summary.checkpoint_bytes
        guard.wait(done)
        if stop:
            summary.interrupted = True
            return


def _count_skipped(skipped: str | None, summary: TrainSummary, train: TrainConfig, saver: CheckpointSaver,
                   hooks: Hooks) -> None:
    if skipped is None:
        summary.skipped_in_a_row = 0
        return
    summary.skipped += 1
    summary.skipped_in_a_row += 1
    if summary.skipped_in_a_row > train.max_skipped:
        saver.finish()  # it is of a step that was taken
        raise TrainError(f"{skipped}. That was {summary.skipped_in_a_row} such step(s) in a row, more than "
                         f"train.max_skipped {train.max_skipped}; none of them was taken, and the last checkpoint "
                         "is good. Lower train.lr, or look at these pairs with 'raydpo show'")
    hooks.note(f"warning: {skipped}. The step was not taken")


def _evaluate(step: int, engine: PolicyEngine, held_out: TrainingPairs, job: TrainJob, plan: BatchPlan, objective: Objective,
              summary: TrainSummary, hooks: Hooks) -> None:
    # With the beta of the last step that was taken.
    beta = job.train.beta_at(max(0, step - 1), plan.total_steps)
    row = evaluate(engine, held_out, objective, beta, Memory(**summary.memory), plan.tokens_per_batch)
    summary.scores = {name: value for name, value in row.items() if name.startswith("eval_")}
    wanted = job.train.keep_best
    if wanted is not None and wanted not in summary.scores:
        raise ConfigError(f"train.keep_best is {wanted!r}, which no evaluation measures; there are "
                          f"{', '.join(sorted(summary.scores))}")
    hooks.evaluated({"step": step} | row)


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


def _check_tokens(pairs: TrainingPairs | None, train: TrainConfig) -> None:
    """LD-DPO weighs tokens, so it must know the reference's log-prob of each."""
    if train.ld_alpha is None or pairs is None:
        return
    lacking = pairs.sums_only()
    if len(lacking):
        first = ", ".join(pairs.ids[int(row)].as_py() for row in lacking[:3])
        raise ConfigError(f"train.ld_alpha is {train.ld_alpha:g}, but of {len(lacking):,} of {len(pairs):,} pairs only the "
                          f"sum of the reference's log-probs was imported (first: {first}); set it to null, or score them "
                          "with 'raydpo score' into another cache (cache.uri)")


def _gate(job: TrainJob, plan: BatchPlan, pairs: TrainingPairs, engine: PolicyEngine, objective: Objective,
          hooks: Hooks) -> str:
    if not pairs.has_reference:
        line = f"step-0 gate: loss {job.train.loss_text} has no reference, so there is nothing to compare"
    elif not job.starts_as_reference:
        line = ("step-0 gate: the policy starts from another model than the reference "
                f"{job.reference_identity}, so cached and live log-probs are not compared")
    else:
        rows = gate_rows(pairs, plan.pairs(0), count=job.train.gate_pairs, seed=job.train.seed)
        comparison = compare(engine, pairs, rows, plan.tokens_per_batch)
        line = judge(comparison, pairs, objective, job.train.beta_at(0, plan.total_steps), dtype=job.coarser_dtype,
                     policy=job.policy_identity, reference=job.reference_identity).line()
    hooks.note(line)
    return line


def _check_first_loss(loss: float, expected: float, job: TrainJob, hooks: Hooks) -> None:
    tolerance = max(1.0, abs(expected)) * (1e-5 if job.coarser_dtype == "float32" else 1e-3)
    gap = abs(loss - expected)
    line = f"first loss {loss:.6f}, {gap:.1e} from {expected:.6f}, the loss of a policy that is the reference"
    hooks.note(line if gap <= tolerance else f"warning: {line} (expected within {tolerance:.0e}): policy and reference "
               "round differently; score.dtype=float32 and model.dtype=float32 remove it")


def _samples(job: TrainJob, engine: PolicyEngine) -> list[list[int]]:
    return greedy_answers(engine, [prompt for _, prompt in job.sample_prompts], job.train.sample_tokens, job.sample_stop)
