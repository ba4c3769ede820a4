import os
import time

import pytest

from raydpo.errors import RaydpoError
from raydpo.storage import Storage


@pytest.fixture(params=["local", "memory"])
def storage(request, tmp_path):
    return Storage(str(tmp_path / "place") if request.param == "local" else f"memory://place-{time.time_ns()}")


def test_written_is_read_and_listed(storage):
    storage.write("a/one", b"1")
    storage.write("a/two", b"2")
    storage.write("a/one", b"3")
    assert storage.read("a/one") == b"3"
    assert storage.list("a") == ["one", "two"]
    assert storage.exists("a/two") and not storage.exists("a/three") and storage.list("nowhere") == []


def test_a_directory_replaces_what_was_there(storage, tmp_path):
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    (source / "inner" / "file").write_bytes(b"new")
    for _ in range(2):
        storage.upload(source, "final")
    assert storage.read("final/inner/file") == b"new"


def test_names_cannot_leave_the_place(storage):
    for name in ("../x", "a/../../x", "/etc/passwd"):
        with pytest.raises(RaydpoError, match="would leave"):
            storage.path(name)


def test_a_failed_write_leaves_the_old_content_and_no_temporary(tmp_path, monkeypatch):
    storage = Storage(str(tmp_path))
    storage.write("file", b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        storage.write("file", b"new")
    assert storage.read("file") == b"old" and os.listdir(tmp_path) == ["file"]


def test_probe_needs_a_writable_place(tmp_path):
    Storage(str(tmp_path / "new" / "place")).probe()
    (tmp_path / "file").write_text("")
    with pytest.raises(RaydpoError, match="cannot write"):
        Storage(str(tmp_path / "file" / "below")).probe()
