"""Files for the image, launcher, Slurm, SkyPilot, Anyscale and Prometheus, each checked by the strictest tool available."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml
from scaling import machines_for

from raydpo.cli.entry import _parser
from raydpo.cluster.resources import Resources
from raydpo.submit.client import STOP_SECONDS

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
TOOLS = Path(sys.executable).parent


def loaded(name):
    return yaml.safe_load((CLUSTER / name).read_text())


def closed(required=(), **properties):
    """JSON schema of a mapping with exactly these keys."""
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


TEXT, NUMBER, ANY = {"type": "string"}, {"type": "integer", "minimum": 0}, {}


# -- image


def test_the_dockerfile_is_free_of_lint():
    result = subprocess.run([TOOLS / "hadolint", CLUSTER / "Dockerfile"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def dockerfile():
    """Instructions of the Dockerfile, one line each."""
    text = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ")
    return [" ".join(line.split()) for line in text.splitlines() if line and not line.startswith("#")]


def test_the_image_is_pinned_and_not_roots():
    lines = dockerfile()
    installs = {
        part.strip().removeprefix("pip install ")
        for line in lines
        if line.startswith("RUN")
        for part in line.removeprefix("RUN ").split("&&")
        if "pip install" in part
    }
    assert installs == {
        "--only-binary=:all: --require-hashes -r build.lock",
        "--require-hashes --no-build-isolation -r requirements.lock",  # of CUDA
        "--only-binary=:all: --no-deps -c constraints.txt --index-url https://download.pytorch.org/whl/cpu torch",
        '--no-build-isolation -c constraints.txt ".[cluster,gpu,launcher,quantization,rewards,track]"',
        "--no-deps --no-build-isolation .",
    }
    # The lock was made from these extras, and it has the packages that build raydpo.
    lock = (ROOT / "requirements.lock").read_text()
    assert set(re.findall(r"--extra (\w+)", lock)) == {"cluster", "gpu", "launcher", "quantization", "rewards", "track"}
    assert "\nnvidia-cudnn" in lock
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000"]
    assert any(line.startswith("HEALTHCHECK") for line in lines)


def test_what_runs_while_the_image_is_built_is_pinned():
    """Without an option pip downloads the newest setuptools to build a source package, without checking a hash."""
    lines, stages = dockerfile(), set()
    for line in lines:
        if line.startswith("FROM"):
            _, image, *name = line.split()
            assert image in stages or "${VARIANT}" in image or re.search(r"@sha256:[0-9a-f]{64}$", image), line
            stages |= {*name[1:]}
    assert "# syntax=" not in (CLUSTER / "Dockerfile").read_text(), "an image of its own, which would run the build"
    for part in (part for line in lines for part in line.split("&&")):
        if "pip install" in part:
            assert "--no-build-isolation" in part or "--only-binary=:all:" in part
    for line in lines:
        if "build.lock" in line:
            command = line.removeprefix("RUN ").split(" > build.lock")[0]
            text = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
            assert re.findall(r"^(\S+)==", text, re.MULTILINE) == ["setuptools"] and "--hash=sha256:" in text


def test_the_driver_is_found_where_gke_puts_it_and_its_version_is_said():
    variables = dict(re.findall(r"(\w+)=(\S+)", " ".join(line for line in dockerfile() if line.startswith("ENV"))))
    assert "/usr/local/nvidia/lib64" in variables["LD_LIBRARY_PATH"].split(":")
    assert variables["PATH"].split(":")[::2] == ["/opt/venv/bin", "/usr/local/nvidia/bin"]
    assert "\nnvidia-cudnn-cu13==" in (ROOT / "requirements.lock").read_text(), "a build for CUDA 13, which wants driver 580"
    for name in (
        "Dockerfile",
        "README.md",
        "aws.yaml",
        "gcp.yaml",
        "skypilot.yaml",
        "slurm.sbatch",
        *(f"kuberay/overlays/{cloud}/kustomization.yaml" for cloud in ("aks", "eks", "gke")),
    ):
        assert re.search(r"\b580\b", (CLUSTER / name).read_text()), name


def test_the_pythons_are_new_enough_for_the_pinned_versions():
    """The pinned numpy, pandas and filelock need Python 3.11."""
    assert "FROM python:3.11-" in (CLUSTER / "Dockerfile").read_text()
    assert "venv --quiet --allow-existing --python 3.11 " in loaded("skypilot.yaml")["setup"]
    assert re.findall(r"Python (3\.\d+)", (CLUSTER / "README.md").read_text()) == ["3.11"]


def test_every_way_to_begin_a_job_gives_it_time_for_a_checkpoint():
    """Ray kills a stopped job after three seconds unless the head or the job sets another time."""
    name, seconds = "RAY_JOB_STOP_WAIT_TIME_S", str(STOP_SECONDS)
    for file in ("aws.yaml", "gcp.yaml"):
        (start,) = [line for line in loaded(file)["head_start_ray_commands"] if "ray start" in line]
        assert f"{name}={seconds} ray start" in start
    assert loaded("anyscale.yaml")["env_vars"] == {name: seconds}
    for file, place in (("raycluster", ("spec",)), ("rayjob", ("spec", "rayClusterSpec"))):
        node = loaded(f"kuberay/base/{file}.yaml")
        for step in (*place, "headGroupSpec", "template", "spec"):
            node = node[step]
        assert {"name": name, "value": seconds} in node["containers"][0]["env"]
    submits = re.findall(r"^ray job submit .*", (CLUSTER / "README.md").read_text(), re.MULTILINE)
    assert submits and all(json.dumps({"env_vars": {name: seconds}}) in line for line in submits)


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
    starts = [
        command
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in config[key]
        if "ray start" in command
    ]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    with pytest.raises(jsonschema.ValidationError):
        validate_config(config | {"max_wokers": 1})


def test_the_launcher_brings_the_accelerator_that_a_stage_asks_for():
    """Ray's provider for Google needs these resources in the file; that for AWS asks EC2."""
    asked = Resources(16, 1.0, None, accelerator="H100", labels={"ray.io/market-type": "spot"})
    assert machines_for(loaded("gcp.yaml"), asked) == {"h100": 2}


