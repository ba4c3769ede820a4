"""Which nodes a stage may use, what is requested early, and what is printed while waiting."""

import io
import json
import threading
import time

import pytest
from machines import LEAN
from tiny import preferences, write_preferences

from raydpo.cluster.nodes import holds, selected
from raydpo.config import load_config
from raydpo.errors import ConfigError
from raydpo.terminal.console import Console


@pytest.mark.parametrize(
    ("wish", "fits"),
    [
        ("spot", True),
        ("!spot", False),
        ("in(spot, on-demand)", True),
        ("!in(spot,on-demand)", False),
        ("on-demand", False),
        ("!on-demand", True),
        ("in(on-demand)", False),
    ],
)
def test_labels_by_the_rules_of_ray(wish, fits):
    assert selected({"ray.io/market-type": "spot"}, {"ray.io/market-type": wish}) is fits
    assert not selected({}, {"ray.io/market-type": "spot"}) and selected({"any": "thing"}, {})


def test_how_often_a_bundle_fits():
    node = {"CPU": 16, "GPU": 4, "accelerator_type:H100": 1}
    assert holds(node, {"CPU": 1, "GPU": 1}) == 4
    assert holds(node, {"CPU": 1, "GPU": 0.3}) == 13
    assert holds(node, {"CPU": 5, "GPU": 1, "accelerator_type:H100": 0.001}) == 3
    assert holds(node, {"CPU": 1, "accelerator_type:A10G": 0.001}) == 0
    assert holds({"GPU": 0.3}, {"GPU": 0.1}) == 3, "a sum of tenths is no reason to wait"


@pytest.fixture
def configured(tiny_llama, tmp_path, ray_cluster):
    import ray

    write_preferences(tmp_path / "a.jsonl", preferences(8))
    tree = {
        "output": str(tmp_path / "runs"),
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "data": {"train": str(tmp_path / "a.jsonl")},
    }
    ray.init(address=ray_cluster, log_to_driver=False)
    yield lambda *overrides: load_config(tree, overrides)
    ray.shutdown()


def demands():
    """The resources requested from an autoscaler (of version 1, or none)."""
    from ray.experimental.internal_kv import _internal_kv_get

    return json.loads(_internal_kv_get(b"autoscaler_resource_request") or "[]")


def test_the_nodes_of_the_training_are_asked_for_within_the_block_only(configured):
    from raydpo.cluster.waiting import request_nodes

    config = configured("train.workers=3", "train.gpus_per_worker=1", "train.accelerator=H100", "ray.autoscaling=true")
    assert demands() == []
    with request_nodes(config):
        wanted = {"CPU": 1, "GPU": 1.0, "accelerator_type:H100": 0.001}
        deadline = time.monotonic() + 20
        while not demands() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert demands() == [wanted] * 3
    assert demands() == []
    with request_nodes(config, wanted=False):
        assert demands() == []


def test_a_stage_that_waits_asks_for_its_own_nodes_beside_those_of_the_training(configured):
    """Ray does not: its actors are created only once there is room for one."""
    import ray

    from raydpo.cluster import waiting
    from raydpo.cluster.resources import resources_for

    config = configured(
        "train.workers=2", "train.gpus_per_worker=1", "score.workers=3", "score.gpus_per_worker=0", "ray.autoscaling=true"
    )
    hog = ray.remote(num_cpus=int(ray.cluster_resources()["CPU"]))(type("Hog", (), {})).remote()
    ray.get(hog.__ray_ready__.remote())
    waiter = threading.Thread(
        target=waiting.wait_for,
        kwargs={"autoscaling": True},
        args=("score", resources_for("score", config), Console(io.StringIO())),
    )
    training, scoring = {"CPU": 1, "GPU": 1.0}, {"CPU": 1}
    with waiting.request_nodes(config):
        waiter.start()
        deadline = time.monotonic() + 20
        while len(demands()) < 5 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert demands() == [training] * 2 + [scoring] * 3
        ray.kill(hog)
        waiter.join(timeout=30)
        assert not waiter.is_alive() and demands() == [training] * 2
    assert demands() == []


