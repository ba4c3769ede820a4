"""Ray's own autoscaler with nodes on this machine: it starts nodes for each stage and removes idle ones."""

import re
import signal
import subprocess
import sys
import time

import pytest
import requests
import yaml
from machines import RayProcesses
from tiny import preferences, write_preferences

NODE_TYPES = {
    name: {
        "resources": {"CPU": cpus, "object_store_memory": 100_000_000},
        "labels": {"pool": name},
        "node_config": {},
        "min_workers": 0,
        "max_workers": 2,
    }
    for name, cpus in (("scorers", 4), ("trainers", 2))
}


@pytest.fixture(scope="module")
def cluster():
    processes = RayProcesses(cpus=0, node_types=NODE_TYPES)
    yield processes
    processes.stop()


def nodes(cluster):
    """All nodes of the cluster so far, oldest first: (pool, alive, start time)."""
    answer = requests.get(
        f"{cluster.env['RAY_API_SERVER_ADDRESS']}/api/v0/nodes",
        timeout=20,
        params={"detail": True},
        headers={"Authorization": f"Bearer {cluster.token}"},
    )
    found = [
        ((node["labels"] or {}).get("pool"), node["state"] == "ALIVE", node["start_time_ms"] / 1000)
        for node in answer.json()["data"]["result"]["result"]
    ]
    return sorted(found, key=lambda node: node[2])


def wait_until_all_are_gone(cluster):
    deadline = time.monotonic() + 90
    while any(alive for pool, alive, _ in nodes(cluster) if pool):
        assert time.monotonic() < deadline, nodes(cluster)
        time.sleep(1)


@pytest.mark.slow
def test_nodes_go_when_the_driver_that_wished_for_them_is_killed(cluster, tmp_path, tiny_llama):
    """The first job of a cluster while it reads its data, before any work of Ray Data or Ray Train."""
    write_preferences(tmp_path / "a.jsonl", preferences(8))
    tree = {
        "output": str(tmp_path / "runs"),
        "model": {"path": str(tiny_llama)},
        "data": {"train": str(tmp_path / "a.jsonl")},
        "ray": {"autoscaling": True},
        "train": {"workers": 4, "gpus_per_worker": 0, "labels": {"pool": "trainers"}},
    }
    program = f"""
import ray, time
from raydpo.config import load_config
from raydpo.cluster.waiting import request_nodes
ray.init(address="127.0.0.1:{cluster.gcs}", log_to_driver=False)
with request_nodes(load_config({tree!r})):
    time.sleep(600)
"""
    driver = subprocess.Popen([sys.executable, "-c", program], env=cluster.env)
    deadline = time.monotonic() + 60
    while not any(alive for pool, alive, _ in nodes(cluster) if pool):
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    wait_until_all_are_gone(cluster)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("score.labels={pool: nowhere}", "add 'labels: {pool: nowhere}' to the group"),
        ("score={accelerator: H100, gpus_per_worker: 1}", "add 'resources: {\"accelerator_type:H100\": 1}' to the group"),
    ],
)
def test_nodes_that_no_group_has_are_refused_at_once(cluster, tmp_path, tiny_llama, setting, line):
    write_preferences(tmp_path / "a.jsonl", preferences(8))
    tree = {
        "output": str(tmp_path / "runs"),
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "data": {"train": str(tmp_path / "a.jsonl")},
        "score": {"gpus_per_worker": 0},
        "ray": {"autoscaling": True, "address": f"127.0.0.1:{cluster.gcs}"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "raydpo.cli", "score", "config.yaml", setting],
        cwd=tmp_path,
        text=True,
        env=cluster.env,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 2 and line in done.stderr, done.stdout + done.stderr
    assert "waiting" not in done.stdout and time.monotonic() - began < 60


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["run", "sweep"])
def test_nodes_come_for_scoring_and_meanwhile_for_training_and_go_after_it(cluster, tmp_path, tiny_llama, verb):
    """A head node without CPUs and two labelled pools: nodes for training start while the reference is scored."""
    write_preferences(tmp_path / "a.jsonl", preferences(1500))
    trials = 2 if verb == "sweep" else 1
    tree = {
        "name": verb,
        "output": str(tmp_path / "runs"),
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "data": {"train": str(tmp_path / "a.jsonl")},
        "score": {"workers": 2, "gpus_per_worker": 0, "labels": {"pool": "scorers"}},
        "train": {
            "workers": 2,
            "gpus_per_worker": 0,
            "labels": {"pool": "trainers"},
            "pairs_per_step": 8,
            "steps": 3,
            "tokens_per_batch": 512,
        },
        "sweep": {"grid": {"train.beta": [0.1, 0.3]}, "at_once": trials} if verb == "sweep" else None,
        "ray": {"autoscaling": True, "address": f"127.0.0.1:{cluster.gcs}"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    began = time.time()
    job = subprocess.Popen(
        [sys.executable, "-m", "raydpo.cli", verb, "config.yaml"],
        cwd=tmp_path,
        env=cluster.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said, scored = "", 0.0
    for line in job.stdout:
        said += line
        scored = scored or (time.time() if line.startswith("cache: ") else 0.0)
    assert job.wait(60) == 0, said
    assert re.search(r"cache: 0 of [\d,]+ completions", said), said

    came = [(pool, started) for pool, _, started in nodes(cluster) if pool and started > began]
    # Sometimes more than one after another: Ray Data's own wish takes the place of ours for seconds, in which idle nodes go.
    assert {pool for pool, _ in came} == {"scorers", "trainers"}, came
    assert min(started for pool, started in came if pool == "trainers") < scored, "they came while scoring was under way"
    wait_until_all_are_gone(cluster)
