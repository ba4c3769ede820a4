"""Files by local path or URI, and the one way to write them: whole or not at all.

Local paths, ``s3://``, ``gs://`` and ``abfs://`` through pyarrow, ``hf://``, ``az://`` and everything else through fsspec.
"""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import pyarrow as pa
from pyarrow import fs as pafs

from raydpo.config import is_uri
from raydpo.errors import RaydpoError

__all__ = ["Entry", "Storage", "redact", "remove_stale_temporaries", "stale_temporaries"]

T = TypeVar("T")
_TEMPORARY = re.compile(r"^\.tmp-(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{32}$")
_PROBE = re.compile(r"^\.probe-[0-9a-f]{32}$")
WAITS = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Seconds before each further attempt on a remote file system, which answers every so often with 500, 503 or not at all."""
# Said by a store that will say the same the next time.
_FINAL = re.compile(r"ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY|SIGNATURE|UNRECOGNIZED_CLIENT|AUTH|"
                    r"HTTP status 40[0134]", re.IGNORECASE)
_DRIVERS = {"az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs",
            "hf": "huggingface_hub"}


@dataclass(frozen=True)
class Entry:
    """A file below a directory: its name, size in bytes, and when it was written, seconds since the epoch by the clock of
    the store."""

    name: str
    size: int
    modified: float


class Storage:
    """A directory on any file system that pyarrow or fsspec opens; names below it are relative, with ``/``.

    On remote file systems what fails for the moment is tried again, for about a minute.

    Args:
        uri: local path or URI. It need not exist yet.

    Raises:
        RaydpoError: if no file system answers to the URI.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.fs, self.root = _open(uri)

    def __str__(self) -> str:
        """The URI, fit to be printed."""
        return redact(self.uri)

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, pafs.LocalFileSystem)

    def path(self, name: str = "") -> str:
        """The path of ``name`` on this file system."""
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise RaydpoError(f"{name!r} would leave {self}")
        return f"{self.root}/{name}" if name else self.root

    def exists(self, name: str = "") -> bool:
        return self._persist(lambda: self.fs.get_file_info(self.path(name))).type != pafs.FileType.NotFound

    def list(self, name: str = "") -> list[str]:
        """Names of the entries directly below ``name``, sorted; empty if it does not exist."""
        return sorted(info.base_name for info in self._infos(name))

    def entries(self, name: str = "") -> list[Entry]:
        """The files directly below ``name``, in order of name; none if it does not exist."""
        return sorted((Entry(info.base_name, info.size, info.mtime_ns / 1e9 if info.mtime_ns else 0.0)
                       for info in self._infos(name) if info.type == pafs.FileType.File), key=lambda entry: entry.name)

    def _infos(self, name: str) -> list[pafs.FileInfo]:
        return self._persist(lambda: self.fs.get_file_info(pafs.FileSelector(self.path(name), allow_not_found=True)))

    def read(self, name: str) -> bytes:
        """The whole file.

        Raises:
            FileNotFoundError: if there is none.
        """
        def read() -> bytes:
            with self.fs.open_input_stream(self.path(name)) as stream:
                return stream.read()

        return self._persist(read)

    def write(self, name: str, data: bytes | pa.Buffer) -> None:
        """Write ``data`` atomically: flushed and renamed locally, one put or multipart upload on an object store.

        Readers see the old content or the new, never a part of it, and a kill leaves at most a temporary file that
        ``remove_stale_temporaries`` knows.

        Raises:
            OSError: if this place is full, read-only or not ours; the old content stays.
            RaydpoError: if a remote store keeps failing.
        """
        target = self.path(name)
        if not self.is_local:
            self._persist(lambda: self._put(target, data))
            return
        path = Path(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(_temporary_name())
        try:
            with open(temporary, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
            _sync_directory(path.parent)
        except OSError as error:
            raise _explained(error, str(path)) from None
        finally:
            temporary.unlink(missing_ok=True)

    def _put(self, target: str, data: bytes | pa.Buffer) -> None:
        with self.fs.open_output_stream(target) as stream:
            stream.write(data)
        # A stream that failed half-way may be closed all the same; some file systems then keep what had arrived.
        size = self.fs.get_file_info(target).size
        if size != len(data):
            raise OSError(f"{size} of {len(data)} bytes arrived")

    def delete(self, name: str) -> None:
        """Delete a file; none is no error."""
        try:
            self._persist(lambda: self.fs.delete_file(self.path(name)))
        except FileNotFoundError:
            return

    def move(self, name: str, to: str) -> None:
        """Rename a file: at once locally, copied and then deleted on an object store.

        Raises:
            FileNotFoundError: if there is none.
        """
        if self.is_local:
            Path(self.path(to)).parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.path(name), self.path(to))
        else:
            self.write(to, self.read(name))
            self.delete(name)

    def clock(self) -> float:
        """Now, by the clock that stamps the files here, which need not be this machine's."""
        name = f".probe-{uuid.uuid4().hex}"
        self.write(name, b"")
        try:
            return self.fs.get_file_info(self.path(name)).mtime_ns / 1e9
        finally:
            self.delete(name)

    def _persist(self, act: Callable[[], T]) -> T:
        """``act``, again and again where it fails for the moment."""
        for wait in (*WAITS, None):
            try:
                return act()
            except (FileNotFoundError, PermissionError, RaydpoError):
                raise
            except OSError as error:
                if self.is_local:
                    raise
                reason = " ".join(str(error).split())[:300]
                if _FINAL.search(reason):
                    raise RaydpoError(f"{self} refuses: {reason}. Check the credentials, the bucket's name and its "
                                      "policy") from None
                if wait is None:
                    raise RaydpoError(f"{self} does not answer, {len(WAITS) + 1} attempts in {sum(WAITS):.0f} s: {reason}. "
                                      "Nothing that was stored is lost; run it again when the store is back") from None
                time.sleep(wait * random.uniform(0.5, 1.0))  # so that a hundred workers do not come back at once
        raise AssertionError

    def upload(self, directory: Path, name: str) -> None:
        """Copy a local directory here, as ``name``, in place of what was there. Locally it appears whole or not at all."""
        if not self.is_local:
            pafs.copy_files(str(directory), self.path(name), source_filesystem=pafs.LocalFileSystem(),
                            destination_filesystem=self.fs)
            return
        target = Path(self.path(name))
        temporary = target.with_name(_temporary_name())
        shutil.copytree(directory, temporary)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)

    def probe(self) -> None:
        """Prove that this place can be written, before a long computation relies on it.

        Raises:
            RaydpoError: naming the place and the reason.
        """
        name = f".probe-{uuid.uuid4().hex}"
        try:
            if self.is_local:
                Path(self.root).mkdir(parents=True, exist_ok=True)
            self.write(name, b"raydpo")
            self.fs.delete_file(self.path(name))
        except OSError as error:
            raise RaydpoError(f"cannot write to {self}: {error}") from None


