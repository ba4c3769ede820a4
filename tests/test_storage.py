import errno
import importlib.util
import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import fsspec
import pyarrow as pa
import pytest
from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from raydpo.errors import ConfigError, RaydpoError
from raydpo.storage import files as storage_module
from raydpo.storage.files import Storage, remove_stale_temporaries, stale_temporaries
from raydpo.storage.uri import carries_secret, redact


@pytest.fixture(params=["local", "file", "memory"])
def storage(request, tmp_path):
    return Storage(
        {"local": str(tmp_path / "place"), "file": f"file://{tmp_path}/place", "memory": f"memory://place-{time.time_ns()}"}[
            request.param
        ]
    )


def test_written_is_read_and_listed(storage):
    storage.write("a/one", b"1")
    storage.write("a/two", pa.py_buffer(b"2"))
    storage.write("a/one", b"3")
    assert storage.read("a/one") == b"3" and storage.read("a/two") == b"2"
    assert storage.list("a") == ["one", "two"]
    assert storage.exists("a/two") and not storage.exists("a/three") and storage.list("nowhere") == []
    with pytest.raises(FileNotFoundError):
        storage.read("a/three")


def test_entries_tell_sizes_and_times_by_the_clock_of_the_store(storage):
    storage.write("a/two", b"22")
    storage.write("a/one", b"1")
    storage.write("a/below/three", b"")
    assert [(entry.name, entry.size) for entry in storage.entries("a")] == [("one", 1), ("two", 2)]
    assert all(0 <= storage.clock() - entry.modified < 5 for entry in storage.entries("a"))
    assert storage.entries("nowhere") == [] and storage.list() == ["a"], "the clock leaves nothing behind"


def test_moved_and_deleted(storage):
    storage.write("a/one", b"1")
    storage.write("b/one", b"old")
    storage.move("a/one", "b/one")
    storage.move("b/one", "c/d/one")
    assert storage.read("c/d/one") == b"1" and not storage.exists("a/one") and not storage.exists("b/one")
    for _ in range(2):
        storage.delete("c/d/one")
    assert not storage.exists("c/d/one")
    with pytest.raises(FileNotFoundError):
        storage.move("a/one", "b/one")


def test_a_directory_replaces_what_was_there(storage, tmp_path):
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    (source / "inner" / "file").write_bytes(b"new")
    storage.write("final/inner/earlier", b"")
    for _ in range(2):
        storage.upload(source, "final")
    assert storage.read("final/inner/file") == b"new" and storage.list("final/inner") == ["file"]


@pytest.mark.parametrize("one_disk", [True, False])
def test_files_are_moved_beside_those_of_others_and_a_second_call_moves_the_rest(storage, tmp_path, monkeypatch, one_disk):
    source = tmp_path / "source"
    source.mkdir()
    if not one_disk:

        def replace(path, target, real=Path.replace):
            if path.parent == source:
                raise OSError(errno.EXDEV, "Invalid cross-device link")
            return real(path, target)

        monkeypatch.setattr(Path, "replace", replace)
    storage.write("step/other", b"0")
    for name in ("a", "b"):
        (source / name).write_bytes(name.encode())
    storage.move_into(source, "step")
    (source / "b").write_bytes(b"again")
    storage.move_into(source, "step")
    assert storage.list("step") == ["a", "b", "other"] and not list(source.iterdir())
    assert [storage.read(f"step/{name}") for name in ("a", "b")] == [b"a", b"again"]


def test_a_failed_copy_of_a_directory_leaves_no_temporary(tmp_path):
    storage = Storage(str(tmp_path))
    storage.write("final/file", b"old")
    with pytest.raises(FileNotFoundError):
        storage.upload(tmp_path / "nowhere", "final")
    assert os.listdir(tmp_path) == ["final"] and storage.read("final/file") == b"old"


def test_names_cannot_leave_the_place(storage):
    for name in ("../x", "a/../../x", "/etc/passwd"):
        with pytest.raises(RaydpoError, match="would leave"):
            storage.path(name)


def test_another_process_gets_the_same_place(storage):
    storage.write("file", b"1")
    assert pickle.loads(pickle.dumps(storage)).read("file") == b"1"


# ---- local disks


def test_another_working_directory_gets_the_same_place(tmp_path, monkeypatch):
    """Workers of a running cluster have another working directory than the command."""
    monkeypatch.chdir(tmp_path)
    here = Storage("runs")
    here.write("a", b"1")
    monkeypatch.chdir("/")
    assert str(here) == "runs" and Storage(here.uri).read("a") == b"1"


def test_a_failed_write_leaves_the_old_content_and_no_temporary(tmp_path, monkeypatch):
    storage = Storage(str(tmp_path))
    storage.write("file", b"old")

    def full(descriptor):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"quota exceeded; free some of your quota; .*kept: .*file"):
        storage.write("file", b"new")
    assert storage.read("file") == b"old" and os.listdir(tmp_path) == ["file"]


