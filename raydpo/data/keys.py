"""The content key of a completion, by which the reference cache is looked up. It never depends on a position in a data
set."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import numpy as np

__all__ = ["completion_key"]

_PERSON = b"raydpo-key-1"
"""Separates these digests from other uses of the hash. Change the number if the recipe changes."""
_SAME_BYTES = np.dtype("<i4")
"""The type of our ids, which lie in memory as little-endian uint32 do."""


def completion_key(prompt_ids: Sequence[int] | np.ndarray, completion_ids: Sequence[int] | np.ndarray) -> bytes:
    """16-byte key of prompt and completion as tokenised, before truncation.

    BLAKE2b of both lengths and both arrays as little-endian uint32, so that moving the boundary between prompt and
    completion gives another key.
    """
    digest = hashlib.blake2b(struct.pack("<QQ", len(prompt_ids), len(completion_ids)), digest_size=16, person=_PERSON)
    for ids in (prompt_ids, completion_ids):
        ids = np.ascontiguousarray(ids)
        digest.update(ids if ids.dtype == _SAME_BYTES else ids.astype("<u4"))
    return digest.digest()
