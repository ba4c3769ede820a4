"""Elastic training: the number of workers follows the cluster, the pairs of every step stay the same."""

import time

import pyarrow.parquet as pq
import pytest
from soak import Soak, prepare

STEPS = 1500


def sizes(run):
    """Number of workers at each start of training."""
    return [int(line.split("with ")[1].split()[0]) for line in run.log() if line.startswith("beginning after")]


def wait_for(run, condition, seconds=150):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline and run.driver.poll() is None, run.log()[-5:]
        time.sleep(0.5)


@pytest.mark.slow
def test_workers_follow_the_machines(tmp_path):
    """Three machines with room for one worker each, the head included; one is lost and later comes back."""
    prepare(tmp_path, STEPS, workers={"min": 1, "max": 3}, lr=1e-5, checkpoint_every=50)
    run = Soak(tmp_path, STEPS, cpus=1, on_head=1)
    try:
        run.drive()
        wait_for(run, lambda: run.registered() >= 50)
        first = sizes(run)[-1]
        run.machines.shrink()
        wait_for(run, lambda: len(sizes(run)) > 1)
        fewer = sizes(run)[-1]
        run.machines.grow()
        wait_for(run, lambda: sizes(run)[-1] > fewer)
        assert run.driver.wait(timeout=400) == 0
    finally:
        if run.driver.poll() is None:
            run.driver.kill()
        run.machines.stop()
    assert fewer < first <= 3
    print("workers:", sizes(run))
    rows = pq.read_table(run.run_dir / "metrics.parquet").to_pylist()
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["pairs"] == 48 for row in rows if row["step"] % 5)