def redact(uri: str) -> str:
    """``uri`` without the secrets that it may carry: user and password, and the values of all but harmless options."""
    if not is_uri(uri):
        return uri
    parts = urlsplit(uri)
    host = parts.netloc.rsplit("@", 1)[-1] if ":" in parts.netloc.rsplit("@", 1)[0] else parts.netloc
    host = host if host == parts.netloc else f"***@{host}"
    query = urlencode([(key, value if key in ("endpoint_override", "scheme", "region") else "***")
                       for key, value in parse_qsl(parts.query)], safe="*:/")
    return urlunsplit((parts.scheme, host, parts.path, query, ""))


def stale_temporaries(storage: Storage, name: str, older_than: float | None = None) -> list[Entry]:
    """What killed processes left half-written in directory ``name``.

    Those of this host whose process is gone; those of other hosts only if they are older than so many seconds by the clock
    of the file system, since nobody here can know whether their writer lives.
    """
    if not storage.is_local:
        return []  # an object store has no half-written objects
    now = None
    stale = []
    for entry in storage.entries(name):
        match = _TEMPORARY.match(entry.name)
        if match and match["host"] == socket.gethostname():
            if not _is_alive(int(match["pid"])):
                stale.append(entry)
        elif (match or _PROBE.match(entry.name)) and older_than is not None:
            now = storage.clock() if now is None else now
            if now - entry.modified > older_than:
                stale.append(entry)
    return stale


def remove_stale_temporaries(storage: Storage, name: str) -> int:
    """Delete what killed processes of this host left half-written in directory ``name``; how many there were."""
    stale = stale_temporaries(storage, name)
    for entry in stale:
        storage.delete(f"{name}/{entry.name}")
    return len(stale)


def _temporary_name() -> str:
    return f".tmp-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync_directory(directory: Path) -> None:
    """So that a power cut cannot take back a rename."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)


_FIXES = {errno.ENOSPC: "free some space", errno.EDQUOT: "free some of your quota",
          errno.EACCES: "check who may write there", errno.EROFS: "choose a place that can be written"}


def _explained(error: OSError, place: str) -> OSError:
    """The same error, with the place and what mends it."""
    fix = _FIXES.get(error.errno or 0)
    return type(error)(error.errno, f"{error.strerror}; {fix}; what was stored before is kept", place) if fix else error


def _open(uri: str) -> tuple[pafs.FileSystem, str]:
    if not is_uri(uri):
        return pafs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
    try:
        fs, root = pafs.FileSystem.from_uri(uri)
        return fs, root.rstrip("/")
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ImportError):
        pass  # a scheme, or a form of it, that pyarrow does not speak itself
    except OSError as error:
        raise RaydpoError(f"cannot open {redact(uri)}: {' '.join(str(error).split())[:300]}") from None
    scheme = uri.split("://", 1)[0]
    try:
        import fsspec

        handler, root = fsspec.core.url_to_fs(uri)
    except ImportError:
        raise RaydpoError(f"cannot open {redact(uri)}: its driver is not installed; run: pip install "
                          f"{_DRIVERS.get(scheme, 'fsspec')}") from None
    except Exception as error:  # each driver raises what it likes
        raise RaydpoError(f"cannot open {redact(uri)}: {' '.join(str(error).split())[:300]}") from None
    return pafs.PyFileSystem(pafs.FSSpecHandler(handler)), root.rstrip("/")
