"""Objectives from the command line: without a reference, and of one's own."""

import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import yaml
from tiny import preferences, write_preferences


def raydpo(place, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "raydpo.cli", "run", "config.yaml", *arguments],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=place,
    )


@pytest.fixture
def place(tmp_path, tiny_llama):
    write_preferences(tmp_path / "a.jsonl", preferences(12))
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump(
            {
                "name": "one",
                "output": str(tmp_path / "runs"),
                "model": {"path": str(tiny_llama), "dtype": "float32"},
                "data": {"train": str(tmp_path / "a.jsonl"), "eval": {"fraction": 0.2}},
                "train": {"pairs_per_step": 4, "lr": 1e-3, "steps": 2, "tokens_per_batch": 1024},
            }
        )
    )
    return tmp_path


@pytest.mark.slow
def test_an_objective_without_a_reference_scores_nothing(place, on_cluster):
    done = raydpo(place, "train.loss=simpo", "train.beta=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing is scored" in done.stdout and "loss simpo has no reference" in done.stdout
    assert "identity" not in done.stdout and "first loss" not in done.stdout.replace("; first loss", "")
    assert [path.name for path in (place / "runs").rglob("cache/*")] == ["sets"]
    row = pq.read_table(place / "runs" / "one" / "metrics.parquet").to_pylist()[0]
    assert row["loss"] > 0 and "logps/chosen" in row and "logps/chosen_fell" not in row
    summary = json.loads((place / "runs" / "one" / "summary.json").read_text())
    assert summary["cache_hit_rate"] is None and summary["reference"]["identity"] is None
    assert "| reference | none |" in (place / "runs" / "one" / "final" / "README.md").read_text()
    changed = raydpo(place, "train.loss=simpo", "train.beta=2", "train.simpo_gamma=1.5")
    assert changed.returncode == 2 and "train.simpo_gamma: None -> 1.5" in changed.stderr
    ignored = raydpo(place, "train.loss=simpo", "reference.path=" + str(place))
    assert ignored.returncode == 2 and "'reference.path'" in ignored.stderr and "simpo" in ignored.stderr


@pytest.mark.slow
def test_a_loss_by_import_path_trains_and_its_source_is_part_of_the_run(place, on_cluster):
    module = place / "my_losses.py"
    module.write_text(
        "def squared(logps, settings, beta):\n"
        "    return (logps.chosen_logratio - logps.rejected_logratio - 1 / (2 * beta)) ** 2\n"
    )
    done = raydpo(place, "train.loss=my_losses:squared")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "first loss 25.000" in done.stdout and "warning: first loss" not in done.stdout
    module.write_text(module.read_text().replace("2 * beta", "4 * beta"))
    changed = raydpo(place, "train.loss=my_losses:squared")
    assert changed.returncode == 2 and "source of my_losses:squared" in changed.stderr
    missing = raydpo(place, "train.loss=my_loses:squared")
    assert missing.returncode == 2 and "my_loses cannot be imported" in missing.stderr
