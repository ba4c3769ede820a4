import threading
import time

from raydpo.local_copy import LocalCopy
from raydpo.storage import Storage


def remote():
    return Storage(f"memory://copies-{time.time_ns()}")


def starts_well(data):
    return data.startswith(b"good")


def test_a_sound_copy_is_read_here_and_an_unsound_one_fetched_again(tmp_path):
    storage = remote()
    storage.write("parts/one", b"good 1")
    copies = LocalCopy(storage, tmp_path)
    assert copies.fetch("parts/one", starts_well) == b"good 1"
    storage.delete("parts/one")
    assert copies.fetch("parts/one", starts_well) == b"good 1"
    (tmp_path / "parts" / "one").write_bytes(b"bad")
    storage.write("parts/one", b"good 2")
    assert copies.fetch("parts/one", starts_well) == b"good 2"


def test_what_is_unsound_afar_is_not_kept(tmp_path):
    storage = remote()
    storage.write("one", b"bad")
    assert LocalCopy(storage, tmp_path).fetch("one", starts_well) == b"bad" and not (tmp_path / "one").exists()


def test_a_place_that_cannot_keep_copies_costs_time_alone(tmp_path):
    (tmp_path / "file").write_text("")
    storage = remote()
    storage.write("one", b"good")
    copies = LocalCopy(storage, tmp_path / "file" / "below")
    assert [copies.fetch("one", starts_well) for _ in range(2)] == [b"good"] * 2
    assert len(copies.problems) == 1 and "XDG_CACHE_HOME" in copies.problems[0]


def test_many_at_once_see_no_torn_file(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("copies")
    storage = Storage(str(tmp_path_factory.mktemp("remote")))  # fsspec's memory:// is not made for threads
    content = b"good" * 100_000
    storage.write("one", content)
    seen = []
    threads = [threading.Thread(target=lambda: seen.append(LocalCopy(storage, tmp_path).fetch("one", content.__eq__)))
               for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [content] * 12 and [file.name for file in tmp_path.iterdir()] == ["one"]


def test_pruning_keeps_what_is_still_there(tmp_path):
    storage = remote()
    copies = LocalCopy(storage, tmp_path)
    for name in ("one", "two"):
        storage.write(f"parts/{name}", b"good")
        copies.fetch(f"parts/{name}", starts_well)
    assert copies.prune("parts", {"two"}) == 1 and [file.name for file in (tmp_path / "parts").iterdir()] == ["two"]
