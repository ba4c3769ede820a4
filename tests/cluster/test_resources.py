"""What a stage requests of a cluster, by a list of nodes in place of Ray's."""

import pytest

from raydpo.cluster import resources as module
from raydpo.cluster.resources import Resources, resources_for
from raydpo.config import load_config
from raydpo.errors import ConfigError


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Configurations, and the resources of a stage on nodes with these CPUs and GPUs."""
    (tmp_path / "model").mkdir()
    (tmp_path / "a.jsonl").write_text("{}\n")
    tree = {"output": "runs", "model": {"path": str(tmp_path / "model")}, "data": {"train": str(tmp_path / "a.jsonl")}}

    def found(stage, nodes, *overrides):
        listed = [{"Resources": {"CPU": cpus, "GPU": gpus}} for cpus, gpus in nodes]
        monkeypatch.setattr(module, "nodes_with", lambda *_: listed)
        monkeypatch.setattr(module, "grows_to", lambda _: None)
        return resources_for(stage, load_config(tree, overrides))

    return found


@pytest.mark.parametrize("stage", ["score", "train"])
def test_a_worker_whose_gpus_no_node_has_is_refused(cluster, stage):
    """Two GPUs in all are enough, but they are on two machines: the worker would wait without end."""
    nodes, wish = [(8, 1), (8, 1)], f"{stage}.gpus_per_worker=2"
    with pytest.raises(
        ConfigError,
        match=f"places for 1 worker.*each 2 GPU on one machine and 1 CPU.s., but .*have places for 0; lower {stage}",
    ):
        cluster(stage, nodes, wish)
    assert cluster(stage, nodes, wish, "ray.autoscaling=true").gpus_per_worker == 2
    assert cluster(stage, [(8, 1), (8, 2)], wish).gpus_per_worker == 2


def test_a_training_needs_a_place_for_each_worker_and_scoring_for_one(cluster):
    nodes = [(8, 3), (8, 3)]
    with pytest.raises(ConfigError, match=r"places for 3 worker.*have places for 2"):
        cluster("train", nodes, "train.workers=3", "train.gpus_per_worker=2")
    assert cluster("train", nodes, "train.workers={min: 2, max: 3}", "train.gpus_per_worker=2").workers == 3
    assert cluster("score", nodes, "score.workers=3", "score.gpus_per_worker=2").workers == 3


@pytest.mark.parametrize(
    ("resources", "said"),
    [
        (Resources(1, 0, None), "a CPU"),
        (Resources(1, 1, None), "1 GPU"),
        (Resources(1, 0.25, None), "0.25 GPU"),
        (Resources(4, 1, None, together=4, accelerator="H100"), "1 H100"),
        (Resources(4, 1, None, together=4, accelerator="H100", on_one_machine=True), "4 H100 on one machine"),
        (Resources(2, 0, None, together=2, on_one_machine=True), "2 CPUs on one machine"),
        (Resources(1, 1, None, labels={"zone": "a"}), "1 GPU zone=a"),
    ],
)
def test_a_message_names_what_ray_must_allocate_together(resources, said):
    assert resources.asks() == said
    assert resources.bundle["CPU"] == (resources.together if resources.on_one_machine else 1)
