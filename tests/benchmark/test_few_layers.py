"""jobs/gpu_benchmark.sh: what it refuses and leaves out, and how few layers are extrapolated to all."""

import dataclasses
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raydpo.benchmark import few_layers
from raydpo.benchmark.job import Result
from raydpo.benchmark.watch import Watched
from raydpo.errors import DeviceMemoryError, TrainError
from raydpo.terminal.console import Console

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "jobs" / "gpu_benchmark.sh"


def script(*words, **environment):
    found = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([SCRIPT, *words], capture_output=True, text=True, env=found)


@pytest.fixture
def pretended(monkeypatch):
    """Stand-ins for the processes: a layer takes 0.1 s, everything else 1 s. TRL takes twice as long, least with 2 pairs; a
    step of adapters is half as long, and more than 8 layers do not fit beside the optimizer."""
    asked = []

    def start(module, job, limit):
        asked.append((module, job, limit))
        layers = json.loads((Path(job.model) / "config.json").read_text())["num_hidden_layers"]
        seconds = 1 + layers / 10
        pairs = {"ref_chosen": [-9.0] * 4, "ref_rejected": [-9.0] * 4}
        if module == "kernel_side":
            if job.stage == "score":
                return Result(reference_seconds=seconds, **pairs), Watched()
            if job.lora is None and job.tokens_per_batch == "auto":
                raise DeviceMemoryError("16,384 tokens of a micro-batch do not fit: CUDA out of memory")
        else:
            seconds *= 2 + (job.batch - 2) ** 2
        if module == "trl_side" and job.batch == 1:
            raise TrainError(
                "raydpo.benchmark.trl_side ended with status 1: torch.OutOfMemoryError: CUDA out of memory. Tried"
            )
        step = seconds / (1 if job.lora is None else 2)
        scored = {"reference_seconds": seconds, **pairs} if module == "trl_side" else {}
        return Result(step_seconds=[9.0] + [step] * (job.steps - 1), losses=[0.6931] * job.steps, **scored), Watched()

    monkeypatch.setattr(few_layers, "start", start)
    return asked


@pytest.fixture
def bench(tmp_path):
    def call(*words):
        where = ["--device", "cpu", "--tiny", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
        status = few_layers.main([*where, *words])
        return status, json.loads((tmp_path / "out" / "result.json").read_text())

    call.out = tmp_path / "out"
    return call


def test_all_layers_are_extrapolated_for_both_sides_alike(bench, pretended, monkeypatch, capsys):
    monkeypatch.setattr(few_layers, "TINY", dataclasses.replace(few_layers.TINY, batches=(1, 2, 4), pairs_per_step=4))
    status, found = bench()
    assert status == 0 and not found["problems"] and not found["notes"]
    rows = {(row["part"], row["side"]): row for row in found["rows"]}
    assert set(rows) == {(part, side) for part in ("reference", "lora", "full") for side in ("raydpo", "trl")}
    for (part, side), row in rows.items():
        whole = (1 + 32 / 10) * (2 if side == "trl" else 1) / (2 if part == "lora" else 1)
        assert row["seconds"]["32"] == pytest.approx(whole), (part, side)
        assert row["pairs_s"] == pytest.approx((8 if part == "reference" else 4) / whole)
    assert rows["full", "trl"]["positions_s"] > 0.6 * rows["full", "raydpo"]["positions_s"], "TRL computes prompts twice"
    tried = [(run["layers"], run["batch"], run["failed"]) for run in found["runs"] if run["side"] == "trl"]
    assert tried[:4] == [(2, 1, "out of memory"), (2, 2, None), (2, 4, None), (1, 2, None)], "the fastest with fewer layers"
    ours = [(run["batch"], run["failed"]) for run in found["runs"] if (run["side"], run["part"]) == ("raydpo", "full")]
    assert ours == [("auto", "out of memory"), (16384, None)] * 2
    page = (bench.out / "result.md").read_text()
    assert page in capsys.readouterr().out and "say nothing about a GPU" in page
    assert "| LoRA, rank 16 | raydpo | 1.9 | 2.00 |" in page and "- trl, lora, 2 layers, 1: out of memory" in page
    assert all(0 < limit <= 840 for _, _, limit in pretended)


def test_mfu_counts_what_the_mathematics_needs(pretended, tmp_path):
    """By hand, from the sizes of the tiny model with all its layers; a prompt once for both completions."""
    bench = few_layers.Bench(few_layers.TINY, tmp_path, "cpu", time.monotonic() + 999, Console(io.StringIO()))
    list(bench.run())
    rows = {(row["part"], row["side"]): row for row in bench.rows(1e9)}
    prompt = tokens = looks = 0
    for row in bench.workloads[2].table.to_pylist():
        start = len(row["prompt_ids"])
        prompt, looks = prompt + start, looks + sum(range(1, start + 1))
        for side in ("chosen", "rejected"):
            tokens += len(row[f"{side}_ids"])
            looks += sum(start + place for place in range(1, len(row[f"{side}_ids"]) + 1))
    weights = 32 * (64 * (64 + 2 * 32 + 64) + 3 * 64 * 128)
    body, attention, head = 2 * weights * (prompt + tokens), 4 * 64 * 32 * looks, 2 * 256 * 64 * tokens
    seconds = rows["reference", "raydpo"]["seconds"][32]
    assert rows["reference", "raydpo"]["mfu"] == pytest.approx((body + attention + head) / seconds / 1e9, rel=0.02)
    steps = few_layers.TINY.steps
    lora = (2 * body + 3 * attention + 2 * head) / steps / rows["lora", "raydpo"]["seconds"][32] / 1e9
    assert rows["lora", "raydpo"]["mfu"] == pytest.approx(lora, rel=0.02)


def test_what_there_is_no_time_for_is_left_out(bench, pretended, monkeypatch):
    monkeypatch.setattr(few_layers, "LEAST_SECONDS", 1000.0)
    status, found = bench()
    assert status == 1 and not pretended and not found["rows"]
    assert found["notes"][0] == "left out, for lack of time: raydpo, reference pass, 1 layers, auto"


def test_sides_with_different_losses_are_told(bench, pretended, monkeypatch):
    start = few_layers.start

    def other(module, job, limit):
        result, watched = start(module, job, limit)
        return (dataclasses.replace(result, losses=[0.9]) if module == "trl_side" else result), watched

    monkeypatch.setattr(few_layers, "start", other)
    status, found = bench()
    assert status == 1 and "the first loss is 0.6931 and 0.9000 (TRL)" in found["problems"][0]


@pytest.mark.parametrize("missing", [("trl",), ("peft",), ("deepspeed",)])
def test_what_needs_a_missing_package_is_skipped_and_named(missing, bench, pretended, monkeypatch):
    find = few_layers.importlib.util.find_spec
    monkeypatch.setattr(few_layers.importlib.util, "find_spec", lambda name: None if name in missing else find(name))
    status, found = bench()
    assert status == 0 and any(f"the package {missing[0]} is not installed" in note for note in found["notes"])
    modules = {(module, job.stage, job.lora) for module, job, _ in pretended}
    assert ("kernel_side", "score", None) in modules
    kept = {"trl": ("kernel_side", "train", 16), "peft": ("trl_side", "cached", None), "deepspeed": None}[missing[0]]
    assert kept in modules or (kept is None and len(modules) == 1)


@pytest.mark.parametrize("layers", ["8,4", "4", "4,99", "a,b"])
def test_layers_that_do_not_grow_are_refused(layers, capsys):
    assert few_layers.main(["--device", "cpu", "--tiny", "--layers", layers]) == 2
    assert "expected two growing numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "cpu", "--tiny", "--out", "/proc/x"], "--out: /proc/x cannot be written (No such file or directory)"),
        (["--device", "cpu", "--tiny", "--work", "/proc/x"], "--work: /proc/x cannot be written"),
        (["--device", "cpu"], "add --tiny"),
    ],
)
def test_bad_input_is_told_before_anything_is_made(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(few_layers, "write_random_llama", None)
    assert few_layers.main(words) == 2 and said in capsys.readouterr().err
    assert not list(tmp_path.glob("**/result.*"))


@pytest.mark.parametrize("seconds", ["-5", "20", "nan"])
def test_a_time_in_which_nothing_is_measured_is_refused(seconds, capsys):
    with pytest.raises(SystemExit) as ended:
        few_layers.main(["--device", "cpu", "--tiny", "--seconds", seconds])
    assert ended.value.code == 2 and "a number of at least 60 is expected" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["abc", "-5", "59", "0900", "1e3"])
