"""What a stage requests of a cluster, by a list of nodes in place of Ray's."""

import os

import pytest

from raydpo.cluster import nodes as nodes_module
from raydpo.cluster import resources as module
from raydpo.cluster.allocator import ALLOCATOR, ALLOCATOR_OLD
from raydpo.cluster.nodes import cores_of, usable_cores
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


def test_a_worker_whose_gpus_no_node_has_is_refused(cluster):
    """CPUs and GPUs are enough in all, but no machine has both: the worker would wait without end."""
    nodes, wish = [(8, 0), (0, 1)], "score.gpus_per_worker=1"
    with pytest.raises(
        ConfigError, match=r"places for 1 worker.*each 1 GPU and 1 CPU.s., but .*have places for 0; lower score"
    ):
        cluster("score", nodes, wish)
    assert cluster("score", nodes, wish, "ray.autoscaling=true").gpus_per_worker == 1
    assert cluster("score", [(8, 0), (8, 1)], wish).gpus_per_worker == 1


def test_a_team_that_no_machine_holds_is_refused_with_what_serves_instead(cluster):
    nodes, wish = [(32, 8), (32, 8)], ("score.workers=16", "score.gpus_per_worker=1")
    with pytest.raises(ConfigError, match=r"partition 16 needs .* 16 GPUs, .* has 8, .*to 8 or lower; .*score\.offload=cpu"):
        cluster("score", nodes, *wish, "score.partition=16")
    with pytest.raises(ConfigError, match=r"sequence_parallel 16 needs .*to 8 or lower; or set ray\.autoscaling=true"):
        cluster("score", nodes, *wish, "score.sequence_parallel=16")
    assert cluster("score", nodes, *wish, "score.partition=8").teams == 2


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_an_optimizer_for_gpus_is_refused_before_scoring_where_workers_have_none(cluster, optimizer):
    wish = f"train.optimizer={optimizer}"
    with pytest.raises(ConfigError, match=f"train.optimizer {optimizer} runs on GPUs only.*set train.optimizer=adamw"):
        cluster("train", [(8, 0)], wish)
    assert cluster("score", [(8, 0)], wish).gpus_per_worker == 0
    assert cluster("train", [(8, 1)], wish).gpus_per_worker == 1
    with pytest.raises(ConfigError, match="runs on GPUs only"):
        cluster("train", [(8, 1)], wish, "train.gpus_per_worker=0")


@pytest.mark.parametrize(
    ("nodes", "workers", "threads"),
    [
        ([(16, 0)], 2, 8),
        ([(16, 0), (16, 0)], 2, 16),
        ([(16, 0), (4, 0)], 2, 4),  # the smaller node decides
        ([(0, 0), (16, 0)], 2, 8),  # a head without CPUs holds no worker
        ([(16, 0), (1, 0)], 6, 1),
        ([(6, 0), (2, 0)], 6, 1),  # the smaller one holds two of them, not three
    ],
)
def test_threads_are_a_share_of_the_cores_of_the_workers_node(nodes, workers, threads, cluster, monkeypatch):
    """This machine's cores do not matter, since the driver is not on these nodes."""
    monkeypatch.setattr(module, "usable_cores", lambda: 1000)
    wish = (f"train.workers={workers}", "train.gpus_per_worker=0")
    assert cluster("train", nodes, *wish).threads == threads
    assert cluster("score", nodes, f"score.workers={workers - 1}", "score.gpus_per_worker=0").threads >= threads


def test_nodes_that_are_to_come_count_as_this_machine(cluster, monkeypatch):
    monkeypatch.setattr(module, "usable_cores", lambda: 6)
    wish = ("train.workers=2", "train.gpus_per_worker=0", "ray.autoscaling=true")
    assert cluster("train", [(0, 0)], *wish).threads == 3


@pytest.mark.parametrize(
    ("nodes", "workers", "gpus", "threads"),
    [
        ([(192, 8)], 8, 1, 24),
        ([(192, 8)], 1, 1, 192),  # alone, with an optimizer on the host
        ([(96, 8), (64, 8)], 16, 1, 8),
        ([(96, 8), (64, 8)], 8, 1, 8),  # Ray Train may put all of them on either
        ([(64, 2), (256, 0)], 2, 1, 32),  # a node without GPUs holds none of them
        ([(16, 4)], 2, 1, 8),
        ([(4, 8)], 4, 1, 1),
    ],
)
@pytest.mark.parametrize("stage", ["score", "train"])
def test_workers_with_gpus_share_the_cores_of_their_node(nodes, workers, gpus, threads, stage, cluster):
    """One CPU of Ray each would mean one thread: AdamW on the host took 82 s a step of 8 billion parameters with one."""
    found = cluster(stage, nodes, f"{stage}.workers={workers}", f"{stage}.gpus_per_worker={gpus}", "ray.autoscaling=true")
    assert (found.threads, found.bundle["CPU"]) == (threads, 1)


def test_threads_beside_gpus_that_are_to_come_are_decided_where_the_worker_starts(cluster):
    assert cluster("train", [(8, 0)], "train.gpus_per_worker=1", "ray.autoscaling=true").threads is None


@pytest.mark.parametrize("own", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_segments_on_gpus_grow_unless_the_user_has_settings_of_his_own(own, monkeypatch):
    for name in (ALLOCATOR, ALLOCATOR_OLD):
        monkeypatch.delenv(name, raising=False)
    if own is not None:
        monkeypatch.setenv(own, "max_split_size_mb:128")
    expected = {} if own else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert Resources(1, 1, None).environment == expected
    assert Resources(1, 0, 4).environment == {}


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "250000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "1600000 100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu.max": "nonsense"}, 8),
    ],
)
def test_cores_are_those_that_this_process_may_use(files, cores, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert usable_cores(tmp_path) == cores


def test_the_drivers_node_has_the_cores_of_this_process_and_others_what_ray_says(monkeypatch):
    """A local Ray may be started with more CPUs than the machine has."""
    import ray

    monkeypatch.setattr(nodes_module, "usable_cores", lambda: 3)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: type("", (), {"get_node_id": lambda _: "here"})())
    assert [cores_of({"NodeID": name, "Resources": {"CPU": 40.0}}) for name in ("here", "there")] == [3, 40]


def test_a_training_needs_a_place_for_each_worker_and_scoring_for_one(cluster):
    nodes = [(8, 2), (0, 1)]  # the second has no CPU for a worker
    with pytest.raises(ConfigError, match=r"places for 3 worker.*have places for 2"):
        cluster("train", nodes, "train.workers=3")
    assert cluster("train", nodes, "train.workers={min: 2, max: 3}").workers == 3
    assert cluster("score", nodes, "score.workers=3").workers == 3


@pytest.mark.parametrize(
    ("resources", "said"),
    [
        (Resources(1, 0, None), "a CPU"),
        (Resources(1, 1, None), "1 GPU"),
        (Resources(1, 0.25, None), "0.25 GPU"),
        (Resources(4, 1, None, sequence=4, accelerator="H100"), "1 H100"),
        (Resources(4, 1, None, sequence=4, accelerator="H100", on_one_machine=True), "4 H100 on one machine"),
        (Resources(2, 0, None, sequence=2, on_one_machine=True), "2 CPUs on one machine"),
        (Resources(1, 1, None, labels={"zone": "a"}), "1 GPU zone=a"),
    ],
)
def test_a_message_names_what_ray_must_allocate_together(resources, said):
    assert resources.asks() == said
    assert resources.bundle["CPU"] == (resources.together if resources.on_one_machine else 1)
