"""One optimizer step: forward, loss, backward, one all-reduce of everything that is counted, clip, update."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raydpo.config import TrainConfig
from raydpo.data.plan import BatchPlan, MicroBatch
from raydpo.data.prefetch import prefetch
from raydpo.errors import DeviceMemoryError, one_line
from raydpo.losses import Objective, ObjectiveState
from raydpo.model.budget import is_out_of_memory, used_memory
from raydpo.model.layout import Layout
from raydpo.training.clock import StepClock
from raydpo.training.evaluate import AllPairLogps, pair_logps
from raydpo.training.gate import StepGate
from raydpo.training.metrics import PairSums
from raydpo.training.pairs import TrainingPairs
from raydpo.training.policy.engine import StepEngine
from raydpo.training.router import RouterLoss
from raydpo.training.schedule import Schedule
from raydpo.training.whole_step import WholeStep

__all__ = ["Step", "StepRequests", "StepResult", "Stepper", "explained_memory"]


@dataclass(frozen=True)
class Step:
    """One optimizer step: its number from 0, the row numbers of its pairs on all ranks, the number of these pairs or of the
    ranked lists that they are, this rank's micro-batches."""

    number: int
    rows: np.ndarray
    count: int
    batches: list[tuple[MicroBatch, Layout]]


@dataclass(frozen=True)
class StepRequests:
    """Requests of one rank to all ranks after this step. They travel in the metrics' all-reduce.

    Attributes:
        stop: end the session, with a checkpoint.
        checkpoint: make a checkpoint.
        uploading: none; this rank is still uploading its share of the checkpoint before.
    """

    stop: bool = False
    checkpoint: bool = False
    uploading: bool = False


@dataclass(frozen=True)
class StepResult:
    """Result of a step.

    Attributes:
        row: its metrics, averaged over its pairs on all ranks.
        stop, checkpoint, uploading: whether any rank requested it, see ``StepRequests``.
        skipped: why the weights were left unchanged (a loss or gradient that is not finite), or None.
    """

    row: dict[str, float]
    stop: bool
    checkpoint: bool
    uploading: bool
    skipped: str | None


