"""Block 9: the optimizer and the activations in the host's memory."""

from __future__ import annotations

import dataclasses
import gc
import os
from typing import Any

import torch

from raydpo.config import TrainConfig
from raydpo.gpu.figures import Findings, Skip
from raydpo.gpu.stepping import make_stepper, policy, reference_pairs
from raydpo.gpu.timing import seconds
from raydpo.gpu.world import World
from raydpo.training.policy.optimizer import make_optimizer

__all__ = ["offload"]

STEPS = 3
STEPPED: dict[str, dict[str, Any]] = {
    "optimizer_on_host": {"zero": 2, "offload_optimizer": "cpu"},
    "recomputed": {"zero": 0, "gradient_checkpointing": True},
    "activations_on_host": {"zero": 0, "gradient_checkpointing": True, "offload_activations": True},
}
"""Settings of the steps that are timed."""


def offload(world: World, found: Findings) -> None:
    """Time AdamW on the host by threads, copies to it, and steps with optimizer and activations there."""
    _host_adamw(world, found)
    _copies(world, found)
    taken = {}
    for name, settings in STEPPED.items():
        try:
            # Page-locked memory for a wide model takes long to make, and the time of a number was measured before.
            narrow = dataclasses.replace(world, shape=world.shape.narrowed)
            taken[name] = _step_seconds(narrow if "offload_optimizer" in settings else world, settings)
        except Skip as why:
            found.note(f"steps skipped: {why}")
            return
    for name, (passes, update) in taken.items():
        found.value(f"{name}.passes_ms", 1000 * passes, f"forward and backward pass, {name.replace('_', ' ')}", "ms")
        found.value(f"{name}.update_ms", 1000 * update, f"optimizer, {name.replace('_', ' ')}", "ms")
    if taken:
        says = "forward and backward pass with activations on the host, as a multiple of one without"
        found.at_most(
            "activations_slowdown", taken["activations_on_host"][0] / taken["recomputed"][0], world.limits.slowdown, says
        )


def _host_adamw(world: World, found: Findings) -> None:
    numbers, before = world.shape.host_numbers, torch.get_num_threads()
    weights = torch.zeros(numbers, requires_grad=True)
    weights.grad = torch.ones(numbers)
    optimizer = make_optimizer([weights], TrainConfig(), torch.device("cpu"))
    optimizer.step()  # makes the moments
    cores = len(os.sched_getaffinity(0))
    try:
        for threads in sorted({1, min(8, cores), cores}):
            torch.set_num_threads(threads)
            each = 1e9 * seconds(optimizer.step, torch.device("cpu"), repeats=1, warm_ups=0) / numbers
            limit = world.limits.host if threads == cores else None
            says = f"AdamW on the host, number of threads {threads}: time of a number"
            found.at_most(f"host_adamw.{threads}_threads_ns", each, limit, says, "ns")
    finally:
        torch.set_num_threads(before)


def _copies(world: World, found: Findings) -> None:
    """Copies from the device to the host and back, in page-locked memory."""
    size = 2**30 if world.cuda else 2**20
    there = torch.empty(size, dtype=torch.uint8, device=world.device)
    here = torch.empty(size, dtype=torch.uint8, pin_memory=world.cuda)
    for name, target, source in (("to_host", here, there), ("to_device", there, here)):

        def copy(target: torch.Tensor = target, source: torch.Tensor = source) -> object:
            return target.copy_(source, non_blocking=True)

        rate = size / seconds(copy, world.device)
        found.value(f"{name}_gb_s", rate / 1e9, f"copy {name.replace('_', ' ')}, page-locked", "GB/s")
    del there, here
    gc.collect()


def _step_seconds(world: World, settings: dict[str, Any]) -> tuple[float, float]:
    """Seconds of the forward and backward pass of a step, and of its update: the fastest step after the first."""
    groups = world.pairs_of(world.shape.planned)
    tokens = sum(world.shape.pair) * len(groups)
    train = TrainConfig(pairs_per_step=len(groups), steps=STEPS, tokens_per_batch=tokens, **settings)
    with policy(world, train) as engine:
        stepper = make_stepper(engine, train, reference_pairs(groups * STEPS), tokens)
        rows = [stepper.take(step).row for step in stepper.prepared()]
    passes = min(row["time/forward"] + row["time/backward"] for row in rows[1:])
    return passes, min(row["time/optimizer"] for row in rows[1:])
