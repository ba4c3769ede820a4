"""Files by local path or URI, and the one way to write them: whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
import socket
import uuid
from pathlib import Path, PurePosixPath

import pyarrow as pa
from pyarrow import fs as pafs

from raydpo.config import is_uri
from raydpo.errors import RaydpoError

__all__ = ["Storage", "remove_stale_temporaries"]

_TEMPORARY = re.compile(r"^\.tmp-(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{32}$")


class Storage:
    """A directory on any file system that pyarrow or fsspec opens; names below it are relative, with ``/``.

    Args:
        uri: local path or URI. It need not exist yet.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.fs, self.root = _open(uri)

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, pafs.LocalFileSystem)

    def path(self, name: str = "") -> str:
        """The path of ``name`` on this file system."""
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise RaydpoError(f"{name!r} would leave {self.uri}")
        return f"{self.root}/{name}" if name else self.root

    def exists(self, name: str = "") -> bool:
        return self.fs.get_file_info(self.path(name)).type != pafs.FileType.NotFound

    def list(self, name: str = "") -> list[str]:
        """Names of the entries directly below ``name``, sorted; empty if it does not exist."""
        selector = pafs.FileSelector(self.path(name), allow_not_found=True)
        return sorted(info.base_name for info in self.fs.get_file_info(selector))

    def read(self, name: str) -> bytes:
        with self.fs.open_input_stream(self.path(name)) as stream:
            return stream.read()

    def write(self, name: str, data: bytes | pa.Buffer) -> None:
        """Write ``data`` atomically: flushed and renamed locally, one put on an object store.

        Readers see the old content or the new, never a part of it, and a kill leaves at most a temporary file that
        ``remove_stale_temporaries`` knows.
        """
        target = self.path(name)
        if not self.is_local:
            with self.fs.open_output_stream(target) as stream:
                stream.write(data)
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
        finally:
            temporary.unlink(missing_ok=True)

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
            raise RaydpoError(f"cannot write to {self.uri}: {error}") from None


def remove_stale_temporaries(storage: Storage, name: str) -> int:
    """Delete what killed processes of this host left half-written in directory ``name``; how many there were."""
    if not storage.is_local:
        return 0  # an object store has no half-written objects
    removed = 0
    for entry in storage.list(name):
        match = _TEMPORARY.match(entry)
        if match and match["host"] == socket.gethostname() and not _is_alive(int(match["pid"])):
            Path(storage.path(f"{name}/{entry}")).unlink(missing_ok=True)
            removed += 1
    return removed


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


def _open(uri: str) -> tuple[pafs.FileSystem, str]:
    if not is_uri(uri):
        return pafs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
    try:
        fs, root = pafs.FileSystem.from_uri(uri)
        return fs, root.rstrip("/")
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        pass  # a scheme that pyarrow does not speak itself
    try:
        import fsspec

        handler, root = fsspec.core.url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise RaydpoError(f"cannot open {uri}: {error}") from None
    return pafs.PyFileSystem(pafs.FSSpecHandler(handler)), root.rstrip("/")
