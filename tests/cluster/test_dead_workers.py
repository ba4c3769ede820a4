"""Actors whose process ends: Ray starts them anew a few times, and then one sentence says how often and why."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, os, threading, time
import pyarrow as pa
import ray
from raydpo.cluster import watch
from raydpo.cluster.actors import over_actors
from raydpo.cluster.ending import end_process
from raydpo.cluster.resources import Resources
from raydpo.errors import ModelError, ProcessLostError, RaydpoError

class Mortal:
    def __init__(self, kind, log):
        self.kind, self.log = kind, log
        with open(log, "a") as file:
            print("start", file=file)
        if kind == "start":
            raise ProcessLostError("the team broke at its start")

    def __call__(self, block):
        first = len(open(self.log).readlines()) == 1
        if self.kind == "always":
            raise ProcessLostError("the team broke; run it again")
        if self.kind == "once" and first:
            raise ProcessLostError("the team broke")
        if self.kind == "killed":
            os.kill(os.getpid(), 9)
        if self.kind == "stuck":  # the main thread waits for ever; the fault is known
            threading.Thread(target=end_process, args=(ModelError("the model is broken. Mend it"),)).start()
            time.sleep(1000)
        return block

watch.LOOK_SECONDS = 0.2
os.environ |= {"RAY_prestart_worker_first_driver": "0", "RAY_enable_worker_prestart": "0"}
ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=1 << 27)
told = {}
for kind in ("once", "always", "start", "killed", "stuck"):
    log, lines = f"{os.environ['PLACE']}/{kind}", []
    try:
        blocks = [pa.table({"number": [number]}) for number in range(2)]
        rows = over_actors(Mortal, (kind, log), blocks, Resources(1, 0.0, 1), "scoring", tell=lines.append)
        said = sorted(row["number"] for row in rows)
    except RaydpoError as error:
        said = [type(error).__name__, str(error)]
    told[kind] = said, lines, len(open(log).readlines())
with open(f"{os.environ['PLACE']}/told", "w") as file:
    json.dump(told, file)
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    place = tmp_path_factory.mktemp("deaths")
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "PLACE": str(place)}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return json.loads((place / "told").read_text())  # Ray prints on stdout


def test_an_actor_that_lost_its_team_is_started_again_and_its_block_repeated(told):
    said, lines, starts = told["once"]
    assert said == [0, 1] and starts == 2
    (line,) = lines
    assert line.startswith("warning: scoring: the worker on "), line
    assert line.endswith(" died because the team broke; it was started again, 1 of 3 times"), line


def test_an_actor_that_dies_again_and_again_ends_the_work_with_how_often_and_why(told):
    for kind, why in (
        ("always", "because the team broke; run it again"),
        ("start", "because the team broke at its start"),
        ("killed", "without a word, as if killed: memory may be short there; run it again"),
    ):
        (name, text), lines, starts = told[kind]
        assert name == "RaydpoError" and text.startswith("scoring failed: the worker on "), text
        assert text.endswith(f" died 4 times, the last time {why}"), text
        assert starts == 4 and 1 <= len(lines) <= 3


def test_a_fault_that_is_known_ends_the_work_though_only_a_thread_could_tell_it(told):
    said, _, starts = told["stuck"]
    assert said == ["ModelError", "the model is broken. Mend it"] and starts == 1
