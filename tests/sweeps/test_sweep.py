"""Sweeps from the command line: one cache pass, each trial a run of its own, and drivers that are killed."""

import io
import json
import re
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest
import yaml
from command import raydpo as raydpo_command
from kernel import exact
from tiny import preferences, write_preferences

import raydpo
from raydpo.cli.entry import main
from raydpo.terminal.console import Console

CHECKPOINT_EVERY = 5
DIVERGED = "lr=1e+30,max_skipped=0"


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_llama):
    place = tmp_path_factory.mktemp("sweep")
    write_preferences(place / "a.jsonl", preferences(45))
    tree = {
        "output": str(place / "runs"),
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "data": {"train": str(place / "a.jsonl"), "eval": {"fraction": 0.2}},
        "train": {
            "pairs_per_step": 8,
            "lr": 1e-3,
            "steps": 12,
            "eval_every": 4,
            "tokens_per_batch": 512,
            "checkpoint_every": CHECKPOINT_EVERY,
        },
    }
    (place / "config.yaml").write_text(yaml.safe_dump(tree))
    return place


def command(place, name, *more):
    return [sys.executable, "-m", "raydpo.cli", "sweep", str(place / "config.yaml"), f"name={name}", *more]


def run(place, name, *more):
    return subprocess.run(command(place, name, *more), capture_output=True, text=True, timeout=400)


def hits(result):
    """Share of all completions that the cache held before the pass, as it says."""
    held, wanted = re.search(r"cache: ([\d,]+) of ([\d,]+) completions were there", result.stdout).groups()
    return int(held.replace(",", "")) / int(wanted.replace(",", ""))


def record(place, name):
    found = json.loads((place / "runs" / name / "sweep.json").read_text())
    return found, {trial["name"]: trial for trial in found["trials"]}


def rows(directory, file="metrics.parquet"):
    return exact(pq.read_table(directory / file).to_pylist())


def weights(directory):
    from safetensors.torch import load_file

    return load_file(directory / "final" / "model.safetensors")


def same(ours, theirs):
    import torch

    assert rows(ours) == rows(theirs)
    assert rows(ours, "eval.parquet") == rows(theirs, "eval.parquet")
    mine, other = weights(ours), weights(theirs)
    assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)


def test_one_pass_then_every_trial_and_those_that_failed_are_told(place, on_cluster):
    trials = "sweep.list=[{train.beta: 0.3}, {train.lr: 1.0e+30, train.max_skipped: 0}]"
    result = raydpo_command("sweep", place / "config.yaml", "name=betas", trials)
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"1 of 2 trials failed: {DIVERGED}: " in result.stderr and "more than train.max_skipped 0" in result.stderr
    found, trials = record(place, "betas")
    assert [(name, trial["status"]) for name, trial in trials.items()] == [("beta=0.3", "done"), (DIVERGED, "failed")]
    assert found["parameters"] == ["train.beta", "train.lr", "train.max_skipped"]
    assert found["metric"] == "eval_rewards/accuracies"
    assert trials["beta=0.3"]["settings"] == {"train.beta": 0.3, "train.lr": 1e-3, "train.max_skipped": 3}
    assert result.stdout.count("scored in") == 1 and found["cache"]["hit_rates"] == [(before := hits(result))] * 2
    directory = place / "runs" / "betas" / "beta=0.3"
    assert trials["beta=0.3"]["run_dir"] == str(directory) and trials["beta=0.3"]["steps"] == 12
    assert exact([trials["beta=0.3"]["eval"]]) == rows(directory, "eval.parquet")[-1:]
    assert json.loads((directory / "summary.json").read_text())["cache_hit_rate"] == before
    assert "step-0 gate" in (directory / "logs" / "driver.log").read_text() and "step-0 gate" not in result.stdout
    assert "highest eval_rewards/accuracies: beta=0.3" in result.stdout
    assert "recommended: none. beta 0.3" in result.stdout, "what the page says"

    before = (directory / "metrics.parquet").stat()
    config = raydpo.load_config(place / "config.yaml", ["name=betas", "sweep.grid={train.beta: [0.3]}"])
    again = raydpo.sweep(config, Console(log := io.StringIO()))
    assert "(100% hits)" in log.getvalue() and "begins" not in log.getvalue()
    assert [(trial["name"], trial["status"]) for trial in again["trials"]] == [("beta=0.3", "done")]
    assert (directory / "metrics.parquet").stat() == before


def test_what_cannot_be_swept_is_said_before_anything_starts(place, capsys):
    def fails(verb, *more):
        assert main([verb, str(place / "config.yaml"), "name=wrong", *more]) == 2
        return capsys.readouterr().err

    assert "trial train.beta=-1: 'train.beta' is -1" in fails("sweep", "sweep.grid={train.beta: [0.1, -1]}")
    assert "nothing to sweep over" in fails("sweep")
    removed = fails("sweep", "sweep.grid={train.beta: [0.1]}", "sweep.together=true")
    assert removed == (
        "error: 'sweep.together' was removed: trials no longer share a process; drop the key, and each "
        "trial trains in workers of its own\n"
    )
    assert "run 'raydpo sweep'" in fails("train", "sweep.grid={train.beta: [0.1]}")