def test_a_disk_that_is_full_or_read_only_keeps_what_was_stored(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "raydpo-test", tmp_path], capture_output=True).returncode:
        pytest.skip("this user cannot mount a small disk")
    try:
        storage = Storage(str(tmp_path))
        storage.write("file", b"old")
        with pytest.raises(OSError, match=r"No space left on device; free some space; .*kept: .*file") as caught:
            storage.write("file", bytes(1 << 20))
        assert caught.value.errno == errno.ENOSPC
        assert storage.read("file") == b"old" and os.listdir(tmp_path) == ["file"]
        storage.write("file", b"new")
        assert not subprocess.run(["mount", "-o", "remount,ro", tmp_path], capture_output=True).returncode
        with pytest.raises(OSError, match="choose a place that can be written"):
            storage.write("file", b"newer")
        with pytest.raises(RaydpoError, match=r"cannot write to .*Read-only"):
            storage.probe()
        assert storage.read("file") == b"new"
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_rename_and_every_new_directory_reach_the_disk(tmp_path, monkeypatch):
    """fsync of the file before the rename; then of its directory, and of those that contain a new directory."""
    synced, fsync = [], os.fsync

    def watched(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    Storage(str(tmp_path)).write("a/b/file", b"1")
    assert set(synced[:2]) == {tmp_path, tmp_path / "a"}
    assert synced[2].name.startswith(".tmp-") and synced[3] == tmp_path / "a" / "b"


def test_a_temporary_that_another_machine_of_this_name_removed_is_written_again(tmp_path, monkeypatch):
    fsync, removed = os.fsync, []

    def meddle(descriptor):
        fsync(descriptor)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if not removed and ".tmp-" in path:
            os.unlink(path)
            removed.append(path)

    monkeypatch.setattr(os, "fsync", meddle)
    Storage(str(tmp_path)).write("file", b"1")
    assert removed and (tmp_path / "file").read_bytes() == b"1" and os.listdir(tmp_path) == ["file"]


def test_a_kill_before_any_line_leaves_the_old_content_or_the_new(tmp_path):
    script = f"""
import os, signal, sys
from raydpo.storage.files import Storage, remove_stale_temporaries
storage = Storage({str(tmp_path)!r})
for lines in range(1000):
    storage.write("file", b"old")
    child = os.fork()
    if not child:
        def step(*_):
            global lines
            lines -= 1
            if lines < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return step
        sys.settrace(step)
        storage.write("file", b"new")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    content = storage.read("file").decode()
    print(status, content, remove_stale_temporaries(storage, ""), *storage.list())
    if status == 0:
        break
"""
    lines = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    killed, ended = lines[:-1], lines[-1]
    assert ended == "0 new 0 file" and len(killed) > 15
    assert set(killed) == {"9 old 0 file", "9 old 1 file", "9 new 0 file"}


def test_an_old_temporary_of_this_host_is_stale_though_its_number_is_in_use(tmp_path):
    """As in a container, whose first process has the same number after each start."""
    storage = Storage(str(tmp_path))
    old = tmp_path / f".tmp-{os.uname().nodename}-{os.getpid()}-{'0' * 32}"
    old.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    assert stale_temporaries(storage, "") == [] and stale_temporaries(storage, "", older_than=3 * 3600) == []
    assert [entry.name for entry in stale_temporaries(storage, "", older_than=3600)] == [old.name]


class Remembering(MemoryFileSystem):
    """A driver that caches listings without a time limit, as hf:// does, and always lists recursively."""

    protocol = "remembering"

    def __init__(self, **settings):
        super().__init__(**settings)
        self.listings = {}

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("remembering://", "/"))

    def ls(self, path, detail=True, **settings):
        path = self._strip_protocol(path)
        if path not in self.listings:
            self.listings[path] = super().ls(path, detail=True, **settings)
        return self.listings[path] if detail else [one["name"] for one in self.listings[path]]

    def info(self, path, **settings):
        path = self._strip_protocol(path)
        parent = self._parent(path)
        if parent in self.listings:
            found = [one for one in self.listings[parent] if one["name"] == path]
            if not found:
                raise FileNotFoundError(path)
            return found[0]
        return super().info(path, **settings)

    def find(self, path, maxdepth=None, **settings):
        return AbstractFileSystem.find(self, path, **settings)  # which asks ls

    def invalidate_cache(self, path=None):
        while path:
            self.listings.pop(path, None)
            path = "" if path == "/" else self._parent(path)


