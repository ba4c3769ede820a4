"""Trackers in their offline modes, and Ray's own metrics port."""

import contextlib
import json
import re
import socket
import time
import urllib.request
from pathlib import Path

import pytest

from raydpo.config.track import MlflowConfig, TrackConfig, WandbConfig
from raydpo.rundir.trackers import Trackers, export_pass

ROWS = [{"loss": 0.69, "rewards/margins": 0.0, "grad_norm": 1.0}, {"loss": 0.5, "rewards/margins": 0.3, "grad_norm": 2.0}]
SETTINGS = {"train.beta": 0.1, "train.lr": 1e-6, "model.path (weights)": "ab12"}


def log(config, place, warnings=None):
    trackers = Trackers(config, "run", str(place), SETTINGS, (warnings if warnings is not None else []).append)
    for step, row in enumerate(ROWS, 1):
        trackers.log(step, row | {"step": step})
    trackers.close()


def test_mlflow_keeps_a_run_and_a_restart_continues_it(tmp_path):
    from mlflow.tracking import MlflowClient

    warnings = []
    config = TrackConfig(mlflow=MlflowConfig(uri=str(tmp_path / "store")), prometheus=False)
    log(config, tmp_path, warnings)
    log(config, tmp_path, warnings)
    assert not warnings
    client = MlflowClient(f"sqlite:///{tmp_path}/store/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("raydpo").experiment_id])
    assert run.data.metrics["loss"] == 0.5 and run.data.params["train.beta"] == "0.1"
    assert run.info.run_name == "run" and run.info.status == "FINISHED"
    assert [(entry.step, entry.value) for entry in client.get_metric_history(run.info.run_id, "rewards/margins")] == [
        (1, 0.0),
        (2, 0.3),
    ] * 2


def test_wandb_offline_writes_what_sync_will_send(tmp_path):
    warnings = []
    log(TrackConfig(wandb=WandbConfig(mode="offline"), prometheus=False), tmp_path, warnings)
    assert not warnings
    (record,) = tmp_path.rglob("*.wandb")
    deadline = time.time() + 30
    while b"train.beta" not in record.read_bytes() and time.time() < deadline:
        time.sleep(0.1)  # a process of its own writes it
    content = record.read_bytes()
    assert b"rewards/margins" in content and b"train.beta" in content


def test_a_tracker_that_fails_is_left_out_with_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    warnings = []
    log(TrackConfig(mlflow=MlflowConfig(uri=str(tmp_path / "file" / "below")), prometheus=False), tmp_path, warnings)
    assert len(warnings) == 1 and "track.mlflow is left out" in warnings[0]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_named_with_the_command(name, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, name, None)
    if name == "mlflow":
        monkeypatch.setitem(__import__("sys").modules, "mlflow.tracking", None)
    warnings = []
    log(TrackConfig(**{name: {}}, prometheus=False), tmp_path, warnings)
    assert len(warnings) == 1 and "pip install 'raydpo[track]'" in warnings[0]


def test_gauges_that_ray_cannot_serve_are_told_where_they_were_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "prometheus_client", None)
    warnings = []
    log(TrackConfig(prometheus=True), tmp_path, warnings)
    assert len(warnings) == 1 and "track.prometheus is left out" in warnings[0] and "raydpo[cluster]" in warnings[0]
    Trackers(TrackConfig(), "run", str(tmp_path), SETTINGS, warnings.append)
    assert len(warnings) == 1


def test_gauges_come_out_of_rays_metrics_port_under_the_names_of_the_dashboard(tmp_path):
    import ray

    warnings = []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"address": "local", "num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 << 20}
    ray.init(**alone, _metrics_export_port=port, log_to_driver=False)
    try:
        log(TrackConfig(), tmp_path, warnings)
        export_pass(TrackConfig(), "run", 0.25, 900.0, warnings.append)
        deadline, text = time.time() + 90, ""
        while not ("ray_raydpo_loss" in text and "ray_raydpo_cache_hits" in text) and time.time() < deadline:
            time.sleep(1)
            with contextlib.suppress(OSError):  # the agent that serves it may start late
                text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    finally:
        ray.shutdown()
    assert not warnings
    value = re.search(r'ray_raydpo_loss\{[^}]*run="run"[^}]*\} ([\d.]+)', text)
    assert value and float(value[1]) == 0.5
    figures = {name: float(figure) for name, figure in re.findall(r"^ray_raydpo_(\w+)\{[^}]*\} (\S+)$", text, re.MULTILINE)}
    assert figures["cache_hits"] == 0.25 and figures["step"] == len(ROWS)
    assert time.time() - figures["began_seconds"] < 300
    dashboard = json.loads((Path(__file__).parents[2] / "cluster" / "grafana.json").read_text())
    shown = set(re.findall(r"ray_raydpo_\w+", json.dumps(dashboard)))
    exported = set(re.findall(r"ray_raydpo_\w+", text))
    assert {"ray_raydpo_loss", "ray_raydpo_rewards_margins", "ray_raydpo_step"} <= shown & exported