@dataclass
class Stepper:
    """Takes the optimizer steps of a plan.

    Attributes:
        plan: which pairs make up a step.
        memory: state of the objective after the last step that was taken.
        longer: the schedule over several trainings that this one is a part of; None = it has its own.
    """

    train: TrainConfig
    plan: BatchPlan
    pairs: TrainingPairs
    engine: StepEngine
    objective: Objective
    clock: StepClock
    memory: ObjectiveState
    longer: Schedule | None = None

    @functools.cached_property
    def schedule(self) -> Schedule:
        """Learning rate and beta of each step."""
        return self.longer or Schedule(self.train, self.plan.total_steps)

    def prepared(self, first: int = 0) -> Iterator[Step]:
        """All steps from number ``first``, counted from 0. Each is laid out in another thread while the one before it is
        computed."""
        return iter(prefetch(range(first, self.plan.total_steps), self._prepare, ahead=1))

    def _prepare(self, number: int) -> Step:
        batches = self.plan.micro_batches(number, self.engine.replica)
        laid_out = [(batch, self.engine.lay_out(self.pairs.groups(batch.pairs))) for batch in batches]
        return Step(number, self.plan.pairs(number), self.plan.count(number), laid_out)

    def take(self, step: Step, requests: StepRequests | None = None, gate: StepGate | None = None) -> StepResult:
        """Take one optimizer step. If its loss or gradient is not finite on any rank, no rank takes it.

        Args:
            gate: compares the step's log-probs with the stored ones, before the update.

        Raises:
            DeviceMemoryError: if memory runs out, in a micro-batch or in the update.
            GateError: if ``gate`` does not accept the log-probs.
        """
        with self.explained_memory("a step"):
            return self._take(step, requests or StepRequests(), gate)

    def _take(self, step: Step, requests: StepRequests, gate: StepGate | None) -> StepResult:
        train, engine, clock, number = self.train, self.engine, self.clock, step.number
        beta = self.schedule.beta(number)
        whole = self._first_pass(step, beta)
        router = RouterLoss.asked(engine, train)
        sums, losses = self._forward_and_backward(step, beta, whole, gate, router)
        if gate is not None:
            gate.close()
        metrics, (stop, checkpoint, uploading), busy = _add_up(sums, router, requests, clock.busy, engine)
        rate = self.schedule.rate(number)
        with clock.phase("optimizer"):
            grad_norm = engine.step(rate)
        what = "loss" if not np.isfinite(metrics["loss"]) else "gradient norm" if not np.isfinite(grad_norm) else None
        skipped = None if what is None else f"the {what} of step {number + 1} is not finite; {self._culprits(losses, what)}"
        if whole is not None:
            beta = whole.beta
            self.memory = self.memory if skipped else whole.memory
        facts, times = self._facts(step)
        row = metrics | {"grad_norm": grad_norm, "learning_rate": rate} | facts | {"skipped": float(skipped is not None)}
        row |= times | _slowest(busy) | ({"beta": beta} if train.beta_moves else {})
        return StepResult(row, stop > 0, checkpoint > 0, uploading > 0, skipped)

    def _first_pass(self, step: Step, beta: float) -> WholeStep | None:
        """Compute the log-probs of the whole step without gradients, if the objective needs them. All ranks call it."""
        if not self.objective.whole_step:
            return None
        everything = AllPairLogps(self.engine, self.pairs, step.rows, self.objective.config)
        with self.clock.phase("forward"):
            everything.compute(step.batches)
        with self.clock.phase("wait"):
            self.engine.barrier()
        with self.clock.phase("forward"):
            return WholeStep(self.objective, step.rows, everything.join(), beta, self.memory)

    def _forward_and_backward(
        self, step: Step, beta: float, whole: WholeStep | None, gate: StepGate | None, router: RouterLoss | None
    ) -> tuple[PairSums, list[tuple[MicroBatch, Tensor]]]:
        """Add the gradients of this rank's micro-batches. Returns the sums of the metrics, and by micro-batch a value of
        each pair that is not finite if the pair spoils the step."""
        pairs, engine, clock = self.pairs, self.engine, self.clock
        drift = self.objective.config.estimates_drift
        sums = PairSums(pairs.source_names, engine.device, reference=pairs.has_reference, drift=drift)
        losses: list[tuple[MicroBatch, Tensor]] = []
        mean_chosen_tokens = pairs.mean_chosen_tokens(step.rows)
        if router is not None:
            with clock.phase("wait"):
                router.begin(step.batches)
        for index, (batch, layout) in enumerate(step.batches):
            last = index == len(step.batches) - 1
            with clock.phase("forward"):
                seen = None if gate is None else functools.partial(gate.gaps.add, batch, layout)
                routed = None if router is None else functools.partial(router.add, batch, layout)
                logps = pair_logps(engine, layout, pairs, batch.pairs, self.train, mean_chosen_tokens, seen, routed)
                if whole is None:
                    loss = self.objective(logps, beta)
                    total = loss.losses.sum()
                else:
                    loss, total = whole.part(batch.pairs, logps)
                # The mean over the step's pairs, whichever rank and micro-batch they are in; a stand-in weighs nothing.
                share = (total / step.count * batch.counts).float()
                if router is not None:
                    share = share + router.share(batch, layout)
                # The factor is 1, or NaN if a loss is not finite. Then every gradient is NaN, and no rank takes the
                # step.
                share = share * (1 + 0 * (share + loss.losses.sum().float()).detach())
            if last:
                with clock.phase("wait"):
                    engine.barrier()
            with clock.phase("backward"):
                engine.backward(share, last=last)
            if batch.counts and engine.is_leader:
                sums.add(loss, logps, pairs.source_of(batch.pairs, engine.device))
                # In a whole step the pair to blame has such log-probs itself, not only a loss that another pair spoiled.
                blamed = loss.losses if whole is None else logps.chosen_logratio + logps.rejected_logratio
                losses.append((batch, blamed.detach()))
        return sums, losses

    def _facts(self, step: Step) -> tuple[dict[str, float], dict[str, float]]:
        """End the clock's lap. Returns size, rates and memory of the step, and the seconds of its phases."""
        pairs, rows = self.pairs, step.rows
        # Each prompt token of a pair or a list counts once, however often it is computed.
        tokens = float((pairs.chosen_tokens[rows] + pairs.rejected_tokens[rows]).sum())
        tokens += float(pairs.prompt_tokens[rows[pairs.begin(rows)]].sum())
        times = self.clock.lap()
        seconds = sum(times[f"time/{phase}"] for phase in ("data", "forward", "backward", "optimizer", "wait", "other"))
        return {
            "epoch": (self.plan.first + step.number + 1) / self.plan.steps_per_epoch,
            "pairs": float(step.count),
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "pairs_per_second": step.count / seconds,
            "peak_memory_bytes": used_memory(self.engine.device),
        }, times

    def _culprits(self, losses: Sequence[tuple[MicroBatch, Tensor]], what: str) -> str:
        """Name the pairs and ranks of a step that was not taken: pairs whose loss is not finite, or all of them if only the
        gradient is not. All ranks call it."""
        mine = [
            row
            for batch, values in losses
            for row, value in zip(batch.pairs, values.tolist(), strict=True)
            if what != "loss" or not np.isfinite(value)
        ]
        everyone = self.engine.gather_objects(_names(self.pairs, mine) if mine else None)
        told = "; ".join(f"rank {rank}: {names}" for rank, names in enumerate(everyone) if names)
        return f"its pairs are {told}" if told else "no pair has such a loss by itself: their sum overflowed"

    def explained_memory(self, what: str) -> AbstractContextManager[None]:
        """``explained_memory`` for the micro-batches of this plan."""
        return explained_memory(self.plan.tokens_per_batch // self.engine.sequence_parallel, what)


@contextlib.contextmanager
def explained_memory(positions: int, what: str) -> Iterator[None]:
    """Turn what torch raises when memory runs out into a DeviceMemoryError with advice.

    Args:
        positions: token positions of a micro-batch.
        what: what is done within the block.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceMemoryError(
            f"{positions} token positions a micro-batch do not fit in memory: {what} ran out of it "
            f"({one_line(error, 200) or type(error).__name__}). Set train.tokens_per_batch lower, or "
            "train.gradient_checkpointing=true; 'raydpo plan' tells what else takes how much"
        ) from error


def _add_up(
    sums: PairSums, router: RouterLoss | None, requests: StepRequests, busy: float, engine: StepEngine
) -> tuple[dict[str, float], list[float], list[float]]:
    """Sum metrics and requests over all ranks and collect their busy seconds of the step before, in one all-reduce."""
    ranks, size = engine.world_size, sums.values.numel()
    rest = torch.zeros(3 + ranks, dtype=torch.float64)
    rest[:3] = torch.tensor([requests.stop, requests.checkpoint, requests.uploading], dtype=torch.float64)
    rest[3 + engine.rank] = busy
    routed = [] if router is None else [router.values]
    everything = engine.sum_over_ranks(torch.cat((sums.values, rest.to(engine.device), *routed)))
    sums.values, end = everything[:size], size + len(rest)
    rest, metrics = everything[size:end].tolist(), sums.metrics()
    if router is not None:
        router.values = everything[end:]
        metrics |= router.metrics()
    return metrics, rest[:3], rest[3:]


def _slowest(busy: Sequence[float]) -> dict[str, float]:
    if len(busy) < 2 or not min(busy):
        return {}
    slowest = int(np.argmax(busy))
    return {"slowest_rank": float(slowest), "slowest_lag": busy[slowest] / float(np.median(busy)) - 1}


def _names(pairs: TrainingPairs, rows: Sequence[int]) -> str:
    names = [pairs.ids[int(row)].as_py() for row in rows[:5]]
    return ", ".join(names) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
