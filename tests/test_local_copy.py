import os
import tempfile
import threading
import time
from pathlib import Path

import pytest

from raydpo.errors import ModelError, RaydpoError
from raydpo.storage import local_copy
from raydpo.storage.files import Storage
from raydpo.storage.local_copy import LocalCopy, RemoteDirectory, local_home


def remote():
    return Storage(f"memory://copies-{time.time_ns()}")


def copies_in(storage, directory):
    copies = LocalCopy(storage)
    copies.local = Storage(str(directory))
    return copies


def starts_well(data):
    return data.startswith(b"good")


def test_a_sound_copy_is_read_here_and_an_unsound_one_fetched_again(tmp_path):
    storage = remote()
    storage.write("parts/one", b"good 1")
    copies = copies_in(storage, tmp_path)
    assert copies.fetch("parts/one", starts_well) == b"good 1"
    storage.delete("parts/one")
    assert copies.fetch("parts/one", starts_well) == b"good 1"
    (tmp_path / "parts" / "one").write_bytes(b"bad")
    storage.write("parts/one", b"good 2")
    assert copies.fetch("parts/one", starts_well) == b"good 2"


def test_what_is_unsound_afar_is_not_kept(tmp_path):
    storage = remote()
    storage.write("one", b"bad")
    assert copies_in(storage, tmp_path).fetch("one", starts_well) == b"bad" and not (tmp_path / "one").exists()


def test_a_place_that_cannot_keep_copies_costs_time_alone(tmp_path):
    (tmp_path / "file").write_text("")
    storage = remote()
    storage.write("one", b"good")
    copies = copies_in(storage, tmp_path / "file" / "below")
    assert [copies.fetch("one", starts_well) for _ in range(2)] == [b"good"] * 2
    assert len(copies.problems) == 1 and "XDG_CACHE_HOME" in copies.problems[0]


def test_many_at_once_see_no_torn_file(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("copies")
    storage = Storage(str(tmp_path_factory.mktemp("remote")))  # fsspec's memory:// is not made for threads
    content = b"good" * 100_000
    storage.write("one", content)
    seen = []
    threads = [
        threading.Thread(target=lambda: seen.append(copies_in(storage, tmp_path).fetch("one", content.__eq__)))
        for _ in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [content] * 12 and [file.name for file in tmp_path.iterdir()] == ["one"]


def test_pruning_keeps_what_is_still_there(tmp_path):
    storage = remote()
    copies = copies_in(storage, tmp_path)
    for name in ("one", "two"):
        storage.write(f"parts/{name}", b"good")
        copies.fetch(f"parts/{name}", starts_well)
    copies.prune("parts", {"two"})
    assert [file.name for file in (tmp_path / "parts").iterdir()] == ["two"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The remote directory of a run with a result, and a node without copies."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "node"))
    run = remote()
    run.write("final/config.json", b"{}")
    run.write("final/model.safetensors", b"weights")
    run.write("final/merged/model.safetensors", b"merged")
    return run


def held(place):
    return {file.name: file.read_bytes() for file in Path(place).iterdir()}


WHOLE = {"config.json": b"{}", "model.safetensors": b"weights"}


def test_each_machine_has_a_copy_of_a_remote_directory_of_its_own(run, tmp_path, monkeypatch):
    final = RemoteDirectory.now(run, "final")
    places = [final.here()]
    assert held(places[0]) == WHOLE, "the files directly in it"
    monkeypatch.setattr(Storage, "download", None)
    assert final.here() == places[0], "which is not fetched again"
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    places.append(final.here())
    assert held(places[1]) == WHOLE and [place.split("/raydpo/")[0] for place in places] == [
        str(tmp_path / "node"),
        str(tmp_path / "other"),
    ]


def test_a_run_that_was_trained_again_is_not_the_one_that_was_meant(run, tmp_path, monkeypatch):
    before = RemoteDirectory.now(run, "final")
    old = before.here()
    time.sleep(0.01)
    run.write("final/model.safetensors", b"WEIGHTS")
    assert held(RemoteDirectory.now(run, "final").here())["model.safetensors"] == b"WEIGHTS"
    assert held(old) == WHOLE, "someone may be reading it"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    with pytest.raises(ModelError, match="final has changed since this command began: it was trained again"):
        before.here()
    assert not list((tmp_path / "other").rglob("*.safetensors"))


def test_copies_that_nobody_used_for_long_make_room(run):
    old, other = Path(RemoteDirectory.now(run, "final").here()), remote()
    os.utime(old, (0, 0))
    other.write("final/config.json", b"{}")
    assert held(RemoteDirectory.now(other, "final").here()) == {"config.json": b"{}"} and not old.exists()


def test_many_processes_of_a_machine_fetch_once(run, monkeypatch):
    fetched, download = [], Storage.download

    def slow(storage, name, directory):
        time.sleep(0.2)
        download(storage, name, directory)
        fetched.append(name)

    monkeypatch.setattr(Storage, "download", slow)
    final, seen = RemoteDirectory.now(run, "final"), []
    threads = [threading.Thread(target=lambda: seen.append(held(final.here()))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [WHOLE] * 6 and fetched == ["final"]


def test_a_store_that_tells_no_times_is_asked_each_time(run, monkeypatch):
    monkeypatch.setattr(Storage, "_modified", lambda storage, info: 0.0)
    first, second = (RemoteDirectory.now(run, "final") for _ in range(2))
    assert first.stamp != second.stamp and held(first.here()) == held(second.here()) == WHOLE


def test_a_copy_that_cannot_be_kept_is_one_sentence(run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(RaydpoError, match=r"cannot keep a copy of memory://.*/final in .*; set XDG_CACHE_HOME"):
        RemoteDirectory.now(run, "final").here()


def test_a_home_in_which_nothing_can_be_written_is_passed_over(tmp_path, monkeypatch):
    """For example when a volume is mounted below ~/.cache, whose parent then belongs to root."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_home() == tmp_path / ".cache" / "raydpo"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    instead = tmp_path / "tmp" / f"raydpo-{os.getuid()}"
    assert local_home() == instead / "raydpo" and instead.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(local_copy.os, "getuid", lambda: 12345)  # another user, who made the place of ours
    (tmp_path / "tmp" / "raydpo-12345").mkdir()
    assert local_home().parent.name not in ("raydpo-12345", instead.name)
