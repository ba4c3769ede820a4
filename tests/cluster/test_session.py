"""A local Ray of our own: what its workers inherit, and which helpers of Ray Train it goes without."""

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import contextlib, json, os, signal, sys, time
import pyarrow as pa
import ray
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from raydpo.cluster.actors import over_actors
from raydpo.cluster.resources import Resources
from raydpo.cluster.session import owns_ray, session
from raydpo.config import Config, TrainConfig
from raydpo.training.launch.launch import _ray_trainer
from raydpo.training.launch.local import _Workers

def callbacks():
    trainer = _ray_trainer(print, {}, TrainConfig(), Resources(1, 0.0, 1), sys.argv[1])
    told = [type(one).__name__ for one in trainer._create_default_callbacks()] + [type(trainer).__base__.__name__]
    return told + [f"{name}={value}" for name, value in get_env_vars_to_propagate().items()]

def worker():
    return [os.nice(0), os.environ["TOKENIZERS_PARALLELISM"], os.environ["PYTHONUTF8"]]

def groups():
    return [os.getpgrp(), os.getpgid(os.getppid())]  # of a worker, and of the process that started it

class Scorer:
    def __call__(self, block):
        return pa.table({"told": [[os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTHONUTF8")]]})

def processes_with_gpus():
    # Environment of a scoring actor, and that for workers of Ray Train on a Ray of our own.
    train = _ray_trainer(print, {}, TrainConfig(), Resources(1, 1.0, 1), sys.argv[1])
    given = train.run_config.worker_runtime_env
    environment = Resources(1, 1.0, 1).environment
    block = pa.table({"n": [1]})
    rows = over_actors(Scorer, (), [block], Resources(1, 0.0, 1), "scoring", environment=environment)
    return [next(iter(rows))["told"], _Workers._get_worker_runtime_env(given)["env_vars"]]

os.environ["PYTHONUTF8"] = "0"
config = {"output": sys.argv[1], "model": {"path": "m"}, "data": {"train": [{"path": "a.jsonl"}]}}
told = {"before": owns_ray(), "on a cluster": callbacks()}
signal.signal(signal.SIGTERM, signal.default_int_handler)
with session(Config.model_validate(config)):
    told["within"], told["worker"] = owns_ray(), ray.get(ray.remote(worker).remote())
    told["in our group"] = os.getpgrp() in ray.get(ray.remote(groups).remote())
    told["with GPUs"] = processes_with_gpus()
    told["here"], told["alone"] = os.environ["PYTHONUTF8"], callbacks()
    with contextlib.suppress(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    told["interrupted"] = ray.is_initialized()
told["after"] = owns_ray() or "RAY_TRAIN_METRICS_ENABLED" in os.environ
print(json.dumps(told))
"""


def test_a_ray_of_our_own(tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTORCH_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["before"], told["within"], told["after"]) == (False, True, False)
    assert told["interrupted"], "Ray leaves SIGTERM to the program"
    assert told["worker"] == [os.nice(0), "false", "1"] and told["here"] == "0"
    assert told["in our group"] is False  # so that a signal to the group, as timeout sends it, does not end Ray
    cleaner, watcher = "PlacementGroupCleanerCallback", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER=0"
    assert "BackendSetupCallback" in told["alone"] and "BackendSetupCallback" in told["on a cluster"]
    assert cleaner in told["on a cluster"] and watcher not in told["on a cluster"]
    assert cleaner not in told["alone"] and watcher in told["alone"]
    assert "LocalTrainer" in told["alone"] and "TorchTrainer" in told["on a cluster"]
    growing = "expandable_segments:True"
    assert told["with GPUs"] == [[growing, "1"], {"PYTORCH_ALLOC_CONF": growing}]
    assert "DatasetsCallback" not in told["alone"] + told["on a cluster"]