def test_the_script_refuses_a_time_that_is_none(seconds):
    result = script("--device", "cpu", "--tiny", SECONDS_IN_ALL=seconds)
    assert result.returncode == 2
    assert f"error: SECONDS_IN_ALL is '{seconds}'; expected a whole number of seconds, at least 60" in result.stderr


def test_the_script_is_sound(tmp_path):
    result = subprocess.run([Path(sys.executable).with_name("shellcheck"), SCRIPT], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    nothing = tmp_path / "python"
    assert "there is no /nowhere" in script(PYTHON="/nowhere").stderr
    nothing.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1\nexit 1\n')
    nothing.chmod(0o755)
    old = script(PYTHON=str(nothing))
    assert old.returncode == 2 and "Python 3.9.1; set PYTHON to a Python of 3.11 or newer" in old.stderr


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU")
def test_without_a_gpu_the_script_says_how_to_try_it():
    result = script()
    assert result.returncode == 2 and "--device cpu --tiny tries the code" in result.stderr


def test_the_script_goes_on_with_what_is_there(tmp_path):
    """No network, and a Python that lacks TRL: the packages cannot be installed, and a line names what is skipped. The
    layers are bad input, so nothing is measured."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in\n *venv*) exit 1;;\n *find_spec*trl*) echo trl;;\n *) exec {sys.executable} "$@";;\nesac\n'
    )
    python.chmod(0o755)
    result = script("--device", "cpu", "--tiny", "--layers", "8,4", PYTHON=str(python))
    assert result.returncode == 2 and "--layers 8,4: expected two growing numbers" in result.stderr
    assert "going on with what" in result.stdout and "skipped without trl" in result.stdout


@pytest.mark.slow  # a dozen processes
def test_the_whole_benchmark_on_a_cpu(tmp_path):
    pytest.importorskip("trl")
    pytest.importorskip("deepspeed")
    result = script("--device", "cpu", "--tiny", "--out", str(tmp_path / "out"))
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert not found["problems"] and not found["notes"] and not any(run["failed"] for run in found["runs"])
    assert len(found["rows"]) == 6 and found["device"] == "cpu" and found["versions"]["trl"]
    assert "say nothing about a GPU" in (tmp_path / "out" / "result.md").read_text()
