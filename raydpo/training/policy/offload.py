"""Offload to a disk: check that DeepSpeed supports it here, and make a folder for each process."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from raydpo.cluster.driver import no_toolkit
from raydpo.errors import ModelError, one_line

__all__ = ["disk_folder"]

PREFIX = "raydpo-offload-"
_HELD: list[IO[str]] = []
"""Open lock files of this process's folders; closed when the process ends."""


def disk_folder(field: str, where: str) -> str:
    """Make a folder below ``where`` for this process's offloaded tensors, and remove the folders of processes that died.

    Each process needs its own: DeepSpeed names files by rank, so two runs in one folder would read each other's weights.

    Args:
        field: name of the setting, for error messages.

    Raises:
        ModelError: if the folder cannot be made, or DeepSpeed lacks what it needs.
    """
    try:
        root = Path(where)
        root.mkdir(parents=True, exist_ok=True)
        with _alone(root):
            for old in root.glob(f"{PREFIX}*"):
                _remove_if_abandoned(old)
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
            lock = open(folder / "lock", "w", encoding="utf-8")  # noqa: SIM115 - held until the process ends
            fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        raise ModelError(
            f"{field} is {where!r}, where this worker cannot write: {error.strerror or error}. Name a "
            "directory of a local disk that every machine has, or set it to cpu"
        ) from None
    _HELD.append(lock)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        _require_asynchronous_files(field, where)
    except ModelError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return str(folder)


def _require_asynchronous_files(field: str, where: str) -> None:
    import torch
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.cuda.is_available() and CUDA_HOME is None:
        raise ModelError(no_toolkit(field, where))
    fix = (
        f"DeepSpeed compiles its access to disks where it runs: install libaio-dev (libaio-devel on Red Hat), a C++ "
        f"compiler and ninja on every machine, or set {field}=cpu"
    )
    if not AsyncIOBuilder().is_compatible():
        raise ModelError(f"{field} is {where!r}, but libaio is not installed here. {fix}")
    try:
        AsyncIOBuilder().load(verbose=False)
    except Exception as error:  # compilation can fail with any exception
        raise ModelError(
            f"{field} is {where!r}, but DeepSpeed's async_io does not compile here: {one_line(error, 300)}. {fix}"
        ) from error


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    with open(root / f".{PREFIX}lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_if_abandoned(folder: Path) -> None:
    """Remove the folder if its lock is free: the operating system releases the locks of a process that ended."""
    with contextlib.suppress(OSError), open(folder / "lock", "a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
