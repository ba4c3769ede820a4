"""A Ray cluster as a user starts one: processes of ``ray start``, a job server, a token. It outlives commands."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path


class RayProcesses:
    """A head on this machine, and as many more nodes as are added. Only what has the token is let in.

    Attributes:
        env: what a command needs to reach it: address and token.
    """

    def __init__(self, cpus: int = 5) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="rdc"))  # short: sockets lie below it
        self._started: list[subprocess.Popen] = []
        self.gcs, self.dashboard = _free_ports(2)
        self.token = secrets.token_hex(16)
        # RAY_* of whoever runs the tests would decide here. PYTHONPATH: as if this raydpo were installed on the nodes.
        self._env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "HOME": str(self.place),
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "RAY_worker_niceness": "0", "RAY_enable_worker_prestart": "0", "RAY_prestart_worker_first_driver": "0",
            # A lost node is noticed in seconds.
            "RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "4",
            "RAY_health_check_initial_delay_ms": "1000"}
        self.env = self._env | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.dashboard}"}
        self.head = self._start("--head", f"--port={self.gcs}", f"--dashboard-port={self.dashboard}",
                                "--dashboard-host=127.0.0.1", f"--num-cpus={cpus}", f"--temp-dir={self.place}/h")
        self._wait_for_server()

    def add(self, cpus: int, before: Path | None = None, **labels: str) -> subprocess.Popen:
        """One more node, with a disk of its own: two that share one unpack a job's files over each other. Its Python finds
        what lies in ``before`` first."""
        return self._start(f"--address=127.0.0.1:{self.gcs}", f"--num-cpus={cpus}",
                           f"--temp-dir={self.place}/{len(self._started)}",
                           *([f"--labels={','.join(f'{key}={value}' for key, value in labels.items())}"] if labels else []),
                           before=before)

    def _start(self, *arguments: str, before: Path | None = None) -> subprocess.Popen:
        environment = dict(self._env)
        if before is not None:
            environment["PYTHONPATH"] = f"{before}{os.pathsep}{environment['PYTHONPATH']}"
        ports = dict(zip(("--dashboard-agent-listen-port", "--dashboard-agent-grpc-port", "--runtime-env-agent-port",
                          "--metrics-export-port", "--node-manager-port", "--object-manager-port"), _free_ports(6),
                         strict=True))
        with open(self.place / f"node{len(self._started)}.log", "wb") as log:
            process = subprocess.Popen(
                [str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats",
                 "--object-store-memory=150000000", *(f"{name}={port}" for name, port in ports.items()), *arguments],
                env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        self._started.append(process)
        return process

    def _wait_for_server(self, seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        request = urllib.request.Request(f"http://127.0.0.1:{self.dashboard}/api/version",
                                         headers={"Authorization": f"Bearer {self.token}"})
        while True:
            try:
                with urllib.request.urlopen(request, timeout=2):
                    return
            except OSError as error:
                if time.monotonic() > deadline or self.head.poll() is not None:
                    log = (self.place / "node0.log").read_text(errors="replace")
                    self.stop()
                    raise AssertionError(f"no job server ({error}): {log[-3000:]}") from None
                time.sleep(0.3)

    def give_notice(self, label: str, value: str, seconds: float) -> None:
        """What a cloud does before it takes the nodes with this label away."""
        program = f"""
import ray, time
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
ray.init(address="127.0.0.1:{self.gcs}", logging_level="error")
for node in ray.nodes():
    if node["Alive"] and node["Labels"].get("{label}") == "{value}":
        accepted, why = GcsClient(address="127.0.0.1:{self.gcs}").drain_node(
            node["NodeID"], DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), "test",
            int((time.time() + {seconds}) * 1000))
        assert accepted, why
"""
        subprocess.run([sys.executable, "-c", program], env=self._env, check=True)

    def lose(self, node: subprocess.Popen) -> None:
        """A node goes, with everything on it and without notice."""
        for process in _family(node.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def stop(self) -> None:
        for node in reversed(self._started):
            self.lose(node)
            node.wait()
        shutil.rmtree(self.place, ignore_errors=True)


def _family(process: int) -> list[int]:
    """A process and all that it started, directly or not, and that is still there."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found = [process]
    for one in found:
        found += children.get(one, [])
    return found


def _free_ports(count: int) -> list[int]:
    """Ports that are free at this moment; those that the system gives lie outside of Ray's for workers."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
