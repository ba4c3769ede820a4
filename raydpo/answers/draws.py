"""The table of prompts to answer, and the random numbers of sampled answers.

The random number of a token depends on (seed, prompt, sample, position) alone. So an answer does not depend on batches or on
the number of workers. Two equal models give the same answer, so a difference between policy and reference is not chance.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

__all__ = ["ROWS", "Draw", "uniforms"]


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Settings of one sampled answer. ``seed`` and ``sample``, the number of the answer, select its random numbers."""

    seed: int
    sample: int
    temperature: float = 1.0


ROWS = pa.schema(
    [("prompt_ids", pa.list_(pa.int32())), ("seed", pa.int64()), ("sample", pa.int32()), ("temperature", pa.float64())]
)
"""Rows of prompts to answer. For a greedy answer, all columns but the prompt are null."""


def uniforms(draw: Draw, prompt: np.ndarray, count: int) -> np.ndarray:
    """Return random numbers in [0, 1) for the first ``count`` positions of a sampled answer, float64 [count].

    Args:
        prompt: token ids of the prompt.
    """
    digest = hashlib.blake2b(struct.pack("<QQ", draw.seed, draw.sample), digest_size=16, person=b"raydpo-sample-1")
    digest.update(np.ascontiguousarray(prompt, "<u4").tobytes())
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest.digest(), "<u8"))).random(count)
