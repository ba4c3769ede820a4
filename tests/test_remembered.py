"""Results that a machine remembers."""

import json
import multiprocessing
import os
import time

import pytest

from raydpo.storage.memory import program, remembered, stamp


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def test_a_result_is_found_once_for_equal_inputs():
    found = []

    def find():
        found.append(1)
        return {"lines": ["a"], "number": len(found)}

    assert remembered("kind", ["model", 1], find) == {"lines": ["a"], "number": 1}
    assert remembered("kind", ["model", 1], find) == {"lines": ["a"], "number": 1}
    assert remembered("kind", ["model", 2], find)["number"] == 2
    assert remembered("other", ["model", 1], find)["number"] == 3


def find_slowly(place, number):
    def find():
        time.sleep(0.5)
        (place / f"found-{number}").touch()
        return "found"

    assert remembered("kind", "asked by all at once", find) == "found"


def test_one_of_several_processes_finds_it_and_the_others_wait(tmp_path):
    """As workers that hash the same model."""
    workers = [multiprocessing.get_context("fork").Process(target=find_slowly, args=(tmp_path, n)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len(list(tmp_path.glob("found-*"))) == 1
    assert [file.suffix for file in (tmp_path / "home" / "raydpo" / "kind").iterdir()] == [".json"]


def never_find(place):
    def find():
        (place / "begun").touch()
        time.sleep(600)

    remembered("kind", "asked by all at once", find)


def test_a_process_that_is_killed_while_it_finds_it_holds_nobody_up(tmp_path):
    context = multiprocessing.get_context("fork")
    killed, waiting = context.Process(target=never_find, args=(tmp_path,)), None
    killed.start()
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    waiting = context.Process(target=find_slowly, args=(tmp_path, 1))
    waiting.start()
    waiting.join(0.7)
    assert waiting.is_alive() and not list(tmp_path.glob("found-*"))
    killed.kill()
    waiting.join(30)
    assert waiting.exitcode == 0 and (tmp_path / "found-1").exists()


def test_an_error_is_not_remembered():
    def fail():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        remembered("kind", 1, fail)
    assert remembered("kind", 1, lambda: 5) == 5


def test_a_damaged_or_unwritable_memory_costs_only_time(tmp_path, monkeypatch):
    remembered("kind", 1, lambda: 5)
    (file,) = (tmp_path / "home" / "raydpo" / "kind").iterdir()
    file.write_text(file.read_text()[:0])
    assert remembered("kind", 1, lambda: 6) == 6
    assert json.loads(file.read_text()) == 6
    (tmp_path / "taken").write_text("a file where the directory would be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    assert remembered("kind", 1, lambda: 7) == 7


def test_the_stamp_changes_with_a_file_that_is_overwritten_within_its_times(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"1234")
    before = stamp(file)
    file.write_bytes(b"5678")
    os.utime(file, ns=(before[3], before[3]))
    assert stamp(file)[3] == before[3] and stamp(file) != before


def test_the_program_names_versions_and_packages_that_are_missing():
    digest, torch, missing = program("torch", "no-such-package")
    assert len(digest) == 64 and torch.startswith("torch 2") and missing == "no-such-package None"
