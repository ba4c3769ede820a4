"""Block 8: a training that is interrupted and resumed against one that is not, and the size of the first update."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from raydpo.config import TrainConfig
from raydpo.errors import TrainError, one_line
from raydpo.gpu.figures import Findings, Skip
from raydpo.gpu.stepping import RandomPolicy, make_stepper, needs, policy, reference_pairs
from raydpo.gpu.world import World
from raydpo.training.checkpoint.files import PendingCheckpoint, load_checkpoint
from raydpo.training.job import TrainSummary

__all__ = ["resume"]

HALF = 3
"""Steps before and after the interruption."""
RATE = 1e-4
PAIRS_PER_STEP = 4
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "bfloat16_moments": {"optimizer_states": "bfloat16"},
    "adamw_8bit": {"optimizer": "adamw_8bit"},
    "paged_adamw_8bit": {"optimizer": "paged_adamw_8bit"},
}
BITSANDBYTES = {"adamw_8bit", "paged_adamw_8bit"}


def resume(world: World, found: Findings) -> None:
    """Compare weights and losses after an interruption for each optimizer, then across ZeRO stages, then bit by bit."""
    needs("deepspeed", "pyarrow")
    world = dataclasses.replace(world, shape=world.shape.narrowed)
    try:
        _compare_all(world, found, _has_deterministic_kernels(world, found))
    finally:
        torch.use_deterministic_algorithms(False)


def _compare_all(world: World, found: Findings, deterministic: bool) -> None:
    """The block, with deterministic kernels where runs are compared closely."""
    for name, options in OPTIMIZERS.items():
        if name in BITSANDBYTES:
            if not world.cuda:
                found.note(f"{name} skipped: runs on GPUs only")
                continue
            try:
                needs("bitsandbytes")
            except Skip as why:
                found.note(f"{name} skipped: {why}")
                continue
        stages = (0, 0) if name in BITSANDBYTES else (2, 2)
        limit = world.limits.resumed8 if name in BITSANDBYTES else world.limits.resumed
        _compare(world, found, name, stages, options | {"deterministic": deterministic}, limit)
    for before, after in ((0, 2), (2, 3)):
        options = {"deterministic": deterministic}
        _compare(world, found, f"zero{before}_to_zero{after}", (before, after), options, world.limits.resumed)
    _first_update(world, found)
    for setting in (True, False) if deterministic else (False,):
        _bits(world, found, setting)


def _train(*, deterministic: bool, steps: int = 2 * HALF, **changes: Any) -> TrainConfig:
    torch.use_deterministic_algorithms(deterministic)  # the policy turns it on only
    settings = {"zero": 2, "pairs_per_step": PAIRS_PER_STEP, "steps": steps, "lr": RATE, "schedule": "constant", "warmup": 0}
    return TrainConfig(**(settings | {"deterministic": deterministic} | changes))


def _has_deterministic_kernels(world: World, found: Findings) -> bool:
    """Whether a step runs with ``train.deterministic``."""
    train, refused = _train(deterministic=True, steps=1), ""
    try:
        with policy(world, train) as engine:
            _steps(world, engine, train, range(1))
    except RuntimeError as error:
        if "determin" not in str(error):
            raise
        refused = f"; {one_line(error, 160)}"
    found.fact("deterministic.runs", not refused, f"a step runs with train.deterministic (1 = yes{refused})")
    return not refused


def _compare(
    world: World, found: Findings, name: str, stages: tuple[int, int], options: dict[str, Any], limit: float
) -> None:
    """Take six steps in one run under the first ZeRO stage, and the last three again under the second from a checkpoint."""
    folder = world.folder / f"checkpoint-{name}"
    first, second = (_train(zero=zero, **options) for zero in stages)
    with policy(world, first) as engine:
        _steps(world, engine, first, range(HALF))
        PendingCheckpoint(engine, folder, HALF, {}, TrainSummary(), copy=True).write()
        losses, weights = _steps(world, engine, first, range(HALF, 2 * HALF)), _weights(engine)
    try:
        with policy(world, second) as engine:
            load_checkpoint(engine, folder, {})
            again, resumed = _steps(world, engine, second, range(HALF, 2 * HALF)), _weights(engine)
    except TrainError as error:
        found.fact(f"{name}.resumes", False, f"{name}: resumes from its checkpoint (1 = yes; {one_line(error, 120)})")
        return
    finally:
        shutil.rmtree(folder)  # a gigabyte
    gap = _gap(weights, resumed)
    found.at_most(f"{name}.weights", gap, limit, f"{name}: relative difference of the weights of a resumed run")
    apart = max(abs(one - other) for one, other in zip(losses, again, strict=True))
    found.at_most(f"{name}.losses", apart, max(limit, 1e-5), f"{name}: largest difference of its losses")


def _first_update(world: World, found: Findings) -> None:
    """AdamW's first update moves each weight by the learning rate, unless a hidden step came before it."""
    for zero in (0, 2):
        train = _train(deterministic=False, steps=1, zero=zero, weight_decay=0.1)
        with policy(world, train) as engine:
            before = _weights(engine)
            _steps(world, engine, train, range(1))
            after = _weights(engine)
        moved = torch.cat([(after[name] - before[name] * (1 - RATE * 0.1)).abs().flatten() for name in before])
        ratio = float(moved[moved > 0].median()) / RATE
        least, most = world.limits.first
        says = f"ZeRO {zero}: median first update as a multiple of the learning rate"
        found.at_least(f"first_update.zero{zero}.least", ratio, least, says)
        found.at_most(f"first_update.zero{zero}.most", ratio, most, says)


def _bits(world: World, found: Findings, deterministic: bool) -> None:
    """Count weights that differ between two equal runs."""
    train, runs = _train(deterministic=deterministic, steps=HALF), []
    for _ in range(2):
        with policy(world, train) as engine:
            _steps(world, engine, train, range(HALF))
            runs.append(_weights(engine))
    differing = sum(int((runs[0][name] != runs[1][name]).sum()) for name in runs[0])
    says = f"weights that differ between two equal runs, deterministic {'on' if deterministic else 'off'}"
    name = f"bits.{'deterministic' if deterministic else 'default'}"
    found.at_most(name, differing, 0.0 if deterministic or not world.cuda else None, says)


def _steps(world: World, engine: RandomPolicy, train: TrainConfig, numbers: Sequence[int]) -> list[float]:
    """Losses of the steps with these numbers."""
    pairs = reference_pairs(world.pairs(PAIRS_PER_STEP * 2 * HALF))
    budget = PAIRS_PER_STEP // 2 * sum(world.shape.pair)  # two micro-batches a step
    stepper = make_stepper(engine, train, pairs, budget)
    steps = stepper.prepared(numbers[0])
    return [stepper.take(next(steps)).row["loss"] for _ in numbers]


def _weights(engine: RandomPolicy) -> dict[str, Tensor]:
    """Copies of the float32 weights by parameter."""
    found: dict[str, list[Tensor]] = {}
    for fragment in engine.state.fragments():
        found.setdefault(fragment.name, []).append(fragment.of(fragment.flat.detach()).float().clone())
    return {name: torch.cat(parts) for name, parts in found.items()}


def _gap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Norm of the difference through the norm, over all weights."""
    apart = sum(float((one[name].double() - other[name].double()).square().sum()) for name in one)
    return (apart / sum(float(each.double().square().sum()) for each in one.values())) ** 0.5
