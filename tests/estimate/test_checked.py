"""Rates and memory of a plan from a report of ``raydpo gpu check``."""

import json

import pytest
from tiny import make_tokenizer, preferences, write_preferences

from raydpo.config import load_config
from raydpo.data.pairs import load_pairs
from raydpo.data.tokenise import Tokeniser
from raydpo.errors import ConfigError
from raydpo.estimate.checked import read_check
from raydpo.estimate.display import plan_run

REPORT = {
    "format": 1,
    "started": "2026-11-29T12:00:00+00:00",
    "device": {"type": "cuda", "name": "NVIDIA H100 80GB HBM3", "memory_gib": 79.1},
    "measured": {
        "gemm_tflops": 700.0,
        "score_flops": 5e14,
        "full_flops": 4.4e14,
        "full_checkpointing_flops": 4.2e14,
        "lora_flops": 4e14,
    },
}


@pytest.fixture
def report(tmp_path):
    def write(**changes):
        file = tmp_path / "gpu-check.json"
        file.write_text(json.dumps(REPORT | changes))
        return file

    return write


@pytest.fixture
def planned(tmp_path, tiny_llama):
    write_preferences(tmp_path / "pairs.jsonl", preferences(20))

    def plan(*overrides, **options):
        tree = {"output": "runs", "model": {"path": str(tiny_llama)}, "data": {"train": str(tmp_path / "pairs.jsonl")}}
        config = load_config(tree, list(overrides))
        sets = load_pairs(config.data, Tokeniser(make_tokenizer()))
        return plan_run(config, sets, **options)

    return plan


@pytest.mark.parametrize(
    ("overrides", "train"),
    [
        ([], 4.4e14),
        (["train.gradient_checkpointing=true"], 4.2e14),
        (["model.lora={r: 4}"], 4e14),
    ],
)
def test_the_rates_are_those_of_the_kind_of_training(planned, report, overrides, train):
    plan = planned(*overrides, measured=str(report()))
    assert (plan.rates.score, plan.rates.train) == (5e14, train)
    assert "NVIDIA H100 80GB HBM3" in plan.rates.origin and "2026-11-29" in plan.rates.origin
    assert (plan.memory.device, plan.memory.memory) == ("NVIDIA H100 80GB HBM3", 79.1 * 2**30)
    assert plan.score.seconds == pytest.approx(plan.score.flops / 5e14)


def test_a_named_memory_stands(planned, report):
    assert planned(measured=str(report()), memory=40.0).memory.memory == 40.0 * 2**30
    assert planned(measured=str(report()), device="L4").memory.memory == 24 * 2**30


def test_what_cannot_be_used_is_refused(planned, report, tmp_path):
    with pytest.raises(ConfigError, match="no rate of lora_checkpointing"):
        planned("model.lora={r: 4}", "train.gradient_checkpointing=true", measured=str(report()))
    with pytest.raises(ConfigError, match="--mfu-train both decide the rates"):
        planned(measured=str(report()), mfu_train=0.4)
    with pytest.raises(ConfigError, match="--measure both decide"):
        planned(measured=str(report()), measure=True)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_check(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="has format 2"):
        read_check(report(format=2))
    with pytest.raises(ConfigError, match="a report of a CPU, AMD EPYC"):
        read_check(report(device={"type": "cpu", "name": "a CPU, AMD EPYC"}))
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match="has format None"):
        read_check(tmp_path / "list.json")


def test_a_report_of_today_is_read(report, tmp_path):
    """What ``raydpo gpu check`` writes has the fields that are read here."""
    from raydpo.gpu.figures import Report

    written = Report(raydpo="1", versions={}, model={}, **{name: REPORT[name] for name in ("started", "device", "measured")})
    written.write(tmp_path / "today.json")
    assert read_check(tmp_path / "today.json").flops["score"] == 5e14


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"device": None}, "is no whole report"),
        ({"device": {"type": "cuda"}}, "is no whole report"),
        ({"measured": []}, "is no whole report"),
        ({"device": REPORT["device"] | {"memory_gib": None}}, "device.memory_gib is None"),
        ({"measured": {"score_flops": float("nan")}}, "measured.score_flops is nan"),
        ({"measured": {"score_flops": 0}}, "measured.score_flops is 0"),
        ({"measured": {"score_flops": True}}, "measured.score_flops is True"),
    ],
)
def test_a_damaged_report_is_named(report, changes, told):
    with pytest.raises(ConfigError, match=told):
        read_check(report(**changes))
