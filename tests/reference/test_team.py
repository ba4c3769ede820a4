"""Scoring in a team of processes: the same log-probs as one process, and an error with its reason when a member fails."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from tiny import preferences, write_preferences

from raydpo.errors import ModelError, ProcessLostError
from raydpo.model.layout import PromptGroup
from raydpo.reference.identity import identify
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


def test_a_team_scores_what_one_process_does_and_names_what_ended_it(tiny_llama, tiny_qwen3):
    spec = ReferenceSpec(path=str(tiny_llama), adapter=None, identity=identify(tiny_llama, "float32"))
    alone = Scorer(spec, device="cpu", tokens_per_batch=64).score(groups())
    team = TeamScorer(spec, sequence=2, device="cpu", threads=1, tokens_per_batch=64)  # every group is longer than 2 x 64
    try:
        assert "sequence parallel: 2 devices" in team.notes[-1] and team.provenance["sequence_parallel"] == 2
        for _ in range(2):
            for mine, theirs in zip(team.score(groups()), alone, strict=True):
                for ours, logps in zip(mine, theirs, strict=True):
                    assert ours.dtype == np.float32 and np.abs(ours - logps).max() < 1e-5
        os.kill(team.members.processes[0].pid, signal.SIGKILL)
        with pytest.raises(ProcessLostError, match=r"team of 2 processes broke: process 1 was ended by SIGKILL"):
            team.score(groups())
        assert team.members.processes[0].poll() == -9
    finally:
        team.close()
    wrong = ReferenceSpec(path=str(tiny_qwen3), adapter=None, identity=spec.identity)
    with pytest.raises(ModelError, match="another model than where the run was started"):
        TeamScorer(wrong, sequence=2, device="cpu", threads=1, tokens_per_batch=64)


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
