"""A cluster over a network: the head node here, a second node in another network namespace."""

import json
import subprocess
import sys

import pytest
import yaml
from machines import RayProcesses, other_host
from tiny import preferences, write_preferences


@pytest.fixture
def cluster():
    try:
        with other_host() as host:
            processes = RayProcesses(cpus=2, host=host)
            yield processes
            processes.stop()
    except PermissionError as error:
        pytest.skip(f"no network namespaces here ({error})")


@pytest.mark.slow
def test_a_job_scores_and_trains_on_two_hosts(cluster, tmp_path, tiny_llama):
    """Neither host can hold all training workers, so they communicate over the network."""
    cluster.add(3, away=True)
    write_preferences(tmp_path / "a.jsonl", preferences(45))
    tree = {
        "name": "two-hosts",
        "output": str(tmp_path / "runs"),
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "data": {"train": str(tmp_path / "a.jsonl")},
        "score": {"workers": 2},
        "train": {"workers": 4, "pairs_per_step": 8, "steps": 4, "tokens_per_batch": 512},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    done = subprocess.run(
        [sys.executable, "-m", "raydpo.cli", "submit", "run", "config.yaml"],
        cwd=tmp_path,
        env=cluster.env,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0 and "job two-hosts-1 is done" in done.stdout, done.stdout + done.stderr
    assert "cluster: 2 nodes, with the same packages and storage" in done.stdout, done.stdout
    summary = json.loads((tmp_path / "runs" / "two-hosts" / "summary.json").read_text())
    assert summary["steps"] == 4
