"""Merge parts and delete superseded ones: nothing is lost, at any kill, with concurrent readers."""

import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from killing import killed_at_every_line
from rows import ONE, files, rows, same, values

from raydpo.reference import compact as compact_module
from raydpo.reference import store as store_module
from raydpo.reference.compact import compact, delete_garbage, find_garbage
from raydpo.reference.part import builder_of
from raydpo.reference.store import PARTS, SET_ASIDE, ReferenceCache
from raydpo.storage import files as storage_module


def fresh(uri):
    return ReferenceCache.open(str(uri), ONE)


def active(cache):
    """Parts that no other part supersedes."""
    cache.reload()
    return int((~cache.superseded()).sum())


def fill(uri, parts=4, each=5):
    """A cache of ``parts`` parts; one row is stored twice, shorter and longer, another twice with different values."""
    cache = fresh(uri)
    cache.prepare({})
    keys, logps = rows(parts * each, seed=7)
    for start in range(0, len(keys), each):
        cache.commit(keys[start : start + each], logps[start : start + each], {"device": f"cpu {start % 2}"})
    cache.commit([keys[0], keys[1]], [logps[0][:1], logps[1] - 0.25], {"device": "late"})
    return keys, logps


def test_few_parts_of_many_and_the_same_answers(tmp_path):
    keys, logps = fill(tmp_path)
    before = values(fresh(tmp_path), keys)
    report = compact(fresh(tmp_path))
    assert (report.before, report.after, report.merged, report.rows, report.dropped) == (5, 1, 5, 20, 2)
    cache = fresh(tmp_path)
    assert same(values(cache, keys), before) and same(before, logps)
    assert active(cache) == 1 and len(files(cache)) == 6 and not cache.problems
    (info,) = [info for info in cache.parts() if builder_of(info.name) == "compact0"]
    provenance = {(one["of"]["device"], one["count"]) for one in info.provenance["parts"]}
    assert provenance == {("cpu 0", 2), ("cpu 1", 2), ("late", 1)}

    garbage = find_garbage(cache)
    assert len(garbage) == 5 and len(files(cache)) == 6, "looking deletes nothing"
    delete_garbage(cache, garbage)
    assert len(files(fresh(tmp_path))) == 1 and same(values(fresh(tmp_path), keys), logps)
    assert same(values(cache, keys), logps), "a reader that had seen the old parts finds the new one"


def test_compacting_what_was_compacted(tmp_path):
    keys, logps = fill(tmp_path)
    compact(fresh(tmp_path))
    more, more_logps = rows(5, seed=8)
    fresh(tmp_path).commit(more, more_logps, {})
    compact(fresh(tmp_path))
    cache = fresh(tmp_path)
    assert active(cache) == 1
    assert same(values(cache, keys + more), logps + more_logps)
    # The first merged part goes before those that it named: they must not come back.
    garbage = find_garbage(cache)
    delete_garbage(cache, [one for one in garbage if "compact0" in one.path])
    again = fresh(tmp_path)
    assert active(again) == 1
    delete_garbage(again, find_garbage(again))
    assert len(files(again)) == 1 and same(values(fresh(tmp_path), keys + more), logps + more_logps)


def test_two_compactions_of_the_same_parts_write_the_same_file(tmp_path):
    fill(tmp_path)
    one, two = fresh(tmp_path), fresh(tmp_path)
    one.refresh()
    two.refresh()
    compact(one)
    before = set(files(one))
    shutil.move(tmp_path / ONE.digest / PARTS, tmp_path / "kept")
    (tmp_path / ONE.digest / PARTS).mkdir()
    for name in before:
        if "compact0" not in name:
            shutil.copy(tmp_path / "kept" / name, tmp_path / ONE.digest / PARTS / name)
    compact(two)
    assert set(files(two)) == before


def test_target_size_is_kept(tmp_path):
    keys, logps = fill(tmp_path, parts=12)
    size = max(entry.size for entry in fresh(tmp_path).storage.entries(f"{ONE.digest}/{PARTS}"))
    report = compact(fresh(tmp_path), target_bytes=4 * size)
    assert 3 <= report.after < 8
    assert same(values(fresh(tmp_path), keys), logps)


def test_a_damaged_merged_part_gives_way_to_what_it_was_made_of(tmp_path):
    keys, logps = fill(tmp_path)
    compact(fresh(tmp_path))
    cache = fresh(tmp_path)
    (merged,) = [name for name in files(cache) if "compact0" in name]
    path = tmp_path / ONE.digest / PARTS / merged
    path.write_bytes(path.read_bytes()[:-30])
    assert find_garbage(cache) == []
    assert same(values(cache, keys), logps)
    assert merged in cache.problems[0]
    cache.set_aside()
    assert files(cache, SET_ASIDE) == [merged]
    assert [one.reason for one in find_garbage(cache)] == ["damaged or foreign, set aside"]


