"""jobs/benchmark.py: what it refuses, what it runs, and how parts that ran separately come together."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from tiny import preferences, write_preferences

from raydpo.benchmark.watch import Watched
from raydpo.estimate.cards import known_peak

GIB = 2**30


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_preferences(tmp_path_factory.mktemp("data") / "pairs.jsonl", preferences(24))


@pytest.fixture
def pretended(monkeypatch):
    """Stand-ins for every process, which note what they were asked. A TRL step is fastest with two pairs a pass."""
    from raydpo.benchmark import run
    from raydpo.benchmark.job import Result

    asked = []

    def trained(steps, **more):
        same = {"losses": [0.69] * steps, "chosen_logps": [-9.0] * steps, "rejected_logps": [-9.0] * steps}
        return Result(**same | {"peak_bytes": 1.0 * GIB} | more)

    def start(module, job):
        asked.append(job)
        seconds = [2.0 + abs(job.batch - 2) + job.recompute] * job.steps
        facts = {name: getattr(job, name) for name in ("batch", "reference_batch", "recompute")}
        facts |= {"forward_passes": 1, "positions": 100, "largest_pass": 100 * job.batch, "fused": True}
        scored = {"reference_seconds": 4.0 / job.reference_batch, "ref_chosen": [-9.0] * 24, "ref_rejected": [-9.0] * 24}
        if job.stage == "train":
            scored = {}
        if job.stage == "cached":
            scored |= {name: [-9.0] * (job.steps * 4) for name in ("ref_chosen", "ref_rejected")}
        return trained(job.steps, step_seconds=seconds, facts=facts, **scored), Watched(20.0, 3 * GIB)

    def run_verb(verb, config, work):
        asked.append(config | {"verb": verb})
        if verb == "train":  # an earlier run directory would be continued
            (Path(config["output"]) / run.NAME).mkdir(parents=True)
        steps = 0 if verb == "score" else config["train"].get("steps", len(work.rows) // 4)
        facts = {"phases": {"first step": 9.0}, "largest_pass": 128, "at_once": 2}
        one = trained(steps, step_seconds=[1.0] * steps, facts=facts)
        return one, Watched(30.0, 4 * GIB), [one] * 5 if verb == "sweep" else []

    monkeypatch.setattr(run, "start", start)
    monkeypatch.setattr(run, "run_verb", run_verb)
    return asked


@pytest.fixture
def bench(tiny_llama, data, tmp_path, pretended):
    pytest.importorskip("trl")
    pytest.importorskip("deepspeed")
    from raydpo.benchmark.command import main

    def call(*words, pairs="12", lora=("--lora", "4")):
        common = ["--data", str(data), "--pairs-per-step", "4", "--dtype", "fp32", "--device", "cpu", *lora]
        places = ["--work", str(tmp_path / "work"), "--json", str(tmp_path / "out.json")]
        return main(["--model", str(tiny_llama), "--pairs", pairs, *common, *places, *words])

    call.out = tmp_path / "out.json"
    return call


def test_parts_that_run_separately_make_one_file_of_results(bench, pretended, capsys):
    assert bench("--parts", "batches") == 0
    tries = [(job.batch, job.steps, job.recompute) for job in pretended if getattr(job, "stage", "") == "cached"]
    assert tries == [(1, 3, False), (2, 3, False), (4, 3, False), (2, 3, True)]
    assert bench("--parts", "kernel,train") == 0
    assert bench("--parts", "job", "--trl-steps", "2", pairs="12,24") == 0
    found = json.loads(bench.out.read_text())
    assert [point["workload"] for point in found["figures"]["points"]] == ["12 pairs, file", "24 pairs, file"]
    small, large = found["figures"]["points"]
    assert small["step"]["ratio"] == 2.0 and small["step"]["over_kernel"] == 1 / 3
    assert small["job"]["trl"]["extrapolated"] == 1 and large["job"]["trl"]["extrapolated"] == 4
    assert large["job"]["raydpo"] == {
        "seconds": 30.0,
        "extrapolated": 0,
        "phases": {"first step": 9.0},
        "startup_seconds": {},
    }
    whole = [job for job in pretended if getattr(job, "name", "") == "trl-run"]
    assert {(job.batch, job.reference_batch, job.steps) for job in whole} == {(2, 4, 2)}, "each at its fastest"
    said = capsys.readouterr().out
    assert "~" in said and "TRL 1.16.0, 2 x 2" in said
    # 20 s with two steps of 2 s; one more step at 12 pairs, four more at 24, and the reference pass of their pairs.
    slope = (large["job"]["trl"]["seconds"] - small["job"]["trl"]["seconds"]) / 12
    start_up = small["job"]["trl"]["seconds"] - 12 * slope
    assert f"raydpo run: 30 s and 0.00 s a pair. TRL: {start_up:.0f} s and {slope:.2f} s a pair." in " ".join(said.split())
    commands = {each["command"] for each in found["measured"].values()}
    assert len(commands) == 3 and all(command.startswith("jobs/benchmark.py --model") for command in commands)
    assert all(each["date"] for each in found["measured"].values()) and found["machine"] and found["versions"]["trl"]
    assert any("with the Ray that it starts" in line for line in found["how"])
    assert {"batch", "largest_pass"} <= found["figures"]["memory"][0]["trl"].keys()


def test_the_commands_are_what_a_user_would_type(bench, pretended):
    assert bench("--parts", "batches,train,sweep", "--steps", "2", "--orders", "shuffled") == 0
    score, train, again, sweep = [each for each in pretended if isinstance(each, dict)]
    assert [each["verb"] for each in (score, train, sweep)] == ["score", "train", "sweep"]
    assert score["output"] == train["output"] != sweep["output"] and train["data"]["shuffle"] is True
    assert again == train, "the second training also takes two steps"
    assert train["train"] == {
        "pairs_per_step": 4, "lr": 1e-4, "beta": 0.1, "schedule": "constant", "warmup": 0.0, "steps": 2,
        "gpus_per_worker": 0,
    }  # fmt: skip
    assert len(sweep["sweep"]["grid"]["train.beta"]) == 5 and "sweep" not in train
    from raydpo.config import Config

    for each in (score, train, sweep):
        Config(**{name: value for name, value in yaml.safe_load(yaml.safe_dump(each)).items() if name != "verb"})
    again = [job for job in pretended if getattr(job, "name", "") == "trl-again"]
    assert [(job.beta, job.steps) for job in again] == [(0.03, 3)] and again[0].cache


def test_the_fastest_batch_must_be_known(bench, capsys):
    assert bench("--parts", "job") == 2
    assert "run --parts batches first" in capsys.readouterr().err


def test_parts_of_different_settings_are_not_put_together(bench, capsys):
    assert bench("--parts", "kernel") == 0
    assert bench("--parts", "kernel", lora=("--full",)) == 2
    said = capsys.readouterr().err
    assert "was measured with other settings" in said and "Give --json another file" in said
    stored = json.loads(bench.out.read_text())
    stored["workloads"]["12 pairs, file"]["tokens"][0] += 1
    bench.out.write_text(json.dumps(stored))
    assert bench("--parts", "kernel") == 2
    assert "were others when the earlier parts were measured" in capsys.readouterr().err


def test_sides_that_differ_are_not_compared(bench, pretended, monkeypatch, capsys):
    from raydpo.benchmark import run

    start = run.start

    def other(module, job):
        found, watched = start(module, job)
        return (dataclasses.replace(found, losses=[0.69, 0.5, 0.69]) if job.batch == 4 else found), watched

    monkeypatch.setattr(run, "start", other)
    assert bench("--parts", "batches,train,job") == 1
    assert "so their speeds are not compared: 12 pairs, file: the loss of step 2" in capsys.readouterr().err
    found = json.loads(bench.out.read_text())
    assert found["figures"]["problems"] and "ratio" not in found["figures"]["points"][0]["step"]


def test_stored_results_are_shown_as_a_page(bench, capsys):
    from raydpo.benchmark.command import main

    assert bench("--parts", "batches,train,job") == 0
    capsys.readouterr()
    assert main(["--show", str(bench.out)]) == 0
    page = capsys.readouterr().out
    assert "**Whole job**" in page and page.splitlines()[-1].startswith("| speed against TRL")
    assert main(["--show", str(bench.out) + "x"]) == 2
    bench.out.write_text('{"engine": "deepspeed"}')
    assert main(["--show", str(bench.out)]) == 2
    assert "holds no results of this version" in capsys.readouterr().err


@pytest.mark.slow  # minutes of processes with Ray; each side alone is tested in test_trl_side and tests/cli
def test_against_trl(tiny_llama, data, tmp_path, capsys):
    pytest.importorskip("trl")
    from raydpo.benchmark.command import main

    out = tmp_path / "out.json"
    words = ["--data", str(data), "--pairs", "12", "--pairs-per-step", "4", "--dtype", "fp32", "--lora", "4"]
    words += ["--orders", "file,shuffled", "--parts", "batches,kernel,train,job", "--trl-steps", "2"]
    assert main(["--model", str(tiny_llama), *words, "--work", str(tmp_path / "work"), "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["figures"]["problems"] == []
    for point in found["figures"]["points"]:
        assert all(point[part]["ratio"] > 0 for part in ("step", "job")) and point["job"]["trl"]["extrapolated"] == 1
        assert point["commands"]["train"]["phases"]["first step"] > 0


@pytest.mark.parametrize("package", ["trl", "deepspeed"])
def test_a_package_that_is_not_installed_is_named(tiny_llama, data, package, capsys, monkeypatch):
    from raydpo.benchmark import command

    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if name == package else name)
    assert command.main(["--model", str(tiny_llama), "--full", "--data", str(data), "--device", "cpu"]) == 2
    assert f"needs the package '{package}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lora", "4"], "--data FILE and --random"),
        (["--data", "{data}"], "--lora R or --full"),
        (["--full", "--data", "{data}", "--pairs", "12"], "--pairs 12 is not two or more whole steps of 8 pairs"),
        (["--full", "--data", "{data}", "--pairs", "8"], "--pairs 8 is not two or more whole steps of 8 pairs"),
        (["--full", "--random", "512:128"], "--random needs a model of random weights"),
        (["--full", "--data", "{data}", "--device", "cuda"], "no CUDA device"),
        (["--full", "--data", "{data}", "--pairs", "16", "--json", "/proc/x/out.json"], "--json: /proc/x cannot be written"),
        (["--full", "--data", "{data}", "--pairs", "48"], "24 usable pairs of at most 1024 tokens, fewer than --pairs 48"),
    ],
)
def test_bad_input_costs_one_message(tiny_llama, data, words, said, capsys, monkeypatch):
    from raydpo.benchmark.command import main

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["--model", str(tiny_llama), *(word.replace("{data}", str(data)) for word in words)]) == 2
    assert said in capsys.readouterr().err


def test_an_unknown_part_is_named(tiny_llama, capsys):
    from raydpo.benchmark.command import main

    with pytest.raises(SystemExit):
        main(["--model", str(tiny_llama), "--parts", "batches,steps"])
    assert "'steps' is none of batches, kernel, train, job, sweep" in capsys.readouterr().err


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
