"""An execution with a slow block goes on, and the actor that is silent is named."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

PROGRAM = """
import json, os, time
import pyarrow as pa
import ray
from ray.experimental.internal_kv import _internal_kv_list
from raydpo.cluster import watch
from raydpo.cluster.actors import over_actors
from raydpo.cluster.resources import Resources
from raydpo.terminal import phases

class Slow:
    def __init__(self):
        phases.SELDOM_SECONDS = 0.0
        watch.loading(0, 4_000_000_000)
        watch.loading(2_100_000_000, 4_000_000_000)
        time.sleep(1)
        watch.loading(4_000_000_000, 4_000_000_000)
        self.seconds = iter((0.1, 6))

    def __call__(self, block):
        time.sleep(next(self.seconds))  # of this call: Ray Data may send the blocks in another order
        return pa.table({"process": [os.getpid()]})

watch.QUIET_SECONDS = 1.0
ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=1 << 27)
blocks = [pa.table({"block": [block]}) for block in range(2)]
lines = []
rows = [row["process"] for row in over_actors(Slow, (), blocks, Resources(1, 0.0, 1), "scoring", tell=lines.append)]
print(json.dumps([rows, lines, len(_internal_kv_list("watch/", namespace=b"raydpo"))]))
"""


def test_a_slow_block_is_no_error_and_its_process_is_named():
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S": "2", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows, lines, left = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) == 2 and len(set(rows)) == 1
    named = [line for line in lines if f"process {rows[0]} on " in line and "at block 2 of its own for " in line]
    assert "scoring: loading the model: 2 of 4 GB read" in lines
    assert named and named[0].startswith("scoring: "), lines
    assert not left, "the notes of a finished execution are removed"


def test_a_sign_that_is_lost_does_not_end_the_work(monkeypatch):
    from ray.experimental import internal_kv

    from raydpo.cluster.watch import Watched

    def fail(*_, **__):
        raise RuntimeError("no answer")

    monkeypatch.setattr(internal_kv, "_internal_kv_put", fail)
    watched = object.__new__(Watched)
    vars(watched).update(_key="k", _host="h", _lock=threading.Lock(), _running=0, _done=0, _actor=len)
    vars(watched).update(_deaths=0, _last=None, _words={})
    assert watched([1, 2]) == 2
