"""Kubernetes evicts a machine of a training, with the time that the manifests allow."""

import re
import subprocess
import sys
import time

import pytest
import yaml
from machines import RayProcesses
from test_kuberay import pods, spec, variables
from tiny import preferences, write_preferences

SLOW_STORAGE = """
import importlib.machinery
import sys
import time


class Slow:
    def find_spec(self, name, path, target=None):
        if name != "raydpo.storage.files":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module

        def then_slow(module):
            run(module)
            upload = module.Storage.move_into
            module.Storage.move_into = lambda *arguments: (time.sleep(40), upload(*arguments))

        spec.loader.exec_module = then_slow
        return spec


sys.meta_path.insert(0, Slow())
"""


@pytest.mark.slow
def test_no_step_is_done_twice_though_a_checkpoint_takes_longer_than_rays_own_drain(tmp_path, tiny_llama):
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "sitecustomize.py").write_text(SLOW_STORAGE)
    write_preferences(tmp_path / "a.jsonl", preferences(45))
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump(
            {
                "name": "run",
                "output": str(tmp_path / "runs"),
                "model": {"path": str(tiny_llama), "dtype": "float32"},
                "data": {"train": str(tmp_path / "a.jsonl")},
                "score": {"gpus_per_worker": 0},
                "ray": {"autoscaling": True},
                "train": {
                    "pairs_per_step": 8,
                    "steps": 100_000,
                    "checkpoint_every": 50_000,
                    "tokens_per_batch": 512,
                    "gpus_per_worker": 0,
                    "workers": 2,
                    "labels": {"pool": "spot"},
                },
            }
        )
    )
    log = tmp_path / "runs" / "run" / "logs" / "worker-0.log"

    def steps():
        return [int(step) for step in re.findall(r"^step (\d+)  loss", log.read_text(), re.M)] if log.is_file() else []

    def until(condition, seconds):
        deadline = time.monotonic() + seconds
        while not condition():
            assert job.poll() is None and time.monotonic() < deadline, (tmp_path / "said").read_text()
            time.sleep(0.2)

    cluster = RayProcesses(cpus=5)
    try:
        node = cluster.add(3, before=tmp_path / "slow", pool="spot", env=variables(pods(spec("eks"))[1]))
        with open(tmp_path / "said", "w") as said:
            job = subprocess.Popen(
                [sys.executable, "-m", "raydpo.cli", "run", "config.yaml"],
                cwd=tmp_path,
                stdout=said,
                stderr=said,
                env=cluster.env | {"RAY_ADDRESS": f"127.0.0.1:{cluster.gcs}"},
            )
        until(lambda: len(steps()) > 15, 180)
        node.terminate()
        assert node.wait(150) and job.poll() is None, (tmp_path / "said").read_text()
        before = steps()
        cluster.add(3, pool="spot")
        until(lambda: len(steps()) > len(before) + 15, 120)
        job.terminate()
        assert job.wait(60) == 130
        done = steps()
        assert done == list(range(1, len(done) + 1)), "each step once"
    finally:
        cluster.stop()
