"""--fresh takes effect once a job, whichever scheduler repeats the job; changed settings of a continued run are told."""

import io
import json
import os

import pytest

from raydpo.config import load_config
from raydpo.errors import ConfigError
from raydpo.rundir.directory import CONFIG, RUN
from raydpo.rundir.earlier import begin_again, neutral_changes, other_held_out
from raydpo.storage.files import Storage
from raydpo.terminal.console import Console


def test_a_continued_run_is_told_which_changed_settings_change_its_rounding(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "a.jsonl").write_text("{}\n")
    tree = {"output": "runs", "model": {"path": str(tmp_path / "model")}, "data": {"train": str(tmp_path / "a.jsonl")}}
    storage = Storage(str(tmp_path / "run"))
    storage.write(CONFIG, load_config(tree, ["model.fused=true"]).to_yaml().encode())

    def told(*overrides):
        return list(neutral_changes(storage, load_config(tree, ["model.fused=true", *overrides])))

    assert told() == []
    elastic = "train.workers={min: 1, max: 2}"
    quiet, rounding = told("train.zero=3", "train.deterministic=true", "model.layout=padded", "train.eval_every=9", elastic)
    assert quiet == "changed since this run started, without effect on its result: train.eval_every: 50 -> 9"
    assert rounding == (
        "changed since this run started, changing only rounding: model.layout: 'auto' -> 'padded'; train.deterministic: "
        "False -> True; train.workers: 1 -> None; train.workers.max: None -> 2; train.workers.min: None -> 1; "
        "train.zero: 2 -> 3"
    )
    (line,) = told("model.fused=false")
    assert line.startswith("warning: model.fused has changed since this run started (True -> False), so ")
    assert "set model.fused=true to continue as it began" in line


def ray_job(submission, **more):
    return {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"metadata": {"job_submission_id": submission}}), **more}


@pytest.fixture
def place(tmp_path, monkeypatch):
    for name in (
        "SLURM_JOB_ID",
        "SLURM_RESTART_COUNT",
        "SKYPILOT_TASK_ID",
        "ANYSCALE_JOB_ID",
        "RAY_JOB_CONFIG_JSON_ENV_VAR",
    ):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def attempt(place, environment, monkeypatch):
    """Number of renamed runs after a command with --fresh has started to train."""
    with monkeypatch.context() as told:
        for name, value in environment.items():
            told.setenv(name, value)
        storage, stream = Storage(str(place / "run")), io.StringIO()
        begin_again(storage, Console(stream))
    assert ("was started by an earlier attempt of this job" in stream.getvalue()) == storage.exists("run.json")
    storage.write("run.json", b"{}")
    return len(os.listdir(place)) - 1


REPEATED = {
    "slurm": ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}),
    "skypilot": ({"SKYPILOT_TASK_ID": "sky-managed-7"},) * 2,
    "anyscale": (
        {"ANYSCALE_JOB_ID": "prodjob_7"} | ray_job("raysubmit_a"),
        {"ANYSCALE_JOB_ID": "prodjob_7"} | ray_job("raysubmit_b"),
    ),
    "kuberay": (
        ray_job("raydpo-x7k2p", RAY_CLUSTER_NAME="raydpo-b4m8w"),
        ray_job("raydpo-9qzzt", RAY_CLUSTER_NAME="raydpo-h5v2c"),
    ),
}
OTHER = {
    "slurm": ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "8"}),
    "a shell in a job of slurm": ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "7"}),
    "another job of slurm that was repeated": ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"}),
    "skypilot": ({"SKYPILOT_TASK_ID": "sky-managed-7"}, {"SKYPILOT_TASK_ID": "sky-managed-8"}),
    "submitted again": (ray_job("one-1"), ray_job("one-2")),
    "ids that look like KubeRay's": (ray_job("one-alpha"), ray_job("one-gamma")),
    "no job": ({}, {}),
}


@pytest.mark.parametrize("kind", REPEATED)
def test_a_repeated_job_goes_on_with_what_its_first_attempt_began(place, monkeypatch, kind):
    (place / "run").mkdir()
    (place / "run" / "run.json").write_text("{}")
    first, second = REPEATED[kind]
    assert [attempt(place, environment, monkeypatch) for environment in (first, second, second)] == [1, 1, 1]


@pytest.mark.parametrize("kind", OTHER)
def test_another_job_begins_again(place, monkeypatch, kind):
    assert [attempt(place, environment, monkeypatch) for environment in OTHER[kind]] == [0, 1]


def test_what_a_killed_command_left_does_not_stay_with_the_old_run(tmp_path):
    storage = Storage(str(tmp_path / "run"))
    storage.write("run.json", b"{}")
    storage.write(".scratch/pairs/0/logps.float32", b"large")
    begin_again(storage, Console(io.StringIO()))
    assert os.listdir(tmp_path / "run~1") == ["run.json"]


def test_on_an_object_store_a_repeated_job_goes_on_too(place, monkeypatch):
    storage = Storage("memory://fresh/run")
    monkeypatch.setenv("SKYPILOT_TASK_ID", "sky-managed-7")
    begin_again(storage, Console(io.StringIO()))
    storage.write("run.json", b"{}")
    begin_again(storage, Console(io.StringIO()))
    monkeypatch.setenv("SKYPILOT_TASK_ID", "sky-managed-8")
    with pytest.raises(ConfigError, match="cannot rename memory://fresh/run on an object store"):
        begin_again(storage, Console(io.StringIO()))


@pytest.mark.parametrize(
    ("before", "now", "told"), [("a", "b", True), ("a", "a", False), (None, "b", False), ("a", None, False)]
)
def test_held_out_figures_of_other_tokens_are_told(tmp_path, before, now, told):
    storage = Storage(str(tmp_path))
    assert other_held_out(storage, now) is None, "no run"
    storage.write(RUN, json.dumps({"fingerprint": {}, "held_out": before}).encode())
    assert ("of other tokens of them" in (other_held_out(storage, now) or "")) == told
