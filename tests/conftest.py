"""Fixtures shared by all tests: tiny random models, made once a session."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# Tests import their helpers as plain modules.
HERE = Path(__file__).parent
sys.path[:0] = [
    str(HERE),
    *(
        str(HERE / name)
        for name in ("answers", "cluster", "training", "reference", "losses", "evaluation", "rewards", "tokens")
    ),
]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The models are so small that a second thread only waits for the first one, and by default it waits by spinning: on two
# cores with a few processes that took five times as long. Workers of raydpo ask for their number of threads themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Ray lets everything else go before its workers; beside another test they would hardly run.
os.environ.setdefault("RAY_worker_niceness", "0")
# A Ray would start a process for each of its CPUs ahead of any task. Each imports for a second, and few are ever used.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
os.environ.setdefault("RAY_enable_worker_prestart", "0")

LONGEST = (
    "test_jobs",
    "test_verbs",
    "test_equalities",
    "test_eval_command",
    "test_rounds",
    "test_reward_functions",
    "test_same_function",
    "test_sweep",
    "test_mixture_training",
    "test_trl_router_parity",
    "test_optimizer",
    "test_state",
    "test_launch",
    "test_cache",
    "test_step",
    "test_command",
    "test_saver",
    "test_policies",
    "test_build",
    "test_nodes",
    "test_compact",
    "test_trackers",
    "test_random_history",
    "test_storage_s3",
    "test_budget",
    "test_footprint",
    "test_sharing",
    "test_head",
)
"""Test files that take longest, the longest first. They start first, so that none of them is left for the end."""


def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="session", autouse=True)
def digests_of_this_session(tmp_path_factory):
    """Tests remember file digests in a place of their own, never in the user's home."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("xdg"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    from tiny import make_model

    return make_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory) -> Path:
    from tiny import make_model

    return make_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3")


@pytest.fixture(scope="session")
def llama():
    """Sizes of Llama 3.1 8B from its config.json. The model is never loaded."""
    from raydpo.model.memory.anatomy import Anatomy

    return Anatomy.of(HERE / "recipes" / "Llama-3.1-8B-Instruct")


@pytest.fixture(scope="module")
def ray_cluster():
    """Address of a Ray that outlives commands, as on a cluster."""
    from machines import LEAN
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 8, "include_dashboard": False, **LEAN})
    yield cluster.address
    cluster.shutdown()


@pytest.fixture
def on_cluster(ray_cluster, monkeypatch):
    """Commands connect to a cluster that is there; for tests in which a Ray of one's own is not the question."""
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster)


@pytest.fixture
def tree(tmp_path):
    """The least configuration, of files that are there."""
    (tmp_path / "model").mkdir()
    (tmp_path / "a.jsonl").write_text("{}\n")
    return {
        "output": str(tmp_path / "runs"),
        "model": {"path": str(tmp_path / "model")},
        "data": {"train": str(tmp_path / "a.jsonl")},
    }
