"""Rates and memory of a plan from a report of ``raydpo gpu check``."""

import json

import pytest
from documented import GUIDE, block
from tiny import make_tokenizer, preferences, write_preferences
from unpaired import labelled_records

from raydpo.config import load_config
from raydpo.data.pairs import load_pairs
from raydpo.data.tokenise import Tokeniser
from raydpo.errors import ConfigError
from raydpo.estimate.checked import read_check
from raydpo.estimate.display import plan_run, print_plan
from raydpo.terminal.console import Console
from raydpo.version import __version__

REPORT = {
    "format": 1,
    "raydpo": __version__,
    "model": {"shape": "llama3-8b", "layers": [4, 8], "whole": 32},
    "started": "2026-11-29T12:00:00+00:00",
    "device": {"type": "cuda", "name": "NVIDIA H100 80GB HBM3", "memory_gib": 79.1},
    "measured": {
        "gemm_tflops": 700.0,
        "score_flops": 5e14,
        "full_flops": 4.4e14,
        "full_checkpointing_flops": 4.2e14,
        "lora_flops": 4e14,
    },
    "blocks": [
        {"number": number, "name": name, "status": "pass", "note": "", "error": None}
        for number, name in ((3, "cached = live"), (6, "scoring speed"), (7, "training speed"))
    ],
}


def ended(number, **changes):
    """The blocks of a report, with one of them changed."""
    return [block | changes if block["number"] == number else block for block in REPORT["blocks"]]


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
        write_preferences(tmp_path / "labels.jsonl", labelled_records(20))
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


def test_mismatched_completions_are_counted_once(planned, tmp_path):
    labels = f"data.train={tmp_path / 'labels.jsonl'}"
    alone, filled = (planned(labels, f"train.loss={loss}").data["completions"] for loss in ("bco_pair", "kto"))
    assert (alone, filled) == (20, 40)


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
    from raydpo.gpu.figures import Report, Result

    fields = ("raydpo", "model", "started", "device", "measured")
    blocks = [Result(number=6, name="scoring speed", status="pass", seconds=1.0, figures={})]
    Report(versions={}, blocks=blocks, **{name: REPORT[name] for name in fields}).write(tmp_path / "today.json")
    assert read_check(tmp_path / "today.json").flops == {"score": 5e14}


def test_the_guides_example_is_read(tmp_path):
    (tmp_path / "example.json").write_text(block(GUIDE["gpus"], "json", '"format"'))
    assert set(read_check(tmp_path / "example.json").flops) == {"score", "full"}


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
        ({"measured": {"score_flops": 1e-300}}, "measured.score_flops is 1e-300, and a number from 1e"),
        ({"measured": {"score_flops": 10**400}}, "measured.score_flops is 1000"),
        ({"device": REPORT["device"] | {"memory_gib": -80}}, "device.memory_gib is -80"),
        ({"device": REPORT["device"] | {"memory_gib": 10**400}}, "device.memory_gib is 1000"),
        ({"device": REPORT["device"] | {"name": None}}, "device.name is None"),
        ({"device": REPORT["device"] | {"name": ["H100"]}}, r"device.name is \['H100'\]"),
        ({"started": None}, "started is None"),
        ({"raydpo": 1}, "raydpo is 1"),
        ({"format": True}, "has format True"),
        ({"format": 1.0}, "has format 1.0"),
        ({"format": [[[[[[[[[1]]]]]]]]]}, "has format"),
        ({"model": {"shape": "tiny"}}, "model.shape is 'tiny'"),
        ({"model": None}, "is no whole report"),
        ({"blocks": None}, "is no whole report"),
        ({"blocks": [{"number": []}]}, "is no whole report"),
    ],
)
def test_a_damaged_report_is_named(report, changes, told):
    with pytest.raises(ConfigError, match=told):
        read_check(report(**changes))


def test_a_report_that_is_nested_too_deeply_is_refused(tmp_path):
    for depth in (500, 900, 100_000):
        (tmp_path / "deep.json").write_text('{"format": ' + "[" * depth + "]" * depth + "}")
        with pytest.raises(ConfigError, match=r"deep\.json"):
            read_check(tmp_path / "deep.json")


@pytest.mark.parametrize(
    ("blocks", "told"),
    [
        (ended(6, status="fail"), r"no rate of score: block 6 \(scoring speed\) ended as 'fail'"),
        (ended(7, status="error", error="ValueError: no"), r"no rate of lora: block 7 .* 'error', and says: ValueError: no"),
        (REPORT["blocks"][:2], "no rate of lora: block 7, which measures it, did not run"),
        (REPORT["blocks"][:1], "no rate of score: .*; nor of lora: "),
    ],
)
def test_rates_of_a_block_that_did_not_pass_are_refused(planned, report, blocks, told):
    with pytest.raises(ConfigError, match=told):
        planned("model.lora={r: 4}", measured=str(report(blocks=blocks)))


def test_a_rate_that_a_missing_package_prevented_names_it(planned, report):
    rates = {name: rate for name, rate in REPORT["measured"].items() if "lora" not in name}
    with pytest.raises(ConfigError, match="says: lora skipped: no peft"):
        planned("model.lora={r: 4}", measured=str(report(measured=rates, blocks=ended(7, note="lora skipped: no peft"))))


@pytest.mark.parametrize(
    ("overrides", "changes", "options", "told"),
    [
        ([], {"blocks": ended(3, status="fail")}, {}, ["block 3 (cached = live) ended as 'fail'"]),
        ([], {"raydpo": "0.0.7"}, {}, ["of raydpo 0.0.7, and this is raydpo"]),
        (["model.dtype=float32"], {}, {}, ["model.dtype is float32"]),
        (["score.dtype=float32"], {}, {}, ["score.dtype is float32"]),
        (["model.fused=true"], {}, {}, ["model.fused is true"]),
        (["model.lora={r: 4}", "model.quantization=4bit"], {}, {}, ["weights are quantized"]),
        ([], {}, {"device": "L4"}, ["--device is L4, but the rates of --measured are those of NVIDIA H100"]),
        ([], {}, {"device": "H100"}, []),
        (["model.dtype=bfloat16"], {"blocks": ended(3, status="skip")}, {}, []),
    ],
)
def test_what_the_rates_do_not_hold_for_is_warned_of(planned, report, capsys, overrides, changes, options, told):
    plan = planned(*overrides, measured=str(report(**changes)), **options)
    assert len(plan.rates.warnings) == len(told)
    print_plan(plan, Console())
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("warning: --") == len(told)
    assert all(one in printed for one in told)


def test_options_that_decide_the_same_are_compared_with_none(planned, report):
    with pytest.raises(ConfigError, match="--mfu-train both decide the rates"):
        planned(measured=str(report()), mfu_train=0.0)


def test_an_unknown_device_is_refused_with_a_memory_too(planned, report):
    with pytest.raises(ConfigError, match=r"--device 'Foo' is not known; name one of H100, .*, or leave it out"):
        planned(measured=str(report()), device="Foo", memory=24.0)
