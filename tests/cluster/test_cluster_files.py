"""Image, launcher, Slurm, SkyPilot, Anyscale and Prometheus, each by the strictest reader that there is for it here."""

import re
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
TOOLS = Path(sys.executable).parent


def loaded(name):
    return yaml.safe_load((CLUSTER / name).read_text())


def closed(required=(), **properties):
    """A JSON schema of a mapping that has these keys and no others."""
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


TEXT, NUMBER, ANY = {"type": "string"}, {"type": "integer", "minimum": 0}, {}


# -- image

def test_the_dockerfile_is_free_of_lint():
    result = subprocess.run([TOOLS / "hadolint", CLUSTER / "Dockerfile"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_the_image_is_pinned_and_not_roots():
    lines = [line for line in (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ").splitlines() if line]
    installs = {line.split("pip install ", 1)[1].split(" &&")[0] for line in lines if "pip install" in line}
    assert installs == {
        "--require-hashes -r requirements.lock",  # of CUDA
        "--no-deps -c constraints.txt --index-url https://download.pytorch.org/whl/cpu torch",
        '-c constraints.txt ".[cluster,gpu,launcher,quantization,track]"',
        "--no-deps --no-build-isolation ."}
    # That is what the lock was made of, and it brings what builds raydpo.
    lock = (ROOT / "requirements.lock").read_text()
    assert set(re.findall(r"--extra (\w+)", lock)) == {"cluster", "gpu", "launcher", "quantization", "track"}
    assert "\nsetuptools==" in lock and "\nnvidia-cudnn" in lock
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000"]
    assert any(line.startswith("HEALTHCHECK") for line in lines)


def test_what_the_image_copies_is_there_and_not_ignored():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copies = re.compile(r"^COPY (?!--from)(?:--chown=\S+ )?(.+) \S+$", re.MULTILINE)
    for line in copies.findall((CLUSTER / "Dockerfile").read_text()):
        for name in line.split():
            assert (ROOT / name).exists() and f"!{name}" in ignored


# -- Ray's cluster launcher

@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_ray_takes_the_launchers_file(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(loaded(f"{name}.yaml"))
    validate_config(config)
    head = config["available_node_types"][config["head_node_type"]]
    (workers,) = [kind for key, kind in config["available_node_types"].items() if key != config["head_node_type"]]
    assert head["resources"]["CPU"] == 0 and "GPU" not in head["resources"] and workers["resources"]["GPU"] == 8
    market = "InstanceMarketOptions" if name == "aws" else "scheduling"
    assert market not in head["node_config"] and "spot" in str(workers["node_config"][market]).lower()
    role = "IamInstanceProfile" if name == "aws" else "serviceAccounts"
    assert head["node_config"][role] != workers["node_config"][role]
    starts = [command for key in ("head_start_ray_commands", "worker_start_ray_commands") for command in config[key]
              if "ray start" in command]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    with pytest.raises(jsonschema.ValidationError):
        validate_config(config | {"max_wokers": 1})


# -- Slurm

def test_the_slurm_script_is_free_of_lint():
    result = subprocess.run([TOOLS / "shellcheck", CLUSTER / "slurm.sbatch"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.fixture
def slurm(tmp_path):
    """Runs the script where srun runs a command here, Ray does nothing, and raydpo is whatever a test says."""
    commands = {
        "srun": 'while [[ $1 == --* ]]; do shift; done\nexec "$@"',
        "scontrol": 'if [[ $1 == show ]]; then printf "node1\\nnode2\\n"; else echo "$@" >> requeued; fi',
        "ray": 'echo "$RAY_AUTH_MODE ${#RAY_AUTH_TOKEN} $*" >> ray.log\nif [[ $1 == start ]]; then exec sleep 60; fi',
    }

    def run(raydpo, *arguments):
        (tmp_path / "bin").mkdir()
        for name, body in (commands | {"raydpo": raydpo}).items():
            (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        with open(tmp_path / "log", "w") as log:
            return subprocess.Popen(
                ["bash", str(CLUSTER / "slurm.sbatch"), *arguments], cwd=tmp_path, stdout=log, stderr=log,
                start_new_session=True, env={"PATH": "/usr/bin:/bin", "VENV": str(tmp_path), "SLURM_JOB_ID": "7",
                                             "SLURM_JOB_NODELIST": "node[1-2]"})
    yield run
    for pid in _session(tmp_path):
        subprocess.run(["kill", str(pid)], check=False, stderr=subprocess.DEVNULL)


def _session(place):
    """Processes that were started in ``place`` and are there still: the stand-ins for Ray, which Slurm would end."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").resolve() == place:
                yield int(entry.name)
        except OSError:
            continue


def until(condition):
    deadline = time.time() + 20
    while not condition():
        assert time.time() < deadline
        time.sleep(0.05)


def test_slurm_starts_ray_on_every_node_and_runs_once(slurm, tmp_path):
    process = slurm('echo "$RAY_ADDRESS $*" > said', "config.yaml", "output=/shared/my runs")
    assert process.wait(20) == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "said").read_text() == "node1:6379 run config.yaml output=/shared/my runs ray.autoscaling=true\n"
    log = tmp_path / "ray.log"
    until(lambda: log.exists() and log.read_text().count(" start ") == 2)
    head, worker = sorted(line for line in log.read_text().splitlines() if " start " in line)[::-1]
    assert head.startswith("token 64 start --head ") and worker.startswith("token 64 start --address=node1:6379 ")
    assert not (tmp_path / "requeued").exists()


def test_slurm_hands_a_preemption_on_and_queues_again(slurm, tmp_path):
    """The driver ends with 130 after its checkpoint; the script waits for that, however long."""
    process = slurm('trap "sleep 1; echo saved > checkpoint; exit 130" TERM\necho > begun\nwhile :; do sleep 0.1; done',
                    "config.yaml")
    until((tmp_path / "begun").exists)
    process.terminate()
    assert process.wait(20) == 130
    assert (tmp_path / "checkpoint").exists() and (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_slurm_does_not_repeat_an_error(slurm, tmp_path):
    assert slurm("exit 2", "c.yaml").wait(20) == 2
    assert not (tmp_path / "requeued").exists()


# -- SkyPilot, Anyscale, Prometheus

def test_skypilot_and_anyscale_have_the_fields_of_their_schemas():
    """Of skypilot 0.14.1 and anyscale's JobConfig, whose own readers took the files; both are too large to install here."""
    jsonschema.validate(loaded("skypilot.yaml"), closed(
        ("resources", "run"), name=TEXT, num_nodes=NUMBER, workdir=TEXT, setup=TEXT, run=TEXT, envs=ANY, secrets=ANY,
        resources=closed(accelerators=TEXT, use_spot={"const": True}, cpus=TEXT, memory=TEXT, disk_size=NUMBER,
                         job_recovery=closed(("strategy",), strategy=TEXT, max_restarts_on_errors=NUMBER))))
    jsonschema.validate(loaded("anyscale.yaml"), closed(
        ("entrypoint",), name=TEXT, image_uri=TEXT, working_dir=TEXT, requirements=ANY, entrypoint=TEXT, max_retries=NUMBER,
        compute_config=closed(cloud=TEXT, head_node=ANY, worker_nodes={"type": "array", "items": closed(
            ("instance_type",), name=TEXT, instance_type=TEXT, min_nodes=NUMBER, max_nodes=NUMBER,
            market_type={"enum": ["SPOT", "ON_DEMAND", "PREFER_SPOT"]})})))


def test_skypilots_script_is_free_of_lint():
    task = loaded("skypilot.yaml")
    for script in (task["setup"], task["run"]):
        # What the task sets is set; SC1090: the environment is of the machine.
        given = "".join(f"export {name}=given\n" for name in (
            *task["envs"], *task["secrets"], "SKYPILOT_NODE_IPS", "SKYPILOT_NODE_RANK"))
        result = subprocess.run([TOOLS / "shellcheck", "--shell=bash", "--exclude=SC1090,SC1091", "-"], input=given + script,
                                capture_output=True, text=True)
        assert result.returncode == 0, result.stdout


def test_prometheus_looks_where_ray_and_the_pods_say():
    config = loaded("prometheus.yml")
    jsonschema.validate(config, closed(("scrape_configs",), **{"global": closed(scrape_interval=TEXT, scrape_timeout=TEXT)},
                                       scrape_configs={"type": "array", "items": closed(
        ("job_name",), job_name=TEXT, relabel_configs={"type": "array", "items": closed(
            source_labels={"type": "array", "items": TEXT}, regex=TEXT, target_label=TEXT, action={"enum": ["keep"]})},
        file_sd_configs={"type": "array", "items": closed(files=ANY, refresh_interval=TEXT)},
        kubernetes_sd_configs={"type": "array", "items": closed(role={"enum": ["pod"]}, namespaces=closed(names=ANY))})}))
    files, pods = config["scrape_configs"]
    assert files["file_sd_configs"][0]["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]
    base = loaded("kuberay/base/raycluster.yaml")["spec"]["headGroupSpec"]["template"]
    (policy,) = [rule for rule in loaded("kuberay/base/networkpolicy.yaml")["spec"]["ingress"]
                 if {"protocol": "TCP", "port": 8080} in rule.get("ports", [])]
    assert base["metadata"]["annotations"]["prometheus.io/scrape"] == "true"
    assert {"name": "metrics", "containerPort": 8080} in base["spec"]["containers"][0]["ports"]
    assert [one["regex"] for one in pods["relabel_configs"] if "regex" in one] == ["true", "metrics"]
    assert "monitoring" in str(policy)


# -- all of them

FILES = [file for file in sorted(CLUSTER.rglob("*")) + sorted((ROOT / "jobs").glob("*")) if file.is_file()]
SECRETS = re.compile(r"A[KS]IA[0-9A-Z]{16}|hf_[A-Za-z0-9]{20}|gh[pousr]_[A-Za-z0-9]{20}|sk-[A-Za-z0-9]{20}|-----BEGIN"
                     r"|AIza[0-9A-Za-z_-]{30}|eyJ[A-Za-z0-9_-]{20}"
                     r"|(?i:(?:password|secret|token|api_?key|account_?key)\s*[=:]\s*[\"']?[A-Za-z0-9+/_-]{20,})")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_holds_a_secret(file):
    assert not SECRETS.search(file.read_text())


def test_the_search_for_secrets_finds_some():
    for text in ("key: AKIAIOSFODNN7EXAMPLE", "HF_TOKEN: hf_abcdefghijklmnopqrstuvwx", "api_key = 'c2VjcmV0c2VjcmV0c2Vj'"):
        assert SECRETS.search(text)
