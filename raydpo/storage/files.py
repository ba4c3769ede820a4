"""Read and write files by local path or URI. Every write is atomic: a file appears whole or not at all.

pyarrow opens local paths, ``s3://``, ``gs://`` and ``abfs://``. fsspec opens ``hf://``, ``az://`` and all other schemes,
behind pyarrow's interface.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import shutil
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import quote, unquote

import pyarrow as pa
from pyarrow import fs as pafs

from raydpo.errors import ConfigError, RaydpoError, one_line
from raydpo.storage.uri import is_uri, redact, secrets_of

__all__ = [
    "FileInfo",
    "Storage",
    "redact",
    "remove_stale_temporaries",
    "stale_temporaries",
]

T = TypeVar("T")
_TEMPORARY = re.compile(r"^\.tmp-(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{32}$")
_PROBE = re.compile(r"^\.probe-[0-9a-f]{32}$")
WAITS = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Seconds to wait before each retry on a remote file system, which may answer 500 or 503, or not at all, for a while.

Within each attempt pyarrow's S3 client makes 31 attempts of its own, 0.2 s apart."""
PATIENCE = 300.0
"""Seconds after which there is no further retry: a store that hangs takes much longer than ``WAITS``."""
TELL_AFTER = 5.0
"""Seconds without an answer after which a line on standard error tells what is being tried."""
SMALL = 1 << 20
"""Bytes of a file that any store writes within ``TELL_AFTER``. Larger ones may take that long, so the line comes only after
an attempt has failed."""
# Error codes of S3, Google and Azure that a retry does not change, in their own spelling, so that no file name matches.
_REFUSALS = re.compile(
    r"AWS Error (ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY_ID|INVALID_CLIENT_TOKEN_ID|INVALID_SIGNATURE|"
    r"SIGNATURE_DOES_NOT_MATCH|UNRECOGNIZED_CLIENT|MISSING_AUTHENTICATION_TOKEN|OPT_IN_REQUIRED|VALIDATION)\b|"
    r"\(HTTP status (301|307|400|401|403|404)\)|Bucket '.*' not found|"
    r"\b(PERMISSION_DENIED|UNAUTHENTICATED|AuthorizationFailure|AuthenticationFailed|AuthorizationPermissionMismatch|"
    r"InvalidAuthenticationInfo|ContainerNotFound|AccountIsDisabled|ClientAuthenticationError)\b"
)
_DRIVERS = {
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "s3": "s3fs",
    "hf": "huggingface_hub",
}


@dataclass(frozen=True)
class FileInfo:
    """A file in a directory: name, size in bytes, and time of its last change in seconds since the epoch, by the clock of
    the store (0 if the store does not tell)."""

    name: str
    size: int
    modified: float


