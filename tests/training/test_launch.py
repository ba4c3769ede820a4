"""Training on real Ray Train workers: killed workers and killed drivers change nothing."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from kernel import exact
from machines import wait_for_checkpoint, workers
from tiny import preferences, write_preferences

from raydpo.training.launch.board import Mailbox


@pytest.fixture(scope="module")
def job(tmp_path_factory, tiny_llama):
    """37 pairs in steps of 8: the last step of an epoch has 5."""
    place = tmp_path_factory.mktemp("train")
    write_preferences(place / "a.jsonl", preferences(45))
    tree = {
        "output": str(place / "runs"),
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "data": {"train": str(place / "a.jsonl"), "eval": {"fraction": 0.2}},
        "train": {
            "workers": 2,
            "pairs_per_step": 8,
            "lr": 1e-3,
            "steps": 60,
            "checkpoint_every": 7,
            "eval_every": 20,
            "tokens_per_batch": 512,
        },
    }
    (place / "config.yaml").write_text(yaml.safe_dump(tree))
    return place


def command(job, verb, name, *more):
    return [sys.executable, "-m", "raydpo.cli", verb, str(job / "config.yaml"), f"name={name}", *more]


def rows(job, name, file="metrics.parquet"):
    return exact(pq.read_table(job / "runs" / name / file).to_pylist())


def final_weights(job, name):
    from safetensors.torch import load_file

    return load_file(job / "runs" / name / "final" / "model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(job):
    result = subprocess.run(command(job, "run", "undisturbed"), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def same(job, name):
    import torch

    assert rows(job, name) == rows(job, "undisturbed")
    assert rows(job, name, "eval.parquet") == rows(job, "undisturbed", "eval.parquet")
    ours, theirs = final_weights(job, name), final_weights(job, "undisturbed")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.slow  # the short soak has this fault, too
def test_a_killed_worker_changes_nothing(job, undisturbed):
    environment = os.environ | {"RAYDPO_TEST_DRIVER": "w"}
    process = subprocess.Popen(
        command(job, "train", "worker-killed"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    wait_for_checkpoint(job / "runs" / "worker-killed", 7, process)
    victims = workers(b"RAYDPO_TEST_DRIVER=w")
    assert len(victims) == 2
    os.kill(victims[1], signal.SIGKILL)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert "workers were restarted; continuing after step" in output
    same(job, "worker-killed")


@pytest.mark.slow  # the run below is stopped by SIGTERM and continued
def test_a_killed_driver_is_continued_by_the_same_command(job, undisturbed):
    process = subprocess.Popen(
        command(job, "train", "driver-killed"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_checkpoint(job / "runs" / "driver-killed", 7, process)
    process.kill()
    process.communicate()
    changed = subprocess.run(
        command(job, "train", "driver-killed", "train.beta=0.3"), capture_output=True, text=True, timeout=300
    )
    assert changed.returncode == 2
    assert "train.beta: 0.1 -> 0.3" in changed.stderr
    result = subprocess.run(command(job, "train", "driver-killed"), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "continuing after step" in result.stdout
    same(job, "driver-killed")
    again = subprocess.run(command(job, "train", "driver-killed"), capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and "already complete" in again.stdout


@pytest.mark.slow  # make soak has this fault, too
def test_a_worker_out_of_memory_is_started_again(job, undisturbed):
    """Limit the memory of this run's workers to what they use after the first steps."""
    process = subprocess.Popen(
        command(job, "train", "starved", "train.tokens_per_batch=100000", "train.pairs_per_step=37"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"RAYDPO_TEST_DRIVER": "m"},
    )
    wait_for_checkpoint(job / "runs" / "starved", 7, process)
    for worker in workers(b"RAYDPO_TEST_DRIVER=m"):
        taken = int(re.search(r"VmSize:\s+(\d+)", Path(f"/proc/{worker}/status").read_text())[1]) * 1024
        resource.prlimit(worker, resource.RLIMIT_AS, (taken + 2**20, resource.RLIM_INFINITY))
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert "a micro-batch of 100000 positions did not fit in memory, though others of this run did" in output
    assert "starting the workers again with the same" in output
    assert len(rows(job, "starved")) == 60


def test_what_does_not_fit_twice_is_halved_once():
    board = Mailbox()
    first, _ = board.enter()
    board.put("begin", {})
    assert board.back_off(100, first) and board.enter() == (2, 50), "no step was done with it: no second chance"
    assert not board.back_off(50, 2)
    assert "starting the workers again with 50" in board.drain()[-1][1]


def test_ranks_out_of_memory_in_the_same_step_have_one_second_chance():
    board, notes = Mailbox(), []

    def ran_out_on_two_ranks(attempt, tokens):
        board.put("begin", {})
        board.put("step", {})
        said = [board.back_off(tokens, attempt) for _ in range(2)]
        notes.extend(content for kind, content in board.drain() if kind == "note")
        return said

    assert board.enter() == (1, None)
    assert ran_out_on_two_ranks(1, 1024) == [True, True]
    assert board.enter() == (2, None) and "starting the workers again with the same" in notes[-1]
    assert ran_out_on_two_ranks(2, 1024) == [True, True]
    assert board.enter() == (3, 512) and "starting the workers again with 512" in notes[-1]
    assert ran_out_on_two_ranks(3, 512) == [False, False]
    assert len(notes) == 2


