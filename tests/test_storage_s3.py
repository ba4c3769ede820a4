"""Storage on a real S3 protocol: multipart uploads, long listings, failing requests of all kinds, refusals."""

import os
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from pyarrow import fs as pafs
from s3_server import s3_server

from raydpo.errors import RaydpoError
from raydpo.storage import files as storage_module
from raydpo.storage.files import Storage, stale_temporaries
from raydpo.storage.local_copy import LocalCopy


@pytest.fixture(scope="module")
def s3():
    pytest.importorskip("moto")
    with s3_server() as server:
        yield server


@pytest.fixture
def storage(s3):
    yield Storage(s3.uri(f"place-{time.time_ns()}"))
    s3.heal()


@pytest.fixture
def hasty(storage, s3, monkeypatch):
    """The same place through a client that makes one attempt of its own, with three immediate retries of ours."""
    storage.fs = pafs.S3FileSystem(
        endpoint_override=s3.address, retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=1)
    )
    monkeypatch.setattr(storage_module, "WAITS", (0.001,) * 3)
    return storage


def test_written_is_read_listed_moved_and_deleted(storage):
    storage.write("a/one", b"1")
    storage.write("a/two", b"22")
    storage.write("a/one", b"333")
    assert storage.read("a/one") == b"333" and storage.list("a") == ["one", "two"] and storage.list("nowhere") == []
    assert [(entry.name, entry.size) for entry in storage.entries("a")] == [("one", 3), ("two", 2)]
    assert storage.exists("a/one") and storage.exists("a") and not storage.exists("b")
    assert -1 < storage.clock() - storage.entries("a")[0].modified < 30 and storage.list() == ["a"]
    storage.move("a/one", "b/one")
    storage.delete("a/two")
    storage.delete("a/two")
    assert storage.list("a") == [] and storage.read("b/one") == b"333"
    with pytest.raises(FileNotFoundError):
        storage.read("a/one")
    with pytest.raises(FileNotFoundError):
        storage.move("a/one", "b/two")
    storage.write("c/d/e", b"1")
    storage.delete_directory("c")
    storage.delete_directory("c")
    assert storage.list("c/d") == [] and storage.list("b") == ["one"]
    storage.probe()
    assert storage.list("b") == ["one"] and not [name for name in storage.list() if name.startswith(".")]
    storage.write("b/.tmp-host-1-" + "0" * 32, b"")
    assert stale_temporaries(storage, "b", older_than=-60) == [], "an object store has nothing half-written"


def test_a_directory_replaces_what_was_there(storage, tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_bytes(b"new")
    storage.write("final/inner/earlier", b"")
    for _ in range(2):
        storage.upload(tmp_path, "final")
    assert storage.read("final/inner/file") == b"new" and storage.list("final/inner") == ["file"]


def test_more_than_a_thousand_objects_are_listed(storage, s3):
    place = storage.root.partition("/")[2]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: s3.put(f"{place}/many/{number:05}", b"x" * (number % 7)), range(1100)))
    assert storage.list("many") == [f"{number:05}" for number in range(1100)]
    assert [entry.size for entry in storage.entries("many")] == [number % 7 for number in range(1100)]


def test_a_large_object_goes_in_several_parts_and_comes_back_bit_for_bit(storage):
    data = os.urandom(30 << 20)
    storage.write("large", data)
    assert storage.read("large") == data


def test_failing_and_slow_requests_cost_time_alone(storage, s3):
    before = s3.faults(fail=0.07, slow=0.02)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: storage.write(f"file-{number}", str(number).encode()), range(200)))
        assert list(pool.map(lambda number: storage.read(f"file-{number}"), range(200))) == [
            str(number).encode() for number in range(200)
        ]
    assert len(storage.list()) == 200
    assert s3.faults()["failed"] - before["failed"] > 20


@pytest.mark.parametrize("fault", ["drop", "lose", "cut"])
def test_dropped_connections_lost_answers_and_halved_bodies_cost_time_alone(storage, s3, fault):
    s3.faults(**{fault: 0.15})
    large = os.urandom(12 << 20)
    storage.write("large", large)
    for number in range(4):
        storage.write(f"file-{number}", str(number).encode() * 1000)
    assert storage.read("large") == large
    for number in range(4):
        assert storage.read(f"file-{number}") == str(number).encode() * 1000
        storage.move(f"file-{number}", f"moved-{number}")
    assert storage.list() == ["large", *(f"moved-{number}" for number in range(4))]
    for number in range(4):
        storage.delete(f"moved-{number}")
    assert storage.list() == ["large"]
    assert s3.faults()[fault] > 3


