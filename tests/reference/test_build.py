"""Fill the cache with real Ray Data actors, and kill the job that does it."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from command import as_a_user
from tiny import preferences, write_preferences


@pytest.fixture(scope="module")
def job(tmp_path_factory, tiny_llama):
    place = tmp_path_factory.mktemp("build")
    write_preferences(place / "a.jsonl", preferences(400, low=20, high=60))
    tree = {
        "output": str(place / "runs"),
        "name": "build",
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "data": {"train": str(place / "a.jsonl")},
        "score": {"workers": 2, "tokens_per_batch": 256, "tokens_per_part": 2500},
    }
    (place / "config.yaml").write_text(yaml.safe_dump(tree))
    return place


def start(job, cache):
    return subprocess.Popen(
        [sys.executable, "-m", "raydpo.cli", "score", str(job / "config.yaml"), f"cache.uri={cache}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def parts(cache: Path) -> set[str]:
    return {file.name for file in cache.glob("*/parts/part-*.parquet")}


def contents(cache: Path) -> dict[bytes, bytes]:
    """Bytes of every stored row, by key."""
    from raydpo.reference.store import ReferenceCache

    opened = ReferenceCache.open(str(cache))
    keys = opened.keys()
    rows = opened.lookup(keys)["logps"].to_pylist()
    return {key: np.array(row, np.float32).tobytes() for key, row in zip(keys.to_pylist(), rows, strict=True)}


@pytest.mark.slow  # builds are killed on an object store in test_build_together, too
def test_killed_at_three_moments_and_finished(job, tmp_path):
    whole, cache = tmp_path / "whole", tmp_path / "killed"
    undisturbed = start(job, whole)
    output = undisturbed.communicate(timeout=300)[0]
    assert undisturbed.returncode == 0, output
    total = len(parts(whole))
    assert total > 12

    for moment in (1, total // 3, 2 * total // 3):
        process = start(job, cache)
        deadline = time.time() + 400
        while len(parts(cache)) < moment and process.poll() is None and time.time() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        time.sleep(2)  # its actors notice that their driver is gone
        assert len(parts(cache)) >= moment
    before = parts(cache)
    assert 0 < len(before) < total, "the kills must leave something to do, or this test proves nothing"

    last = start(job, cache)
    output = last.communicate(timeout=300)[0]
    assert last.returncode == 0, output
    after = parts(cache)
    assert before <= after and len(after) == total, "no committed part is scored again"
    assert contents(cache) == contents(whole)
    assert not list(cache.rglob(".tmp-*"))

    again = start(job, cache)
    output = again.communicate(timeout=300)[0]
    assert again.returncode == 0 and "(100% hits), 0 scored" in output
    assert parts(cache) == after


def test_new_data_scores_only_the_new_rows(job, tmp_path, tiny_llama):
    """In this process without Ray: the plan of a build decides what is scored."""
    from kernel import tiny_pairs

    from raydpo.reference.identity import identify
    from raydpo.reference.shards import Plan, Wanted
    from raydpo.reference.store import ReferenceCache

    cache = ReferenceCache.open(str(tmp_path / "cache"), identify(tiny_llama, "float32"))
    old = Wanted([tiny_pairs(10)])
    cache.commit([one.key for one in old], [np.full(len(one.tokens), -1.0, np.float32) for one in old], {})
    wanted = Wanted([tiny_pairs(25)])
    missing = Plan(wanted, 500).missing(cache.covers(wanted.keys, wanted.tokens))
    keys = {key.tobytes() for shard in missing for key in shard.keys}
    assert len(keys) == 2 * 15 and not keys & {one.key for one in old}


def built(tmp_path, tiny_llama, provenance=None):
    """Fill a new cache in this process, in which no actor scores anything. Returns what was said."""
    from kernel import tiny_pairs

    from raydpo.cluster.resources import Resources
    from raydpo.reference.build import build
    from raydpo.reference.identity import identify
    from raydpo.reference.score import ReferenceSpec
    from raydpo.reference.shards import Wanted
    from raydpo.reference.store import ReferenceCache

    spec = ReferenceSpec(path=str(tiny_llama), adapter=None, identity=identify(tiny_llama, "float32"))
    pairs, said = tiny_pairs(4), []
    cache = ReferenceCache.open(str(tmp_path / "cache"), spec.identity)
    if provenance is not None:
        wanted = Wanted([pairs])
        cache.commit([one.key for one in wanted], [np.full(len(one.tokens), -1.0, np.float32) for one in wanted], provenance)
    sizes = {"tokens_per_batch": "auto", "tokens_per_part": 1000}
    build(
        [pairs],
        spec,
        cache,
        Resources(workers=1, gpus_per_worker=0, threads=1),
        progress=lambda *_: None,
        note=said.append,
        **sizes,
    )
    return said


def test_another_release_of_transformers_is_a_warning(tmp_path, tiny_llama):
    (line,) = built(tmp_path, tiny_llama, {"transformers": "4.9.1"})
    assert line.startswith("warning: stored log-probs were computed with transformers 4.9.1, here is ")
    assert f"'raydpo cache verify {tmp_path / 'cache'} --config CONFIG'" in line


def test_the_cache_knows_whether_fused_functions_computed_its_parts(tmp_path, tiny_llama):
    from raydpo.reference.identity import identify
    from raydpo.reference.store import ReferenceCache

    built(tmp_path, tiny_llama, {"layout": "tree by FlexAttention, fused"})
    cache = ReferenceCache.open(str(tmp_path / "cache"), identify(tiny_llama, "float32"))
    cache.refresh()
    assert cache.fused == {True}
    cache.commit([bytes(16)], [np.zeros(1, np.float32)], {"layout": "tree"})
    cache.refresh()
    assert cache.fused == {True, False}


def test_what_was_not_stored_is_one_whole_sentence(tmp_path, tiny_llama, monkeypatch):
    from raydpo.errors import CacheError
    from raydpo.reference import build

    monkeypatch.setattr(build, "_score_on_ray", lambda *_: [])
    with pytest.raises(
        CacheError, match=r"8 completions are still missing from .* \(first key [0-9a-f]{32}\); run it again$"
    ):
        built(tmp_path, tiny_llama)


def test_a_failing_actor_says_why(job, tmp_path, tiny_llama):
    """Weights so large that their products overflow: one readable message, and nothing is stored."""
    import shutil

    from safetensors.torch import load_file, save_file

    model = shutil.copytree(tiny_llama, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][:] = 3e38
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    result = as_a_user(
        "score", job / "config.yaml", f"model.path={model}", f"cache.uri={tmp_path / 'cache'}", "score.workers=1"
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert "log-prob" in result.stderr
    assert not parts(tmp_path / "cache")
