"""Blocks 6 and 7: speed of scoring and of training, extrapolated to a whole model, as a share of the GPU's peak (MFU).

MFU counts what the mathematics needs: a forward pass once for scoring, three times for full fine-tuning, and for adapters
twice with attention three times. What gradient checkpointing or the head computes again does not count.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from raydpo.config import TrainConfig
from raydpo.errors import one_line
from raydpo.estimate.plan import ADAPTERS, FORWARD, FULL, operations, training_factors
from raydpo.gpu.figures import Findings, Skip
from raydpo.gpu.stepping import LORA, needs
from raydpo.gpu.timing import extrapolate, seconds
from raydpo.gpu.world import World, amount_of
from raydpo.model.layout import Layout, Method
from raydpo.model.load import add_lora
from raydpo.model.logps import LogpModel
from raydpo.training.policy.optimizer import make_optimizer

__all__ = ["scoring_speed", "training_speed"]

GEMM = re.compile(r"gemm|cutlass|cublas|nvjet|xmma|::mm|addmm|bmm|matmul", re.IGNORECASE)
ATTENTION = re.compile(r"flash|fmha|attention|attn", re.IGNORECASE)
OPTIMIZER_NUMBERS = 250_000_000
"""Numbers of an optimizer's update on the device."""


def _mfu(world: World) -> str:
    """What a share of ``world.peak`` is called."""
    return "MFU" if world.sheet_peak else "as a multiple of the measured product's speed"


def scoring_speed(world: World, found: Findings) -> None:
    """Time scoring passes of different sizes, and tell where the time goes."""
    shape, times = world.shape, {}
    for layers in shape.layers:
        model = LogpModel(world.model(layers)).eval().requires_grad_(False)
        model.use(Method("tree", world.bodies()[0]))
        for positions in shape.passes:
            with torch.no_grad():
                layout = _batch(world, model, positions)
                times[layers, positions] = seconds(partial(model, layout), world.device)
                if layers == shape.layers[-1] and positions == shape.passes[1]:
                    _kinds(world, found, partial(model, layout))
        del model
        gc.collect()
    for positions in shape.passes:
        groups = world.pairs_of(positions)
        says = f"scoring, {shape.whole} layers by extrapolation, {positions:,} positions a pass"
        whole = _whole(world, found, [times[layers, positions] for layers in shape.layers], says)
        computed = operations(amount_of(groups, "tree"), world.cost(shape.whole), FORWARD)
        rate, mfu = float(amount_of(groups, "tree")[0]) / whole, computed / whole / world.peak
        if positions == shape.passes[1]:
            found.value(f"score_positions_s_{shape.whole}", rate, says, "positions/s")
            found.goal(f"score_mfu_{shape.whole}", mfu, world.limits.score, f"{says}, {_mfu(world)}")
            if _grew(world, [times[layers, positions] for layers in shape.layers]):
                world.measured["score_flops"] = computed / whole
        else:
            found.value(f"score_{positions}.positions_s_{shape.whole}", rate, says, "positions/s")
            found.value(f"score_{positions}.mfu_{shape.whole}", mfu, f"{says}, {_mfu(world)}")


