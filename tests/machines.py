"""A Ray cluster as a user starts it: ``ray start``, a job server, a token. It runs on after a command ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LEAN = {"object_store_memory": 150 << 20, "include_log_monitor": False}
"""Arguments of each node of a ``ray.cluster_utils.Cluster``: no process that only forwards workers' output to a driver."""
FAKE_PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
"""By its path, since the type 'fake_multinode' needs a file that Ray's package lacks."""


@dataclass(frozen=True)
class OtherHost:
    """A network namespace that acts as another machine, connected by one virtual cable from ``here`` to ``there``.

    Attributes:
        here, there: addresses of the two ends.
        cable: name of the interface on either side, by address.
    """

    name: str
    here: str
    there: str
    cable: dict[str, str]


@contextlib.contextmanager
def other_host() -> Iterator[OtherHost]:
    """Create one, and remove it afterwards.

    Raises:
        PermissionError: if this machine does not allow it.
    """
    name = f"rdc{secrets.token_hex(3)}"
    net = f"10.213.{secrets.randbelow(250)}"
    host = OtherHost(name, f"{net}.1", f"{net}.2", {f"{net}.1": f"{name}a", f"{net}.2": f"{name}b"})
    if shutil.which("ip") is None:
        raise PermissionError("there is no 'ip' command to make network namespaces with")
    try:
        for words in (
            f"netns add {name}",
            f"link add {name}a type veth peer name {name}b",
            f"link set {name}b netns {name}",
            f"addr add {host.here}/24 dev {name}a",
            f"link set {name}a up",
            f"-n {name} addr add {host.there}/24 dev {name}b",
            f"-n {name} link set {name}b up",
            f"-n {name} link set lo up",
        ):
            done = subprocess.run(["ip", *words.split()], capture_output=True, text=True)
            if done.returncode:
                raise PermissionError(f"ip {words}: {done.stderr.strip()}")
        yield host
    finally:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)  # with the cable
        subprocess.run(["ip", "link", "delete", f"{name}a"], capture_output=True)


