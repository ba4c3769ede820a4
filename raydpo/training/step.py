"""One optimizer step: forward, loss, backward, one all-reduce of everything that is counted, clip, update."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from raydpo.config import TrainConfig
from raydpo.data.plan import BatchPlan, MicroBatch
from raydpo.errors import DeviceMemoryError
from raydpo.losses import Memory, Objective
from raydpo.model.budget import is_out_of_memory, used_memory
from raydpo.model.layout import Layout
from raydpo.training.clock import StepClock
from raydpo.training.engine import PolicyEngine
from raydpo.training.evaluate import pair_logps
from raydpo.training.metrics import PairSums
from raydpo.training.pairs import TrainingPairs
from raydpo.training.schedule import learning_rate, warmup_steps
from raydpo.training.whole_step import look_at_step

__all__ = ["Step", "StepResult", "Wishes", "prepare_step", "train_step"]


@dataclass(frozen=True)
class Step:
    """One optimizer step: its number from 0, the row numbers of its pairs on all ranks, this rank's micro-batches."""

    number: int
    rows: np.ndarray
    batches: list[tuple[MicroBatch, Layout]]


@dataclass(frozen=True)
class Wishes:
    """What one rank would like all ranks to do after this step; summed over ranks with the metrics."""

    stop: bool = False
    checkpoint: bool = False
    storing: bool = False


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Attributes:
        row: its metrics, averaged over its pairs on all ranks.
        stop, checkpoint, storing: whether any rank wished so.
        skipped: why the weights were left alone (a loss or gradient that is not finite), or None.
        memory: what the objective knows now.
    """

    row: dict[str, float]
    stop: bool
    checkpoint: bool
    storing: bool
    skipped: str | None
    memory: Memory


def prepare_step(number: int, plan: BatchPlan, pairs: TrainingPairs, engine: PolicyEngine) -> Step:
    """Lay out step ``number``, counted from 0; may run in another thread than the one that computes."""
    return Step(number, plan.pairs(number), [(batch, engine.lay_out(pairs.groups(batch.pairs)))
                                             for batch in plan.micro_batches(number, engine.replica)])


def train_step(step: Step, plan: BatchPlan, pairs: TrainingPairs, engine: PolicyEngine, train: TrainConfig,
               objective: Objective, memory: Memory, clock: StepClock, wishes: Wishes | None = None) -> StepResult:
    """One optimizer step. Where its loss or gradient is not finite on any rank, no rank takes it.

    Raises:
        DeviceMemoryError: if a micro-batch does not fit.
    """
    number, rows = step.number, step.rows
    beta, mean_chosen_tokens = train.beta_at(number, plan.total_steps), float(pairs.chosen_tokens[rows].mean())
    sums = PairSums(pairs.source_names, engine.device, reference=pairs.has_reference)
    with _explained_memory(plan.tokens_per_batch // engine.sequence_parallel):
        whole = look_at_step(objective, rows, step.batches, pairs, engine, beta, memory, clock)
    losses: list[tuple[MicroBatch, Tensor]] = []
    for index, (batch, layout) in enumerate(step.batches):
        last = index == len(step.batches) - 1
        with _explained_memory(plan.tokens_per_batch // engine.sequence_parallel):
            with clock.phase("forward"):
                logps = pair_logps(engine, layout, pairs, batch.pairs, train, mean_chosen_tokens)
                if whole is None:
                    loss = objective(logps, beta)
                    total = loss.losses.sum()
                else:
                    loss, total = whole.part(batch.pairs, logps)
                # The mean over the step's pairs, whichever rank and micro-batch they are in; a stand-in weighs nothing.
                share = (total / len(rows) * batch.counts).float()
                # A factor 1 that is NaN where a loss is not finite: so is then every gradient, and no rank steps.
                share = share * (1 + 0 * (share + loss.losses.sum().float()).detach())
            if last:
                with clock.phase("wait"):
                    engine.meet()
            with clock.phase("backward"):
                engine.backward(share, last=last)
        if batch.counts and engine.leads:
            sums.add(loss, logps, pairs.source_of(batch.pairs, engine.device))
            # In a whole step the pair to blame is the one with such log-probs, not the one whose quantile they spoil.
            blamed = loss.losses if whole is None else logps.chosen_logratio + logps.rejected_logratio
            losses.append((batch, blamed.detach()))
    metrics, (stop, checkpoint, storing), busy = _add_up(sums, wishes or Wishes(), clock.busy, engine)
    rate = learning_rate(number, peak=train.lr, schedule=train.schedule, total_steps=plan.total_steps,
                         warmup=warmup_steps(train.warmup, plan.total_steps))
    with clock.phase("optimizer"):
        grad_norm = engine.step(rate)
    what = "loss" if not np.isfinite(metrics["loss"]) else "gradient norm" if not np.isfinite(grad_norm) else None
    skipped = None if what is None else \
        f"the {what} of step {number + 1} is not finite; {_culprits(pairs, losses, what, engine)}"
    # Each prompt token of a pair counts once, however often it is computed.
    tokens = float((pairs.prompt_tokens[rows] + pairs.chosen_tokens[rows] + pairs.rejected_tokens[rows]).sum())
    times = clock.lap()
    seconds = sum(times[f"time/{phase}"] for phase in ("data", "forward", "backward", "optimizer", "wait", "other"))
    row = metrics | {"grad_norm": grad_norm, "learning_rate": rate, "epoch": (number + 1) / plan.steps_per_epoch,
                     "pairs": float(len(rows)), "tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds,
                     "pairs_per_second": len(rows) / seconds, "peak_memory_bytes": used_memory(engine.device),
                     "skipped": float(skipped is not None)} | times | _slowest(busy)
    if whole is not None:
        beta = whole.beta
        memory = memory if skipped else whole.memory
    if train.beta_moves:
        row["beta"] = beta
    return StepResult(row, stop > 0, checkpoint > 0, storing > 0, skipped, memory)


def _add_up(sums: PairSums, wishes: Wishes, busy: float, engine: PolicyEngine
            ) -> tuple[dict[str, float], list[float], list[float]]:
    """Metrics, wishes and every rank's busy seconds of the step before, in one all-reduce."""
    ranks, size = engine.world_size, sums.values.numel()
    rest = torch.zeros(3 + ranks, dtype=torch.float64)
    rest[:3] = torch.tensor([wishes.stop, wishes.checkpoint, wishes.storing], dtype=torch.float64)
    rest[3 + engine.rank] = busy
    everything = engine.sum_over_ranks(torch.cat((sums.values, rest.to(engine.device))))
    sums.values = everything[:size]
    rest = everything[size:].tolist()
    return sums.metrics(), rest[:3], rest[3:]


def _slowest(busy: Sequence[float]) -> dict[str, float]:
    if len(busy) < 2 or not min(busy):
        return {}
    slowest = int(np.argmax(busy))
    return {"slowest_rank": float(slowest), "slowest_lag": busy[slowest] / float(np.median(busy)) - 1}


def _culprits(pairs: TrainingPairs, losses: Sequence[tuple[MicroBatch, Tensor]], what: str, engine: PolicyEngine) -> str:
    """The pairs and ranks of a step that was not taken: those with such a loss, or all where only the gradient has it."""
    mine = [row for batch, values in losses for row, value in zip(batch.pairs, values.tolist(), strict=True)
            if what != "loss" or not np.isfinite(value)]
    everyone: list[str | None] = [None] * engine.world_size
    dist.all_gather_object(everyone, _names(pairs, mine) if mine else None)
    told = "; ".join(f"rank {rank}: {names}" for rank, names in enumerate(everyone) if names)
    return f"its pairs are {told}" if told else "no pair has such a loss by itself: their sum overflowed"


def _names(pairs: TrainingPairs, rows: Sequence[int]) -> str:
    names = [pairs.ids[int(row)].as_py() for row in rows[:5]]
    return ", ".join(names) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")


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
