"""Builds on a failing object store, and two builds of one cache at once, on one machine and on two."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from s3_server import s3_server
from tiny import preferences, write_preferences

from raydpo.reference.claims import Claims
from raydpo.reference.store import ReferenceCache
from raydpo.storage.files import Storage


def configure(place, tiny_llama, count, part):
    write_preferences(place / "a.jsonl", preferences(count, low=5, high=15))
    tree = {
        "output": str(place / "runs"),
        "name": "build",
        "model": {"path": str(tiny_llama), "dtype": "float32"},
        "data": {"train": str(place / "a.jsonl")},
        "score": {"workers": 1, "tokens_per_batch": 2048, "tokens_per_part": part},
    }
    (place / "config.yaml").write_text(yaml.safe_dump(tree))
    return place / "config.yaml"


def start(config, cache, home, **environment):
    """Start ``raydpo score`` in its own process, with local copies in ``home``."""
    return subprocess.Popen(
        [sys.executable, "-m", "raydpo.cli", "score", str(config), f"cache.uri={cache}", f"output={home}/runs"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"XDG_CACHE_HOME": str(home)} | environment,
    )


def parts(uri):
    storage = Storage(str(uri))
    return [
        f"{identity}/parts/{name}"
        for identity in storage.list()
        if len(identity) == 32
        for name in storage.list(f"{identity}/parts")
        if name.endswith(".parquet")
    ]


def contents(uri):
    """Every stored row, by key."""
    cache = ReferenceCache.open(str(uri))
    keys = cache.keys()
    rows = cache.lookup(keys)["logps"].to_pylist()
    return {key: np.array(row, np.float32) for key, row in zip(keys.to_pylist(), rows, strict=True)}


def equal(one, two):
    return one.keys() == two.keys() and all(np.array_equal(one[key], two[key]) for key in one)


def figures(output):
    """(hits, wanted, scored) from the last line of a build."""
    match = re.search(r"cache: ([\d,]+) of ([\d,]+) completions were there .*?, ([\d,]+) scored", output)
    assert match, output
    return tuple(int(group.replace(",", "")) for group in match.groups())


@pytest.mark.slow
def test_killed_twice_on_a_failing_object_store_it_ends_complete_and_equal(tmp_path, tiny_llama):
    config = configure(tmp_path, tiny_llama, 2000, 8000)
    local = start(config, tmp_path / "local", tmp_path / "one")
    output = local.communicate(timeout=300)[0]
    assert local.returncode == 0, output
    total = len(parts(tmp_path / "local"))
    assert total >= 12
    with s3_server() as s3:
        s3.faults(fail=0.05, slow=0.01)
        uri = s3.uri("cache")
        for share in (0.2, 0.6):
            build = start(config, uri, tmp_path / "two")
            deadline = time.time() + 400
            while len(parts(uri)) < share * total and build.poll() is None and time.time() < deadline:
                time.sleep(0.05)
            build.send_signal(signal.SIGKILL)
            build.communicate()
            time.sleep(2)  # its actors notice that their driver is gone
        before = parts(uri)
        assert 0 < len(before) < total, "the kills must leave something to do, or this test proves nothing"
        last = start(config, uri, tmp_path / "two")
        output = last.communicate(timeout=300)[0]
        assert last.returncode == 0, output
        hits, wanted, scored = figures(output)
        assert hits > 0 and hits + scored == wanted and set(before) <= set(parts(uri))
        counts = s3.faults(fail=0)
        assert counts["failed"] > 10
        assert equal(contents(uri), contents(tmp_path / "local"))


def read_meanwhile(cache, build):
    """Read the cache again and again while ``build`` runs: answers are never wrong, and their number only grows. Returns how
    often it grew."""
    seen, grew = {}, 0
    while build.poll() is None:
        if parts(cache):
            found = contents(cache)
            assert all(np.array_equal(found[key], row) for key, row in seen.items())
            grew += len(found) > len(seen)
            seen = found
        time.sleep(0.4)
    return grew


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_llama):
    """A configuration, and the result of one undisturbed build of it."""
    place = tmp_path_factory.mktemp("alone")
    config = configure(place, tiny_llama, 500, 1500)
    build = start(config, place / "alone", place / "home")
    output = build.communicate(timeout=300)[0]
    assert build.returncode == 0, output
    return config, contents(place / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2])
def test_two_builds_at_once(machines, tmp_path, alone):
    """On one machine in one directory, or on two that share only a bucket; with a concurrent reader."""
    config, whole = alone
    with s3_server() as s3:
        cache = tmp_path / "cache" if machines == 1 else s3.uri("together")
        builds = [start(config, cache, tmp_path / f"home-{number}") for number in range(2)]
        assert read_meanwhile(cache, builds[0]) > 1
        outputs = [build.communicate(timeout=300)[0] for build in builds]
        assert [build.returncode for build in builds] == [0, 0], outputs
        done = [figures(output) for output in outputs]
        wanted = done[0][1]
        scored = sum(scored for _, _, scored in done)
        stored = ReferenceCache.open(str(cache))
        assert sum(part.rows for part in stored.parts()) == scored >= wanted
        # Scored twice are at most the shards in progress when the other build started: one being scored, one being
        # stored.
        assert scored - wanted <= 2 * max(part.rows for part in stored.parts()), outputs
        assert Claims.names(stored) == []
        if scored > wanted:
            assert any("twice" in output for output in outputs), outputs
        assert equal(contents(cache), whole)
