"""Storage on a real S3 protocol: multipart, long listings, failing and slow requests, refusals."""

import os
import time

import pytest
from s3_server import s3_server

from raydpo import storage as storage_module
from raydpo.errors import RaydpoError
from raydpo.local_copy import LocalCopy
from raydpo.storage import Storage


@pytest.fixture(scope="module")
def s3():
    pytest.importorskip("moto")
    with s3_server() as server:
        yield server


@pytest.fixture
def storage(s3, request):
    yield Storage(s3.uri(f"{request.node.name}-{time.time_ns()}"))
    s3.faults(fail=0, slow=0)


def test_written_is_read_listed_moved_and_deleted(storage):
    storage.write("a/one", b"1")
    storage.write("a/two", b"22")
    storage.write("a/one", b"333")
    assert storage.read("a/one") == b"333" and storage.list("a") == ["one", "two"] and storage.list("nowhere") == []
    assert [(entry.name, entry.size) for entry in storage.entries("a")] == [("one", 3), ("two", 2)]
    assert abs(storage.entries("a")[0].modified - storage.clock()) < 30 and storage.list() == ["a"]
    storage.move("a/one", "b/one")
    storage.delete("a/two")
    storage.delete("a/two")
    assert storage.list("a") == [] and storage.read("b/one") == b"333"
    with pytest.raises(FileNotFoundError):
        storage.read("a/one")
    storage.probe()
    assert "b" in storage.list("")


def test_more_than_a_thousand_objects_are_listed(storage):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: storage.write(f"many/{number:05}", b"x"), range(1100)))
    assert storage.list("many") == [f"{number:05}" for number in range(1100)]


def test_a_large_object_goes_in_several_parts_and_comes_back_bit_for_bit(storage):
    data = os.urandom(30 << 20)
    storage.write("large", data)
    assert storage.read("large") == data


def test_failing_and_slow_requests_cost_time_alone(storage, s3):
    before = s3.faults(fail=0.1, slow=0.02)
    for number in range(60):
        storage.write(f"file-{number}", str(number).encode())
    assert [storage.read(f"file-{number}") for number in range(60)] == [str(number).encode() for number in range(60)]
    assert len(storage.list()) == 60
    counts = s3.faults(fail=0, slow=0)
    assert counts["failed"] - before.get("failed", 0) > 5


def test_a_store_that_keeps_failing_is_one_readable_error(storage, s3, monkeypatch):
    monkeypatch.setattr(storage_module, "WAITS", (0.01, 0.01))
    s3.faults(fail=1)
    with pytest.raises(RaydpoError, match=r"does not answer, 3 attempts.*Nothing that was stored is lost"):
        storage.write("file", b"data")
    s3.faults(fail=0)
    assert storage.list() == []


def test_a_missing_bucket_is_found_by_the_probe(s3):
    with pytest.raises(RaydpoError, match="nobucket") as caught:
        Storage("s3://nobucket/cache").probe()
    assert "\n" not in str(caught.value)


def test_address_in_the_uri(s3):
    host = s3.address.removeprefix("http://")
    storage = Storage(f"s3://key:secret@bucket/explicit?endpoint_override={host}&scheme=http&region=us-east-1")
    storage.write("file", b"data")
    assert Storage(s3.uri("explicit")).read("file") == b"data"
    assert "secret" not in str(storage) and "bucket/explicit" in str(storage)


def test_copies_are_read_once_over_the_network(storage, s3, tmp_path):
    storage.write("parts/one", b"sound")
    copies = LocalCopy(storage, tmp_path)
    assert copies.fetch("parts/one", lambda data: data == b"sound") == b"sound"
    requests = s3.faults()["requests"]
    assert copies.fetch("parts/one", lambda data: data == b"sound") == b"sound"
    assert s3.faults()["requests"] == requests
