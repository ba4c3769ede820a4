"""Credentials in a URI work, and are found nowhere afterwards; a Ray of our own lets nobody else in."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from pyarrow import fs as pafs
from s3_server import s3_server
from tiny import preferences, write_preferences

from raydpo.storage.files import Storage

KEY, SECRET = "planted-key", "planted/secret+x"


def everything(uri):
    """Every file below a place, by name."""
    storage = Storage(uri)
    infos = storage.fs.get_file_info(pafs.FileSelector(storage.root, recursive=True))
    return {info.path: storage.fs.open_input_stream(info.path).read() for info in infos if info.is_file}


@pytest.mark.slow
def test_a_run_on_a_store_with_planted_credentials_tells_them_nowhere(tiny_llama, tmp_path):
    pytest.importorskip("moto")
    write_preferences(tmp_path / "a.jsonl", preferences(24))
    # Logs of a run on a URI lie among temporary files; the path is short for Ray's sockets.
    with s3_server() as s3, tempfile.TemporaryDirectory(prefix="rds") as temporary:
        uri = s3.uri("secrets").replace("s3://", f"s3://{KEY}:{SECRET.replace('/', '%2F')}@")
        tree = {
            "name": "one",
            "output": uri,
            "model": {"path": str(tiny_llama), "dtype": "float32"},
            "data": {"train": str(tmp_path / "a.jsonl"), "eval": {"fraction": 0.2}},
            "train": {"pairs_per_step": 8, "steps": 2, "tokens_per_batch": 512},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
        done = subprocess.run(
            [sys.executable, "-m", "raydpo.cli", "run", str(tmp_path / "config.yaml")],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=280,
            env=os.environ | {"TMPDIR": temporary},
        )
        assert done.returncode == 0, done.stdout
        files = everything(uri) | {
            str(path): path.read_bytes() for path in Path(temporary).glob("raydpo-*/**/*") if path.is_file()
        }
    assert {"config.yaml", "summary.json", "report.html", "README.md", "driver.log"} <= {
        path.rsplit("/", 1)[1] for path in files
    }
    told = {"output": done.stdout.encode()} | files
    for secret in (KEY, SECRET, SECRET.replace("/", "%2F"), "planted"):
        assert [name for name, content in told.items() if secret.encode() in content] == []


@pytest.mark.slow
def test_a_ray_of_our_own_asks_for_a_token_and_has_no_dashboard(tmp_path, tiny_llama):
    write_preferences(tmp_path / "a.jsonl", preferences(8))
    program = f"""
import os, ray
from raydpo.config import load_config
from raydpo.cluster.session import session
with session(load_config({{"output": "{tmp_path}/runs", "model": {{"path": "{tiny_llama}"}},
                          "data": {{"train": "{tmp_path}/a.jsonl"}}}})):
    print(os.environ["RAY_AUTH_MODE"], ray._private.worker.global_worker.node.address_info["webui_url"],
          ray.get_runtime_context().gcs_address)
    import subprocess, sys
    address = ray.get_runtime_context().gcs_address
    other = subprocess.run([sys.executable, "-c", f"import ray; ray.init(address='{{address}}')"],
                           env=os.environ | {{"RAY_AUTH_TOKEN": "f" * 32}}, capture_output=True, text=True, timeout=120)
    print("refused" if other.returncode and "oken" in other.stderr else other.stderr[-500:])
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment | {"HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == 0 and done.stdout.split()[:1] == ["token"], done.stdout + done.stderr[-2000:]
    assert "8265" not in done.stdout and "refused" in done.stdout, done.stdout
