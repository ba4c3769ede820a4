import hashlib
import io
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rows import ONE, OTHER, rows, values

from raydpo.errors import CacheError
from raydpo.reference.store import ReferenceCache
from raydpo.storage.files import Storage


def part_file(cache, index=0):
    return cache.storage.path(f"{cache.directory}/parts/{cache.storage.list(f'{cache.directory}/parts')[index]}")


@pytest.fixture
def cache(tmp_path):
    return ReferenceCache.open(str(tmp_path / "cache"), ONE)


def test_what_is_committed_is_found_bit_for_bit_in_any_order(cache):
    keys, logps = rows(100)
    cache.commit(keys[:60], logps[:60], {})
    cache.commit(keys[60:], logps[60:], {})
    order = np.random.default_rng(1).permutation(100)
    for index, found in zip(order, values(cache, [keys[index] for index in order]), strict=True):
        assert np.array_equal(found, logps[index])


def test_missing_keys_are_null_never_a_default(cache):
    keys, logps = rows(3)
    cache.commit(keys, logps, {})
    table = cache.lookup([b"\0" * 16, keys[1]])
    assert table["logps"][0].as_py() is None and table["tokens"].to_pylist() == [0, len(logps[1])]


def test_an_empty_cache_holds_nothing(cache):
    assert cache.lookup(rows(2)[0])["logps"].null_count == 2
    assert not cache.covers(pa.array(rows(2)[0], pa.binary(16)), np.array([1, 1])).any()


def test_the_longest_of_two_rows_is_read(cache):
    (key,), (long,) = rows(1, tokens=20)
    cache.commit([key], [long[:5]], {})
    cache.commit([key], [long], {})
    cache.commit([key], [long[:7]], {})
    assert np.array_equal(values(cache, [key])[0], long)


def test_covers_asks_for_enough_tokens(cache):
    (key,), (logps,) = rows(1, tokens=10)
    cache.commit([key], [logps], {})
    keys = pa.array([key] * 3, pa.binary(16))
    assert cache.covers(keys, np.array([9, 10, 11])).tolist() == [True, True, False]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 0.5])
def test_what_is_no_log_prob_is_not_stored(cache, bad):
    with pytest.raises(CacheError, match="nothing of this part was stored"):
        cache.commit([b"k" * 16], [np.array([-1.0, bad], np.float32)], {})
    assert cache.parts() == []


def test_part_of_another_reference_is_named_and_not_used(cache, tmp_path):
    other = ReferenceCache.open(str(tmp_path / "cache"), OTHER)
    keys, logps = rows(2)
    other.commit(keys, logps, {})
    cache.prepare({})
    shutil.copytree(tmp_path / "cache" / OTHER.digest / "parts", tmp_path / "cache" / ONE.digest / "parts")
    assert values(cache, keys) == [None, None]
    assert OTHER.digest in cache.problems[0] and "weights" in cache.problems[0]


@pytest.mark.parametrize("damage", ["truncate", "empty", "footer", "page"])
def test_damaged_part_is_named_and_costs_only_its_rows(cache, damage):
    good, bad = rows(50, 1), rows(50, 2)
    cache.commit(*bad, {})
    cache.commit(*good, {})
    file = part_file(cache)
    data = bytearray(Path(file).read_bytes())
    if damage == "truncate":
        data = data[: len(data) // 2]
    elif damage == "empty":
        data = b""
    elif damage == "footer":
        data[-6] ^= 0xFF  # its length
    else:
        data[len(data) // 4] ^= 0x01  # one bit of one value: page checksums see it
    with open(file, "wb") as stream:
        stream.write(data)
    found = values(cache, [*bad[0], *good[0]])
    assert found[:50] == [None] * 50
    assert all(np.array_equal(one, two) for one, two in zip(found[50:], good[1], strict=True))
    assert len(cache.problems) == 1 and os.path.basename(file) in cache.problems[0]


def test_foreign_file_format_is_refused(cache):
    keys, logps = rows(2)
    cache.commit(keys, logps, {})
    table, file = pq.read_table(part_file(cache)), Path(part_file(cache))
    file.unlink()
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"raydpo.format": b"99"}), sink)
    checksum = hashlib.sha256(sink.getvalue()).hexdigest()[:32]
    file.with_name(f"part-{'0' * 20}-{'0' * 8}-{checksum}.parquet").write_bytes(sink.getvalue())
    assert values(cache, keys) == [None, None] and "format" in cache.problems[0]


def test_stale_temporaries_of_dead_processes_go_and_those_of_living_stay(cache):
    cache.prepare({})
    cache.commit(*rows(1), {})
    parts = os.path.dirname(part_file(cache))
    host = os.uname().nodename
    dead, living = (f".tmp-{host}-{pid}-{'0' * 32}" for pid in (2**22 + 1, os.getpid()))
    elsewhere = f".tmp-otherhost-1-{'0' * 32}"
    for name in (dead, living, elsewhere):
        open(os.path.join(parts, name), "w").close()
    cache.prepare({})
    assert set(os.listdir(parts)) >= {living, elsewhere} and dead not in os.listdir(parts)
    assert len(cache.parts()) == 1


def test_open_wants_a_unique_identity(tmp_path):
    uri = str(tmp_path / "cache")
    with pytest.raises(CacheError, match="raydpo score"):
        ReferenceCache.open(uri)
    for identity in (ONE, OTHER):
        ReferenceCache.open(uri, identity).commit(*rows(1), {})
    with pytest.raises(CacheError, match="2 identities"):
        ReferenceCache.open(uri)
    assert ReferenceCache.open(uri, ONE.digest[:6]).identity == ONE


def test_unwritable_place_is_found_before_the_work(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(Exception, match="cannot write"):
        Storage(str(blocked / "cache")).probe()


def test_any_fsspec_uri(tmp_path):
    uri = f"memory://raydpo-{time.time_ns()}"
    keys, logps = rows(5)
    ReferenceCache.open(uri, ONE).commit(keys, logps, {})
    assert np.array_equal(values(ReferenceCache.open(uri), keys)[3], logps[3])


def test_bytes_per_token_on_disk(cache):
    keys, logps = rows(200, tokens=200)
    cache.commit(keys, logps, {})
    assert cache.parts()[0].bytes / (200 * 200) < 4.0
