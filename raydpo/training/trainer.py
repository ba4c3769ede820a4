"""The training of one policy on one rank, from the first step to the last. Does not use Ray."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raydpo.config import TrainConfig
from raydpo.data.plan import BatchPlan
from raydpo.errors import ConfigError, TrainError
from raydpo.losses import Objective, ObjectiveState
from raydpo.model.budget import PROBES, TIGHT, before_first_step, share_of_first_step
from raydpo.rundir.watch import TrainingWatch
from raydpo.training.checkpoint.files import load_checkpoint, load_earlier
from raydpo.training.checkpoint.preemption import PreemptionGuard
from raydpo.training.checkpoint.saver import CheckpointSaver
from raydpo.training.clock import StepClock
from raydpo.training.evaluate import Comparison, Gaps, compare, evaluate
from raydpo.training.gate import GateReport, StepGate, expected_first_loss, gate_rows, judge
from raydpo.training.hooks import TrainHooks
from raydpo.training.job import TrainJob, TrainSummary
from raydpo.training.pairs import TrainingPairs
from raydpo.training.policy.engine import Engine
from raydpo.training.policy.sample import greedy_answers
from raydpo.training.schedule import Schedule
from raydpo.training.step import Stepper, StepRequests, StepResult, explained_memory

__all__ = ["Trainer", "train_policy"]

HELD_OUT_PAIRS = 4
"""Held-out pairs that the gate scores again, where their stored log-probs are the first evaluation."""


def train_policy(
    job: TrainJob,
    pairs: TrainingPairs,
    held_out: TrainingPairs | None,
    engine: Engine,
    hooks: TrainHooks,
    checkpoint: Path | None,
    scratch: Path,
    earlier: Path | None = None,
) -> TrainSummary:
    """Train the policy of ``engine`` to the last step, or until ``hooks`` requests a stop. Either ends with a checkpoint.

    Args:
        pairs: pairs to train on.
        held_out: pairs to evaluate on, or None.
        checkpoint: directory of the checkpoint to continue from, or None to begin.
        scratch: directory in which checkpoints are written before they are uploaded.
        earlier: directory of the checkpoint of an earlier round whose weights and moments a new training begins with.

    Raises:
        ConfigError: if the checkpoint is of a run with other settings, ``train.keep_best`` names no metric, or the objective
            needs log-probs of tokens where only sums are known, or if the disk has no room for a checkpoint.
        GateError: if the stored log-probs are not those of the starting policy.
        TrainError: if too many losses or gradients in a row are not finite, if the last checkpoint cannot be
            stored, or if the one to continue from is damaged.
        DeviceMemoryError: if memory runs out.
    """
    train, objective, continued = job.train, Objective(job.train), job.continued
    for each in (pairs, held_out):
        _check_tokens(each, train)
    hooks.note(engine.layout_line)
    if train.router_aux_loss_coef:
        hooks.note(f"router loss: {train.router_aux_loss_coef:g} times aux_loss is added to the loss")
    if engine.adapters_line is not None:
        hooks.note(engine.adapters_line)
    fused = bool(engine.module.head.fused)
    if pairs.has_reference and job.reference_fused - {fused}:
        hooks.note(_differently_fused(job, fused=fused))
    if checkpoint is not None:
        summary = _resumed(job, engine, hooks, checkpoint)
    else:
        summary = TrainSummary() if earlier is None else _carried(engine, hooks, earlier)
    summary.load_seconds, summary.load_bytes = engine.load_seconds, engine.load_bytes
    hooks.note(
        f"policy loaded in {engine.load_seconds:.1f} s{', each worker its share' if engine.zero == 3 else ''}; at most "
        f"{engine.load_bytes / 1e9:.2f} GB of host memory a worker"
    )
    hooks.phase("measuring memory")
    # A resumed run keeps the budget it began with: the same micro-batches, hence the same bits.
    summary.tokens_per_batch = _tokens_per_batch(job, engine, summary, hooks)
    plan = BatchPlan(
        pairs.shapes_of,
        pairs.sources,
        pairs.weights,
        seed=train.seed,
        pairs_per_step=train.pairs_per_step,
        tokens_per_batch=summary.tokens_per_batch * engine.sequence_parallel,
        world_size=engine.replicas,
        shuffle=job.shuffle,
        epochs=train.epochs,
        steps=train.steps,
        layout=engine.module.method.layout,
        work=job.work,
        starts=pairs.starts,
        first=0 if continued is None else continued.position,
    )
    facts = {"pairs": pairs.count, "steps_per_epoch": plan.steps_per_epoch, "world_size": engine.world_size}
    facts |= {"unit": pairs.unit, "held_out": 0 if held_out is None else held_out.count}
    hooks.begin(summary.steps, plan.total_steps, facts)
    schedule = None
    if continued is not None and continued.total is not None:
        schedule = Schedule(train, continued.total, continued.first)
    memory = ObjectiveState(**summary.memory)
    stepper = Stepper(train, plan, pairs, engine, objective, StepClock(engine.device), memory, schedule)
    saver = CheckpointSaver(engine, hooks, scratch, job.fingerprint)
    if summary.steps < plan.total_steps:
        saver.check_room()
    watch, guard = TrainingWatch(summary.warned), PreemptionGuard(engine, hooks, train.preemption_every)
    try:
        Trainer(job, stepper, engine, held_out, hooks, saver, watch, guard, summary).run(begins=checkpoint is None)
    finally:
        saver.close()
    return summary


@dataclass
class Trainer:
    """Runs the steps of a training, with its step-0 gate, evaluations and checkpoints. All ranks call the same methods.

    Attributes:
        stepper: takes the optimizer steps.
        held_out: pairs to evaluate on, or None.
        saver: makes the checkpoints.
        watch: gives warnings about the metrics.
        guard: makes a checkpoint when a machine of the run is about to be preempted.
        summary: progress of the training, updated in place.
    """

    job: TrainJob
    stepper: Stepper
    engine: Engine
    held_out: TrainingPairs | None
    hooks: TrainHooks
    saver: CheckpointSaver
    watch: TrainingWatch
    guard: PreemptionGuard
    summary: TrainSummary

    def run(self, *, begins: bool) -> None:
        """Train to the end.

        Args:
            begins: whether the run starts with its first step. Then the stored log-probs are checked, and the policy is
                evaluated and sampled, before that step.
        """
        gate = None
        if begins:
            self.hooks.phase("step-0 gate")
            with self.stepper.explained_memory("the step-0 gate"):
                gate = self.gate()
            self.hooks.phase("first evaluation")
            self.evaluate(0)
            self.summary.samples_before = self._samples()
        self.hooks.phase("first step")
        self._take_steps(gate)

    def gate(self) -> StepGate | None:
        """Compare stored log-probs with those of the starting policy, except those of the first step's pairs. Return what
        compares these within the step; None if there is nothing to compare.

        Raises:
            GateError: if they differ by more than rounding.
        """
        job, plan, pairs = self.job, self.stepper.plan, self.stepper.pairs
        if not pairs.has_reference:
            line = f"step-0 gate: loss {job.train.loss_text} has no reference, so there is nothing to compare"
        elif not job.starts_as_reference:
            line = f"step-0 gate: the policy starts from another model than the reference {job.reference_identity}, so "
            line += "cached and live log-probs are not compared"
            if job.continued is not None:
                line = (
                    f"step-0 gate: the policy starts as {job.continued.begins_as}, not as the reference "
                    f"{job.reference_identity}; {job.continued.compared}"
                )
        else:
            seed, first = job.train.seed, np.unique(plan.pairs(0))
            others = self._compared(pairs, gate_rows(pairs, first, count=job.train.gate_pairs, seed=seed))
            if (held_out := self._stored_held_out()) is not None:
                self._compared(held_out, gate_rows(held_out, first[:0], count=HELD_OUT_PAIRS, seed=seed))
            return StepGate(Gaps(self.engine, pairs, first), lambda found: sum(others, start=self._judged(pairs, found)))
        self._gated(line)
        return None

    def _gated(self, line: str) -> None:
        self.summary.gate = line
        self.hooks.note(line)

    def _compared(self, pairs: TrainingPairs, rows: Sequence[int]) -> list[GateReport]:
        """Compute ``rows``, if there are any, and compare them."""
        tokens = self.stepper.plan.tokens_per_batch
        return [self._judged(pairs, compare(self.engine, pairs, rows, tokens))] if rows else []

    def _judged(self, pairs: TrainingPairs, found: Comparison) -> GateReport:
        job = self.job
        beta, identities = self.stepper.schedule.beta(0), (str(job.policy.identity), job.reference_identity)
        return judge(found, pairs, self.stepper.objective, beta, job.coarser_dtype, *identities)

    def _stored_held_out(self) -> TrainingPairs | None:
        """The held-out pairs, if their stored log-probs are those of the starting policy at its own precision."""
        if self.held_out is None or not self.held_out.has_reference:
            return None
        return self.held_out if self.job.policy.identity == self.job.reference_identity else None

    def evaluate(self, step: int) -> None:
        """Measure the held-out pairs, if there are any, after ``step`` finished steps.

        Raises:
            ConfigError: if ``train.keep_best`` is none of the metrics.
        """
        if self.held_out is None:
            return
        # The beta is that of the last step.
        beta, plan = self.stepper.schedule.beta(max(0, step - 1)), self.stepper.plan
        with self.stepper.explained_memory("an evaluation"):
            row = evaluate(
                self.engine,
                self.held_out,
                self.stepper.objective,
                beta,
                self.stepper.memory,
                plan.tokens_per_batch,
                as_reference=step == 0 and self._stored_held_out() is not None,
            )
        self.summary.scores = {name: value for name, value in row.items() if name.startswith("eval_")}
        wanted = self.job.train.keep_best
        if wanted is not None and wanted not in self.summary.scores:
            raise ConfigError(
                f"train.keep_best is {wanted!r}, which no evaluation measures; choose one of "
                f"{', '.join(sorted(self.summary.scores))}"
            )
        self.hooks.evaluated({"step": step} | row)

    def _samples(self) -> list[list[int]]:
        prompts = [ids for _, ids in self.job.sample_prompts]
        with self.stepper.explained_memory("an answer to a sample prompt"):
            return greedy_answers(self.engine, prompts, self.job.train.sample_tokens, self.job.sample_stop)

    def _take_steps(self, gate: StepGate | None) -> None:
        train, summary, clock, total_steps = self.job.train, self.summary, self.stepper.clock, self.stepper.plan.total_steps
        start, before = time.perf_counter(), dataclasses.replace(summary)
        tokens = 0.0
        steps = self.stepper.prepared(summary.steps)
        allocated = before_first_step(self.engine.device)
        clock.lap()  # gate and first evaluation are no part of the first step
        while summary.steps < total_steps:
            with clock.phase("data"):
                step = next(steps)
            result = self.stepper.take(step, self._wishes(), gate)
            if gate is not None and gate.report is not None:
                self._gated(gate.report.line())
                gate = None
            row, done = result.row, step.number + 1
            tokens += row["tokens"]
            summary.steps = done
            summary.pairs += int(row["pairs"])
            summary.step_seconds += row["seconds"]
            summary.tokens_per_second = (before.tokens_per_second * before.step_seconds + tokens) / summary.step_seconds
            summary.memory = dataclasses.asdict(self.stepper.memory)
            if done == 1:
                self._check_first_loss(result)
                if self._halve_tight_budget(allocated):
                    steps = self.stepper.prepared(done)
            self.hooks.step({"step": done} | row)
            for line in self.watch.look(done, row):
                self.hooks.note(line)
            self._count_skipped(result.skipped)

            with clock.phase("checkpoint"):
                self.saver.settle(all_stored=not result.uploading)
            last = done == total_steps
            if last or done % train.eval_every == 0:
                with clock.phase("evaluation"):
                    self.evaluate(done)
            if last:
                summary.samples_after = self._samples()
            stop = (result.stop or done == self.job.stop_after) and not last
            summary.seconds = before.seconds + time.perf_counter() - start  # the checkpoint records it
            with clock.phase("checkpoint"):
                self._checkpoint(result, done, ends=last or stop)
                summary.checkpoint_seconds = before.checkpoint_seconds + self.saver.seconds
            summary.seconds = before.seconds + time.perf_counter() - start
            self.guard.wait(done)
            if stop:
                summary.interrupted = True
                return

    def _wishes(self) -> StepRequests:
        minutes = self.job.train.checkpoint_minutes
        return StepRequests(
            stop=self.hooks.stop_requested(),
            uploading=self.saver.busy,
            checkpoint=self.engine.rank == 0 and minutes is not None and self.saver.minutes_since >= minutes,
        )

    def _checkpoint(self, result: StepResult, done: int, *, ends: bool) -> None:
        """Make a checkpoint after ``done`` steps if one is due. If the session ``ends`` here, it must succeed."""
        train, metrics = self.job.train, self.summary.scores | {"loss": result.row["loss"]}
        notice = self.guard.ask(done, result.row["time/step"], self.saver.last_seconds)
        if ends:
            self.saver.save_last(done, self.summary, metrics)
        elif notice:
            self.saver.save(done, self.summary, metrics)
        elif result.checkpoint or (train.checkpoint_minutes is None and done % train.checkpoint_every == 0):
            self.saver.begin(done, self.summary, metrics)
        self.summary.checkpoint_bytes = self.saver.bytes or self.summary.checkpoint_bytes

    def _check_first_loss(self, result: StepResult) -> None:
        """Report the gap between the first loss and the loss of a policy that equals the reference. Warn if it is more than
        rounding."""
        job, stepper = self.job, self.stepper
        if job.continued is not None and not job.starts_as_reference and stepper.pairs.has_reference:
            self.hooks.note(f"first loss {result.row['loss']:.6f} = these pairs under {job.continued.begins_as}")
        # WPO's weights depend on the policy, so the loss is not known beforehand.
        if not job.starts_as_reference or not stepper.pairs.has_reference or result.skipped or job.train.use_weighting:
            return
        loss, beta = result.row["loss"], stepper.schedule.beta(0)
        expected = expected_first_loss(stepper.objective, stepper.pairs, stepper.plan.pairs(0), beta)
        tolerance = max(1.0, abs(expected)) * (1e-5 if job.coarser_dtype == "float32" else 1e-3)
        gap = abs(loss - expected)
        line = f"first loss {loss:.6f}, {gap:.1e} from {expected:.6f}, the loss of a policy that is the reference"
        if gap > tolerance:
            line = (
                f"warning: {line} (expected within {tolerance:.0e}): policy and reference round differently; "
                "score.dtype=float32 and model.dtype=float32 remove it"
            )
        self.hooks.note(line)

    def _halve_tight_budget(self, before: float) -> bool:
        """Halve a measured budget for the steps after the first one, if that left too little memory on any rank. Returns
        whether it did; a budget that was set is only warned about.

        Args:
            before: bytes that were allocated before the first step.
        """
        engine, plan, job = self.engine, self.stepper.plan, self.job
        share = share_of_first_step(engine.device, before, job.memory_share)
        if share is None or (most := max(engine.gather_objects(share))) <= TIGHT:
            return False
        now = plan.tokens_per_batch // engine.sequence_parallel
        half = max(1, now // 2)
        told = f"warning: steps with micro-batches of {now} positions take {most:.0%} of a GPU's memory"
        if job.tokens_per_batch is not None or job.train.tokens_per_batch != "auto":
            self.hooks.note(f"{told}, so another one may not fit. Set train.tokens_per_batch={half} if memory runs out")
            return False
        self.hooks.note(f"{told}; continuing with {half}. Set train.tokens_per_batch={half} to start with that")
        plan.tokens_per_batch, self.summary.tokens_per_batch = half * engine.sequence_parallel, half
        return True

    def _count_skipped(self, skipped: str | None) -> None:
        """Warn about a step that was not taken. End the run after more than ``train.max_skipped`` such steps in a row."""
        summary, most = self.summary, self.job.train.max_skipped
        if skipped is None:
            summary.skipped_in_a_row = 0
            return
        summary.skipped += 1
        summary.skipped_in_a_row += 1
        if summary.skipped_in_a_row > most:
            self.saver.finish()  # the checkpoint under way is of a step that was taken
            raise TrainError(
                f"{skipped}. That was {summary.skipped_in_a_row} such step(s) in a row, more than "
                f"train.max_skipped {most}; none of them was taken, and the last checkpoint is good. Lower "
                "train.lr, or look at these pairs with 'raydpo show'"
            )
        self.hooks.note(f"warning: {skipped}. The step was not taken")


def _resumed(job: TrainJob, engine: Engine, hooks: TrainHooks, checkpoint: Path) -> TrainSummary:
    """Load a checkpoint into ``engine``. Return the summary in it."""
    state = load_checkpoint(engine, checkpoint, job.fingerprint)
    if (state.world_size, state.zero) != (engine.world_size, engine.zero):
        hooks.note(
            f"the checkpoint of step {state.step} was made by {state.world_size} worker(s) under ZeRO {state.zero}, "
            f"now {engine.world_size} continue under ZeRO {engine.zero}; every step has the same pairs, and losses "
            "are equal up to the order of sums"
        )
    return TrainSummary(**state.summary)


def _carried(engine: Engine, hooks: TrainHooks, earlier: Path) -> TrainSummary:
    """Load the weights and moments that an earlier round ended with. Return the beginning of a summary."""
    state = load_earlier(engine, earlier)
    hooks.note(f"weights and moments continue those of the round before after its step {state.step}")
    # The same micro-batches as before, hence the same bits as one training over both rounds.
    kept = {name: state.summary[name] for name in ("memory", "tokens_per_batch")}
    return TrainSummary(**kept)


def _differently_fused(job: TrainJob, *, fused: bool) -> str:
    """A warning that the stored log-probs round differently from a policy that computes with ``fused`` functions or not."""
    how = {True: "with fused functions", False: "without fused functions"}
    as_scored = f"set model.fused={str(not fused).lower()}, or " if job.policy.fused is fused else ""
    return (
        f"warning: stored log-probs were computed {how[not fused]}, the policy computes {how[fused]} (model.fused "
        f"{str(job.policy.fused).lower()}): both round differently in every pair, and the step-0 gate and the first loss "
        f"contain that; {as_scored}score into another cache (cache.uri)"
    )


def _tokens_per_batch(job: TrainJob, engine: Engine, summary: TrainSummary, hooks: TrainHooks) -> int:
    """Return the token positions of a micro-batch: those that are set, else those of the checkpoint, else measured."""
    if job.tokens_per_batch is not None:
        return job.tokens_per_batch
    if job.train.tokens_per_batch != "auto":
        return job.train.tokens_per_batch
    if summary.tokens_per_batch:
        return summary.tokens_per_batch
    with explained_memory(PROBES[-1], "the measurement of a budget"):
        budget = engine.find_budget(job.memory_share)
    hooks.note(budget.line())
    return budget.tokens


def _check_tokens(pairs: TrainingPairs | None, train: TrainConfig) -> None:
    """Refuse pairs without the reference's log-probs of tokens if the objective is LD-DPO, which needs them. Imported pairs
    have sums only."""
    if train.ld_alpha is None or pairs is None:
        return
    lacking = pairs.sums_only()
    if len(lacking):
        first = ", ".join(pairs.ids[int(row)].as_py() for row in lacking[:3])
        raise ConfigError(
            f"train.ld_alpha is {train.ld_alpha:g}, but {len(lacking):,} of {len(pairs):,} pairs have "
            f"only an imported sum of the reference's log-probs (first: {first}); set it to null, or score them "
            "with 'raydpo score' into another cache (cache.uri)"
        )
