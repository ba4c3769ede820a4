"""Estimate of a run before it starts: tokens, floating point operations (FLOPs), GPU hours, dollars.

FLOPs are counted from the lengths of the data and the sizes of the model. Seconds follow from a rate (``estimate.rate``) and
from the imbalance of the ranks (``data.simulate``). Loading, communication, checkpoints and the optimizer are not included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpo.config import Config, TrainConfig
from raydpo.data.lists import count_of, rows_of, starts_of_table
from raydpo.data.pairs import PairSets
from raydpo.data.plan import epoch_order, split_over_ranks
from raydpo.data.shapes import LayoutName
from raydpo.data.simulate import STEPS, WORLD_SIZES, Simulation, amounts, deal, simulate, steps_of, training_order
from raydpo.errors import ConfigError
from raydpo.estimate.modes import Modes
from raydpo.estimate.tokenising import Tokenising
from raydpo.estimate.work import by_scale, evaluation_pass, lengths_of, reference_pass, shapes_of_steps
from raydpo.model.cost import ModelCost
from raydpo.model.memory.scoring import Choice

__all__ = [
    "ADAPTERS",
    "FORWARD",
    "FULL",
    "PAIRS_PER_RANK",
    "Plan",
    "Rates",
    "Stage",
    "check_numbers",
    "make_plan",
    "operations",
    "sample_pairs",
    "training_factors",
]

TOKENS_PER_BATCH = 16384
"""Positions of a micro-batch assumed for ``auto``, which a run measures on its device."""
PAIRS_PER_RANK = 4
"""Pairs per rank in the second imbalance table, whose steps grow with the number of ranks."""
FORWARD = (1.0, 1.0, 1.0)
"""Factors of ``operations`` for one forward pass."""
FULL = (3.0, 3.0, 3.0)
"""Factors of forward and backward pass of full fine-tuning, as MFU counts them: without what is computed again."""
ADAPTERS = (2.0, 3.0, 2.0)
"""The same for adapters on frozen weights."""
PAIRS_SIMULATED = 8192
"""Largest number of pairs simulated for one row of a table. If steps are larger, fewer steps are simulated, to save time."""
LAYOUTS: tuple[LayoutName, ...] = ("padded", "packed", "tree")


@dataclass(frozen=True, kw_only=True)
class Rates:
    """FLOPs per second that one device reaches scoring and training, and where the figures come from.

    Attributes:
        warnings: why they may not be those of the planned run.
    """

    score: float
    train: float
    origin: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of the job. ``seconds`` is wall-clock time; ``dollars`` is None if no price is given."""

    flops: float
    seconds: float
    gpu_hours: float
    dollars: float | None

    @classmethod
    def of(cls, flops: float, workers: int, rate: float, price: float | None, lost: float = 0.0) -> Stage:
        """A stage on ``workers`` devices of ``rate`` FLOP/s that wait for each other for the share ``lost`` of the time."""
        seconds = flops / (workers * rate * (1 - lost))
        gpu_hours = workers * seconds / 3600
        return cls(flops=flops, seconds=seconds, gpu_hours=gpu_hours, dollars=None if price is None else gpu_hours * price)

    def __add__(self, other: Stage) -> Stage:
        """Both stages, one after the other."""
        more = vars(other)
        return Stage(**{name: None if value is None else value + more[name] for name, value in vars(self).items()})

    def __mul__(self, times: int) -> Stage:
        return Stage(**{name: None if value is None else value * times for name, value in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The whole estimate.

    Attributes:
        data: counts of pairs, completions and tokens. ``planned``: of how many completions and held-out pairs the batches
            were planned; they stand for all. ``positions``: token positions of a training by layout; ``dealt`` means padded
            rows dealt to ranks in turn (``data.simulate.deal``).
        model: sizes of the policy. ``head_share``: the head's share of a forward pass.
        score_workers, train_workers: devices of each stage.
        steps, epochs: steps and epochs of one training.
        score: the reference pass. training: all steps of one run. evaluation: all held-out evaluations of one run.
        total: one reference pass, and ``runs`` trainings with their evaluations.
        online: ``runs`` trainings that compute the reference in every step, in padded rows dealt to ranks in turn. Their
            evaluations are assumed to cost the same.
        imbalance: imbalance of this configuration. fixed: by world size, at its pairs per step. scaled: by world size, at
            ``PAIRS_PER_RANK``.
        memory: in which modes the training fits; None if that was not asked.
        reference: how the reference is put on the devices, or why it fits in no way; None if that was not asked.
        tokenising: of all sources; None if that was not asked.
        first: ``data.first.FirstPairs.to_dict``: how much of each source was read, if not all.
    """

    data: dict[str, Any]
    model: dict[str, Any]
    rates: Rates
    score_workers: int
    train_workers: int
    steps: int
    epochs: float
    runs: int
    score: Stage
    training: Stage
    evaluation: Stage
    total: Stage
    online: Stage
    online_packed: Stage
    """``online`` in packed rows, as some trainers have it, without any time lost to imbalance."""
    imbalance: Simulation
    fixed: tuple[Simulation, ...]
    scaled: tuple[Simulation, ...]
    memory: Modes | None = None
    reference: Choice | str | None = None
    tokenising: Tokenising | None = None
    first: dict[str, dict[str, int]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The estimate as plain data, for JSON."""
        return asdict(self)


def operations(amount: np.ndarray, model: ModelCost, factors: Sequence[float] = FORWARD) -> float:
    """FLOPs of ``simulate.amounts`` [3], each multiplied by its factor."""
    return float(np.dot(amount * factors, (model.position_flops, model.look_flops, model.prediction_flops)))


def training_factors(train: TrainConfig, lora: bool) -> tuple[float, float, float]:
    """FLOPs of forward and backward pass relative to a forward pass, for the layers, their attention, and the head.

    One product in the forward pass becomes two in the backward pass, for the gradients of its input and of its weight.
    Frozen weights have no gradient, and attention has no weights. A trained head computes its logits again (``model.head``),
    gradient checkpointing computes the layers again, and an objective of the whole step does one more forward pass
    (``training.whole_step``). The adapters' own products are not counted.
    """
    again, before = float(train.gradient_checkpointing), float(train.needs_whole_step)
    return (2.0 if lora else 3.0) + again + before, 3.0 + again + before, (2.0 if lora else 4.0) + before


def check_numbers(workers: int | None, price: float | None, runs: int | None) -> None:
    """Refuse arguments of ``make_plan`` that are too small.

    Raises:
        ConfigError: if one is.
    """
    for name, value, least in (("--workers", workers, 1), ("--runs", runs, 1), ("--price", price, 0)):
        if value is not None and not value >= least:
            raise ConfigError(f"{name} is {value:g}; at least {least} is expected")


def make_plan(
    config: Config,
    sets: PairSets,
    model: ModelCost,
    reference: ModelCost,
    rates: Rates,
    *,
    workers: int | None = None,
    price: float | None = None,
    runs: int = 1,
    scales: Mapping[str, float] | None = None,
    choice: Choice | None = None,
) -> Plan:
    """Estimate ``runs`` runs of ``config`` on its pairs.

    Args:
        sets: as they are trained on, see ``data.mismatch.as_trained``.
        scales: number of pairs for which each pair in ``sets`` stands, by name of source; 1 where a source is not named.
        model, reference: sizes of the policy and of the reference.
        workers: devices of both stages; None = as configured for each.
        price: dollars per GPU hour.
        choice: how the reference is put on the devices; None = whole on each.

    Raises:
        ConfigError: if a number is out of range.
    """
    check_numbers(workers, price, runs)
    train = config.train
    layout: LayoutName = "tree" if config.model.layout == "auto" else config.model.layout
    together = train.sequence_parallel
    budget = _budget(train.tokens_per_batch) * together  # of all workers that share a micro-batch
    score_workers, train_workers = workers or config.score.workers, workers or train.most_workers
    if train_workers % together:
        raise ConfigError(f"--workers {train_workers} is not a multiple of train.sequence_parallel {together}")
    scales = scales or {}
    numbers, weights, stands_for = _sources(sets.train, scales)
    scale = float(stands_for.max())
    # Of a source whose pairs stand for fewer, fewer are used, so that steps are mixed as in the run.
    order_of = {"sources": numbers, "weights": weights * stands_for / scale, "seed": train.seed}
    seen = len(epoch_order(**order_of, epoch=0, shuffle=False))
    per_epoch = round(seen * scale)
    steps_per_epoch = -(-per_epoch // train.pairs_per_step)
    steps = train.steps if train.steps is not None else train.epochs * steps_per_epoch
    trained = steps // steps_per_epoch * per_epoch + min(steps % steps_per_epoch * train.pairs_per_step, per_epoch)
    costs: dict[str, Any] = {"tokens_per_batch": budget, "work": model.work}

    # Beyond these sizes most ranks have no pair, or most pairs of a step are repeated: such rows tell nothing.
    fixed = [size for size in WORLD_SIZES if size < 2 * max(train.pairs_per_step, train_workers)]
    scaled = [size for size in WORLD_SIZES if PAIRS_PER_RANK * size < 2 * max(per_epoch, PAIRS_PER_RANK)]
    most_steps = {
        size: max(1, min(STEPS, PAIRS_SIMULATED // size))
        for size in (train.pairs_per_step, *(PAIRS_PER_RANK * ranks for ranks in scaled))
    }
    most = max(seen, *(size * count for size, count in most_steps.items()))
    order = training_order(**order_of, shuffle=config.data.shuffle, count=most)
    shapes, (sampled, *simulations) = shapes_of_steps(
        sets.train,
        [
            steps_of(order[:seen], train.pairs_per_step, STEPS),
            *(steps_of(order[: max(seen, size * count)], size, count) for size, count in most_steps.items()),
        ],
    )
    steps_by_size = dict(zip(most_steps, simulations, strict=True))

    def simulated(world_size: int, pairs_per_step: int) -> Simulation:
        taken, ranks = steps_by_size[pairs_per_step], max(1, world_size // together)
        wanted = {"world_size": ranks, "pairs_per_step": pairs_per_step, "steps": len(taken), "layout": layout}
        return replace(simulate(np.concatenate(taken), shapes, **wanted, **costs), world_size=world_size)

    def of_a_run(batches: list[Sequence[int]], kind: LayoutName) -> np.ndarray:
        """Amounts [3] of all steps, extrapolated from the micro-batches of the sampled steps."""
        return trained / sum(map(len, sampled)) * amounts(batches, shapes, kind)

    split = partial(split_over_ranks, shapes_of=shapes.take, world_size=train_workers // together, **costs)
    computed = {
        kind: of_a_run(
            [batch.pairs for step in sampled for rank in split(step, layout=kind) for batch in rank if batch.counts], kind
        )
        for kind in LAYOUTS
    }
    dealt = of_a_run([batch for step in sampled for rank in deal(step, train_workers) for batch in rank], "padded")
    imbalance = simulated(train_workers, train.pairs_per_step)
    planned, completions, scored = {"completions": 0, "held_out_pairs": 0}, 0.0, np.zeros(3)
    waited = 0.0
    if train.needs_reference:
        wish = config.score
        positions = _budget(wish.tokens_per_batch) * wish.sequence_parallel
        replicas = 1 if choice is None else max(1, choice.partition // wish.sequence_parallel)
        if choice is not None and not choice.simple and wish.tokens_per_batch == "auto":  # gathers want large micro-batches
            positions = choice.positions * wish.sequence_parallel
        # Of a replica, whose devices compute a pass together.
        gathers = 0.0 if choice is None else choice.gather_positions * wish.sequence_parallel
        tables = [table for table in (sets.train, sets.eval) if table is not None]
        for times, group in by_scale(tables, scales):
            distinct, looked_at, amount, waiting = reference_pass(
                group, positions, wish.tokens_per_part, layout, replicas, gathers
            )
            planned["completions"] += looked_at
            completions, scored = completions + times * distinct, scored + times * amount
            waited += times * amount[0] * waiting
    factors = training_factors(train, config.model.adapts)
    held_out_pairs, held_out = 0.0, np.zeros(3)
    if sets.eval is not None:
        for times, (table,) in by_scale([sets.eval], scales):
            looked_at, once = evaluation_pass(table, budget, layout)
            planned["held_out_pairs"] += looked_at
            held_out_pairs += times * count_of(table)
            held_out += times * once * (1 + -(-steps // train.eval_every))

    def of_training(flops: float, rate: float, lost: float) -> Stage:
        return Stage.of(flops, train_workers, rate, price, lost)

    lost = waited / scored[0] if scored[0] else 0.0
    score = Stage.of(operations(scored, reference), score_workers, rates.score, price, lost)
    evaluation = of_training(operations(held_out, model), rates.score, 0.0)
    # ZeRO 2 and 3 reduce gradients after every micro-batch.
    waiting = imbalance.lockstep if train.zero >= 2 else imbalance.imbalance
    training = of_training(operations(computed[layout], model, factors), rates.train, waiting)
    head_share = computed[layout][2] * model.prediction_flops / operations(computed[layout], model)

    def online(amount: np.ndarray, lost: float) -> Stage:
        passes = of_training(operations(amount * train.needs_reference, reference), rates.score, lost)
        return (passes + of_training(operations(amount, model, factors), rates.train, lost) + evaluation) * runs

    prompts, *answers = lengths_of(sets.train)

    def over_all(values: np.ndarray | None = None) -> int:
        """Sum of ``values`` of the pairs, and of those that they stand for."""
        return round(float(np.bincount(numbers, values, len(stands_for)) @ stands_for))

    return Plan(
        data={
            "unit": sets.report.unit,
            "training_pairs": over_all(),
            "held_out_pairs": round(held_out_pairs),
            "pairs_per_step": train.pairs_per_step,
            "pairs_trained_on": trained,
            "completions": round(completions),
            "planned": planned,
            "prompt_tokens": over_all(prompts),
            "completion_tokens": sum(map(over_all, answers)),
            "longest": int((prompts + np.max(answers, axis=0)).max()),
            "layout": layout,
            "tokens_per_batch": budget // together,
            "positions": {kind: round(amount[0]) for kind, amount in (computed | {"dealt": dealt}).items()},
            "report": sets.report.to_dict(),
        },
        model=asdict(model) | {"head_share": float(head_share), "training_factors": factors},
        rates=rates,
        score_workers=score_workers,
        train_workers=train_workers,
        steps=steps,
        epochs=trained / per_epoch,
        runs=runs,
        score=score,
        training=training,
        evaluation=evaluation,
        total=score + (training + evaluation) * runs,
        online=online(dealt, imbalance.naive),
        online_packed=online(computed["packed"], 0.0),
        imbalance=imbalance,
        fixed=tuple(simulated(size, train.pairs_per_step) for size in fixed),
        scaled=tuple(simulated(size, PAIRS_PER_RANK * size) for size in scaled),
    )


def sample_pairs(config: Config, table: pa.Table, count: int = 32) -> pa.Table:
    """The first ``count`` pairs, or ranked lists, of a run, for a measurement."""
    sources, weights, _ = _sources(table, {})
    order = training_order(sources, weights, seed=config.train.seed, shuffle=config.data.shuffle, count=count)
    starts = starts_of_table(table)
    return table.take(pa.array(order if starts is None else rows_of(starts, order)))


def _sources(table: pa.Table, scales: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Index of the source of each pair or ranked list, int [pairs], weight of each source, and number of pairs for which one
    of its pairs stands, float [sources]."""
    starts = starts_of_table(table)
    table = table if starts is None else table.select(["source", "weight"]).take(pa.array(starts[:-1]))
    column = table["source"]
    names = column.unique()  # in order of their first pairs, as in training
    weights = [table["weight"][pc.index(column, name).as_py()].as_py() for name in names]
    return (
        pc.index_in(column, names).to_numpy(),
        np.array(weights),
        np.array([scales.get(name.as_py(), 1.0) for name in names]),
    )


def _budget(tokens_per_batch: int | str) -> int:
    return TOKENS_PER_BATCH if isinstance(tokens_per_batch, str) else tokens_per_batch