@pytest.mark.slow
def test_only_what_is_new_is_trained(place, on_cluster):
    """Trials with fractions of the data share a cache that one pass filled for the largest fraction."""
    first = run(place, "fractions", "sweep.grid={data.fraction: [0.5, 1.0]}")
    assert first.returncode == 0, first.stdout + first.stderr
    rates = record(place, "fractions")[0]["cache"]["hit_rates"]
    assert first.stdout.count("scored in") == 1 and rates[1] == hits(first)
    more = run(place, "fractions", "sweep.grid={data.fraction: [0.25, 0.5, 1.0]}")
    assert more.returncode == 0, more.stdout + more.stderr
    assert "(100% hits)" in more.stdout and re.findall(r"(\S+): begins", more.stdout) == ["fraction=0.25"]
    assert [trial["status"] for trial in record(place, "fractions")[1].values()] == ["done"] * 3
    other = run(place, "fractions", "sweep.grid={data.fraction: [0.25, 0.5, 1.0]}", "train.lr=1e-4")
    assert other.returncode == 2 and "train.lr: 0.001 -> 0.0001" in other.stderr and "fraction=0.25" in other.stderr


@pytest.mark.slow
def test_other_settings_of_the_evaluation_measure_all_trials_again(place, on_cluster):
    """A trial is added and max_tokens is raised: the earlier trial is evaluated again."""
    settings = ("train.steps=1", "sweep.evaluate=true", "evaluate.prompts=3")

    def swept(betas, *more):
        result = run(place, "measured", f"sweep.grid={{train.beta: {betas}}}", *settings, *more)
        assert result.returncode == 0, result.stdout + result.stderr
        return {trial["name"]: trial["evaluation"] for trial in record(place, "measured")[1].values()}, result.stdout

    first, _ = swept([0.1], "evaluate.max_tokens=4")
    assert first["beta=0.1"]["generation"]["max_tokens"] == 4
    both, said = swept([0.1, 0.3], "evaluate.max_tokens=6")
    assert [one["generation"]["max_tokens"] for one in both.values()] == [6, 6] and "beta=0.1: begins" not in said
    assert both["beta=0.1"]["protocol"] == both["beta=0.3"]["protocol"]


@pytest.mark.slow
def test_trials_need_one_reference(place, on_cluster):
    result = run(place, "dtypes", "sweep.grid={model.dtype: [float32, bfloat16]}")
    assert result.returncode == 2
    assert "trial dtype=bfloat16 needs another reference than trial dtype=float32" in result.stderr
    crowded = run(place, "dtypes", "sweep.grid={train.beta: [0.1, 0.2]}", "sweep.at_once=99")
    assert crowded.returncode == 2 and "sweep.at_once is 99, but the cluster holds" in crowded.stderr
    shared = run(place, "dtypes", "sweep.grid={model.dtype: [float32, bfloat16]}", "score.dtype=float32", "train.steps=1")
    assert shared.returncode == 0, shared.stdout + shared.stderr
    assert record(place, "dtypes")[0]["cache"]["hit_rates"] == [hits(shared)] * 2


