"""Git LFS pointers: the few lines of text that stand in the place of a file that was not fetched."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from raydpo.errors import FilesError

__all__ = ["is_pointer", "refuse_pointers"]

_BEGINNING = b"version https://git-lfs"


def is_pointer(head: bytes) -> bool:
    """Whether a file that begins with ``head`` (at least 23 bytes) is a Git LFS pointer."""
    return head.startswith(_BEGINNING)


def refuse_pointers(files: Iterable[Path]) -> None:
    """Refuse files of a model, adapter or tokenizer that are Git LFS pointers. Files that are not there are passed over.

    Raises:
        FilesError: naming the first pointer.
    """
    pointers = [file for file in files if is_pointer(_head(file))]
    if pointers:
        raise FilesError(
            f"{pointers[0]} is a Git LFS pointer, not the file itself"
            + (f" ({len(pointers) - 1:,} more files beside it)" if len(pointers) > 1 else "")
            + f"; run 'git lfs pull' in {pointers[0].parent}, or download the model again"
        )


def _head(file: Path) -> bytes:
    try:
        with open(file, "rb") as stream:
            return stream.read(len(_BEGINNING))
    except OSError:
        return b""