def training_speed(world: World, found: Findings) -> None:
    """Time forward and backward passes of full fine-tuning and of adapters, and the optimizer's update of a number."""
    shape = world.shape
    for kind, factors, goal in (("full", FULL, world.limits.full), ("lora", ADAPTERS, world.limits.lora)):
        try:
            needs(*(["peft"] if kind == "lora" else []))
        except Skip as why:
            found.note(f"{kind} skipped: {why}")
            continue
        for recomputes in (False, True):
            measured = []
            for layers in shape.layers:
                measured.append(_passes(world, kind, layers, recomputes))
                gc.collect()  # before the next model is made
            groups = world.pairs_of(shape.planned)
            amount, cost = amount_of(groups, "tree"), world.cost(shape.whole)
            name, says = kind, f"{kind}, {shape.whole} layers by extrapolation"
            if recomputes:
                name, says = f"{kind}_checkpointing", f"{says}, gradient checkpointing"
            times = list(zip(*measured, strict=True))
            forward, both = (_whole(world, found, one, says) for one in times)
            mfu = operations(amount, cost, factors) / both / world.peak
            found.value(f"{name}.forward_ms", 1000 * forward, f"{says}: forward pass", "ms")
            found.value(f"{name}.backward_ms", 1000 * (both - forward), f"{says}: backward pass", "ms")
            found.value(f"{name}_positions_s_{shape.whole}", float(amount[0]) / both, says, "positions/s")
            found.goal(f"{name}_mfu_{shape.whole}", mfu, None if recomputes else goal, f"{says}, {_mfu(world)}")
            # As the plan counts operations, with what is computed again.
            planned = training_factors(TrainConfig(gradient_checkpointing=recomputes), kind == "lora")
            if all(_grew(world, one) for one in times):
                world.measured[f"{name}_flops"] = operations(amount, cost, planned) / both
    found.value("optimizer_ns", _update(world), "AdamW on the device, a number", "ns")


def _grew(world: World, times: Sequence[float]) -> bool:
    """Whether the larger model was the slower one; always on a CPU, where other work may slow down either."""
    few, many = times
    return few < many or not world.cuda


def _whole(world: World, found: Findings, times: Sequence[float], says: str) -> float:
    """Seconds of the whole model, at least those of the larger one measured. Fails if that was not the slower one."""
    few, many = times
    if not _grew(world, times):
        (less, more), name = world.shape.layers, f"{says.split(',')[0].replace(' ', '_')}.grows"
        found.fact(name, False, f"{says}: {more} layers take longer than {less} (1 = yes; {few:.4f} and {many:.4f} s)")
    return max(many, extrapolate(world.shape.layers, (few, many), world.shape.whole))


def _batch(world: World, model: LogpModel, positions: int) -> Layout:
    return model.lay_out(world.pairs_of(positions)).to(world.device)


def _passes(world: World, kind: str, layers: int, recomputes: bool) -> tuple[float, float]:
    """Seconds of a forward pass, and of a forward and backward pass, in training mode."""
    causal_lm: nn.Module = world.model(layers)
    model = LogpModel(add_lora(causal_lm, LORA, 0) if kind == "lora" else causal_lm)
    model.use(Method("tree", world.bodies()[0]))
    if recomputes:
        model.causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    layout = _batch(world, model, world.shape.planned)

    def both() -> None:
        model(layout).sum().backward()
        for parameter in model.parameters():
            parameter.grad = None

    repeats = {"repeats": 3, "warm_ups": 2}
    return seconds(partial(model, layout), world.device, **repeats), seconds(both, world.device, **repeats)


def _kinds(world: World, found: Findings, run: Callable[[], object]) -> None:
    """Shares of matrix products, attention and the rest in the time of ``run``."""
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if world.cuda else ProfilerActivity.CPU
    try:
        with profile(activities=[activity]) as profiler:
            run()
    except RuntimeError as error:  # a container may not let CUPTI count
        found.note(f"no profile: {one_line(error, 120)}")
        return
    spent = {"products": 0.0, "attention": 0.0, "rest": 0.0}
    for event in profiler.key_averages():
        kind = "attention" if ATTENTION.search(event.key) else "products" if GEMM.search(event.key) else "rest"
        spent[kind] += event.self_device_time_total if world.cuda else event.self_cpu_time_total
    total = sum(spent.values()) or 1.0
    for kind, time in spent.items():
        found.value(f"share.{kind}", time / total, f"share of {kind} in the time of a scoring pass")


def _update(world: World) -> float:
    """Nanoseconds of an AdamW update for each number."""
    numbers = OPTIMIZER_NUMBERS if world.cuda else world.shape.host_numbers
    weights = torch.zeros(numbers, device=world.device, requires_grad=True)
    weights.grad = torch.ones_like(weights)
    optimizer = make_optimizer([weights], TrainConfig(), world.device)
    return 1e9 * seconds(optimizer.step, world.device, repeats=3, warm_ups=2) / numbers