def test_a_driver_that_remembers_its_listings_sees_what_others_write():
    fsspec.register_implementation("remembering", Remembering, clobber=True)
    place = f"/place-{time.time_ns()}"
    storage, others = Storage(f"remembering:/{place}"), MemoryFileSystem()
    assert storage.root == place and storage.list("a") == [] and not storage.exists("a/one")
    storage.write("a/one", b"1")
    assert storage.list("a") == ["one"] and not storage.exists("a/two") and storage.list() == ["a"]
    others.pipe_file(f"{place}/a/two", b"22")
    others.pipe_file(f"{place}/a/below/three", b"333")
    assert storage.list("a") == ["below", "one", "two"] and storage.exists("a/two")
    assert [(entry.name, entry.size) for entry in storage.entries("a")] == [("one", 1), ("two", 2)]
    others.rm_file(f"{place}/a/two")
    assert not storage.exists("a/two") and storage.list("a") == ["below", "one"] and storage.list() == ["a"]


def test_temporaries_of_other_hosts_are_stale_only_when_old_by_the_clock_of_the_store(tmp_path):
    storage = Storage(str(tmp_path))
    old, young = (tmp_path / f".tmp-otherhost-1-{digit * 32}" for digit in "01")
    for path in (old, young, tmp_path / "file"):
        path.write_bytes(b"half")
        os.utime(path, (time.time() - 7200,) * 2)
    os.utime(young)
    assert stale_temporaries(storage, "") == []
    assert [entry.name for entry in stale_temporaries(storage, "", older_than=3600)] == [old.name]
    assert remove_stale_temporaries(storage, "") == 0
    assert remove_stale_temporaries(storage, "", older_than=3600) == 1 and not old.exists() and young.exists()


def test_probe_needs_a_writable_place(tmp_path):
    Storage(str(tmp_path / "new" / "place")).probe()
    assert os.listdir(tmp_path / "new" / "place") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(RaydpoError, match="cannot write"):
        Storage(str(tmp_path / "file" / "below")).probe()


# ---- addresses


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("/plain/path", "/plain/path"),
        ("s3://bucket/cache", "s3://bucket/cache"),
        ("s3://key:secret@bucket/cache", "s3://***@bucket/cache"),
        ("-----BEGIN RSA PRIVATE KEY-----\nSECRET\n-----END RSA PRIVATE KEY-----\nbelow", "***\nbelow"),
        ("-----BEGIN PRIVATE KEY-----\nSECRET", "***"),
        ("s3://key:sec/r+t@bucket/cache", "s3://***@bucket/cache"),
        (
            "s3://bucket/c?access_key=AK&region=eu&endpoint_override=h:9000&scheme=http",
            "s3://bucket/c?access_key=***&region=eu&endpoint_override=h:9000&scheme=http",
        ),
        ("abfss://container@account.dfs.core.windows.net/c", "abfss://container@account.dfs.core.windows.net/c"),
        ("https://host/c?sig=secret", "https://host/c?sig=***"),
        ("https://secret@host/c", "https://***@host/c"),
        ("https://host/c?secret", "https://host/c?***"),
        ("https://host/c?sig=", "https://host/c?sig="),
        ("https://host/c?region=eu&secret&sig=secret", "https://host/c?region=eu&***&sig=***"),
    ],
)
def test_redact(uri, shown):
    assert redact(uri) == shown and carries_secret(uri) == (shown != uri)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://key:SECRET@bucket/x?nonsense=1",
        "s3://key:SEC/RET@bucket/x",
        "s3://bucket/x?secret_key=SECRET",
        "nosuch://host/x?SECRET&y=1",
        "abfss://user:SECRET@/x?y=1",
        "nosuch://user:SECRET@host/x",
        "ftp://user:SECRET@localhost:1/x",
    ],
)
def test_no_secret_in_an_error(uri):
    with pytest.raises(RaydpoError, match=r"^cannot open .*\*\*\*") as caught:
        Storage(uri)
    assert not any(secret in str(caught.value) for secret in ("SECRET", "SEC/RET", "user", "key:"))


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("s3://", "names no bucket; it should look like s3://bucket/path"),
        ("s3://bucket/x?colour=blue", "Unexpected query parameter"),
        ("file://relative/path", "cannot open file://relative/path"),
        ("nosuch://x", "cannot open nosuch://x"),
    ],
)
def test_an_address_that_cannot_be_meant(uri, told):
    with pytest.raises(ConfigError, match=told) as caught:
        Storage(uri)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("uri", "package"), [("az://container/x", "adlfs"), ("sftp://host/x", "paramiko")])
def test_a_missing_driver_is_a_line_to_type(uri, package):
    if importlib.util.find_spec(package):
        pytest.skip("it is installed")
    with pytest.raises(RaydpoError, match=f"cannot open {uri}: its driver is not installed; run: pip install {package}$"):
        Storage(uri)


# ---- drivers that fail