@pytest.mark.parametrize("size", [4, 12 << 20])
def test_a_store_that_keeps_failing_is_one_readable_error_and_keeps_the_old(hasty, s3, size):
    hasty.write("old", b"old")
    s3.faults(fail=1)
    for name in ("old", "new"):
        with pytest.raises(
            RaydpoError,
            match=rf"cannot write {hasty}/{name}: the store failed 4 times in \d+ s, last "
            r"with .*on purpose.*Nothing stored is lost",
        ) as caught:
            hasty.write(name, b"x" * size)
        assert "\n" not in str(caught.value)
    s3.heal()
    assert hasty.list() == ["old"] and hasty.read("old") == b"old"


def test_a_part_that_fails_half_way_leaves_nothing(hasty, s3):
    """The first requests of a multipart upload succeed, later ones fail: no object appears under the name."""
    for share in (0.3, 0.5, 0.7):
        s3.faults(fail=share)
        for number in range(8):
            try:
                hasty.write(f"{share}-{number}", b"x" * (23 << 20))
            except RaydpoError as error:
                assert "failed 4 times" in str(error)
        s3.heal()
    entries = hasty.entries()
    assert entries and len(entries) < 24, "some must succeed and some fail, or this test proves nothing"
    assert {entry.size for entry in entries} == {23 << 20}


def test_a_store_that_hangs_is_given_up(hasty, s3, monkeypatch):
    monkeypatch.setattr(storage_module, "PATIENCE", 1.0)
    hasty.write("file", b"1")
    s3.faults(hang=1)
    with pytest.raises(RaydpoError, match=r"the store failed 1 times in [34] s, last with .*Timeout was reached"):
        hasty.read("file")


def test_refusals_are_told_at_once_and_not_as_missing_files(storage, s3):
    storage.write("file", b"1")
    before = s3.faults(deny=1)["requests"]
    told = rf"cannot [a-z ]+ {storage}.*the store refuses, .*ACCESS_DENIED.*credentials"
    for act in (
        storage.probe,
        lambda: storage.read("file"),
        lambda: storage.exists("file"),
        storage.list,
        storage.entries,
        lambda: storage.delete("file"),
        lambda: storage.write("file", b"2"),
        storage.clock,
    ):
        with pytest.raises(RaydpoError, match=told):
            act()
    assert s3.faults()["requests"] - before < 20
    s3.heal()
    assert storage.read("file") == b"1"


def test_a_missing_bucket_is_found_by_the_probe(s3):
    told = r"cannot write s3://nobucket/cache/\.probe.*NO_SUCH_BUCKET.*bucket's name"
    with pytest.raises(RaydpoError, match=told) as caught:
        Storage("s3://nobucket/cache").probe()
    assert "\n" not in str(caught.value)


def test_address_in_the_uri(s3):
    host = s3.address.removeprefix("http://")
    storage = Storage(f"s3://key:secret@bucket/explicit?endpoint_override={host}&scheme=http&region=us-east-1")
    storage.write("file", b"data")
    assert Storage(s3.uri("explicit")).read("file") == b"data"
    s3.faults(deny=1)
    with pytest.raises(RaydpoError) as caught:
        storage.read("file")
    s3.heal()
    assert "secret" not in f"{storage} {caught.value}" and "cannot read s3://***@bucket/explicit/file: " in str(caught.value)


def test_the_address_travels_with_the_environment_and_with_a_pickle(storage, s3, tmp_path):
    storage.write("file", b"data")
    script = "import sys; from raydpo.storage.files import Storage; print(Storage(sys.argv[1]).read('file'))"
    run = subprocess.run([sys.executable, "-c", script, storage.uri], capture_output=True, text=True, env=os.environ)
    assert run.stdout == "b'data'\n", run.stderr
    script = "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb')).read('file'))"
    (tmp_path / "pickle").write_bytes(pickle.dumps(storage))
    elsewhere = {name: value for name, value in os.environ.items() if name != "AWS_ENDPOINT_URL"}
    run = subprocess.run([sys.executable, "-c", script, tmp_path / "pickle"], capture_output=True, text=True, env=elsewhere)
    assert run.stdout == "b'data'\n", run.stderr


def test_copies_are_read_once_over_the_network(storage, s3, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    storage.write("parts/one", b"sound")
    copies = LocalCopy(storage)
    assert copies.fetch("parts/one", lambda data: data == b"sound") == b"sound"
    requests = s3.faults()["requests"]
    assert copies.fetch("parts/one", lambda data: data == b"sound") == b"sound"
    assert s3.faults()["requests"] == requests


def test_what_another_client_stored_is_what_is_read(storage, s3):
    """Chunked uploads with checksums in between, which this client may send, leave no framing in the object."""
    place = storage.root.partition("/")[2]
    data = os.urandom(100_000)
    s3.put(f"{place}/theirs", data)
    storage.write("ours", data)
    assert storage.read("theirs") == storage.read("ours") == data
    sizes = {entry.name: entry.size for entry in storage.entries()}
    assert sizes == {"ours": len(data), "theirs": len(data)}
