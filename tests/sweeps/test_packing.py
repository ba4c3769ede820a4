"""How many trainings a cluster holds at once."""

import pytest

from raydpo.cluster import resources
from raydpo.config import load_config
from raydpo.errors import ConfigError
from raydpo.sweeps import packing
from raydpo.sweeps.packing import FreeNode, places, trials_at_once
from raydpo.sweeps.trials import trials_of

EIGHT = FreeNode(cpus=32, gpus=8)


@pytest.mark.parametrize(
    ("nodes", "workers", "gpus", "held"),
    [
        ([EIGHT], 1, 1, 8),
        ([EIGHT], 2, 1, 4),
        ([EIGHT], 3, 1, 2),
        ([EIGHT, EIGHT], 3, 1, 5),  # one of them on both machines
        ([EIGHT], 16, 1, 0),
        ([EIGHT], 1, 0.25, 32),
        ([EIGHT], 1, 0.1, 32),  # 80 by GPUs; each takes a CPU
        ([FreeNode(100, 8)], 1, 0.1, 80),
        ([FreeNode(100, 8)], 1, 0.3, 24),  # three on each GPU, not 26 on all
        ([FreeNode(100, 8)], 1, 0.6, 8),
        ([FreeNode(100, 3), FreeNode(100, 3)], 1, 2, 2),  # no worker has a GPU of each machine
        ([FreeNode(4, 8)], 1, 1, 4),
        ([FreeNode(0, 0), FreeNode(8, 0), FreeNode(3, 0)], 2, 0, 5),
        ([FreeNode(2.9, 0)], 1, 0, 2),
        ([FreeNode(32, 0)], 1, 1, 0),
    ],
)
def test_places(nodes, workers, gpus, held):
    assert places(nodes, workers, gpus) == held


@pytest.fixture
def at_once(tmp_path, monkeypatch):
    """Trials at once on nodes with these CPUs and GPUs."""
    (tmp_path / "model").mkdir()
    (tmp_path / "a.jsonl").write_text("{}\n")
    tree = {
        "output": "runs",
        "model": {"path": str(tmp_path / "model")},
        "data": {"train": str(tmp_path / "a.jsonl")},
        "sweep": {"grid": {"train.beta": [0.1, 0.2, 0.3, 0.4]}},
    }

    def found(nodes, *overrides):
        listed = [{"NodeID": "x", "Resources": {"CPU": cpus, "GPU": gpus}} for cpus, gpus in nodes]
        for module in (packing, resources):
            monkeypatch.setattr(module, "nodes_with", lambda *_: listed)
        monkeypatch.setattr(resources, "grows_to", lambda _: None)
        config = load_config(tree, overrides)
        return trials_at_once(config, trials_of(config))

    return found


def test_a_varying_number_of_workers_needs_room_for_the_smallest(at_once):
    varying = "train.workers={min: 1, max: 8}"
    assert at_once([(16, 2)], varying) == 1, "each takes both GPUs"
    assert at_once([(16, 2)], varying, "sweep.at_once=2") == 2
    assert at_once([(32, 16)], varying) == 2
    with pytest.raises(
        ConfigError, match=r"^sweep.at_once is 3, but the cluster holds 2 trial\(s\) of 1 worker\(s\) with 1 GPU"
    ):
        at_once([(16, 2)], varying, "sweep.at_once=3")
    with pytest.raises(ConfigError, match=r"holds 1 trial\(s\) of 2 worker\(s\) with 1 GPU\(s\) each; lower it"):
        at_once([(16, 2)], "train.workers=2", "sweep.at_once=2")


def test_trials_that_need_different_things_are_each_counted_as_they_are(at_once):
    """Many workers on CPUs and one on a GPU: no trial has many on GPUs."""
    small, large = "{train.workers: 8, train.gpus_per_worker: 0}", "{train.workers: 1, train.gpus_per_worker: 1}"
    both = ("sweep.grid=null", f"sweep.list=[{small}, {large}]")
    assert at_once([(16, 1)], *both) == 1
    with pytest.raises(ConfigError, match=r"holds 1 trial\(s\) of 1 worker\(s\) with 1 GPU\(s\) each"):
        at_once([(16, 1)], *both, "sweep.at_once=2")


def test_a_machine_with_fewer_cores_than_workers_trains_one_trial_at_a_time(at_once, monkeypatch):
    monkeypatch.setattr(packing, "cores_of", lambda _: 2)
    assert at_once([(8, 0)], "train.workers=4") == 1
    with pytest.raises(
        ConfigError, match=r"holds 0 trial\(s\) of 4 worker\(s\) with 0 GPU.*so trials train one at a time; lower"
    ):
        at_once([(8, 0)], "train.workers=4", "sweep.at_once=2")
