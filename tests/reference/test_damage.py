"""Faults of files and disks: each is found, named, set aside and scored again; never used, never fatal."""

import hashlib
import io
import os
import shutil
import subprocess
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rows import ONE, OTHER, files, rows, same, values

from raydpo.errors import CacheError, RaydpoError
from raydpo.reference.compact import find_garbage
from raydpo.reference.store import PARTS, SET_ASIDE, ReferenceCache


def fresh(uri):
    return ReferenceCache.open(str(uri), ONE)


@pytest.fixture
def filled(tmp_path):
    """(directory, keys and rows of the part to be damaged, keys and rows of the intact one, file of the first)."""
    cache = fresh(tmp_path)
    cache.prepare({})
    bad, good = rows(30, 1), rows(30, 2)
    name = cache.commit(*bad, {})
    cache.commit(*good, {})
    return tmp_path, bad, good, tmp_path / ONE.digest / PARTS / name


def flip(file, place):
    data = bytearray(file.read_bytes())
    data[place] ^= 0x10
    file.write_bytes(data)


def swap_in_another_identity(file):
    other = ReferenceCache.open(str(file.parent.parent.parent), OTHER)
    name = other.commit(*rows(2), {})
    shutil.copy(file.parent.parent.parent / OTHER.digest / PARTS / name, file.parent)
    file.unlink()


DAMAGE = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "one byte short": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "empty": lambda file: file.write_bytes(b""),
    "bit in the data": lambda file: flip(file, 200),
    "bit in the footer": lambda file: flip(file, -60),
    "bit in the footer's length": lambda file: flip(file, -7),
    "bit in the magic": lambda file: flip(file, 1),
    "another file of text": lambda file: file.write_text("hello"),
    "a part of another identity": swap_in_another_identity,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named_set_aside_and_scored_again(damage, filled):
    place, bad, good, file = filled
    damage(file)
    cache = fresh(place)
    found = values(cache, [*bad[0], *good[0]])
    assert same(found[:30], [None] * 30) and same(found[30:], good[1])
    (problem,) = cache.problems
    assert "not used" in problem and "part-" in problem and "\n" not in problem
    cache.set_aside()
    assert len(files(cache, SET_ASIDE)) == 1
    cache.commit(*bad, {})  # what a build does next
    again = fresh(place)
    assert same(values(again, bad[0] + good[0]), bad[1] + good[1]) and again.problems == []


def test_every_flipped_byte_of_a_part_is_found(filled):
    """One bit of every seventh byte, in data and footer, one at a time."""
    place, bad, _, file = filled
    sound = file.read_bytes()
    for position in range(0, len(sound), 7):
        flip(file, position)
        cache = fresh(place)
        assert values(cache, bad[0][:1]) == [None] and cache.problems, position
        file.write_bytes(sound)
    assert same(values(fresh(place), bad[0]), bad[1])


def test_what_may_not_be_read_is_named_and_left_where_it_is(filled):
    place, bad, good, file = filled
    if os.getuid() != 0:
        pytest.skip("needs root to become somebody else")
    file.chmod(0o000)
    for directory in (place, *list(place.parents)[:3]):
        directory.chmod(directory.stat().st_mode | 0o555)
    child = os.fork()
    if not child:
        try:
            os.setuid(65534)
            cache = fresh(place)
            found = values(cache, [bad[0][0], good[0][0]])
            assert found[0] is None and np.array_equal(found[1], good[1][0])
            assert "Permission denied" in cache.problems[0] and file.name in cache.problems[0]
            cache.set_aside()  # the parent finds the file where it was
            os._exit(0)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0 and file.exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_loses_nothing(small_disk):
    cache = fresh(small_disk)
    cache.prepare({})
    stored = rows(100, 1)
    cache.commit(*stored, {})
    rng = np.random.default_rng(0)
    large = [rng.bytes(16) for _ in range(50)], [-rng.random(20_000).astype(np.float32) for _ in range(50)]
    with pytest.raises(OSError, match=r"No space left.*free some space.*kept"):
        cache.commit(*large, {})
    assert not [name for name in os.listdir(small_disk / ONE.digest / PARTS) if name.startswith(".tmp")]
    again = fresh(small_disk)
    assert same(values(again, stored[0]), stored[1]) and again.problems == []
    cache.commit(*rows(5, 3), {})


