"""jobs/benchmark.py from end to end on a tiny model: a handful of processes, and what they leave."""

import json
import math

import pytest
from tiny import preferences, write_preferences

from raydpo.estimate.rate import known_peak

RATIOS = [
    ("reference_pass", "ratio"),
    ("train_step", "ratio_vs_cached"),
    ("train_step", "ratio_vs_online"),
    ("memory", "ratio"),
    ("memory_alike", "ratio"),
    ("memory_alike", "ratio_vs_cached"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_preferences(tmp_path_factory.mktemp("data") / "pairs.jsonl", preferences(14))


@pytest.mark.slow  # a minute of processes; losses are compared with TRL's in training/test_trl_parity
def test_against_trl(tiny_llama, data, tmp_path, capsys):
    pytest.importorskip("trl")
    pytest.importorskip("deepspeed")
    from raydpo.benchmark.command import main

    out = tmp_path / "out.json"
    # Called in this process: each side starts a process of its own.
    status = main(
        [
            "--model",
            str(tiny_llama),
            "--data",
            str(data),
            "--pairs",
            "14",
            "--pairs-per-step",
            "4",
            "--threads",
            "1",
            "--dtype",
            "fp32",
            "--lora",
            "4",
            "--work",
            str(tmp_path / "work"),
            "--tokens-per-batch",
            "200",
            "--baseline-batches",
            "1,4",
            "--json",
            str(out),
        ]
    )
    said = capsys.readouterr()
    assert status == 0, said.err
    found = json.loads(out.read_text())
    assert found["equal"] and found["problems"] == [] and found["baseline"].startswith("TRL 1.")
    assert all(found[part][key] > 0 and math.isfinite(found[part][key]) for part, key in RATIOS)
    assert found["workload"]["pairs"] == 14 and found["versions"]["trl"] and found["versions"]["deepspeed"]
    for name in ("raydpo_train", "cached", "online"):
        raw = found["raw"][name]
        assert len(raw["step_seconds"]) == len(raw["losses"]) == 4  # the last step has two pairs
        assert raw["losses"][0] == pytest.approx(math.log(2), abs=1e-6) and raw["losses"][1] != raw["losses"][0]
        assert raw["facts"]["fused"], "the optimizers are not the same"
    assert found["reference_pass"]["cached"]["seconds"] == found["raw"]["cached"]["reference_seconds"]
    for name, tried in found["tried"].items():
        assert [(one["pairs_per_pass"], one["forward_passes"]) for one in tried] == [(1, 14), (4, 4)]
        assert tried[0]["positions"] < tried[1]["positions"] and tried[0]["largest_pass"] < tried[1]["largest_pass"]
        fastest = min(tried, key=lambda one: one["step_seconds"])
        assert found["raw"][name]["facts"]["pairs_per_pass"] == fastest["pairs_per_pass"]
        assert fastest["positions"] == found["raw"][name]["facts"]["positions"]
    assert found["tried"]["cached"][1]["positions"] == found["workload"]["positions"]["padded"]
    assert 0 < found["raw"]["raydpo_train"]["facts"]["largest_pass"] <= 200
    assert "reference pass" in said.out and "tried: 1 pair(s) at a time" in said.out


@pytest.mark.slow
def test_random_pairs_and_all_weights(tiny_llama, tmp_path):
    pytest.importorskip("trl")
    pytest.importorskip("deepspeed")
    from raydpo.benchmark.command import main

    out = tmp_path / "out.json"
    assert (
        main(
            [
                "--model",
                str(tiny_llama),
                "--synthetic",
                "--lengths",
                "60",
                "--ratios",
                "1:4",
                "--full",
                "--pairs",
                "4",
                "--pairs-per-step",
                "2",
                "--dtype",
                "fp32",
                "--skip-online",
                "--threads",
                "1",
                "--baseline-batches",
                "2",
                "--work",
                str(tmp_path / "work"),
                "--json",
                str(out),
            ]
        )
        == 0
    )
    found = json.loads(out.read_text())
    assert [point["workload"]["ratio"] for point in found["results"]] == ["1:4"]
    assert all(point["equal"] and point["train_step"]["ratio_vs_cached"] > 0 for point in found["results"])


@pytest.mark.parametrize("package", ["trl", "deepspeed"])
def test_a_package_that_is_not_installed_is_named(tiny_llama, package, capsys, monkeypatch):
    from raydpo.benchmark import command

    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if name == package else name)
    assert command.main(["--model", str(tiny_llama), "--full", "--synthetic", "--device", "cpu"]) == 2
    assert f"needs the package '{package}'" in capsys.readouterr().err


def test_sides_that_differ_are_not_compared(tiny_llama, data, tmp_path, monkeypatch, capsys):
    """Stand-ins for the processes: only the comparison of their figures is tested."""
    pytest.importorskip("trl")
    from raydpo.benchmark import command
    from raydpo.benchmark.job import Result

    def pretended(module, job):
        steps = (
            {}
            if job.stage == "score"
            else {
                "step_seconds": [1.0, 1.0],
                "losses": [0.69, 0.69],
                "chosen_logps": [-9.0] * 2,
                "rejected_logps": [-9.0] * 2,
            }
        )
        reference = {
            "reference_seconds": 1.0,
            "ref_chosen": [-9.0] * 4,
            "ref_rejected": [-9.0, -9.0, -9.0, -8.0 if job.stage == "cached" else -9.0],
        }
        facts = dict.fromkeys(("pairs_per_pass", "forward_passes", "positions", "largest_pass"), 2)
        return Result(
            load_seconds=1.0,
            peak_bytes=1.0,
            facts=facts,
            **steps,
            **(reference if job.stage in ("score", "cached") else {}),
        )

    monkeypatch.setattr(command, "start", pretended)
    out = tmp_path / "out.json"
    status = command.main(
        [
            "--model",
            str(tiny_llama),
            "--data",
            str(data),
            "--pairs",
            "4",
            "--pairs-per-step",
            "2",
            "--dtype",
            "fp32",
            "--full",
            "--json",
            str(out),
        ]
    )
    assert status == 1
    assert capsys.readouterr().err.count("pairs:4") == 1
    found = json.loads(out.read_text())
    assert not found["equal"] and found["train_step"]["cached"]["seconds"] == 1.0
    assert not any(key.startswith("ratio") for part in ("reference_pass", "train_step", "memory") for key in found[part])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lora", "4"], "--data FILE and --synthetic"),
        (["--lora", "4", "--synthetic", "--pairs", "8", "--pairs-per-step", "8"], "8 pairs are 1 steps"),
        (["--full", "--synthetic", "--device", "cuda"], "no CUDA device"),
        (
            ["--full", "--synthetic", "--pairs", "14", "--pairs-per-step", "4", "--baseline-batches", "1,3"],
            "--baseline-batches 3 does not divide steps of 4 and 2 pairs",
        ),
    ],
)
def test_bad_input_costs_one_message(tiny_llama, arguments, words, capsys, monkeypatch):
    from raydpo.benchmark.command import main

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["--model", str(tiny_llama), *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA A100-SXM4-80GB", 311.8),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40", None),
        ("AMD EPYC", None),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200 NVL", 835.0),
        ("NVIDIA A100 80GB PCIe", 311.8),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_peak_is_known_by_name(name, tflops):
    assert known_peak(name) == (None if tflops is None else tflops * 1e12)
