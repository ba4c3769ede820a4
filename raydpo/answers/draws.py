"""What is to be answered: prompts, and the random numbers that sampled answers are drawn with.

The random number of a token depends on (seed, prompt, sample, position) alone. So an answer depends neither on the engine's
batches nor on the number of workers, and two models that agree give the same answer: what differs between policy and
reference is not luck.
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
    """Which random numbers an answer is drawn with: those of its ``sample`` number under ``seed``."""

    seed: int
    sample: int
    temperature: float = 1.0


ROWS = pa.schema([("prompt_ids", pa.list_(pa.int32())), ("seed", pa.int64()), ("sample", pa.int32()),
                  ("temperature", pa.float64())])
"""What is to be answered; of greedy answers all but the prompt is null."""


def uniforms(draw: Draw, prompt: np.ndarray, count: int) -> np.ndarray:
    """Numbers in [0, 1) for the first ``count`` positions of a sampled answer, float64."""
    digest = hashlib.blake2b(struct.pack("<QQ", draw.seed, draw.sample), digest_size=16, person=b"raydpo-sample-1")
    digest.update(np.ascontiguousarray(prompt, "<u4").tobytes())
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest.digest(), "<u8"))).random(count)