class Flaky(MemoryFileSystem):
    """Fails a given number of times with exceptions of HTTP libraries, as drivers do."""

    protocol = "flaky"
    errors: ClassVar[list[Exception]] = []
    torn = 0

    def pipe_file(self, path, value, **kwargs):
        if Flaky.errors:
            raise Flaky.errors.pop()
        if Flaky.torn:
            Flaky.torn -= 1
            value = value[: len(value) // 2]
        super().pipe_file(path, value, **kwargs)


class ConnectError(Exception):
    """Like httpx's, which is no OSError."""


@pytest.fixture
def flaky(monkeypatch):
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(storage_module, "WAITS", (0.001,) * 3)
    yield Storage(f"flaky://place-{time.time_ns()}")
    Flaky.errors, Flaky.torn = [], 0


@pytest.mark.parametrize(
    "error",
    [
        ConnectError("reset"),
        TimeoutError("timed out"),
        OSError("HTTP 503"),
        ConnectionResetError(104, "reset"),
        OSError("AUTH of SIGNATURE ACCESS_DENIED in a name"),
    ],
)
def test_what_may_pass_is_tried_again(flaky, error):
    Flaky.errors = [error] * 3
    flaky.write("file", b"data")
    assert flaky.read("file") == b"data"
    Flaky.errors = [error] * 4
    with pytest.raises(RaydpoError, match=r"cannot write flaky://place-\d+/file: the store failed 4 times in .* again"):
        flaky.write("file", b"new")
    assert flaky.read("file") == b"data"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionError("Forbidden"), "the store refuses, Forbidden. Check the bucket's name"),
        (OSError("AWS Error ACCESS_DENIED during PutObject operation: no"), "the store refuses"),
        (OSError("google::cloud::Status(PERMISSION_DENIED: no)"), "the store refuses"),
        (NotImplementedError("read only"), "cannot write .*: read only"),
        (ValueError("bad name"), "cannot write .*: bad name"),
    ],
)
def test_what_will_not_pass_is_told_at_once(flaky, error, told):
    Flaky.errors = [error]
    with pytest.raises(RaydpoError, match=told):
        flaky.write("file", b"data")
    assert not flaky.exists("file") and Flaky.errors == []


def test_patience_ends_also_where_each_attempt_takes_long(flaky, monkeypatch):
    monkeypatch.setattr(storage_module, "PATIENCE", 0.0)
    Flaky.errors = [OSError("timed out")] * 2
    with pytest.raises(RaydpoError, match="failed 1 times"):
        flaky.write("file", b"data")


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(storage_module, "TELL_AFTER", 0.05)
    monkeypatch.setattr(storage_module, "WAITS", (0.3, 0.001))


def test_a_store_that_keeps_failing_is_told_while_it_is_tried(flaky, impatient, capsys):
    Flaky.errors = [ConnectError("no route to ***")] * 2
    flaky.write("file", b"data")
    place = f"{flaky.uri}/file"
    assert capsys.readouterr().err == (
        f"warning: no success in 0 s of trying to write {place}, last with no route to ***. It is still being tried; "
        "is the address right, and is the store reachable from here?\n"
    )
    flaky.write("file", b"data")
    assert flaky.read("file") == b"data" and capsys.readouterr().err == "", "an answer in time is not told"


def test_a_store_that_does_not_answer_is_told_but_not_a_long_transfer(flaky, impatient, capsys, monkeypatch):
    """No attempt has failed yet: it hangs. A large file may take as long as it needs."""
    put = Storage._put
    monkeypatch.setattr(Storage, "_put", lambda *given: (time.sleep(0.2), put(*given))[1])
    flaky.write("large", bytes(storage_module.SMALL + 1))
    assert capsys.readouterr().err == ""
    flaky.write("small", bytes(storage_module.SMALL))
    assert re.match(
        r"warning: no success in 0 s of trying to write flaky://place-\d+/small\. It is", capsys.readouterr().err
    )


def test_opening_tells_without_secrets(flaky, impatient, capsys, monkeypatch):
    def hang(uri):
        time.sleep(0.2)
        return flaky.fs, uri

    monkeypatch.setattr(storage_module, "_open_remote", hang)
    Storage("s3://me:hunter2@bucket/place")
    said = capsys.readouterr().err
    assert said.startswith("warning: no success in 0 s of trying to open s3://") and "hunter2" not in said


def test_what_arrived_in_part_does_not_stay(flaky):
    Flaky.torn = 3
    flaky.write("file", b"data")
    assert flaky.read("file") == b"data"
    Flaky.torn = 4
    with pytest.raises(RaydpoError, match="2 of 4 bytes arrived"):
        flaky.write("torn", b"data")
    assert not flaky.exists("torn")


def test_what_is_no_bytes_is_not_stored(storage):
    with pytest.raises(TypeError):
        storage.write("file", "text")
    assert storage.list() == []
