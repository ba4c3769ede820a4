"""Blocks 4 and 5: the plan of a training's memory against what it takes, and the measured budget under a cap."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch

from raydpo.config import ModelConfig, TrainConfig
from raydpo.errors import DeviceMemoryError
from raydpo.gpu.figures import Findings, Skip
from raydpo.gpu.stepping import LORA, RandomPolicy, make_stepper, needs, policy, reference_pairs
from raydpo.gpu.world import World
from raydpo.model.budget import MOST_TRAINED, reset_peak_memory, used_memory
from raydpo.model.layout import PromptGroup
from raydpo.model.memory.activations import Batch
from raydpo.model.memory.ledger import estimate_memory

__all__ = ["auto_budget", "memory_plan"]

KINDS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"lora": True}, "qlora": {"lora": True, "quantization": "4bit"}}
CONSTANT: dict[str, Any] = {"schedule": "constant", "warmup": 0, "lr": 1e-6}
STEPS = 5
"""Steps of changing micro-batches with a measured budget."""
MODES = (
    *({"zero": zero} for zero in range(4)),
    {"zero": 2, "gradient_checkpointing": True},
    {"zero": 0, "lora": True},
    {"zero": 2, "lora": True},
    {"zero": 2, "lora": True, "gradient_checkpointing": True},
)


def memory_plan(world: World, found: Findings) -> None:
    """Compare the plan with the peak of the second step, under ZeRO 2."""
    needs("deepspeed", "pyarrow")
    shape, worst = world.shape, 0.0
    groups = world.pairs_of(shape.planned)
    for kind, options in KINDS.items():
        for recomputes in (False, True):
            name = f"{kind}{'.checkpointing' if recomputes else ''}"
            train = _settings(len(groups), 2, tokens=sum(map(_positions, groups)), gradient_checkpointing=recomputes)
            sizes = (shape.few, shape.small_vocabulary) if "quantization" in options else _sizes(world, train, groups)
            planned = _planned(world, train, groups, *sizes, **options)
            wanted = dict(options) if "quantization" in options else {"layers": sizes[0], "vocabulary": sizes[1], **options}
            try:
                peak, reserved = _second_step(world, train, groups, wanted)
            except Skip as why:
                found.note(f"{name} skipped: {why}")
                continue
            gap = peak / planned - 1
            worst = max(worst, abs(gap))
            says = f"{name}, number of layers {sizes[0]}: measured {peak / 2**30:.2f} GiB, relative difference from the plan"
            found.at_most(f"{name}.plan_gap", abs(gap), world.limits.plan, says)
            if world.cuda:
                says = f"{name}: reserved memory through allocated memory"
                found.at_most(f"{name}.reserved", reserved, world.limits.reserved, says)
    found.value("plan_worst", worst, "largest relative difference from the plan")


def _second_step(
    world: World, train: TrainConfig, groups: list[PromptGroup], options: dict[str, Any]
) -> tuple[float, float]:
    """Peak bytes of the second step, and reserved bytes as a multiple of them."""
    reset_peak_memory(world.device)
    before = used_memory(world.device)
    with policy(world, train, **options) as engine:
        stepper = make_stepper(engine, train, reference_pairs(groups * 2), train.tokens_per_batch)
        first, second = stepper.prepared()
        stepper.take(first)
        reset_peak_memory(world.device)
        stepper.take(second)
        peak = used_memory(world.device)
        reserved = torch.cuda.max_memory_reserved(world.device) / peak if world.cuda else math.nan
    return peak - before, reserved


def auto_budget(world: World, found: Findings) -> None:
    """Train with measured budgets under a cap, and let an optimizer step run out of memory on purpose."""
    needs("deepspeed", "pyarrow")
    shape = world.shape
    for mode in MODES if world.cuda else MODES[::3]:
        name = ".".join(f"zero{value}" if key == "zero" else key for key, value in mode.items())
        settings = {key: value for key, value in mode.items() if key != "lora"}
        probe = _settings(1, 1, tokens=shape.live, **settings)
        share, total = _share(world, probe, bool(mode.get("lora")))
        with _capped(world, share), policy(world, probe, lora=bool(mode.get("lora"))) as engine:
            budget = engine.find_budget(share)
            # Two micro-batches a step, each somewhat below the budget.
            count = min(shape.most_pairs, max(2, int(1.8 * budget.tokens / sum(shape.pair))))
            train = _settings(count, STEPS, tokens=budget.tokens, **settings)
            pairs = reference_pairs(world.pairs(count * STEPS, spread=0.2))
            stepper = make_stepper(engine, train, pairs, budget.tokens)
            reset_peak_memory(world.device)
            try:
                for step in stepper.prepared():
                    stepper.take(step)
            except DeviceMemoryError as error:
                found.fact(f"{name}.fits", False, f"{name}: {STEPS} steps fit in the measured budget (1 = yes; {error})")
                continue
            found.value(f"{name}.budget", budget.tokens, f"{name}: measured budget", "positions")
            _judge(world, found, name, used_memory(world.device), share * total, budget.tokens)
            if mode is MODES[0]:
                _out_of_memory(engine, train, world, found)


def _judge(world: World, found: Findings, name: str, peak: float, allowed: float, budget: int) -> None:
    """Compare the peak with the bytes that were allowed: neither too near to them, nor much left unused."""
    least, most = world.limits.room or (None, None)
    says = f"{name}: peak as a share of the {allowed / 2**30:.1f} GiB allowed"
    found.at_most(f"{name}.peak", peak / allowed, most, says)
    if budget < MOST_TRAINED[world.device.type]:
        found.at_least(f"{name}.used", peak / allowed, least, says)


def _out_of_memory(engine: RandomPolicy, train: TrainConfig, world: World, found: Findings) -> None:
    """Let the optimizer raise what torch, cuBLAS and the CUDA runtime raise without memory."""
    pairs = reference_pairs(world.pairs(train.pairs_per_step))
    errors = {
        "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    }
    for name, error in errors.items():

        def step(_rate: float, error: Exception = error) -> float:
            raise error

        engine.step = step
        stepper = make_stepper(engine, train, pairs, train.tokens_per_batch)
        told = "nothing"
        try:
            stepper.take(next(stepper.prepared()))
        except Exception as raised:
            told = type(raised).__name__
        finally:
            del engine.step
        says = f"out of memory in the optimizer step, as {name} says it, is told as a lack of device memory, found {told}"
        found.fact(f"injected.{name}", told == DeviceMemoryError.__name__, f"{says} (1 = yes)")


def _settings(pairs: int, steps: int, *, tokens: int, **changes: Any) -> TrainConfig:
    return TrainConfig(
        **({"zero": 2, "pairs_per_step": pairs, "steps": steps, "tokens_per_batch": tokens} | CONSTANT | changes)
    )


def _positions(group: PromptGroup) -> int:
    return len(group.prompt) + sum(map(len, group.completions))


def _planned(
    world: World,
    train: TrainConfig,
    groups: list[PromptGroup],
    layers: int,
    vocabulary: int,
    *,
    lora: bool = False,
    quantization: str | None = None,
) -> float:
    """Bytes of the plan for a step of one micro-batch with ``groups``."""
    lengths = [(len(group.prompt), *map(len, group.completions)) for group in groups]
    model = ModelConfig(path="random", lora=LORA if lora else None, quantization=quantization)
    estimate = estimate_memory(
        world.anatomy(layers, vocabulary),
        model,
        train,
        Batch.of_pairs(lengths, "tree", micro_batches=1),
        workers=1,
        dtype=str(world.dtype).removeprefix("torch."),
        device="cuda" if world.cuda else "cpu",
    )
    return estimate.device


def _sizes(world: World, train: TrainConfig, groups: list[PromptGroup]) -> tuple[int, int]:
    """Layers and vocabulary of the largest model whose training fits on this device by the plan."""
    shape = world.shape
    sizes = [(layers, shape.vocabulary) for layers in (shape.layers[0], shape.few)]
    if not world.cuda:
        return sizes[0]
    room = 0.85 * torch.cuda.mem_get_info(world.device)[0]
    return next(
        (each for each in sizes if _planned(world, train, groups, *each) < room), (shape.few, shape.small_vocabulary)
    )


def _share(world: World, train: TrainConfig, lora: bool) -> tuple[float, float]:
    """Share of the device's memory to allow, and its bytes: a fifth, or what the largest mode needs on a small GPU."""
    if not world.cuda:
        return 1.0, float(2**33)
    total = float(torch.cuda.get_device_properties(world.device).total_memory)
    groups = world.pairs_of(world.shape.live)
    planned = _planned(world, train, groups, world.shape.few, world.shape.small_vocabulary, lora=lora)
    return min(0.9, max(0.2, 1.5 * planned / total)), total


@contextlib.contextmanager
def _capped(world: World, share: float) -> Iterator[None]:
    """Let torch allocate at most ``share`` of the device's memory within the block."""
    if not world.cuda:
        yield
        return
    torch.cuda.set_per_process_memory_fraction(share, world.device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, world.device)