def test_clocks_that_disagree_change_nothing(tmp_path, monkeypatch):
    """Parts from the past and the future: the longest row still wins, and no part counts as old."""
    (key,), (long,) = rows(1, tokens=12)
    for offset, logps in ((86400 * 365 * 10**9, long[:5]), (-86400 * 365 * 10**9, long), (0, long[:7])):
        real = time.time_ns
        monkeypatch.setattr(time, "time_ns", lambda offset=offset, real=real: real() + offset)
        fresh(tmp_path).commit([key], [logps], {})
        monkeypatch.undo()
    assert same(values(fresh(tmp_path), [key]), [long])


def test_a_wrong_name_is_no_part(filled):
    place, bad, good, file = filled
    shutil.copy(file, file.with_name("copy of part.parquet"))
    file.rename(file.with_name(file.name.replace(file.name[-20:-8], "0" * 12)))  # another checksum
    cache = fresh(place)
    assert values(cache, bad[0][:1]) == [None] and len(cache.problems) == 2
    assert same(values(cache, good[0]), good[1])


def test_what_is_no_log_prob_is_never_stored(tmp_path):
    with pytest.raises(CacheError, match="no log-prob"):
        fresh(tmp_path).commit([b"k" * 16], [np.array([0.5], np.float32)], {})


def rewritten(file, **metadata):
    """The part with other metadata and a name whose checksum fits, as another version of raydpo would write it."""
    table = pq.read_table(file)
    changed = {**table.schema.metadata, **{f"raydpo.{name}".encode(): value for name, value in metadata.items()}}
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(changed), sink)
    data = sink.getvalue()
    file.unlink()
    new = file.with_name(f"{file.name[:-40]}{hashlib.sha256(data).hexdigest()[:32]}.parquet")
    new.write_bytes(data)
    return new


def test_a_part_of_a_newer_format_is_told_and_stays(filled):
    place, bad, good, file = filled
    newer = rewritten(file, format=b"2")
    cache = fresh(place)
    assert values(cache, bad[0][:1]) == [None] and same(values(cache, good[0]), good[1])
    assert "format b'2'" in cache.problems[0]
    cache.set_aside()
    assert newer.exists() and find_garbage(cache) == []


def test_a_codec_that_is_not_there_is_no_damage(filled, monkeypatch):
    place, bad, _, file = filled

    def read_table(*arguments, **settings):
        raise pa.ArrowNotImplementedError("Support for codec 'zstd' not built")

    cache = fresh(place)
    monkeypatch.setattr(pq, "read_table", read_table)
    assert not cache.covers(pa.array(bad[0], pa.binary(16)), np.ones(30, np.int32)).any()
    cache.set_aside()
    assert "zstd" in cache.problems[0] and file.exists()


def test_too_little_memory_is_said_and_moves_nothing(filled, monkeypatch):
    place, bad, good, _ = filled

    def read_table(*arguments, **settings):
        raise pa.ArrowMemoryError("malloc of size 64 failed")

    cache = fresh(place)
    with monkeypatch.context() as patch, pytest.raises(RaydpoError, match=r"memory.*malloc.*more memory"):
        patch.setattr(pq, "read_table", read_table)
        cache.covers(pa.array(bad[0], pa.binary(16)), np.ones(30, np.int32))
    cache.set_aside()
    assert not files(cache, SET_ASIDE) and cache.problems == []
    assert same(values(cache, bad[0] + good[0]), bad[1] + good[1])


def test_one_bad_read_is_no_damage(filled, monkeypatch):
    place, bad, _, file = filled
    cache = fresh(place)
    real, short = cache.storage.read, []

    def read(name):
        data = real(name)
        if name.endswith(file.name) and not short:
            short.append(name)
            return data[:-100]
        return data

    monkeypatch.setattr(cache.storage, "read", read)
    assert cache.covers(pa.array(bad[0], pa.binary(16)), np.ones(30, np.int32)).all() and short
    cache.set_aside()
    assert cache.problems == [] and file.exists()
