"""The content key of a completion: what the reference cache is looked up by. Never a position in a data set."""

from __future__ import annotations

import hashlib
import struct

import numpy as np

__all__ = ["completion_key"]


def completion_key(prompt_ids: np.ndarray, completion_ids: np.ndarray) -> bytes:
    """16 bytes over prompt and completion as tokenised, before truncation.

    BLAKE2b of both lengths and both arrays as little-endian uint32, so that moving the boundary between prompt and
    completion gives another key.
    """
    digest = hashlib.blake2b(struct.pack("<QQ", len(prompt_ids), len(completion_ids)), digest_size=16, person=b"raydpo-key-1")
    for ids in (prompt_ids, completion_ids):
        digest.update(np.asarray(ids, dtype="<u4").tobytes())
    return digest.digest()
