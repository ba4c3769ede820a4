"""Each block of ``raydpo gpu check`` that needs no DeepSpeed, on the CPU: as it is, and with a fault that it must find."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from raydpo.gpu import cached, environment, fusing, kernels, numerics, offload, speed
from raydpo.gpu.blocks import BLOCKS
from raydpo.gpu.command import run_block
from raydpo.gpu.figures import Findings
from raydpo.gpu.limits import CPU_LIMITS, GPU_LIMITS
from raydpo.gpu.shape import TINY
from raydpo.gpu.world import World
from raydpo.model import bodycheck
from raydpo.model.head import LogitTransform
from raydpo.model.load import add_lora
from raydpo.terminal.console import Console

BY_NUMBER = {block.number: block for block in BLOCKS}


@pytest.fixture(autouse=True)
def forgetful(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


@pytest.fixture
def world(tmp_path):
    return World(torch.device("cpu"), TINY, CPU_LIMITS, tmp_path)


def outcome(number, world):
    """Status of a block, and the names of the figures outside their limits."""
    result = run_block(BY_NUMBER[number], world, 120.0, Console())
    assert result.error is None, result.error
    return result.status, [name for name, figure in result.figures.items() if figure.ok is False]


def test_there_are_twelve_blocks_in_order():
    assert [block.number for block in BLOCKS] == list(range(12))
    assert [block.number for block in BLOCKS if block.quick] == [0, 1, 2, 3, 4, 5, 8]


def test_environment(world, monkeypatch):
    assert outcome(0, world) == ("pass", [])
    assert world.measured["gemm_tflops"] > 0
    # The product of a CPU, compared with a GPU's data sheet.
    monkeypatch.setattr(World, "sheet_peak", 989.4e12)
    world.limits = GPU_LIMITS
    assert outcome(0, world) == ("fail", ["gemm_tflops"])


@pytest.mark.parametrize(
    ("driver", "cuda", "ok"),
    [("580.95.05", "13.0", True), ("550.54.15", "13.0", False), (None, "13.0", False), ("550.54.15", "12.8", None)],
)
def test_a_driver_too_old_for_cuda_13_fails(driver, cuda, ok):
    found = Findings()
    environment.judge_driver(found, driver, cuda, GPU_LIMITS.driver)
    assert found.figures["driver"].ok is ok


def test_clocks_are_those_of_the_gpu_in_use(tmp_path, monkeypatch):
    """Asked by UUID, since CUDA_VISIBLE_DEVICES changes numbers."""
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\n[ "$1" = --id=GPU-12ab ] && echo "1980, 690.21"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for uuid, told in (
        ("12ab", (1980.0, 690.21)),
        ("GPU-12ab", (1980.0, 690.21)),
        ("34cd", (None, None)),
        (None, (None, None)),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, uuid=uuid: SimpleNamespace(uuid=uuid))
        assert environment.clocks(torch.device("cuda:0")) == told


def test_kernels(world, monkeypatch):
    assert outcome(1, world) == ("pass", [])
    right = bodycheck.attend

    def aligned_to_the_first_key(query, key, value, segments, terms):
        return kernels.definition(segments.nodes, query, key, value, terms, aligned_to_first=True)

    monkeypatch.setattr(bodycheck, "attend", aligned_to_the_first_key)
    status, failed = outcome(1, world)
    assert status == "fail" and {"sdpa.d128.error", "sdpa.softcap.error", "sdpa.sinks.error"} <= set(failed)

    def with_half_the_gradient_of_keys(query, key, *rest):
        return right(query, 0.5 * key + 0.5 * key.detach(), *rest)

    monkeypatch.setattr(bodycheck, "attend", with_half_the_gradient_of_keys)
    status, failed = outcome(1, world)
    assert status == "fail" and {f"sdpa.{kind}.error" for kind in kernels.cases(world, "sdpa")} == set(failed)


def test_a_definition_that_is_wrong_fails(world, monkeypatch):
    """The code that bodies are compared with, without the soft cap."""
    right = bodycheck.by_node.attend_exactly

    def uncapped(query, key, value, segments, terms):
        return right(query, key, value, segments, dataclasses.replace(terms, softcap=None))

    monkeypatch.setattr(bodycheck.by_node, "attend_exactly", uncapped)
    status, failed = outcome(1, world)
    assert status == "fail" and "definition.error" in failed


def test_a_body_that_refuses_fails(world, monkeypatch):
    def refuse(*_):
        raise TypeError("varlen_attn() got an unexpected keyword argument 'scale'")

    monkeypatch.setattr(bodycheck, "attend", refuse)
    status, failed = outcome(1, world)
    assert status == "fail" and "sdpa.d128.runs" in failed


def test_head(world, monkeypatch):
    assert outcome(2, world) == ("pass", [])
    monkeypatch.setattr(LogitTransform, "backward_", lambda self, grad, transformed: grad)
    status, failed = outcome(2, world)
    assert status == "fail" and {"softcap.float32.dh", "softcap.float32.dW"} <= set(failed)
    assert not any("log-probs" in name or name.startswith("plain") for name in failed)


def test_cached_is_live(world, monkeypatch):
    assert outcome(3, world) == ("pass", [])
    assert len(cached.MODES) == 5

    def adapters_that_are_not_zero(*arguments):
        model = add_lora(*arguments)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.3)
        return model

    monkeypatch.setattr(cached, "MODES", {"lora": cached.MODES["lora"]})
    monkeypatch.setattr(cached, "add_lora", adapters_that_are_not_zero)
    status, failed = outcome(3, world)
    assert status == "fail" and "lora.mean_gap" in failed


def test_a_first_loss_that_is_not_ln_2_fails(world, monkeypatch):
    """Log-probs of chosen and rejected exchanged in the cache."""
    monkeypatch.setattr(cached, "MODES", {"full": {}})
    right = cached.Scorer.score
    monkeypatch.setattr(cached.Scorer, "score", lambda self, groups: [one[::-1] for one in right(self, groups)])
    monkeypatch.setattr(World, "pairs", _equal_lengths(World.pairs))
    status, failed = outcome(3, world)
    assert status == "fail" and "full.first_loss" in failed


def _equal_lengths(pairs):
    return lambda self, count, **options: pairs(self, count, **options | {"spread": 0.0})


def test_speed(world):
    assert outcome(6, world) == ("pass", [])
    assert outcome(7, world) == ("pass", [])
    kinds = {"score", "full", "full_checkpointing", "lora", "lora_checkpointing"}
    assert world.measured.keys() == {f"{kind}_flops" for kind in kinds}
    assert all(value > 0 for value in world.measured.values())


@pytest.mark.parametrize("number", [6, 7])
def test_a_pass_that_breaks_ends_its_block_only(number, world, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(speed.LogpModel, "forward", broken)
    result = run_block(BY_NUMBER[number], world, 60.0, Console())
    assert result.status == "error" and "illegal memory access" in result.error


def test_mfu_is_that_of_the_whole_model(world, monkeypatch):
    """A pass of a millisecond a layer: 32 layers take 32 ms, and the operations are those of 32 layers."""
    monkeypatch.setattr(speed, "seconds", _a_millisecond_a_layer())
    monkeypatch.setattr(World, "sheet_peak", 1e12)
    result = run_block(BY_NUMBER[6], world, 60.0, Console())
    groups = world.pairs_of(TINY.passes[1])
    positions = sum(len(group.prompt) + sum(map(len, group.completions)) for group in groups)
    assert result.figures["score_positions_s_32"].value == pytest.approx(positions / 0.032)
    # By hand: 2 operations a weight and position; 4 A D a query and key; 2 H V a prediction.
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128 + 2 * 64
    prompt, *completions = TINY.pair
    looks = len(groups) * (prompt**2 / 2 + sum(prompt * one + one**2 / 2 for one in completions))
    flops = 2 * (32 * layer + 64) * positions + 4 * 64 * looks * 32 + 2 * 64 * 384 * len(groups) * sum(completions)
    assert result.figures["score_mfu_32"].value == pytest.approx(flops / 0.032 / 1e12, rel=1e-3)


def test_a_time_that_does_not_grow_with_layers_fails(world, monkeypatch):
    found = Findings()
    monkeypatch.setattr(World, "cuda", True)
    assert speed._whole(world, found, (0.002, 0.001), "full, 32 layers") == 0.001
    assert [name for name, figure in found.figures.items() if figure.ok is False] == ["full.grows"]
    assert speed._whole(world, Findings(), (0.001, 0.002), "full, 32 layers") == pytest.approx(0.032)


@pytest.mark.parametrize("grows", [True, False])
def test_a_rate_without_growth_is_none_of_those_that_plans_use(world, monkeypatch, grows):
    for name, value in (("cuda", True), ("sheet_peak", 1e12)):
        monkeypatch.setattr(World, name, value)
    monkeypatch.setattr(speed, "_kinds", lambda *_: None)
    monkeypatch.setattr(speed, "_update", lambda _: 1.0)
    monkeypatch.setattr(speed, "_passes", lambda world, kind, layers, recomputes: (1e-3, 2e-3 * layers))
    monkeypatch.setattr(speed, "seconds", lambda *_, **__: 1e-3)
    if grows:
        monkeypatch.setattr(speed, "_passes", lambda world, kind, layers, recomputes: (1e-3 * layers, 2e-3 * layers))
        monkeypatch.setattr(speed, "seconds", _a_millisecond_a_layer())
    found = Findings()
    speed.scoring_speed(world, found)
    speed.training_speed(world, found)
    assert len(world.measured) == (5 if grows else 0)
    assert any(figure.ok is False for figure in found.figures.values()) is not grows


def _a_millisecond_a_layer():
    def seconds(run, device, **_):
        return 0.001 * run.func.causal_lm.config.num_hidden_layers

    return seconds


def test_offload(world, monkeypatch):
    monkeypatch.setattr(offload, "STEPPED", {})
    assert outcome(9, world) == ("pass", [])
    world.limits = dataclasses.replace(CPU_LIMITS, host=GPU_LIMITS.host)
    monkeypatch.setattr(offload, "seconds", lambda *_, **__: 1.0)
    status, failed = outcome(9, world)
    assert status == "fail" and len(failed) == 1 and failed[0].startswith("host_adamw")


def test_fused_functions(world, monkeypatch):
    assert outcome(10, world) == ("pass", [])
    right = fusing.switch

    def wrong(model, parts, on):
        right(model, parts, on)
        with torch.no_grad():
            model.causal_lm.get_output_embeddings().weight.mul_(1.5 if on else 1.0)

    monkeypatch.setattr(fusing, "switch", wrong)
    status, failed = outcome(10, world)
    assert status == "fail" and failed == ["mean_gap"]


def test_numerics(world, monkeypatch):
    assert outcome(11, world) == ("pass", [])
    right = numerics._logps

    def shifted_in_padded_rows(world, model, groups, positions):
        shift = 0.1 if model.method.layout == "padded" else 0.0
        return right(world, model, groups, positions) + np.float32(shift)

    monkeypatch.setattr(numerics, "_logps", shifted_in_padded_rows)
    assert outcome(11, world) == ("fail", ["padded"])
    # Weights that are not those of the float32 model.
    monkeypatch.setattr(numerics, "_logps", right)
    model = World.model

    def scaled(self, layers, *, dtype=None, **options):
        made = model(self, layers, dtype=dtype, **options)
        calls.append(made)
        with torch.no_grad():
            made.lm_head.weight.mul_(1.0 if len(calls) == 1 else 3.0)
        return made

    calls = []
    monkeypatch.setattr(World, "model", scaled)
    status, failed = outcome(11, world)
    assert status == "fail" and failed == ["bfloat16.mean"]
