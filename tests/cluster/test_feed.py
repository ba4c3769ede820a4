"""Blocks reach actors while others are made, one task each, also on one CPU and when processes die."""

import json
import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json, os, signal, threading, time
import psutil
import pyarrow as pa
import ray
from raydpo.cluster import feed
from raydpo.cluster.actors import over_actors
from raydpo.cluster.resources import Resources
from raydpo.errors import DataError

class Counter:
    def __call__(self, block):
        time.sleep(0.01)
        return pa.table({"n": block["n"], "rows": [block.num_rows], "process": [os.getpid()]})

def blocks(count, error=None):
    for number in range(count):
        made.append(number)
        if number == 60:
            # Ray Data does not end while the next block is waited for.
            assert gate.wait(60)
        yield pa.table({"n": [number], "much": [bytes(30_000)]})
    if error is not None:
        raise error

def kill(name):
    found = [one for one in psutil.Process().children(recursive=True) if one.cmdline()[:1] == [name]]
    for one in found:
        one.send_signal(signal.SIGKILL)
    return len(found)

ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=1 << 27)
made, gate, told, done, ahead = [], threading.Event(), {}, [], 0
for row in over_actors(Counter, (), blocks(120), Resources(1, 0.0, 1), "counting", calls_at_once=2):
    done.append([row["n"], row["rows"], row["process"]])
    ahead = max(ahead, len(made) - len(done))
    if len(done) == 20:
        told["reader"] = kill("ray::ReadBlocks")
    if len(done) == 50:
        told["made while the next one is waited for"] = len(made)
        gate.set()
    if len(done) == 90:
        os.kill(row["process"], signal.SIGKILL)
told |= {"done": done, "ahead": ahead, "current": ray.data.DataContext.get_current().target_max_block_size}
made, done = [], []
try:
    for row in over_actors(Counter, (), blocks(30, DataError("no more")), Resources(1, 0.0, 1), "counting"):
        done.append(row["n"])
except DataError as error:
    told["error"] = [str(error), len(done)]
told["nothing"] = list(over_actors(Counter, (), [], Resources(1, 0.0, 1), "counting"))
told["left"] = sum(thread.name == "raydpo-feed" for thread in threading.enumerate())
print(json.dumps(told))
"""


def test_blocks_reach_actors_while_others_are_made():
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    told = json.loads(
        next(line for line in done.stdout.splitlines() if line.startswith("{"))
    )  # Ray tells of the killed, too
    assert sorted(number for number, _, _ in told["done"]) == list(range(120)), "none is lost or done twice"
    assert {rows for _, rows, _ in told["done"]} == {1}, "each is a task of its own"
    assert told["reader"] == 1 and len({process for _, _, process in told["done"]}) == 2, "both processes were killed"
    assert 50 < told["made while the next one is waited for"] <= 61 and told["ahead"] <= 16
    assert told["current"] > 1, "the settings of the program are as they were"
    assert told["error"] == ["no more", 30] and told["nothing"] == [] and told["left"] == 0
