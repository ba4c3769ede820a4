"""What tells the content of a file from any other: digests of its bytes, or what its store says."""

from __future__ import annotations

import contextlib
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
from pyarrow import fs as pafs

from raydpo.storage.memory import remembered, stamp

__all__ = ["BY_TIME", "checksum", "content_version", "file_digest"]

_VERSIONS = ("etag", "generation", "md5hash", "content-md5", "content_md5", "blob_id", "sha256", "version_id")
"""What stores call that which changes with each new content of a file, in lower case."""
BY_TIME = "time "
"""Begins what ``content_version`` returns where a store tells no more than a time."""
_PIECE = 64 << 20
"""Bytes of a file that one thread hashes at a time."""


def file_digest(file: Path) -> str:
    """Digest of the content of ``file``, remembered as long as its ``stamp`` is the same.

    It is the SHA-256 of the SHA-256 of successive pieces, which several threads compute.
    """

    def find() -> str:
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            pieces = pool.map(lambda start: _piece_digest(file, start), range(0, max(1, file.stat().st_size), _PIECE))
            return hashlib.sha256(b"".join(pieces)).hexdigest()

    return remembered("digests", [*stamp(file), "whole"], find)


def _piece_digest(file: Path, start: int) -> bytes:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        stream.seek(start)
        left = _PIECE
        while left and (block := stream.read(min(left, 1 << 20))):
            digest.update(block)  # releases the GIL
            left -= len(block)
    return digest.digest()


def checksum(data: bytes | pa.Buffer) -> str:
    """The 32 hexadecimal digits of a file's bytes that stand in its name, so that damage is noticed."""
    return hashlib.sha256(data).hexdigest()[:32]


def content_version(filesystem: pafs.FileSystem, path: str) -> str | None:
    """What a remote store tells of a file that changes whenever its content does: an ETag, generation or digest.

    ``time ...`` if it tells no more than the time of the last change, None if not even that. Nothing of the file is read.
    """
    handler = filesystem.handler if isinstance(filesystem, pafs.PyFileSystem) else None
    if isinstance(handler, pafs.FSSpecHandler):
        handler.fs.invalidate_cache(path)
        told = handler.fs.info(path)
    else:
        with filesystem.open_input_file(path) as stream:
            told = {_text(key): _text(value) for key, value in stream.metadata().items()}
    lower = {str(key).lower(): value for key, value in told.items()}
    for name in _VERSIONS:
        if lower.get(name):
            return f"{name} {lower[name]}"
    info = filesystem.get_file_info(path)
    if info.mtime_ns is None and isinstance(handler, pafs.FSSpecHandler):
        with contextlib.suppress(NotImplementedError):
            return f"{BY_TIME}{handler.fs.modified(path).timestamp()}"
    return None if info.mtime_ns is None else f"{BY_TIME}{info.mtime_ns}"


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