@pytest.mark.slow
def test_a_trial_is_the_run_that_it_would_be_alone(place, on_cluster):
    swept = run(place, "swept", "sweep.grid={train.beta: [0.2, 0.4]}", "sweep.at_once=1")
    assert swept.returncode == 0, swept.stdout + swept.stderr
    alone = subprocess.run(
        [sys.executable, "-m", "raydpo.cli", "run", str(place / "config.yaml"), "name=alone", "train.beta=0.4"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert alone.returncode == 0 and "(100% hits)" in alone.stdout
    same(place / "runs" / "swept" / "beta=0.4", place / "runs" / "alone")


STEPS = 40
BETAS = ("sweep.grid={train.beta: [0.05, 0.1, 0.5]}", f"train.steps={STEPS}")


def registered(directory):
    """Step of the newest complete checkpoint of a trial."""
    snapshot = directory / "checkpoints" / "checkpoint_manager_snapshot.json"
    steps = re.findall(r"step-(\d+)", snapshot.read_text()) if snapshot.is_file() else []
    return max(map(int, steps), default=0)


def logged(directory, pattern):
    """Numbers in the lines of a trial's log that match."""
    log = directory / "logs" / "worker-0.log"
    text = log.read_text(errors="replace") if log.is_file() else ""
    return [int(found) for found in re.findall(pattern, text, re.MULTILINE)]


BEGINS = r"^beginning after step (\d+)"


def killed_when(process, ready, timeout=300):
    deadline = time.time() + timeout
    while not ready():
        assert process.poll() is None, process.communicate()[0]
        assert time.time() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
def test_a_sweep_killed_three_times_ends_as_an_undisturbed_one(place):
    undisturbed = run(place, "undisturbed", *BETAS)
    assert undisturbed.returncode == 0, undisturbed.stdout + undisturbed.stderr
    theirs = sorted(path for path in (place / "runs" / "undisturbed").glob("beta=*"))
    ours = [place / "runs" / "killed" / path.name for path in theirs]
    ready = (
        lambda: any(registered(path) >= 10 for path in ours),
        lambda: any(registered(path) >= 25 for path in ours),
        lambda: any((path / "summary.json").is_file() for path in ours),
    )
    stored: list[dict[str, tuple[int, int]]] = []  # at each kill: the newest checkpoint, and how often training had begun
    for moment in ready:
        process = subprocess.Popen(
            command(place, "killed", *BETAS), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        killed_when(process, moment)
        stored.append({path.name: (registered(path), len(logged(path, BEGINS))) for path in ours})
    done_before = {path.name for path in ours if (path / "summary.json").is_file()}
    last = run(place, "killed", *BETAS)
    assert done_before and last.returncode == 0, last.stdout + last.stderr
    found, trials = record(place, "killed")
    assert [trial["status"] for trial in trials.values()] == ["done"] * 3 and found["cache"]["hit_rates"] == [1.0] * 3
    for our, their in zip(ours, theirs, strict=True):
        same(our, their)
        begins, steps = logged(our, BEGINS), logged(our, r"^step (\d+)  loss")
        assert begins[0] == 0 and len(begins) <= 4
        for known, begun in (point[our.name] for point in stored):
            assert all(begin >= known for begin in begins[begun:]), "what was stored before the kill is not done again"
        # One interval since the last checkpoint, and another while that one was being stored.
        assert len(steps) - STEPS <= 2 * CHECKPOINT_EVERY * (len(begins) - 1)
        if our.name in done_before:
            assert f"{our.name}: begins" not in last.stdout and f"{our.name}: continues" not in last.stdout
    assert "(100% hits)" in last.stdout


HALVING = (
    "sweep.grid={train.lr: [1.0e-3, 1.0e-4, 1.0e-5, 1.0e-6]}",
    "train.steps=32",
    "train.eval_every=8",
    "sweep.stop_early={grace: 8, metric: eval_rewards/margins}",
)


@pytest.mark.slow
def test_what_is_behind_stops_early_and_a_kill_changes_nothing(place):
    halved = run(place, "halved", *HALVING)
    assert halved.returncode == 0, halved.stdout + halved.stderr
    directory = place / "runs" / "halved"
    _, trials = record(place, "halved")

    def margins(step):
        return {
            name: row["eval_rewards/margins"]
            for name in trials
            for row in rows(directory / name, "eval.parquet")
            if row["step"] == step
        }

    at_8, at_16 = margins(8), margins(16)
    assert len(at_8) == 4 and set(at_16) == set(sorted(at_8, key=at_8.get)[2:])
    winner = max(at_16, key=at_16.get)
    assert {name: (trial["status"], trial["steps"]) for name, trial in trials.items()} == {
        name: ("done", 32) if name == winner else ("stopped", 16 if name in at_16 else 8) for name in trials
    }
    assert not any((directory / name / "final").exists() for name in trials if name != winner)

    process = subprocess.Popen(
        command(place, "halved-killed", *HALVING), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    killed_when(process, lambda: any(registered(place / "runs" / "halved-killed" / name) >= 10 for name in trials))
    again = run(place, "halved-killed", *HALVING)
    assert again.returncode == 0, again.stdout + again.stderr
    _, ours = record(place, "halved-killed")
    assert [(trial["name"], trial["status"], trial["steps"], exact([trial["eval"]])) for trial in ours.values()] == [
        (trial["name"], trial["status"], trial["steps"], exact([trial["eval"]])) for trial in trials.values()
    ]
    same(place / "runs" / "halved-killed" / winner, directory / winner)


@pytest.mark.slow
def test_ctrl_c_stops_all_trials_with_checkpoints(place):
    more = (*BETAS, "train.steps=1000", "train.checkpoint_every=2000")
    process = subprocess.Popen(command(place, "stopped", *more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    directory = place / "runs" / "stopped"
    deadline = time.time() + 200
    while not any(logged(directory / f"beta={beta}", r"^step (\d+)  loss") for beta in ("0.05", "0.1")):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130, output
    _, trials = record(place, "stopped")
    assert {trial["status"] for trial in trials.values()} == {"waiting"}
    for name, trial in trials.items():
        assert registered(directory / name) == trial["steps"], "no step is done again"
    assert any(trial["steps"] for trial in trials.values())
