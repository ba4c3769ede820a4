"""A run with constant faults ends with the same weights, bit for bit, as one without faults.

    python tests/soak.py [--steps 300] [--minutes 10] [--faults worker,hang,...] [--seed 0]

Ray's cluster utility simulates two machines, each a raylet with its own processes. A fault follows each new checkpoint.
Prints one line per fault, then a JSON report: faults, restarts, steps repeated.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from kernel import exact
from machines import LEAN, workers
from tiny import make_model, preferences, write_preferences

MARK = "RAYDPO_SOAK"
CHECKPOINT_EVERY = 5
PACED = """
import time
from pathlib import Path

from raydpo.losses.objective import FUNCTIONS

SECONDS = float(Path(__file__).with_name("pace").read_text())


def sigmoid(logps, config, beta):
    time.sleep(SECONDS)
    return FUNCTIONS["sigmoid"](logps, config, beta)
"""
"""A slow loss, so that faults come at about the same steps on machines of any speed."""


class Machines:
    """A simulated cluster: a head for the driver, and two machines with room for the given number of workers each."""

    def __init__(self, cpus: int = 2, on_head: int = 0) -> None:
        self._cpus, self._on_head = cpus, on_head
        os.environ.update(
            {
                MARK: "1",
                "RAY_USAGE_STATS_ENABLED": "0",
                "RAY_health_check_period_ms": "500",
                "RAY_health_check_failure_threshold": "4",
                "RAY_health_check_initial_delay_ms": "1000",
            }
        )
        self.start()

    def start(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": self._on_head, "include_dashboard": False, **LEAN},
        )
        self.nodes = [self._add() for _ in range(2)]
        self.address = self.cluster.address

    def _add(self):
        return self.cluster.add_node(num_cpus=self._cpus, **LEAN)

    def stop(self) -> None:
        self.cluster.shutdown()

    def lose(self, node) -> None:
        """A machine is lost without notice, and another one joins."""
        self.cluster.remove_node(node, allow_graceful=False)
        self.nodes[self.nodes.index(node)] = self._add()

    def shrink(self) -> None:
        """Remove a machine."""
        self.cluster.remove_node(self.nodes.pop(), allow_graceful=False)

    def grow(self) -> None:
        """Add a machine."""
        self.nodes.append(self._add())

    def give_notice(self, node, seconds: float) -> None:
        """Drain a machine, as a cloud does before it takes a spot machine."""
        from ray._raylet import GcsClient
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        accepted, why = GcsClient(address=self.address).drain_node(
            node.node_id, DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), "soak", int((time.time() + seconds) * 1000)
        )
        assert accepted, why

    def of(self, process: int):
        """The machine that a worker runs on. IndexError if there is none any more."""
        environment = Path(f"/proc/{process}/environ").read_bytes()
        arguments = Path(f"/proc/{process}/cmdline").read_bytes()
        for node in self.nodes:
            name = node.unique_id.encode()
            if name in environment or name in arguments or str(node.node_id).encode() in environment + arguments:
                return node
        parent = int(re.search(r"PPid:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[1])
        for node in self.nodes:
            if any(info.process.pid == parent for infos in node.all_processes.values() for info in infos):
                return node
        raise IndexError(f"process {process} is on no machine that is left")


class Soak:
    """One run with faults, and a record of them."""

    def __init__(self, place: Path, steps: int, **machines: int) -> None:
        self.place, self.steps = place, steps
        self.run_dir = place / "runs" / "disturbed"
        self.machines = Machines(**machines)
        self.driver: subprocess.Popen | None = None
        self.faults: list[tuple[str, int]] = []  # and the number of starts until then

    # -- the run ---------------------------------------------------------------------------------------------------

    def command(self, name: str) -> list[str]:
        return [sys.executable, "-m", "raydpo.cli", "run", str(self.place / "config.yaml"), f"name={name}"]

    def drive(self) -> None:
        with open(self.place / "driver.log", "ab") as log:
            self.driver = subprocess.Popen(
                self.command("disturbed"),
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"RAY_ADDRESS": self.machines.address},
            )

    def log(self) -> list[str]:
        path = self.run_dir / "logs" / "worker-0.log"
        return path.read_text(errors="replace").splitlines() if path.is_file() else []

    def steps_done(self) -> list[int]:
        return [int(found[1]) for line in self.log() if (found := re.match(r"step (\d+)  loss", line))]

    def begins(self) -> list[int]:
        """The step after which training started, for each start."""
        return [int(found[1]) for line in self.log() if (found := re.match(r"beginning after step (\d+)", line))]

    def progresses(self) -> bool:
        """Whether the training is taking steps now."""
        before = len(self.log())
        time.sleep(0.5)
        return len(self.log()) > before

    def registered(self) -> int:
        """The newest step with a complete checkpoint."""
        snapshot = self.run_dir / "checkpoints" / "checkpoint_manager_snapshot.json"
        steps = re.findall(r"step-(\d+)", snapshot.read_text()) if snapshot.is_file() else []
        return max(map(int, steps), default=0)

    def workers(self) -> list[int]:
        return workers(f"{MARK}=1".encode())

    # -- faults ----------------------------------------------------------------------------------------------------

    def worker(self) -> None:
        os.kill(random.choice(self.workers()), signal.SIGKILL)

    def hang(self) -> None:
        os.kill(random.choice(self.workers()), signal.SIGSTOP)

    def machine(self) -> None:
        node = self.machines.of(random.choice(self.workers()))
        self.machines.lose(node)

    def preemption(self) -> None:
        node = self.machines.of(random.choice(self.workers()))
        self.machines.give_notice(node, 6)
        time.sleep(7)
        self.machines.lose(node)

    def terminate(self) -> None:
        self.driver.send_signal(signal.SIGTERM)
        status = self.driver.wait(timeout=120)
        assert status in (0, 130), status
        self.drive()

    def driver_killed(self) -> None:
        self.driver.kill()
        self.driver.wait()
        time.sleep(1)
        self.drive()

    def head(self) -> None:
        self.machines.stop()
        self.driver.kill()
        self.driver.wait()
        self.machines.start()
        self.drive()

    def memory(self) -> None:
        """One worker cannot allocate memory for a while."""
        worker = random.choice(self.workers())
        taken = int(re.search(r"VmSize:\s+(\d+)", Path(f"/proc/{worker}/status").read_text())[1]) * 1024
        resource.prlimit(worker, resource.RLIMIT_AS, (taken, resource.RLIM_INFINITY))

    def disk(self) -> None:
        """The last worker's disk is full for some checkpoints."""
        worker = self.workers()[-1]
        resource.prlimit(worker, resource.RLIMIT_FSIZE, (64 << 10, resource.RLIM_INFINITY))
        time.sleep(4)
        resource.prlimit(worker, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def storage(self) -> None:
        """The checkpoint directory cannot be written for some seconds."""
        done = max(self.steps_done())
        first = done + CHECKPOINT_EVERY - done % CHECKPOINT_EVERY
        blocks = [self.run_dir / "checkpoints" / f"step-{step:08d}" for step in range(first, first + 60, CHECKPOINT_EVERY)]
        made = []
        for block in blocks:
            try:
                block.touch(exist_ok=False)
                made.append(block)
            except FileExistsError:
                continue
        time.sleep(5)
        for block in made:
            block.unlink()

    # -- all of it -------------------------------------------------------------------------------------------------

    def disturb(self, faults: list[str], minutes: float, seed: int) -> None:
        random.seed(seed)
        start, seen, turn = time.time(), 0, list(faults)
        self.drive()
        while self.driver.poll() is None:
            time.sleep(0.2)
            newest = self.registered()
            if newest <= seen or newest >= self.steps - CHECKPOINT_EVERY or not self.workers():
                continue
            if minutes and time.time() - start > minutes * 60:
                continue
            time.sleep(random.uniform(0, 1.5))
            if not turn:
                if not minutes:
                    continue
                turn = random.sample(faults, len(faults))
            if not self.progresses():
                continue  # the previous fault is not over
            fault, begun = turn.pop(0), len(self.begins())
            try:
                getattr(self, fault)()
            except (ProcessLookupError, FileNotFoundError, IndexError, ValueError) as error:
                print(f"  {fault}: nothing left to disturb ({error})", flush=True)
                turn.append(fault)
                continue
            self.faults.append((fault, begun))
            print(f"  {time.time() - start:5.0f} s  {fault}, checkpoint {newest}", flush=True)
            seen = max(newest, self.registered())
        self.seconds = time.time() - start

    def report(self) -> dict[str, Any]:
        done, restarts = self.steps_done(), len(self.begins()) - 1
        redone: dict[str, list[int]] = {}
        for fault, begun in self.faults:
            if begun <= restarts:
                redone.setdefault(fault, []).append(self._redone(begun))
        return {
            "steps": self.steps,
            "seconds": round(self.seconds),
            "faults": dict(Counter(name for name, _ in self.faults)),
            "restarts": restarts,
            "steps_redone": len(done) - len(set(done)),
            "redone_after": redone,
            "same_bits": weights(self.run_dir) == weights(self.place / "runs" / "undisturbed"),
            "same_metrics": metrics(self.run_dir) == metrics(self.place / "runs" / "undisturbed"),
        }

    def _redone(self, number: int) -> int:
        """Steps that restart ``number`` repeated."""
        begun = newest = -1
        for line in self.log():
            if found := re.match(r"step (\d+)  loss", line):
                newest = int(found[1])
            elif found := re.match(r"beginning after step (\d+)", line):
                begun += 1
                if begun == number:
                    return max(0, newest - int(found[1]))
        return 0


def within_bounds(redone: dict[str, list[int]]) -> bool:
    """A fault repeats at most one checkpoint interval of steps. After a notice or SIGTERM, which leave time for a
    checkpoint, none is repeated."""
    return all(
        steps <= (0 if fault in ("preemption", "terminate") else CHECKPOINT_EVERY)
        for fault, counts in redone.items()
        for steps in counts
    )


def weights(run_dir: Path) -> str:
    path = run_dir / "final" / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else f"no {path}"


def metrics(run_dir: Path) -> list[dict[str, float]]:
    return exact(pq.read_table(run_dir / "metrics.parquet").to_pylist())


def prepare(place: Path, steps: int, **train: object) -> None:
    model = make_model(place / "model")
    write_preferences(place / "a.jsonl", preferences(200))
    tree = {
        "output": str(place / "runs"),
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": str(place / "a.jsonl")},
        "cache": {"uri": str(place / "cache")},
        "train": {
            "workers": 2,
            "pairs_per_step": 48,
            "lr": 1e-3,
            "steps": steps,
            "checkpoint_every": CHECKPOINT_EVERY,
            "tokens_per_batch": 512,
            "max_failures": -1,
            "max_preemptions": -1,
            "collective_timeout": 8,
            "preemption_every": 1,
        }
        | train,
    }
    (place / "config.yaml").write_text(yaml.safe_dump(tree))


FAULTS = ["worker", "hang", "machine", "preemption", "terminate", "driver_killed", "memory", "disk", "storage", "head"]


def soak(place: Path, steps: int, faults: list[str], minutes: float = 0, seed: int = 0, pace: float = 0) -> dict[str, Any]:
    """Train without faults, then with them. ``minutes`` 0: each fault once; ``pace``: least seconds of a micro-batch with
    faults."""
    prepare(place, steps, loss="paced:sigmoid")
    (place / "paced.py").write_text(PACED)
    (place / "pace").write_text("0")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(place), os.environ.get("PYTHONPATH")]))
    run = Soak(place, steps)
    try:
        quiet = subprocess.run(
            run.command("undisturbed"),
            env=os.environ | {"RAY_ADDRESS": run.machines.address},
            capture_output=True,
            text=True,
            timeout=1200,
        )
        assert quiet.returncode == 0, quiet.stdout + quiet.stderr
        (place / "pace").write_text(str(pace))
        run.disturb(faults, minutes, seed)
        assert run.driver.returncode == 0, (place / "driver.log").read_text()[-4000:]
        return run.report()
    finally:
        if run.driver is not None and run.driver.poll() is None:
            run.driver.kill()
        run.machines.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--minutes", type=float, default=0, help="disturb for so long; 0 = each fault once")
    parser.add_argument("--faults", default=",".join(FAULTS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="raydpo-soak-") as place:
        report = soak(Path(place), arguments.steps, arguments.faults.split(","), arguments.minutes, arguments.seed)
    print(json.dumps(report, indent=2))
    return 0 if report["same_bits"] and report["same_metrics"] and within_bounds(report["redone_after"]) else 1


if __name__ == "__main__":
    sys.exit(main())
