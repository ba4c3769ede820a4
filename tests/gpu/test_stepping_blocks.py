"""The blocks of ``raydpo gpu check`` that train inside DeepSpeed, on the CPU: as they are, and with planted faults."""

import contextlib
import dataclasses

import pytest
import torch
from distributed import run_distributed

from raydpo.errors import DeviceMemoryError
from raydpo.gpu.figures import Findings
from raydpo.gpu.limits import CPU_LIMITS, GPU_LIMITS
from raydpo.gpu.shape import TINY
from raydpo.gpu.world import World


@contextlib.contextmanager
def planted(owner, name, value):
    """``owner.name`` is ``value`` within the block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield before
    finally:
        setattr(owner, name, before)


def outcome(number, world):
    from raydpo.gpu.blocks import BLOCKS
    from raydpo.gpu.command import run_block
    from raydpo.terminal.console import Console

    (block,) = (block for block in BLOCKS if block.number == number)
    result = run_block(block, world, 200.0, Console())
    figures = result.figures
    return result.status, result.error, [name for name, each in figures.items() if each.ok is False], sorted(figures)


def memory_blocks(folder):
    from raydpo.gpu import memory
    from raydpo.training import step

    world = World(torch.device("cpu"), TINY, CPU_LIMITS, folder)
    found = {"plan": outcome(4, world), "budget": outcome(5, world)}
    memory.MODES = memory.MODES[:1]
    with planted(step, "is_out_of_memory", lambda error: False):
        found["raw out of memory"] = outcome(5, world)

    def too_large(self, *_, **__):
        raise DeviceMemoryError("1024 token positions a micro-batch do not fit in memory")

    with planted(memory.RandomPolicy, "backward", too_large):
        found["too large a budget"] = outcome(5, world)
    return found


def test_memory_plan_and_budget(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (found,) = run_distributed(memory_blocks, 1, tmp_path / "ranks", tmp_path)
    status, error, failed, names = found["plan"]
    assert (status, error, failed) == ("pass", None, [])
    assert {"full.plan_gap", "lora.checkpointing.plan_gap", "qlora.plan_gap", "plan_worst"} <= set(names)
    assert found["budget"][:3] == ("pass", None, [])
    assert found["raw out of memory"][2] == ["injected.torch", "injected.cublas"]
    assert found["too large a budget"][2] == ["zero0.fits"]


def test_a_plan_that_is_wrong_fails(tmp_path, monkeypatch):
    """Twice the planned memory, and as much reserved as the plan's limit allows twice."""
    from raydpo.gpu import memory

    plan = memory._planned
    world = World(torch.device("cpu"), TINY, dataclasses.replace(CPU_LIMITS, plan=GPU_LIMITS.plan), tmp_path)
    monkeypatch.setattr(memory, "_planned", lambda *arguments, **options: plan(*arguments, **options) * scale)
    monkeypatch.setattr(
        memory, "_second_step", lambda world, train, groups, options: (peak(world, train, groups, options), 1.0)
    )

    def peak(world, train, groups, options):
        sizes = (TINY.layers[0], TINY.vocabulary) if "quantization" not in options else (TINY.few, TINY.small_vocabulary)
        kinds = {name: options[name] for name in ("lora", "quantization") if name in options}
        return plan(world, train, groups, *sizes, **kinds)

    for scale, status in ((1.0, "pass"), (0.5, "fail"), (1.1, "fail")):
        assert outcome(4, world)[0] == status, scale


@pytest.mark.parametrize(("share", "failed"), [(0.5, ["a.used"]), (0.85, []), (0.99, ["a.peak"])])
def test_a_budget_that_leaves_or_takes_too_much_fails(tmp_path, share, failed):
    from raydpo.gpu.memory import _judge

    found = Findings()
    _judge(World(torch.device("cpu"), TINY, GPU_LIMITS, tmp_path), found, "a", share * 2**30, 2**30, budget=512)
    assert [name for name, each in found.figures.items() if each.ok is False] == failed


def resume_block(folder):
    from raydpo.gpu import resume
    from raydpo.training.policy import deepspeed_engine
    from raydpo.training.policy.state import TrainedState

    world = World(torch.device("cpu"), TINY, CPU_LIMITS, folder)
    sound, read = outcome(8, world), TrainedState.read

    def forgets_the_moments(self, *arguments):
        read(self, *arguments)
        for state in self.optimizer.state.values():
            state["exp_avg"].zero_()

    found = Findings()
    with planted(TrainedState, "read", forgets_the_moments):
        resume._compare(world, found, "lost_moments", (2, 2), {"deterministic": False}, CPU_LIMITS.resumed)
    with planted(deepspeed_engine, "no_steps", lambda _: contextlib.nullcontext()):
        resume._first_update(world, found)

    def refuses(*_, **__):
        raise RuntimeError("index_add_cuda_ does not have a deterministic implementation")

    with planted(resume, "_steps", refuses):
        assert not resume._has_deterministic_kernels(world, found)
    return sound, [name for name, each in found.figures.items() if each.ok is False]


def test_resume(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    ((sound, failed),) = run_distributed(resume_block, 1, tmp_path / "ranks", tmp_path)
    assert sound[:3] == ("pass", None, [])
    assert {
        "adamw.weights",
        "bfloat16_moments.weights",
        "zero0_to_zero2.losses",
        "bits.default",
        "bits.deterministic",
    } <= set(sound[3])
    assert failed == ["lost_moments.weights", "lost_moments.losses", "first_update.zero0.least", "deterministic.runs"]


def offload_block(folder):
    return outcome(9, World(torch.device("cpu"), TINY, CPU_LIMITS, folder))


def test_offload_inside_deepspeed(tmp_path):
    (found,) = run_distributed(offload_block, 1, tmp_path / "ranks", tmp_path)
    assert found[:3] == ("pass", None, [])
    assert "activations_slowdown" in found[3]
