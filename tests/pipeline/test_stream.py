"""Pairs are scored while they are tokenised: the same log-probs as from whole sets, and a bad source still ends it."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import preferences, write_preferences

from raydpo.config import load_config
from raydpo.data.pieces import Sizes
from raydpo.errors import ConfigError, DataError, FilesError, RaydpoError
from raydpo.pipeline import score as score_module
from raydpo.pipeline import stream, tokenised
from raydpo.pipeline.partition import place_reference
from raydpo.reference import shards
from raydpo.reference.store import ReferenceCache
from raydpo.storage.files import Storage
from raydpo.terminal.console import Console
from raydpo.tokens import build, reader
from raydpo.tokens.build import Progress
from raydpo.tokens.store import TokenSet

PAIRS = 90


@pytest.fixture(scope="module", autouse=True)
def ray():
    import ray

    ray.init(num_cpus=6, include_dashboard=False, log_to_driver=False, object_store_memory=1 << 27)
    yield ray
    ray.shutdown()


@pytest.fixture
def run(tmp_path, tiny_llama, monkeypatch):
    """Gives a configuration whose cache has this name; its source has 9 blocks, and its set three windows."""
    monkeypatch.setattr(reader, "PIECE_SIZES", Sizes(first=1 << 22, most=1 << 22, lines=10, first_lines=10))
    for module in (shards, stream):
        monkeypatch.setattr(module, "WINDOWS", (0, 20, 50))
    monkeypatch.setattr(build, "WORTH_BYTES", 0)
    write_preferences(tmp_path / "a.jsonl", preferences(PAIRS, low=3, high=9))

    def config(cache, *settings):
        tree = {
            "output": str(tmp_path / "runs"),
            "name": "stream",
            "model": {"path": str(tiny_llama), "dtype": "float32"},
            "data": {"train": str(tmp_path / "a.jsonl")},
            "score": {"tokens_per_batch": 512, "tokens_per_part": 2048},
            "cache": {"uri": str(tmp_path / cache)},
        }
        (tmp_path / "config.json").write_text(json.dumps(tree))
        return load_config(str(tmp_path / "config.json"), list(settings))

    return config


def stored(config):
    """The log-probs of a cache, by key."""
    cache = ReferenceCache.open(config.cache_uri)
    keys = cache.keys()
    return dict(zip(keys.to_pylist(), (row.values.to_numpy() for row in cache.lookup(keys)["logps"]), strict=True))


def only_set(config):
    (digest,) = TokenSet.digests(Storage(config.cache_uri))
    return TokenSet(Storage(config.cache_uri), digest)


def test_scoring_beside_tokenising_stores_the_same_bits_as_scoring_a_whole_set(run, monkeypatch):
    streamed, whole = run("streamed"), run("whole")
    assert stream.streams(streamed)
    report = score_module.score(streamed, Console())
    assert not stream.streams(streamed)  # now there is a set
    with monkeypatch.context() as patch:
        patch.setattr(build, "WORTH_BYTES", 1 << 30)
        assert not stream.streams(whole)
        other = score_module.score(whole, Console())
    assert report.scored == other.scored == report.wanted > PAIRS
    ours, theirs = stored(streamed), stored(whole)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[key], theirs[key]) for key in ours)
    assert only_set(streamed).complete() == only_set(whole).complete()


def test_the_first_window_is_there_before_the_set_is_whole(run, monkeypatch):
    config, go_on = run("windows"), threading.Event()

    def paused(*arguments, **given):
        for progress in tokenised.make_on_ray(*arguments, **given):
            yield progress
            if progress.contiguous >= 20 and progress.complete is None:
                assert go_on.wait(60)

    monkeypatch.setattr(stream, "make_on_ray", paused)
    with stream.Stream(config, Console()) as made:
        windows = made.windows()
        first = next(windows)
        assert first["place"].to_pylist() == list(range(20)) and only_set(config).complete() is None
        go_on.set()
        assert [table["place"].to_pylist() for table in windows] == [list(range(20, 50)), list(range(50, PAIRS))]
        assert only_set(config).complete().pairs == PAIRS


def test_who_waits_for_a_window_ends_with_the_stream(run, monkeypatch):
    def never(*arguments, **given):
        while True:
            time.sleep(0.01)
            yield Progress(0, 0, 0, 0.0, None)

    monkeypatch.setattr(stream, "make_on_ray", never)
    with stream.Stream(run("stopped"), Console()) as made, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: next(made.windows()))
        time.sleep(0.2)
        made.__exit__()
        with pytest.raises(RaydpoError, match="tokenising was stopped"):
            waiting.result(timeout=10)


def test_a_source_that_is_refused_ends_the_scoring(run, tmp_path):
    config = run("refused")
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write("{broken\n" * PAIRS)
    with pytest.raises(DataError, match=r"malformed, more than data\.max_malformed"):
        score_module.score_streamed(config, Console())  # ``score`` reads the first records before that
    assert only_set(config).complete() is None


def test_a_model_without_a_row_for_a_token_is_refused_before_anything_is_scored(run, monkeypatch):
    from raydpo.model.limits import ModelLimits

    config = run("limits")
    monkeypatch.setattr(stream, "limits_of", lambda config: {"m": ModelLimits(5, None, False)})
    with pytest.raises(FilesError, match="the embedding of m has 5 rows"):
        score_module.score(config, Console())
    assert not [*Path(config.cache_uri).glob("*/parts/*")]


@pytest.mark.parametrize("setting", ["data.filter=copy == 0", "data.fraction=0.5"])
def test_what_depends_on_all_pairs_is_not_streamed(run, setting):
    assert not stream.streams(run("other", setting))


def test_a_reference_that_fits_nowhere_is_refused_only_where_something_is_missing(run, monkeypatch):
    def refused(config, spec):
        return replace(place_reference(config, spec), problem=ConfigError("it does not fit"))

    config = run("nowhere")
    with monkeypatch.context() as patch:
        patch.setattr(score_module, "place_reference", refused)
        with pytest.raises(ConfigError, match="it does not fit"):
            score_module.score(config, Console())
    assert score_module.score(config, Console()).scored > 0
    with monkeypatch.context() as patch:
        patch.setattr(score_module, "place_reference", refused)
        assert score_module.score(config, Console()).hit_rate == 1
