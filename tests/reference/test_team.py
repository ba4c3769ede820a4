"""Scoring in a team of processes: the same log-probs as one process, and an error with its reason when a member fails."""

import json
import os
import signal
import subprocess
import sys
from datetime import timedelta

import numpy as np
import pytest
import torch
from tiny import preferences, write_preferences

from raydpo.errors import ConfigError, ModelError, ProcessLostError, RaydpoError
from raydpo.model.layout import PromptGroup
from raydpo.model.partition import Partition
from raydpo.reference import team as module
from raydpo.reference.identity import identify
from raydpo.reference.members import WithoutWordsError
from raydpo.reference.score import ReferenceSpec, Scorer
from raydpo.reference.team import TeamScorer


def groups(vocabulary=250):
    rng = np.random.default_rng(0)
    return [
        PromptGroup(
            rng.integers(0, vocabulary, prompt).astype(np.int32),
            tuple(rng.integers(0, vocabulary, length).astype(np.int32) for length in lengths),
        )
        for prompt, *lengths in ((100, 30, 20), (5, 200, 7), (1, 1, 1), (50, 60, 61))
    ]


def test_a_team_scores_what_one_process_does_and_names_what_ended_it(tiny_llama, tiny_qwen3, monkeypatch):
    spec = ReferenceSpec(path=str(tiny_llama), adapter=None, identity=identify(tiny_llama, "float32"))
    alone = Scorer(spec, device="cpu", tokens_per_batch=64).score(groups())
    team = TeamScorer(spec, sequence=2, device="cpu", threads=1, tokens_per_batch=64)  # every group is longer than 2 x 64
    try:
        assert "sequence parallel: 2 devices" in team.notes[-1] and team.provenance["sequence_parallel"] == 2
        for _ in range(2):
            for mine, theirs in zip(team.score(groups()), alone, strict=True):
                for ours, logps in zip(mine, theirs, strict=True):
                    assert ours.dtype == np.float32 and np.abs(ours - logps).max() < 1e-5
        monkeypatch.setattr(module, "PATIENCE", timedelta(seconds=1.5))
        module._wait_at_most(module.PATIENCE)
        os.kill(team.members.processes[0].pid, signal.SIGSTOP)
        with pytest.raises(ProcessLostError, match=r"team of 2 processes broke: a process did not answer for 0\.025 min"):
            team.score(groups())
        assert team.members.processes[0].poll() == -signal.SIGKILL, "and it holds its device no longer"
    finally:
        team.close()
    monkeypatch.undo()
    wrong = ReferenceSpec(path=str(tiny_qwen3), adapter=None, identity=spec.identity)
    with pytest.raises(ModelError, match="another model than where the run was started"):
        TeamScorer(wrong, sequence=2, device="cpu", threads=1, tokens_per_batch=64)


@pytest.mark.parametrize(
    ("settings", "field"), [({"sequence": 2}, "sequence_parallel"), ({"partition": Partition(2)}, "partition")]
)
def test_a_machine_with_fewer_gpus_is_refused_before_a_process_starts(tiny_llama, monkeypatch, settings, field):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(module, "Members", None)
    spec = ReferenceSpec(path=str(tiny_llama), adapter=None, identity=None)
    with pytest.raises(ConfigError, match=rf"score\.{field} 2 needs 2 GPUs on one machine, and this one shows 1"):
        TeamScorer(spec, device="cuda", tokens_per_batch=64, **settings)


CLOSED = RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1: Connection closed by peer")
KILLED = WithoutWordsError("process 1 was ended by SIGKILL")
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it")


@pytest.mark.parametrize(
    ("causes", "kind", "said"),
    [
        ([CLOSED, KILLED], ProcessLostError, "processes broke: process 1 was ended by SIGKILL; run it again"),
        ([CLOSED, KILLED, CLOSED], ProcessLostError, "process 1 was ended by SIGKILL; run it again"),
        ([RuntimeError("shapes"), KILLED], ProcessLostError, "process 1 was ended by SIGKILL; run it again"),
        ([CLOSED], ProcessLostError, "Connection closed by peer; run it again"),
        ([RuntimeError("CUDA error: uncorrectable ECC error encountered")], ProcessLostError, "ECC error encountered"),
        ([CLOSED, RuntimeError("CUDA error: ECC"), CLOSED], ProcessLostError, "broke: RuntimeError: CUDA error: ECC; run"),
        ([CLOSED, FileNotFoundError("no weights")], RaydpoError, "failed: FileNotFoundError: no weights"),
        ([BrokenPipeError(), KILLED], ProcessLostError, "process 1 was ended by SIGKILL"),
        ([CLOSED, ModelError("the reason")], ModelError, "the reason"),
        ([CLOSED, KILLED, FULL], RaydpoError, "tokens_per_batch lower, or score.partition higher, or score.offload=cpu"),
        ([CLOSED, KeyError("name")], RaydpoError, "a process of the scoring team failed: KeyError: 'name'"),
    ],
)
def test_what_a_setting_could_mend_is_told_from_what_is_worth_another_try(causes, kind, said):
    team = object.__new__(TeamScorer)
    vars(team).update(_size=2, _partition=Partition(2))
    error = team._explain(causes)
    assert type(error) is kind and said in str(error), error


@pytest.mark.slow
def test_a_run_scores_and_trains_in_teams(tiny_llama, tmp_path):
    """The rows hit with any number of devices, and the first loss is ln 2."""
    data = write_preferences(tmp_path / "a.jsonl", preferences(12, low=60, high=90))
    config = {
        "output": str(tmp_path / "runs"),
        "name": "team",
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "data": {"train": str(data)},
        "score": {"workers": 2, "sequence_parallel": 2, "tokens_per_batch": 64},
        "train": {"workers": 2, "sequence_parallel": 2, "pairs_per_step": 6, "steps": 3, "tokens_per_batch": 64},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-m", "raydpo.cli", "run", str(tmp_path / "config.yaml")],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("sequence parallel: 2 devices compute each micro-batch together") == 2
    assert "first loss 0.69314" in done.stdout
    assert "warning: first loss" not in done.stdout