def test_superseded_rows_that_nobody_else_answers_are_kept(tmp_path):
    """A merged part that lacks rows must not get the parts it names deleted, and must hide no rows."""
    keys, logps = fill(tmp_path)
    cache = fresh(tmp_path)
    cache.refresh()
    part = cache.read(cache.paths()[0])
    name, data = store_module.encode_part(
        ONE,
        part.keys.slice(0, 2),
        part.tokens[:2],
        part.logps.slice(0, 2),
        {},
        builder="compact0",
        time_ns=1,
        supersedes=[part.info.name],
    )
    cache.storage.write(f"{ONE.digest}/{PARTS}/{name}", data)
    assert find_garbage(fresh(tmp_path)) == []
    assert same(values(fresh(tmp_path), keys), logps)


MODULES = [compact_module, store_module, storage_module]


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    place = tmp_path_factory.mktemp("filled")
    return place, fill(place / "cache", parts=2, each=2)


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_compact_and_gc_killed_at_every_line(stride, filled, tmp_path):
    source, (keys, logps) = filled
    place = tmp_path / "cache"

    def prepare():
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(source / "cache", place)

    def act():
        cache = fresh(place)
        compact(cache)
        delete_garbage(cache, find_garbage(cache))

    def check(ended):
        cache = fresh(place)
        assert same(values(cache, keys), logps) and not cache.problems
        compact(cache)
        cache.prepare({})
        delete_garbage(cache, find_garbage(cache))
        assert len(files(cache)) == 1 and same(values(fresh(place), keys), logps)
        assert not list(place.rglob(".tmp-*"))

    # Lines of the store only read here.
    kills = killed_at_every_line(act, [compact_module, storage_module], prepare, check, stride)
    assert kills > 100 / stride


def test_commit_killed_at_every_line(tmp_path):
    place = tmp_path / "cache"
    keys, logps = rows(3)
    more, more_logps = rows(3, seed=1)

    def prepare():
        shutil.rmtree(place, ignore_errors=True)
        cache = fresh(place)
        cache.prepare({})
        cache.commit(keys, logps, {})

    def check(ended):
        cache = fresh(place)
        found = values(cache, keys + more)
        assert same(found[:3], logps) and not cache.problems
        assert same(found[3:], more_logps) or same(found[3:], [None] * 3), "all rows of a part or none"
        assert not ended or found[3] is not None
        cache.prepare({})
        cache.commit(more, more_logps, {})
        assert same(values(cache, keys + more), logps + more_logps) and not list(place.rglob(".tmp-*"))

    kills = killed_at_every_line(lambda: fresh(place).commit(more, more_logps, {}), MODULES, prepare, check)
    assert kills > 30


def test_readers_never_see_a_gap(tmp_path):
    """Readers read without pause while parts are added, merged and deleted."""
    keys, logps = fill(tmp_path, parts=10)
    stop, failures, looks = threading.Event(), [], [0]

    def read():
        while not stop.is_set():
            looks[0] += 1
            try:
                if not same(values(fresh(tmp_path), keys), logps):
                    failures.append("a value is missing or wrong")
            except Exception as error:
                failures.append(repr(error))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    end = time.monotonic() + 4
    seed = 100
    while time.monotonic() < end and not failures:
        writer = fresh(tmp_path)
        for _ in range(3):
            writer.commit(*rows(2, seed=seed), {})
            seed += 1
        compact(writer)
        delete_garbage(writer, find_garbage(writer))
    stop.set()
    for reader in readers:
        reader.join()
    assert not failures, failures[:3]
    assert looks[0] > 20 and seed > 110


def test_temporaries_of_other_hosts_go_when_old_by_the_clock_of_the_store(tmp_path):
    fill(tmp_path)
    parts = Path(tmp_path / ONE.digest / PARTS)
    old, new = (parts / f".tmp-elsewhere-{pid}-{'0' * 32}" for pid in (1, 2))
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (time.time() - 3 * 86400,) * 2)
    assert [Path(one.path).name for one in find_garbage(fresh(tmp_path))] == [old.name]


def test_nothing_to_do(tmp_path):
    cache = fresh(tmp_path)
    assert compact(cache).after == 0 and find_garbage(cache) == []
    cache.commit(*rows(2), {})
    assert compact(cache).merged == 0 and np.array_equal(cache.scored_tokens() > 0, [True, True])
