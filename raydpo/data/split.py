"""Decide which prompts are held out, by the content of each prompt only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from raydpo.data.messages import Text, content_text
from raydpo.data.preference import as_text
from raydpo.errors import DataError

__all__ = ["held_out", "kept", "prompt_digest", "question_digest"]

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


def held_out(digests: Sequence[bytes], fraction: float) -> np.ndarray:
    """Which pairs are held out, bool [pairs], given the ``prompt_digest`` of each.

    A prompt is held out if its digest, as a number in [0, 1), is below ``fraction``. So adding, removing or reordering data
    moves no prompt to the other side, and a prompt is never on both. If one side would be empty, the prompt with the lowest
    number is held out, or the one with the highest is trained on.

    Raises:
        DataError: if there is only one prompt.
    """
    places = {digest: int.from_bytes(digest[:8], "big") / 2**64 for digest in set(digests)}
    if len(places) < 2:
        raise DataError(
            f"data.eval.fraction {fraction:g} cannot split pairs that all have the same prompt; set "
            "data.eval.path instead, or remove data.eval"
        )
    ordered = sorted(places.values())
    # Between just above the lowest place and the highest, so that neither side is empty.
    bound = min(max(fraction, np.nextafter(ordered[0], 1)), ordered[-1])
    return np.array([places[digest] < bound for digest in digests], dtype=bool)


def kept(digests: Sequence[bytes], fraction: float, seed: int) -> np.ndarray:
    """Which pairs ``data.fraction`` keeps, bool [pairs], given the ``prompt_digest`` of each.

    Like ``held_out``, but a prompt's number in [0, 1) depends on its digest and the seed. So smaller fractions are subsets
    of larger ones, independent of what is held out. At least the prompt with the lowest number stays.
    """
    seeded = {"digest_size": 8, "salt": seed.to_bytes(16, "big"), "person": b"raydpo-thin-1"}
    hashes = {digest: hashlib.blake2b(digest, **seeded).digest() for digest in set(digests)}
    places = {digest: int.from_bytes(hashed, "big") / 2**64 for digest, hashed in hashes.items()}
    bound = max(fraction, np.nextafter(min(places.values()), 1)) if places else fraction
    return np.array([places[digest] < bound for digest in digests], dtype=bool)
