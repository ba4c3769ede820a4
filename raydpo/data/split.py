"""Decide which prompts are held out, by the content of each prompt only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from raydpo.data.messages import Text, content_text
from raydpo.data.preference import as_text
from raydpo.errors import DataError

__all__ = ["held_out", "kept", "prompt_digest", "question_digest"]

_BLOCK_ROWS = 100_000
_encode = json.JSONEncoder(sort_keys=True, default=str).encode


def prompt_digest(prompt: Text) -> bytes:
    """16-byte digest of the prompt's text or messages.

    Token ids are not used: they depend on the tokenizer and, through merges across the boundary, even on the completions.
    """
    content = prompt if isinstance(prompt, str) else _encode(prompt)
    return hashlib.blake2b(content.encode(), digest_size=16, person=b"raydpo-prompt-1").digest()


def question_digest(prompt: Text) -> bytes:
    """16-byte digest of what a prompt says: the same for text and for a single message, and with white space around it."""
    one = not isinstance(prompt, str) and len(prompt) == 1
    return prompt_digest((content_text(prompt[0]) if one else as_text(prompt)).strip())


def held_out(digests: np.ndarray | Sequence[bytes], fraction: float) -> np.ndarray:
    """Which pairs are held out, bool [pairs].

    A prompt is held out if its digest, as a number in [0, 1), is below ``fraction``. So adding, removing or reordering data
    moves no prompt to the other side, and a prompt is never on both. If one side would be empty, the prompt with the lowest
    number is held out, or the one with the highest is trained on.

    Args:
        digests: the ``prompt_digest`` of each pair, as bytes or as uint8 [pairs, 16].

    Raises:
        DataError: if there is only one prompt.
    """
    rows = _rows(digests)
    if not (rows != rows[:1]).any():
        raise DataError(
            f"data.eval.fraction {fraction:g} cannot split pairs that all have the same prompt; set "
            "data.eval.path instead, or remove data.eval"
        )
    places = _places(rows)
    # Between just above the lowest place and the highest, so that neither side is empty.
    return places < min(max(fraction, np.nextafter(places.min(), 1)), places.max())


def kept(digests: np.ndarray | Sequence[bytes], fraction: float, seed: int) -> np.ndarray:
    """Which pairs ``data.fraction`` keeps, bool [pairs].

    Like ``held_out``, but a prompt's number in [0, 1) depends on its digest and the seed. So smaller fractions are subsets
    of larger ones, independent of what is held out. At least the prompt with the lowest number stays.

    Args:
        digests: as of ``held_out``.
    """
    seeded = hashlib.blake2b(digest_size=8, salt=seed.to_bytes(16, "big"), person=b"raydpo-thin-1")
    rows, hashes = _rows(digests), [b""]
    for start in range(0, len(rows), _BLOCK_ROWS):
        content = memoryview(rows[start : start + _BLOCK_ROWS].tobytes())
        hashes.append(b"".join(_hash(seeded, content[place : place + 16]) for place in range(0, len(content), 16)))
    places = _places(np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 8))
    return places < (max(fraction, np.nextafter(places.min(), 1)) if len(places) else fraction)


def _hash(seeded: Any, content: memoryview) -> bytes:
    """The hash of ``content`` in continuation of ``seeded``: a copy costs less than to set it up again."""
    digest = seeded.copy()
    digest.update(content)
    return digest.digest()


def _rows(digests: np.ndarray | Sequence[bytes]) -> np.ndarray:
    """Digests as uint8 [pairs, 16]."""
    return digests if isinstance(digests, np.ndarray) else np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)


def _places(digests: np.ndarray) -> np.ndarray:
    """The first 64 bits of digests, uint8 [pairs, 8 or more], as numbers in [0, 1], float64, rounded to nearest."""
    return np.ascontiguousarray(digests[:, :8]).view(">u8").ravel().astype(np.uint64) / 2.0**64
