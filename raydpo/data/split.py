"""Which prompts are held out: decided by the content of each prompt alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from raydpo.data.preference import Text
from raydpo.errors import DataError

__all__ = ["held_out", "kept", "prompt_digest"]


def prompt_digest(prompt: Text) -> bytes:
    """16 bytes of the prompt as it is written.

    Not of its token ids: those depend on the tokenizer, and through merges across the boundary even on the completions.
    """
    content = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)
    return hashlib.blake2b(content.encode(), digest_size=16, person=b"raydpo-prompt-1").digest()


def held_out(digests: Sequence[bytes], fraction: float) -> np.ndarray:
    """Which pairs are held out, bool [pairs], given the ``prompt_digest`` of each.

    A prompt is held out if its digest, read as a number in [0, 1), lies below ``fraction``: adding, removing or reordering
    data moves no prompt to the other side, and a prompt is never on both. Where that would leave one side empty, the prompt
    with the lowest number is held out, or the one with the highest trained on.

    Raises:
        DataError: if there is only one prompt.
    """
    places = {digest: int.from_bytes(digest[:8], "big") / 2**64 for digest in set(digests)}
    if len(places) < 2:
        raise DataError(f"data.eval.fraction {fraction:g} cannot split pairs that all have the same prompt; give "
                        "data.eval.path instead, or leave data.eval out")
    ordered = sorted(places.values())
    # At least just above the lowest place, at most the highest, which itself is not below the bound.
    bound = min(max(fraction, np.nextafter(ordered[0], 1)), ordered[-1])
    return np.array([places[digest] < bound for digest in digests], dtype=bool)


def kept(digests: Sequence[bytes], fraction: float, seed: int) -> np.ndarray:
    """Which pairs ``data.fraction`` keeps, bool [pairs], given the ``prompt_digest`` of each.

    As in ``held_out`` each prompt has a place in [0, 1), here of its digest and the seed, and stays if that lies below
    ``fraction``. So smaller shares are parts of larger ones, and what is held out says nothing about what is kept. At least
    the prompt with the lowest place stays.
    """
    places = {digest: int.from_bytes(hashlib.blake2b(digest, digest_size=8, salt=seed.to_bytes(16, "big"),
                                                     person=b"raydpo-thin-1").digest(), "big") / 2**64
              for digest in set(digests)}
    bound = max(fraction, np.nextafter(min(places.values()), 1)) if places else fraction
    return np.array([places[digest] < bound for digest in digests], dtype=bool)
