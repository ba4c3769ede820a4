"""Files that the previous version wrote are read by this one: a reference cache and the directory of a finished run.

``tests/stored`` was made by commit 264fd15 with ``raydpo run config.yaml``, from the model and the pairs beside it. The run
lacks its checkpoints, its weights and its pages.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from command import raydpo

STORED = Path(__file__).parent / "stored"
IDENTITY = "b133836236ae6cc674ca09330fc6862b"


@pytest.fixture
def place(tmp_path):
    """A copy of the stored files: ``model``, ``pairs.jsonl``, ``config.yaml``, ``cache`` and the run, ``stored``."""
    shutil.copytree(STORED, tmp_path, dirs_exist_ok=True)
    (tmp_path / "run").rename(tmp_path / "stored")
    return tmp_path


@pytest.fixture
def prepared(place, monkeypatch):
    from raydpo.config import load_config
    from raydpo.pipeline.prepare import Prepared
    from raydpo.terminal.console import Console

    monkeypatch.chdir(place)
    return Prepared.of(load_config("config.yaml"), Console())


def test_the_cache_answers_every_row_with_the_values_that_were_stored(prepared):
    from raydpo.reference.shards import Wanted

    cache, wanted = prepared.cache, Wanted(prepared.tables)
    assert prepared.reference.identity.digest == IDENTITY
    assert [one.digest for one in cache.identities(cache.storage)] == [IDENTITY]
    assert len(wanted) == 24 and cache.covers(wanted.keys, wanted.tokens).all() and cache.problems == []
    rows = cache.lookup(wanted.keys)
    assert rows["tokens"].to_pylist() == wanted.tokens.tolist() and int(wanted.tokens.sum()) == 190
    sums = [row.values.to_numpy().astype(np.float64).sum() for row in rows["logps"]]
    assert sums[:4] == [-47.83638620376587, -60.20596218109131, -59.63518190383911, -65.49332284927368]
    assert sum(sums) == pytest.approx(-1133.8624844551086, abs=1e-9)


def test_a_finished_run_is_recognised_and_not_trained_again(place, on_cluster):
    summary = json.loads((place / "stored" / "summary.json").read_text())
    again = raydpo("train", "config.yaml", cwd=place)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "already complete" in again.stdout and "training:" not in again.stdout
    assert json.loads((place / "stored" / "summary.json").read_text()) == summary
    other = raydpo("train", "config.yaml", "train.lr=0.002", cwd=place)
    assert other.returncode == 2 and "train.lr: 0.001 -> 0.002" in other.stderr


def test_a_report_is_made_of_the_run(place):
    made = raydpo("report", "stored", cwd=place)
    assert made.returncode == 0, made.stdout + made.stderr
    page = (place / "stored" / "report.html").read_text()
    assert "stored" in page and "0.6931" in page and "Answer:" in page