LOSS = """
import os, time
from pathlib import Path
from raydpo.errors import TrainError

def mine(logps, settings, beta):
    if os.environ.get("RANK") == "1" and logps.chosen.requires_grad:
        Path(__file__).with_name("raised").write_text(str(time.time()))
        raise TrainError("this worker alone cannot go on; it was asked not to")
    return -beta * (logps.chosen_logratio - logps.rejected_logratio)
"""


def one_fails(given):
    """A worker's part: rank 1 raises an error, rank 0 waits for it in a collective operation."""
    import torch.distributed as dist

    from raydpo.errors import TrainError
    from raydpo.training.launch.launch import _attempt

    def work(tokens_per_batch):
        if dist.get_rank() == 1:
            Path(given["raised"]).write_text(str(time.time()))
            raise TrainError("this worker alone cannot go on")
        dist.barrier()

    _attempt(given["board"], given["train"], work)


@pytest.mark.parametrize("max_failures", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_an_error_of_one_worker_ends_all_at_once(on_cluster, tmp_path, max_failures):
    """Without it, the other worker would wait for two minutes. The limit is half of that: other tests may run meanwhile."""
    import ray

    from raydpo.cluster.resources import Resources
    from raydpo.config import TrainConfig
    from raydpo.errors import TrainError
    from raydpo.training.launch.board import start_mailbox
    from raydpo.training.launch.launch import _fit, _ray_trainer

    ray.init(address=os.environ["RAY_ADDRESS"], runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}})
    try:
        train, board = TrainConfig(workers=2, collective_timeout=120, max_failures=max_failures), start_mailbox()
        given = {"board": board, "train": train, "raised": str(tmp_path / "raised")}
        trainer = _ray_trainer(one_fails, given, train, Resources(2, 0.0, 1), str(tmp_path / "run"))
        with pytest.raises(TrainError, match="this worker alone cannot go on"):
            _fit(trainer, board, lambda kind, content: None, print, str(tmp_path / "run"))
    finally:
        ray.shutdown()
    assert time.time() - float((tmp_path / "raised").read_text()) < 60


@pytest.mark.slow
@pytest.mark.parametrize("max_failures", [0, 3])
def test_a_run_whose_second_worker_fails_says_why(job, tmp_path, max_failures):
    (tmp_path / "my_losses.py").write_text(LOSS)
    process = subprocess.run(
        command(
            job,
            "run",
            f"one-fails-{max_failures}",
            "train.loss=my_losses:mine",
            f"train.max_failures={max_failures}",
            "train.collective_timeout=120",
        ),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    seconds = time.time() - float((tmp_path / "raised").read_text())
    assert process.returncode == 1, process.stdout + process.stderr
    assert process.stderr.strip().endswith("this worker alone cannot go on; it was asked not to"), process.stderr
    assert "Traceback" not in process.stdout + process.stderr
    print(f"{seconds:.1f} s after the error")
    assert seconds < 60, "half of what the other worker would wait; with the start of new workers and the command's end"


@pytest.mark.slow  # the short soak has SIGTERM, too
def test_sigterm_then_one_worker_with_the_best_checkpoint_kept(job):
    """LoRA with a tracker and a merged export, stopped by SIGTERM, continued by one worker instead of two."""
    more = [
        "model.lora={r: 4}",
        "train.keep_best=eval_loss",
        "train.keep_checkpoints=1",
        "train.eval_every=5",
        "train.checkpoint_every=5",
        "train.merge_adapter=true",
        "track.mlflow={}",
        "train.steps=40",
    ]
    process = subprocess.Popen(
        command(job, "run", "terminated", *more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_checkpoint(job / "runs" / "terminated", 10, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130, output
    stopped = int(re.search(r"stopped after step (\d+)", output)[1])
    changed = subprocess.run(
        command(job, "run", "terminated", *more, "train.beta=0.3"), capture_output=True, text=True, timeout=300
    )
    assert changed.returncode == 2 and "train.beta: 0.1 -> 0.3" in changed.stderr
    result = subprocess.run(
        command(job, "run", "terminated", *more, "train.workers=1"), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "is left out" not in output + result.stdout, "MLflow took everything"
    assert f"continuing after step {stopped}" in result.stdout, "no step is done again"
    assert "changed since this run started, changing only rounding: train.workers: 2 -> 1" in result.stdout
    assert "was made by 2 worker(s) under ZeRO 2, now 1" in result.stdout
    run = job / "runs" / "terminated"
    assert len(rows(job, "terminated")) == 40
    evals = {row["step"]: row["eval_loss"] for row in rows(job, "terminated", "eval.parquet")}
    kept = {int(path.name.split("-")[1]) for path in (run / "checkpoints").glob("step-*")}
    best = min((step for step in evals if step), key=evals.get)
    assert kept == {best, 40}, (kept, evals)
    assert {"README.md", "adapter_model.safetensors", "merged"} <= {path.name for path in (run / "final").iterdir()}
    assert (run / "mlflow.db").is_file() and (run / "final" / "merged" / "model.safetensors").is_file()
    assert re.search(r"checkpoints: [\d.,]+ MB each; training stood still for them for [\d.]+ s", result.stdout)
    assert not list((run / "checkpoints").rglob("*.pt"))
    told = re.search(r"policy loaded in ([\d.]+) s; at most ([\d.]+) GB of host memory a worker", result.stdout)
    summary = json.loads((run / "summary.json").read_text())
    assert float(told[1]) == pytest.approx(summary["load_seconds"], abs=0.05)
    assert 0.1 < float(told[2]) == pytest.approx(summary["load_host_bytes"] / 1e9, abs=0.005)