def test_waiting_says_what_is_missing_and_ends_when_it_is_there(configured, monkeypatch):
    import ray

    from raydpo.cluster import waiting
    from raydpo.cluster.resources import resources_for

    monkeypatch.setattr(waiting, "SAY_SECONDS", 1.0)
    stream = io.StringIO()
    resources = resources_for("train", configured("train.workers=4", "train.gpus_per_worker=0"))
    hog = ray.remote(num_cpus=6)(type("Hog", (), {})).remote()
    ray.get(hog.__ray_ready__.remote())
    while ray.available_resources().get("CPU", 0) > 2:
        time.sleep(0.1)
    waiter = threading.Thread(target=waiting.wait_for, args=("train", resources, Console(stream)))
    waiter.start()
    time.sleep(3.5)
    assert waiter.is_alive() and "for 2 of 4 train worker(s), each a CPU; others use them" in stream.getvalue()
    ray.kill(hog)
    waiter.join(timeout=30)
    assert not waiter.is_alive()


@pytest.mark.parametrize("variable", [True, False])
def test_the_address_of_a_job_server_is_none_to_run_on(tiny_llama, tmp_path, monkeypatch, variable):
    from raydpo.cluster.doctor import report
    from raydpo.cluster.session import session

    server, stream = "http://localhost:8265", io.StringIO()
    tree = {"output": str(tmp_path), "model": {"path": str(tiny_llama)}, "data": {"train": str(tiny_llama)}}
    if variable:
        monkeypatch.setenv("RAY_ADDRESS", server)
    else:
        tree["ray"] = {"address": server}
    named = r"\$RAY_ADDRESS" if variable else "ray.address"
    told = rf"^{named} is '{server}', the address of a job server.* \$RAY_API_SERVER_ADDRESS"
    with pytest.raises(ConfigError, match=told), session(load_config(tree)):
        pass
    report(Console(stream))
    assert ("$RAY_API_SERVER_ADDRESS" in " ".join(stream.getvalue().split())) is variable


def test_gpus_that_torch_does_not_find_and_lost_environments_are_told_before_a_gpu_is_held(tiny_llama, tmp_path):
    """Ray is told of a GPU, but this machine has none, or no torch for one; and of vLLM where there is none."""
    import ray
    import torch
    from ray.cluster_utils import Cluster

    from raydpo.cluster.preflight import check_cluster

    if torch.cuda.is_available():
        pytest.skip("torch finds GPUs here")
    write_preferences(tmp_path / "a.jsonl", preferences(8))
    config = load_config(
        {
            "output": str(tmp_path / "runs"),
            "model": {"path": str(tiny_llama), "dtype": "float32"},
            "data": {"train": str(tmp_path / "a.jsonl")},
            "train": {"workers": 2},
        }
    )
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 1, "include_dashboard": False, **LEAN}
    )
    try:
        cluster.add_node(num_cpus=2, num_gpus=2, **LEAN)
        ray.init(address=cluster.address, log_to_driver=False)
        with pytest.raises(ConfigError) as error:
            check_cluster(config, ["score", "train"], Console(io.StringIO()))
        without = config.train.model_copy(update={"gpus_per_worker": 0.0})
        check_cluster(config.model_copy(update={"train": without}), ["train"], Console(io.StringIO()))
        without = config.score.model_copy(update={"gpus_per_worker": 0.0})
        with pytest.raises(ConfigError) as unanswered:
            check_cluster(
                config.model_copy(update={"score": without}), ["score"], Console(io.StringIO()), pythons=["/nowhere/python"]
            )
    finally:
        ray.shutdown()
        cluster.shutdown()
    here, there = sorted(str(error.value).splitlines(), reverse=True)
    assert here.startswith("this node has 1 GPU(s) in Ray, and torch finds 0: ") and "install a torch for CUDA" in here
    assert there.startswith("node ") and " has 2 GPU(s) in Ray, and torch finds 0: " in there
    nodes = [line.partition("but on ")[2] for line in str(unanswered.value).splitlines()]
    assert [node.split()[0] for node in nodes] == ["this", "node"], nodes
    assert all("/nowhere/python cannot be started" in node for node in nodes)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["train.accelerator=H100"], "has no node of kind H100, which train.accelerator"),
        (["train.labels={zone: x}"], "has no node with labels {'zone': 'x'}"),
        (["train.workers=2", "train.gpus_per_worker=1"], "needs 2 GPUs, the Ray cluster has 0; ask for fewer"),
        (["train.workers=20"], "needs 21 CPUs of Ray"),
        (["ray.autoscaling=true"], "score.gpus_per_worker is null, and the cluster, which starts nodes on demand"),
        (["output=/proc/nowhere"], "'output' does not work: cannot write to /proc/nowhere"),
    ],
)
def test_preflight_is_one_sentence_for_each_problem(configured, overrides, sentence):
    from raydpo.cluster.preflight import check_cluster

    with pytest.raises(ConfigError) as error:
        check_cluster(configured(*overrides), ["score", "train"], Console(io.StringIO()))
    assert sentence in str(error.value)