class RayProcesses:
    """A head on this machine, to which nodes can be added. Clients need its token.

    Args:
        node_types: types that Ray's autoscaler (version 2) may start on this machine, as in a launcher's file.
        idle_seconds: seconds after which it stops an idle node.
        host: another host for nodes; the head is at this end of the cable.

    Attributes:
        env: environment variables to reach it: address and token.
    """

    def __init__(
        self,
        cpus: int = 5,
        node_types: dict[str, dict] | None = None,
        idle_seconds: float = 10,
        host: OtherHost | None = None,
    ) -> None:
        self.host, self.address = host, host.here if host else "127.0.0.1"
        self.place = Path(tempfile.mkdtemp(prefix="rdc"))  # short, since paths of sockets have a length limit
        self._started: list[subprocess.Popen] = []
        self.gcs, self.dashboard = _free_ports(2)
        self.token = secrets.token_hex(16)
        # Without RAY_* of the calling environment. PYTHONPATH: as if this raydpo were installed on the nodes.
        self._env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.place),
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "RAY_worker_niceness": "0",
            "RAY_enable_worker_prestart": "0",
            "RAY_prestart_worker_first_driver": "0",
            # A lost node is noticed in seconds.
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_failure_threshold": "4",
            "RAY_health_check_initial_delay_ms": "1000",
        }
        self.env = self._env | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.dashboard}"}
        scaling, more = self._autoscaler(node_types, idle_seconds) if node_types else ((), {})
        self.head = self._start(
            "--head",
            f"--port={self.gcs}",
            f"--dashboard-port={self.dashboard}",
            "--dashboard-host=127.0.0.1",
            f"--num-cpus={cpus}",
            f"--temp-dir={self.place}/h",
            *scaling,
            *self._at(self.address),
            env=more | self._by_cable(self.address),
        )
        self._wait_for_server()

    def _autoscaler(self, node_types: dict[str, dict], idle_seconds: float) -> tuple[list[str], dict[str, str]]:
        """Environment of a head that starts nodes on this machine: as ``ray.cluster_utils.AutoscalingCluster``, but without
        'ray stop --force', which would end every Ray."""
        from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

        file = self.place / "autoscaler.json"
        file.write_text(
            json.dumps(
                {
                    "cluster_name": "fake",
                    "max_workers": 8,
                    "upscaling_speed": 1.0,
                    "idle_timeout_minutes": idle_seconds / 60,
                    "provider": {
                        "type": "external",
                        "module": FAKE_PROVIDER,
                        "disable_node_updaters": True,
                        "disable_launch_config_check": True,
                        "foreground_node_launch": True,
                        "launch_multiple": True,
                        "head_node_id": FAKE_HEAD_NODE_ID,
                        "gcs_address": f"127.0.0.1:{self.gcs}",
                    },
                    "auth": {},
                    "docker": {},
                    "file_mounts": {},
                    "cluster_synced_files": [],
                    "initialization_commands": [],
                    "setup_commands": [],
                    "head_setup_commands": [],
                    "worker_setup_commands": [],
                    "head_start_ray_commands": [],
                    "worker_start_ray_commands": [],
                    "file_mounts_sync_continuously": False,
                    "rsync_exclude": [],
                    "rsync_filter": [],
                    "head_node_type": "ray.head.default",
                    "available_node_types": node_types
                    | {"ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}},
                }
            )
        )
        return [f"--autoscaling-config={file}"], {
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        }

    def _at(self, address: str) -> list[str]:
        return [f"--node-ip-address={address}"] if self.host else []

    def _by_cable(self, address: str) -> dict[str, str]:
        """Gloo uses the host name, which is the same on both hosts here."""
        return {"GLOO_SOCKET_IFNAME": self.host.cable[address]} if self.host else {}

    def add(
        self, cpus: int, before: Path | None = None, away: bool = False, env: dict[str, str] | None = None, **labels: str
    ) -> subprocess.Popen:
        """Add a node with its own directory, since two nodes in one directory overwrite each other's job files. ``before``
        is first on its PYTHONPATH. ``away``: on the other host. ``env``: environment of its processes."""
        address = self.host.there if away else self.address
        return self._start(
            f"--address={self.address}:{self.gcs}",
            f"--num-cpus={cpus}",
            f"--temp-dir={self.place}/{len(self._started)}",
            *self._at(address),
            *([f"--labels={','.join(f'{key}={value}' for key, value in labels.items())}"] if labels else []),
            before=before,
            away=away,
            env=self._by_cable(address) | (env or {}),
        )

    def _start(
        self, *arguments: str, before: Path | None = None, away: bool = False, env: dict[str, str] | None = None
    ) -> subprocess.Popen:
        environment = self._env | (env or {})
        enter = ["ip", "netns", "exec", self.host.name] if away else []
        if before is not None:
            environment["PYTHONPATH"] = f"{before}{os.pathsep}{environment['PYTHONPATH']}"
        ports = dict(
            zip(
                (
                    "--dashboard-agent-listen-port",
                    "--dashboard-agent-grpc-port",
                    "--runtime-env-agent-port",
                    "--metrics-export-port",
                    "--node-manager-port",
                    "--object-manager-port",
                ),
                _free_ports(6),
                strict=True,
            )
        )
        with open(self.place / f"node{len(self._started)}.log", "wb") as log:
            process = subprocess.Popen(
                [
                    *enter,
                    str(Path(sys.executable).parent / "ray"),
                    "start",
                    "--block",
                    "--disable-usage-stats",
                    "--object-store-memory=150000000",
                    *(f"{name}={port}" for name, port in ports.items()),
                    *arguments,
                ],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def _wait_for_server(self, seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.dashboard}/api/version", headers={"Authorization": f"Bearer {self.token}"}
        )
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
        """Drain the nodes with this label, as a cloud does before it removes them."""
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
        """Kill a node and everything on it without notice."""
        for process in _family(node.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def stop(self) -> None:
        for node in reversed(self._started):
            self.lose(node)
            node.wait()
        shutil.rmtree(self.place, ignore_errors=True)


def _family(process: int) -> list[int]:
    """A process and all of its descendants that still run."""
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
    """Ports that are free now. The system gives ports outside the range of Ray's workers."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def workers(mark: bytes) -> list[int]:
    """Process ids of the Ray Train workers whose environment contains ``mark``. Ray names processes after actors."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if b"RayTrainWorker" in (entry / "cmdline").read_bytes() and mark in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:  # it has ended
                continue
    return sorted(found)


def wait_for_checkpoint(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Return as soon as a run has a complete checkpoint of ``step`` or later. AssertionError if ``process`` ends before."""
    deadline = time.time() + 400
    snapshot = run_dir / "checkpoints" / "checkpoint_manager_snapshot.json"
    while time.time() < deadline and process.poll() is None:
        if snapshot.is_file():
            steps = [int(found) for found in re.findall(r"step-(\d+)", snapshot.read_text())]
            if steps and max(steps) >= step:
                return
        time.sleep(0.01)
    raise AssertionError(process.communicate()[0])
