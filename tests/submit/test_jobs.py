"""Jobs on a cluster made by 'ray start', with a token: exit statuses, stopping, submitting again, detaching."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
import requests
import yaml
from machines import RayProcesses
from tiny import preferences, write_preferences

STEPS = 240
PLANTED = "planted-" + "0123456789abcdef"


@pytest.fixture(scope="module")
def cluster():
    processes = RayProcesses(cpus=5)
    yield processes
    processes.stop()


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_llama):
    place = tmp_path_factory.mktemp("project")
    data = tmp_path_factory.mktemp("shared")  # that all nodes see
    write_preferences(data / "a.jsonl", preferences(45))
    tree = {
        "name": "one",
        "output": str(data / "runs"),
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "data": {"train": str(data / "a.jsonl")},
        "train": {"pairs_per_step": 8, "lr": 1e-3, "steps": STEPS, "checkpoint_every": 100, "tokens_per_batch": 512},
    }
    (place / "config.yaml").write_text(yaml.safe_dump(tree))
    (place / ".env").write_text(f"WANDB_API_KEY={PLANTED}\n")
    place.joinpath("data").symlink_to(data)
    return place


def start(cluster, project, *words, **env):
    return subprocess.Popen(
        [sys.executable, "-m", "raydpo.cli", *words],
        cwd=project,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=cluster.env | {"WANDB_API_KEY": PLANTED} | env,
    )


def raydpo(cluster, project, *words, **env):
    process = start(cluster, project, *words, **env)
    said, _ = process.communicate(timeout=300)
    return process.returncode, said


def jobs(cluster):
    answer = requests.get(
        f"{cluster.env['RAY_API_SERVER_ADDRESS']}/api/jobs/",
        timeout=20,
        headers={"Authorization": f"Bearer {cluster.token}"},
    )
    return {job["submission_id"]: job for job in answer.json()}


def steps(project, name="one"):
    """(First step after each start of the training, steps done)."""
    log = project / "data" / "runs" / name / "logs" / "worker-0.log"
    text = log.read_text(errors="replace") if log.is_file() else ""
    return (
        [int(step) for step in re.findall(r"beginning after step (\d+)", text)],
        [int(step) for step in re.findall(r"^step (\d+)  loss", text, re.M)],
    )


def wait_until(condition, process, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline or process.poll() is not None:
            process.kill()
            raise AssertionError(process.communicate()[0])
        time.sleep(0.1)


def test_it_waits_aloud_is_refused_twice_left_alone_and_stopped(cluster, project):
    """A job that waits for a GPU says so; a second job of the run is refused; Ctrl-C does not stop it; once stopped, its
    exit status is 130."""
    status, said = raydpo(
        cluster,
        project,
        "submit",
        "score",
        "config.yaml",
        "name=waiting",
        "score.gpus_per_worker=1",
        "ray.autoscaling=true",
        "--no-wait",
    )
    assert status == 0 and "raydpo jobs logs -f waiting-1" in said, said
    first = start(cluster, project, "jobs", "logs", "-f", "waiting")
    said = ""
    while "waiting 1" not in said:
        line = first.stdout.readline()
        assert line, said
        said += line
    assert re.search(r"waiting 1\d s for 1 of 1 score worker\(s\), each 1 GPU; others use them, or", said), said
    first.send_signal(signal.SIGINT)
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 130 and "detached; job waiting-1 continues" in said, said
    status, said = raydpo(cluster, project, "submit", "score", "config.yaml", "name=waiting")
    assert status == 2 and "job waiting-1 of this run is running" in said, said

    second = start(cluster, project, "jobs", "logs", "-f", "waiting-1")
    status, said = raydpo(cluster, project, "jobs", "stop", "waiting")
    assert status == 0 and "job waiting-1 is stopped" in said, said
    assert "stopping waiting-1, which has 120 s for a checkpoint" in said and "warning" not in said, said
    said, _ = second.communicate(timeout=60)
    assert second.returncode == 130 and "job waiting-1 was stopped" in said, said


def test_a_job_that_others_began_may_have_no_time_to_stop(cluster, project):
    begun = requests.post(
        f"{cluster.env['RAY_API_SERVER_ADDRESS']}/api/jobs/",
        timeout=60,
        json={"entrypoint": "sleep 600", "submission_id": "bare"},
        headers={"Authorization": f"Bearer {cluster.token}"},
    )
    assert begun.ok, begun.text
    wait_until(lambda: jobs(cluster)["bare"]["status"] == "RUNNING", cluster.head)
    status, said = raydpo(cluster, project, "jobs", "stop", "bare")
    assert status == 0 and "job bare is stopped" in said, said
    assert "job bare was started without RAY_JOB_STOP_WAIT_TIME_S in its runtime_env" in said, said
    assert "3 by default" in said, said


@pytest.mark.slow
def test_two_workers_on_two_nodes_stopped_submitted_again_and_finished(cluster, project):
    """A stopped job writes a checkpoint; submitted again it continues there and repeats no step."""
    cluster.add(4)
    two = ("score.workers=2", "train.workers=2")
    first = start(cluster, project, "submit", "run", "config.yaml", *two)
    wait_until(lambda: len(steps(project)[1]) > 15, first)
    status, said = raydpo(cluster, project, "jobs", "stop", "one")
    assert status == 0 and "job one-1 is stopped" in said, said
    said, _ = first.communicate(timeout=60)
    assert first.returncode == 130 and "job one-1 was stopped" in said, said
    assert "cluster: 2 nodes, with the same packages and storage" in said, said
    done = max(steps(project)[1])

    status, said = raydpo(cluster, project, "submit", "run", "config.yaml", *two)
    assert status == 0 and "job one-2 is done" in said and "(100% hits)" in said, said
    assert steps(project) == ([0, done], list(range(1, STEPS + 1)))


@pytest.mark.slow
def test_every_verb_is_a_job_and_leaves_what_it_leaves_anywhere(cluster, project):
    cluster.add(4)
    runs = project / "data" / "runs"
    settings = (
        "config.yaml",
        "name=verbs",
        "train.steps=4",
        "score.workers=2",
        "train.workers=2",
        "data.eval={fraction: 0.2}",
        f"cache.uri={project}/data/cache-verbs",
        "evaluate.prompts=4",
        "evaluate.max_tokens=4",
    )

    def done(verb, *words):
        status, said = raydpo(cluster, project, "submit", verb, *words)
        assert status == 0 and re.search(r"job [\w-]+ is done", said), said
        return said

    assert "(0% hits)" in done("score", *settings) and (runs / "verbs" / "audit.json").is_file()
    done("train", *settings)
    assert json.loads((runs / "verbs" / "summary.json").read_text())["steps"] == 4
    done("eval", *settings)
    assert json.loads((runs / "verbs" / "evaluation.json").read_text())["preferences"]["total"]["pairs"] > 0
    said = done("sweep", *settings, "name=verbs-sweep", "sweep.grid={train.beta: [0.1, 0.3]}")
    assert "(100% hits)" in said
    trials = json.loads((runs / "verbs-sweep" / "sweep.json").read_text())["trials"]
    assert [(trial["status"], trial["steps"]) for trial in trials] == [("done", 4), ("done", 4)]
    model, out = yaml.safe_load((project / "config.yaml").read_text())["model"]["path"], project / "data" / "benchmark.json"
    done(
        "benchmark",
        "--",
        "--model",
        model,
        "--data",
        f"{project}/data/a.jsonl",
        "--pairs",
        "16",
        "--dtype",
        "fp32",
        "--full",
        "--parts",
        "kernel",
        "--device",
        "cpu",
        "--json",
        str(out),
    )
    assert json.loads(out.read_text())["figures"]["points"][0]["step"]["kernel"]["seconds"] > 0


@pytest.mark.slow
def test_the_node_of_a_training_is_lost_and_another_one_comes(cluster, project):
    """The workers need a label that one node has; when that node is lost they wait for the next one and continue there."""
    node = cluster.add(3, zone="training")
    job = start(
        cluster,
        project,
        "submit",
        "run",
        "config.yaml",
        "name=lost",
        "train.workers=2",
        "train.labels={zone: training}",
        "train.checkpoint_every=10",
    )
    wait_until(lambda: len(steps(project, "lost")[1]) > 25, job)
    cluster.lose(node)
    cluster.add(3, zone="training")
    said, _ = job.communicate(timeout=280)
    assert job.returncode == 0 and "job lost-1 is done" in said, said
    began, done = steps(project, "lost")
    assert len(began) == 2 and began[1] >= 10 and sorted({*done}) == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.parametrize("notice", [False, True])
def test_the_node_that_scores_is_lost_and_another_one_comes(cluster, project, notice):
    write_preferences(project / "data" / "many.jsonl", preferences(6000))
    zone = "noticed" if notice else "lost"
    node = cluster.add(3, zone=zone)
    job = start(
        cluster,
        project,
        "submit",
        "score",
        "config.yaml",
        f"name=score-{zone}",
        "score.workers=2",
        f"score.labels={{zone: {zone}}}",
        f"data.train={project}/data/many.jsonl",
        f"cache.uri={project}/data/cache-{zone}",
        "score.tokens_per_part=8192",
    )
    wait_until(lambda: any((project / "data" / f"cache-{zone}").rglob("*.parquet")), job)
    if notice:
        cluster.give_notice("zone", zone, 5)
        time.sleep(5)
    assert job.poll() is None
    cluster.lose(node)
    cluster.add(3, zone=zone)
    said, _ = job.communicate(timeout=280)
    assert job.returncode == 0 and "(0% hits)" in said, said
    scored = re.search(r"cache: 0 of ([\d,]+) completions were there .* ([\d,]+) scored", said)
    assert scored and scored[1] == scored[2], said


@pytest.mark.slow
def test_a_node_with_other_packages_is_named_before_anything_is_scored(cluster, project, tmp_path):
    (tmp_path / "transformers-0.0.1.dist-info").mkdir()
    (tmp_path / "transformers-0.0.1.dist-info" / "METADATA").write_text("Name: transformers\nVersion: 0.0.1\n")
    node = cluster.add(3, before=tmp_path, zone="odd")
    status, said = raydpo(
        cluster,
        project,
        "submit",
        "score",
        "config.yaml",
        "name=odd",
        "score.labels={zone: odd}",
        "score.gpus_per_worker=0",
        "ray.autoscaling=true",
    )
    cluster.lose(node)
    assert status == 2 and re.search(r"error: node \S+ \(\w+\) has transformers 0.0.1, the driver's node \d", said), said
    assert "scoring" not in said


def test_exit_statuses_are_the_jobs_own(cluster, project):
    status, said = raydpo(cluster, project, "submit", "train", "config.yaml", "name=two", "data.train=/nowhere.jsonl")
    assert status == 2 and "there is no such file" in said, said
    status, said = raydpo(cluster, project, "submit", "train", "config.yaml", "name=two", "cache.uri=/proc/nowhere")
    assert status == 1, said
    status, said = raydpo(cluster, project, "jobs", "ls")
    assert status == 0 and re.search(r"two-1 +│ +failed +│ +2 ", said) and re.search(r"two-2 +│ +failed +│ +1 ", said), said


def test_without_the_token_nobody_gets_in(cluster, project):
    for token, why in (("", "and this machine has none"), ("f" * 32, "and does not take this machine's")):
        status, said = raydpo(cluster, project, "submit", "run", "config.yaml", RAY_AUTH_TOKEN=token, HOME=str(project))
        assert status == 2 and f"wants a token, {why}" in said, said
    address = cluster.env["RAY_API_SERVER_ADDRESS"]
    assert requests.get(f"{address}/api/jobs/", timeout=10).status_code == 401
    assert requests.post(f"{address}/api/jobs/", json={"entrypoint": "id"}, timeout=10).status_code == 401


def test_no_cluster_is_one_sentence(cluster, project):
    status, said = raydpo(cluster, project, "jobs", "ls", "--address", "127.0.0.1:9")
    assert status == 2 and said.startswith("error: no Ray job server answers at http://127.0.0.1:9"), said


def test_no_secret_is_in_jobs_or_runs(cluster, project):
    """Secrets in the submitter's environment, its .env and the cluster's token, all set above."""
    files = [*(project / "data" / "runs").rglob("*"), *(cluster.place / "h").rglob("job-driver*")]
    told = "".join([json.dumps(jobs(cluster)), *(file.read_text("latin-1") for file in files if file.is_file())])
    assert "Running entrypoint for job waiting-1" in told
    assert PLANTED not in told and cluster.token not in told