class Storage:
    """A directory on any file system that pyarrow or fsspec opens. File names are relative to it, with ``/``.

    Remote operations that fail temporarily are retried for at least a minute (see ``WAITS``). ``s3://`` respects
    AWS_ENDPOINT_URL and ``?endpoint_override=host:port&scheme=http&region=...``.

    Args:
        uri: local path or URI. It need not exist yet.

    Attributes:
        uri: the URI, or the absolute local path; valid in processes with another working directory.
        root: path of the directory on its file system.

    Raises:
        ConfigError: if the URI is invalid.
        RaydpoError: if no file system can open the URI.
    """

    def __init__(self, uri: str) -> None:
        self._given = uri
        self.fs, self.root = _open(uri)
        self.uri = uri if is_uri(uri) else self.root

    def __str__(self) -> str:
        """The path or URI as given, without secrets, for messages."""
        return redact(self._given)

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, pafs.LocalFileSystem)

    def path(self, name: str = "") -> str:
        """Path of ``name`` on this file system."""
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise RaydpoError(f"{name!r} would leave {self}")
        return f"{self.root}/{name}" if name else self.root

    def exists(self, name: str = "") -> bool:
        return self._info(name).type != pafs.FileType.NotFound

    def list(self, name: str = "") -> Sequence[str]:
        """Names of the entries directly in ``name``, sorted; empty if it does not exist."""
        return sorted(info.base_name for info in self._infos(name))

    def entries(self, name: str = "") -> Sequence[FileInfo]:
        """The files directly in ``name``, in order of name; empty if it does not exist."""
        files = (info for info in self._infos(name) if info.type == pafs.FileType.File)
        found = (FileInfo(info.base_name, info.size, self._modified(info)) for info in files)
        return sorted(found, key=lambda entry: entry.name)

    def _info(self, name: str) -> pafs.FileInfo:
        return self._persist("look at", name, lambda: self._ask(self.path(name)))

    def _infos(self, name: str, *, recursive: bool = False) -> list[pafs.FileInfo]:
        path = self.path(name)
        infos = self._persist(
            "list", name, lambda: self._ask(path, pafs.FileSelector(path, allow_not_found=True, recursive=recursive))
        )
        if recursive or self._driver is None:
            return infos
        # Some drivers list recursively even if not asked to.
        return [info for info in infos if info.path.strip("/").rpartition("/")[0] == path.strip("/")]

    def _ask(self, path: str, selector: pafs.FileSelector | None = None) -> Any:
        """Current file info of ``path``, or of what ``selector`` selects. A driver may cache its listings (``hf://`` without
        a time limit) and would miss what other processes write, so its cache is dropped first."""
        if self._driver is not None:
            self._driver.invalidate_cache(path)
        return self.fs.get_file_info(path if selector is None else selector)

    def _modified(self, info: pafs.FileInfo) -> float:
        if info.mtime_ns is not None:
            return info.mtime_ns / 1e9
        driver = self._driver
        if driver is None:
            return 0.0
        try:  # pyarrow knows one name of the time, drivers use several
            return self._persist("look at", info.base_name, lambda: driver.modified(info.path)).timestamp()
        except (FileNotFoundError, NotImplementedError, RaydpoError):
            return 0.0

    @property
    def _driver(self):
        """The fsspec file system behind pyarrow's interface, or None."""
        handler = self.fs.handler if isinstance(self.fs, pafs.PyFileSystem) else None
        return handler.fs if isinstance(handler, pafs.FSSpecHandler) else None

    def read(self, name: str) -> bytes:
        """Content of a file.

        Raises:
            FileNotFoundError: if it does not exist.
        """

        def read() -> bytes:
            with self.fs.open_input_stream(self.path(name)) as stream:
                return stream.read()

        return self._persist("read", name, read, long=True)

    def look_into(self, name: str, act: Callable[[pa.NativeFile], T]) -> T:
        """Result of ``act`` on the open file. ``act`` is called again if reading fails temporarily.

        Raises:
            FileNotFoundError: if it does not exist.
        """

        def look() -> T:
            with self.fs.open_input_file(self.path(name)) as stream:
                return act(stream)

        return self._persist("read", name, look, long=True)

    def write(self, name: str, data: bytes | pa.Buffer, *, durable: bool = True) -> None:
        """Write a file atomically: local files are flushed and renamed; object stores get one put or multipart upload.

        Readers see the old content or the new, never a part. A kill leaves at most a temporary file, which
        ``remove_stale_temporaries`` deletes.

        Args:
            durable: False = local files are not flushed, which takes milliseconds each. A power cut may then lose or damage
                them, a kill may not.

        Raises:
            OSError: if the disk is full or read-only, or access is denied; the old content stays.
            RaydpoError: if a remote store keeps failing.
        """
        target = self.path(name)
        if self.is_local:
            _write_local(Path(target), data, durable)
        else:
            # Convert before a stream is open: closing a stream stores what it has, even nothing.
            buffer = pa.py_buffer(data)
            self._persist("write", name, lambda: self._put(target, buffer), long=buffer.size > SMALL)

    def _put(self, target: str, data: pa.Buffer) -> None:
        if self._driver is not None:  # sends a whole object; a stream might be closed half-way
            self._driver.pipe_file(target, data.to_pybytes())
        else:
            # Never set allow_delayed_open on S3: if the first part fails, closing then stores an empty object.
            with self.fs.open_output_stream(target) as stream:
                stream.write(data)
        size = self._ask(target).size
        if size != data.size:
            if size is not None:
                self.fs.delete_file(target)
            raise OSError(f"{size or 0} of {data.size} bytes arrived")

    def delete(self, name: str) -> None:
        """Delete a file. It is no error if it does not exist."""
        try:
            self._persist("delete", name, lambda: self.fs.delete_file(self.path(name)))
        except FileNotFoundError:
            return

    def delete_directory(self, name: str) -> None:
        """Delete a directory and all that is in it. It is no error if it does not exist."""
        try:
            self._persist("delete", name, lambda: self.fs.delete_dir(self.path(name)))
        except FileNotFoundError:
            return

    def move(self, name: str, to: str) -> None:
        """Rename a file; on an object store, copy and then delete it.

        Raises:
            FileNotFoundError: if it does not exist.
        """
        if self.is_local:
            _make_directory(Path(self.path(to)).parent)
            os.replace(self.path(name), self.path(to))
        else:
            self.write(to, self.read(name))
            self.delete(name)

    def clock(self) -> float:
        """Current time in seconds since the epoch, by the clock that stamps the files here, which may be another machine's.
        This machine's time if the store does not tell when a file was written."""
        name = f".probe-{uuid.uuid4().hex}"
        self.write(name, b"")
        try:
            return self._modified(self._info(name)) or time.time()
        finally:
            self.delete(name)

    def _persist(self, verb: str, name: str, act: Callable[[], T], *, long: bool = False) -> T:
        """Call ``act``, and retry while it fails temporarily. Local errors are raised unchanged.

        Args:
            long: whether a success may take longer than ``TELL_AFTER``.
        """
        if self.is_local:
            return act()
        place = redact(f"{self.uri.partition('?')[0].rstrip('/')}/{name}".rstrip("/"))
        with _telling(verb, place) as notice:
            if not long:
                notice()
            return self._attempts(verb, place, act, notice)

    def _attempts(self, verb: str, place: str, act: Callable[[], T], failed: Callable[[str], None]) -> T:
        """As ``_persist``. ``failed`` is called with the reason after each attempt that is followed by another."""
        started = time.monotonic()
        for attempt, wait in enumerate((*WAITS, None), 1):
            try:
                return act()
            except (FileNotFoundError, RaydpoError):
                raise
            except Exception as error:  # drivers raise whatever their HTTP libraries raise
                reason = _said(error, self.uri)
                if isinstance(error, PermissionError) or _REFUSALS.search(f"{type(error).__name__} {reason}"):
                    raise RaydpoError(
                        f"cannot {verb} {place}: the store refuses, {reason}. Check the bucket's name and "
                        "region, the credentials, and that they may list, read, write and delete"
                    ) from None
                if not _may_pass(error):
                    raise RaydpoError(f"cannot {verb} {place}: {reason}") from None
                elapsed = time.monotonic() - started
                if wait is None or elapsed > PATIENCE:
                    raise RaydpoError(
                        f"cannot {verb} {place}: the store failed {attempt} times in {elapsed:.0f} s, last "
                        f"with {reason}. Nothing stored is lost; run it again when the store is "
                        "back"
                    ) from None
                failed(reason)
                time.sleep(wait * random.uniform(0.5, 1.0))  # spread the retries of many workers
        raise AssertionError

    def upload(self, directory: Path, name: str) -> None:
        """Copy a local directory to ``name``, replacing what was there. A local copy appears whole or not at all."""
        if self.is_local:
            target = Path(self.path(name))
            temporary = target.with_name(_temporary_name())
            try:
                shutil.copytree(directory, temporary)
                shutil.rmtree(target, ignore_errors=True)
                temporary.rename(target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            return
        self._send(directory, name)
        for info in self._infos(name, recursive=True):
            below = info.path[len(self.path(name)) :].lstrip("/")
            if info.type == pafs.FileType.File and not (directory / below).exists():
                self.delete(f"{name}/{below}")

    def move_into(self, directory: Path, name: str) -> None:
        """Move the files of a local directory into ``name``, beside those of other workers. Each file appears whole, and
        only then leaves ``directory``; on one file system it is renamed."""
        for path in sorted(directory.iterdir()):
            if self.is_local:
                target = Path(self.path(f"{name}/{path.name}"))
                _make_directory(target.parent)
                try:
                    path.replace(target)
                except OSError as error:
                    if error.errno != errno.EXDEV:
                        raise
                    _copy_whole(path, target)
            else:
                self._send(path, f"{name}/{path.name}")
            path.unlink(missing_ok=True)

    def _send(self, local: Path, name: str) -> None:
        """Copy a local file or directory to a remote file system."""
        target = self.path(name)
        self._persist("write", name, lambda: pafs.copy_files(str(local), target, pafs.LocalFileSystem(), self.fs), long=True)

    def download(self, name: str, directory: Path) -> None:
        """Copy the files directly in ``name`` into a local directory."""

        def copy(file: FileInfo) -> None:
            target = directory / file.name
            pafs.copy_files(self.path(f"{name}/{file.name}"), str(target), self.fs, pafs.LocalFileSystem())
            if target.stat().st_size != file.size:
                raise OSError(f"{target.stat().st_size} of {file.size} bytes arrived")

        for file in self.entries(name):
            self._persist("read", f"{name}/{file.name}", lambda file=file: copy(file), long=True)

    def probe(self) -> None:
        """Check that this place is writable, before a long computation relies on it.

        Raises:
            RaydpoError: naming the place and the reason.
        """
        name = f".probe-{uuid.uuid4().hex}"
        try:
            if self.is_local:
                _make_directory(Path(self.root))
            self.write(name, b"raydpo")
            self.delete(name)
        except OSError as error:
            raise RaydpoError(f"cannot write to {self}: {error}") from None


@contextlib.contextmanager
def _telling(verb: str, place: str) -> Iterator[Callable[..., None]]:
    """Print a warning if an operation on a store takes long. Yields a function that starts the clock at its first call, and
    takes the reason of an attempt that failed."""
    reasons: list[str] = []

    def tell() -> None:
        last = f", last with {reasons[-1]}" if reasons else ""
        line = (
            f"warning: no success in {TELL_AFTER:.0f} s of trying to {verb} {place}{last}. It is still being tried; "
            "is the address right, and is the store reachable from here?"
        )
        with contextlib.suppress(OSError, ValueError):  # nobody may read it
            print(line, file=sys.stderr, flush=True)

    clock = threading.Timer(TELL_AFTER, tell)
    clock.daemon = True

    def notice(reason: str | None = None) -> None:
        if reason is not None:
            reasons.append(reason)
        if clock.ident is None:
            clock.start()

    try:
        yield notice
    finally:
        clock.cancel()


def _said(error: Exception, uri: str) -> str:
    """First 300 characters of a driver's message, on one line, without the secrets of ``uri``."""
    # Each part of user:password is hidden, too.
    secrets = [part for secret in secrets_of(uri) for part in (secret, *secret.split(":", 1))]
    said = one_line(error) or type(error).__name__
    spellings = {spelling for secret in secrets for spelling in (secret, quote(secret, safe=""), unquote(secret))}
    for secret in sorted(spellings, key=len, reverse=True):
        if len(secret) > 3:  # a shorter one is no secret, and part of many words
            said = said.replace(secret, "***")
    return said[:300].rstrip(".")


def _may_pass(error: Exception) -> bool:
    """Whether the same call may succeed later: errors of the system or a driver, not Python's or pyarrow's for wrong use."""
    if isinstance(error, (IsADirectoryError, NotADirectoryError, FileExistsError)):
        return False
    return isinstance(error, OSError) or type(error).__module__ not in ("builtins", "pyarrow.lib")


def stale_temporaries(storage: Storage, name: str, older_than: float | None = None) -> list[FileInfo]:
    """Temporary files of killed processes in directory ``name``.

    These are the files of this host whose process is gone, and, with ``older_than``, all that are older than this many
    seconds by the clock of the file system. The age decides for files of other hosts, and for process numbers that are in
    use again: a container uses the same few numbers after each start.
    """
    if not storage.is_local:
        return []  # an object store has no half-written objects
    now = None
    stale = []
    for entry in storage.entries(name):
        match = _TEMPORARY.match(entry.name)
        if match and match["host"] == socket.gethostname() and not _is_alive(int(match["pid"])):
            stale.append(entry)
        elif (match or _PROBE.match(entry.name)) and older_than is not None:
            now = storage.clock() if now is None else now
            if now - entry.modified > older_than:
                stale.append(entry)
    return stale


def remove_stale_temporaries(storage: Storage, name: str, older_than: float | None = None) -> int:
    """Delete what ``stale_temporaries`` finds in directory ``name``, and return how many files that were."""
    stale = stale_temporaries(storage, name, older_than)
    for entry in stale:
        storage.delete(f"{name}/{entry.name}" if name else entry.name)
    return len(stale)


def _write_local(path: Path, data: bytes | pa.Buffer, durable: bool) -> None:
    try:
        _make_directory(path.parent, durable)
        while True:
            temporary = path.with_name(_temporary_name())
            try:
                with open(temporary, "wb") as stream:
                    stream.write(data)
                    stream.flush()
                    if durable:
                        os.fsync(stream.fileno())
                os.replace(temporary, path)
                break
            except FileNotFoundError:
                # A machine or container with the same host name may have deleted it as stale.
                if not path.parent.exists():
                    raise
            finally:
                temporary.unlink(missing_ok=True)
        if durable:
            _sync_directory(path.parent)
    except OSError as error:
        raise _explained(error, str(path)) from None


def _make_directory(directory: Path, durable: bool = True) -> None:
    """Create a directory that survives a power cut if it is ``durable``, like the files in it."""
    missing = [one for one in (directory, *directory.parents) if not one.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for one in missing if durable else []:
        _sync_directory(one.parent)


def _copy_whole(path: Path, target: Path) -> None:
    """Copy a local file. ``target`` appears whole or not at all."""
    temporary = target.with_name(_temporary_name())
    try:
        shutil.copyfile(path, temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


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
    """Flush a directory, so that a power cut cannot undo a rename."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # unsupported on some network file systems
            raise
    finally:
        os.close(descriptor)


_FIXES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EACCES: "check who may write there",
    errno.EROFS: "choose a place that can be written",
}


def _explained(error: OSError, place: str) -> OSError:
    """The same error with the place and the fix, where a fix is known."""
    fix = _FIXES.get(error.errno or 0)
    return type(error)(error.errno, f"{error.strerror}; {fix}; what was stored before is kept", place) if fix else error


def _open(uri: str) -> tuple[pafs.FileSystem, str]:
    if not is_uri(uri):
        return pafs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
    with _telling("open", redact(uri)) as notice:  # S3 is asked for the bucket's region
        notice()
        return _open_remote(uri)


def _open_remote(uri: str) -> tuple[pafs.FileSystem, str]:
    scheme = uri.partition("://")[0]
    try:
        fs, root = pafs.FileSystem.from_uri(uri)
        if not root.strip("/") and not isinstance(fs, pafs.LocalFileSystem):
            raise ConfigError(f"{redact(uri)} names no bucket; it should look like {scheme}://bucket/path")
        return fs, root.rstrip("/")
    except OSError as error:
        raise RaydpoError(f"cannot open {redact(uri)}: {_said(error, uri)}") from None
    except pa.ArrowInvalid as error:
        if scheme in ("s3", "gs", "gcs", "file"):  # fsspec would not accept it either
            raise ConfigError(f"cannot open {redact(uri)}: {_said(error, uri)}") from None
    except (pa.ArrowNotImplementedError, ImportError):
        pass  # this pyarrow does not know the scheme
    try:
        from fsspec.core import url_to_fs

        driver, root = url_to_fs(uri)
    except ImportError as error:
        package = _DRIVERS.get(scheme) or getattr(error.__cause__, "name", None) or "fsspec"
        raise RaydpoError(f"cannot open {redact(uri)}: its driver is not installed; run: pip install {package}") from None
    except Exception as error:  # each driver has its own errors
        from fsspec import available_protocols

        kind = RaydpoError if scheme in available_protocols() else ConfigError
        raise kind(f"cannot open {redact(uri)}: {_said(error, uri)}") from None
    return pafs.PyFileSystem(pafs.FSSpecHandler(driver)), root.rstrip("/")