# -- Slurm


def test_the_slurm_script_is_free_of_lint():
    result = subprocess.run([TOOLS / "shellcheck", CLUSTER / "slurm.sbatch"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.fixture
def slurm(tmp_path):
    """Run the script with stand-ins: srun runs commands here, Ray does nothing, and raydpo is a test's command."""
    commands = {
        "srun": 'while [[ $1 == --* ]]; do shift; done\nexec "$@"',
        "scontrol": 'if [[ $1 == show ]]; then printf "node1\\nnode2\\n"; else echo "$@" >> requeued; fi',
    }
    started = "if [[ $1 == start ]]; then exec sleep 60; fi"

    def run(raydpo, *arguments, ray=started, **environment):
        commands["ray"] = f'echo "$RAY_AUTH_MODE ${{#RAY_AUTH_TOKEN}} $*" >> ray.log\n{ray}'
        (tmp_path / "bin").mkdir()
        for name, body in (commands | {"raydpo": raydpo}).items():
            (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        with open(tmp_path / "log", "w") as log:
            return subprocess.Popen(
                ["bash", str(CLUSTER / "slurm.sbatch"), *arguments],
                cwd=tmp_path,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={"PATH": "/usr/bin:/bin", "VENV": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]"}
                | environment,
            )

    yield run
    for pid in _session(tmp_path):
        subprocess.run(["kill", str(pid)], check=False, stderr=subprocess.DEVNULL)


def _session(place):
    """Processes started in ``place`` that still run: the stand-ins for Ray, which Slurm would end."""
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
    assert (tmp_path / "said").read_text() == "node1:6379 run config.yaml ray.autoscaling=true output=/shared/my runs\n"
    log = tmp_path / "ray.log"
    until(lambda: log.exists() and log.read_text().count(" start ") == 2)
    head, worker = sorted(line for line in log.read_text().splitlines() if " start " in line)[::-1]
    assert head.startswith("token 64 start --head ") and worker.startswith("token 64 start --address=node1:6379 ")
    assert not (tmp_path / "requeued").exists()


def test_slurm_hands_a_preemption_on_and_queues_again(slurm, tmp_path):
    """The driver ends with status 130 after its checkpoint, and the script waits for it without a limit."""
    process = slurm(
        'trap "sleep 1; echo saved > checkpoint; exit 130" TERM\necho > begun\nwhile :; do sleep 0.1; done', "config.yaml"
    )
    until((tmp_path / "begun").exists)
    process.terminate()
    assert process.wait(20) == 130
    assert (tmp_path / "checkpoint").exists() and (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_slurm_does_not_repeat_an_error(slurm, tmp_path):
    assert slurm("exit 2", "c.yaml").wait(20) == 2
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize("words", [("c.yaml", "a=1", "--fresh"), ("--fresh", "c.yaml", "a=1")])
@pytest.mark.parametrize("restarts", ["0", "1"])
def test_slurm_begins_afresh_only_once(slurm, tmp_path, words, restarts):
    """The command line accepts the arguments; a requeued job keeps its own checkpoint."""
    process = slurm('echo "$*" > said', *words, SLURM_RESTART_COUNT=restarts)
    assert process.wait(20) == 0, (tmp_path / "log").read_text()
    args = _parser().parse_args((tmp_path / "said").read_text().split())
    assert (args.config, args.overrides) == ("c.yaml", ["ray.autoscaling=true", "a=1"])
    assert args.fresh == (restarts == "0")
    assert ("--fresh counted at the first start" in (tmp_path / "log").read_text()) != args.fresh


def test_slurm_ends_where_ray_does_not_begin(slurm, tmp_path):
    assert slurm("echo > begun", "c.yaml", ray="echo no such port >&2; exit 3").wait(20) == 3
    log = (tmp_path / "log").read_text()
    assert "no such port" in log and re.search(r"Ray on node[12] has ended with status 3", log)
    assert not (tmp_path / "begun").exists() and not (tmp_path / "requeued").exists()


def test_slurm_does_not_wait_for_ray_without_end(slurm, tmp_path):
    process = slurm(
        "echo > begun",
        "c.yaml",
        START_SECONDS="1",
        ray="if [[ $1 == start ]]; then exec sleep 60; fi\necho not yet healthy; exit 1",
    )
    assert process.wait(20) == 1
    log = (tmp_path / "log").read_text()
    assert "Ray on node1 has not begun within 1 seconds" in log and "not yet healthy" in log
    assert not (tmp_path / "begun").exists()


def test_slurm_ends_when_a_node_is_lost_with_a_checkpoint(slurm, tmp_path):
    """Its Ray does not come back, so the driver would wait for its GPUs."""
    process = slurm(
        'trap "echo saved > checkpoint; exit 130" TERM\necho > begun\nwhile :; do sleep 0.1; done',
        "c.yaml",
        ray='case "$*" in *--address=node1*) until [[ -e begun ]]; do sleep 0.1; done; exit 9;; '
        "start*) exec sleep 60;; esac",
    )
    assert process.wait(20) == 9
    assert "Ray on node2 has ended with status 9" in (tmp_path / "log").read_text()
    assert (tmp_path / "checkpoint").exists() and not (tmp_path / "requeued").exists()


def test_slurm_queues_again_what_is_preempted_while_ray_begins(slurm, tmp_path):
    process = slurm("echo > begun", "c.yaml", ray="exec sleep 60")  # the health check, too
    until(lambda: (tmp_path / "ray.log").exists() and "health-check" in (tmp_path / "ray.log").read_text())
    process.terminate()
    assert process.wait(20) == 143
    assert (tmp_path / "requeued").read_text() == "requeue 7\n" and not (tmp_path / "begun").exists()


def test_slurm_asks_for_the_whole_machine():
    """--exclusive gives all CPUs and GPUs, but only the site's default memory."""
    asked = re.findall(r"^#SBATCH --(\S+)$", (CLUSTER / "slurm.sbatch").read_text(), re.MULTILINE)
    assert {"exclusive", "mem=0", "gpus-per-node=8"} <= {*asked}


# -- SkyPilot, Anyscale, Prometheus


def test_skypilot_and_anyscale_have_the_fields_of_their_schemas():
    """Fields of skypilot 0.14.1 and anyscale's JobConfig, which accepted the files. Both are too large to install here."""
    jsonschema.validate(
        loaded("skypilot.yaml"),
        closed(
            ("resources", "run"),
            name=TEXT,
            num_nodes=NUMBER,
            workdir=TEXT,
            setup=TEXT,
            run=TEXT,
            envs=ANY,
            secrets=ANY,
            resources=closed(
                accelerators=TEXT,
                use_spot={"const": True},
                cpus=TEXT,
                memory=TEXT,
                disk_size=NUMBER,
                job_recovery=closed(("strategy",), strategy=TEXT, max_restarts_on_errors=NUMBER),
            ),
        ),
    )
    jsonschema.validate(
        loaded("anyscale.yaml"),
        closed(
            ("entrypoint",),
            name=TEXT,
            image_uri=TEXT,
            env_vars=ANY,
            working_dir=TEXT,
            requirements=ANY,
            entrypoint=TEXT,
            max_retries=NUMBER,
            compute_config=closed(
                cloud=TEXT,
                head_node=ANY,
                worker_nodes={
                    "type": "array",
                    "items": closed(
                        ("instance_type",),
                        name=TEXT,
                        instance_type=TEXT,
                        min_nodes=NUMBER,
                        max_nodes=NUMBER,
                        market_type={"enum": ["SPOT", "ON_DEMAND", "PREFER_SPOT"]},
                    ),
                },
            ),
        ),
    )


def test_skypilots_script_is_free_of_lint():
    task = loaded("skypilot.yaml")
    for script in (task["setup"], task["run"]):
        # Variables of the task are defined; SC1090: the environment is on the machine.
        given = "".join(
            f"export {name}=given\n" for name in (*task["envs"], *task["secrets"], "SKYPILOT_NODE_IPS", "SKYPILOT_NODE_RANK")
        )
        result = subprocess.run(
            [TOOLS / "shellcheck", "--shell=bash", "--exclude=SC1090,SC1091", "-"],
            input=given + script,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout


def test_prometheus_looks_where_ray_and_the_pods_say():
    config = loaded("prometheus.yml")
    jsonschema.validate(
        config,
        closed(
            ("scrape_configs",),
            **{"global": closed(scrape_interval=TEXT, scrape_timeout=TEXT)},
            scrape_configs={
                "type": "array",
                "items": closed(
                    ("job_name",),
                    job_name=TEXT,
                    relabel_configs={
                        "type": "array",
                        "items": closed(
                            source_labels={"type": "array", "items": TEXT},
                            regex=TEXT,
                            target_label=TEXT,
                            action={"enum": ["keep"]},
                        ),
                    },
                    file_sd_configs={"type": "array", "items": closed(files=ANY, refresh_interval=TEXT)},
                    kubernetes_sd_configs={
                        "type": "array",
                        "items": closed(role={"enum": ["pod"]}, namespaces=closed(names=ANY)),
                    },
                ),
            },
        ),
    )
    files, pods = config["scrape_configs"]
    assert files["file_sd_configs"][0]["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]
    base = loaded("kuberay/base/raycluster.yaml")["spec"]["headGroupSpec"]["template"]
    (policy,) = [
        rule
        for rule in loaded("kuberay/base/networkpolicy.yaml")["spec"]["ingress"]
        if {"protocol": "TCP", "port": 8080} in rule.get("ports", [])
    ]
    assert base["metadata"]["annotations"]["prometheus.io/scrape"] == "true"
    assert {"name": "metrics", "containerPort": 8080} in base["spec"]["containers"][0]["ports"]
    assert [one["regex"] for one in pods["relabel_configs"] if "regex" in one] == ["true", "metrics"]
    assert "monitoring" in str(policy)


# -- all of them

FILES = [file for file in sorted(CLUSTER.rglob("*")) + sorted((ROOT / "jobs").glob("*")) if file.is_file()]
SECRETS = re.compile(
    r"A[KS]IA[0-9A-Z]{16}|hf_[A-Za-z0-9]{20}|gh[pousr]_[A-Za-z0-9]{20}|sk-[A-Za-z0-9]{20}|-----BEGIN"
    r"|AIza[0-9A-Za-z_-]{30}|eyJ[A-Za-z0-9_-]{20}"
    r"|(?i:(?:password|secret|token|api_?key|account_?key)\s*[=:]\s*[\"']?[A-Za-z0-9+/_-]{20,})"
)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_holds_a_secret(file):
    assert not SECRETS.search(file.read_text())


def test_the_search_for_secrets_finds_some():
    for text in ("key: AKIAIOSFODNN7EXAMPLE", "HF_TOKEN: hf_abcdefghijklmnopqrstuvwx", "api_key = 'c2VjcmV0c2VjcmV0c2Vj'"):
        assert SECRETS.search(text)
