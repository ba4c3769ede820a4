"""The table of prompts to answer, and the random numbers of sampled answers.

The random number of a token depends on (seed, prompt, sample, position) alone. So an answer does not depend on batches or on
the number of workers. Two equal models give the same answer, so a difference between policy and reference is not chance.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

__all__ = ["ROWS", "Draw", "answer_rows", "answers_identity", "draws_of", "rows_of_block", "uniforms"]


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Settings of one sampled answer. ``seed`` and ``sample``, the number of the answer, select its random numbers."""

    seed: int
    sample: int
    temperature: float = 1.0
    top_p: float = 1.0
    """Smallest probability of the tokens that are sampled from, of which the most likely are taken; 1 = all tokens."""


ROWS = pa.schema(
    [("prompt_ids", pa.list_(pa.int32())), ("seed", pa.int64()), ("sample", pa.int32()), ("temperature", pa.float64())]
)
"""Rows of prompts to answer. For a greedy answer, all columns but the prompt are null.

A column ``top_p``, float64, is there only where it is below 1: names of stored answers depend on the columns.
"""


def answer_rows(
    prompts: Sequence[Sequence[int]], *, samples: int = 0, seed: int = 0, temperature: float = 1.0, top_p: float = 1.0
) -> pa.Table:
    """Return rows that ask for ``samples`` sampled answers to each prompt, or for one greedy answer if that is 0.

    The answers to a prompt are next to each other. Work on them in blocks of ``rows_of_block`` rows.

    Args:
        prompts: token ids of each.
    """
    each, sampled = max(1, samples), samples > 0
    count = len(prompts) * each
    settings = {"seed": seed, "temperature": temperature} if sampled else {}
    columns = {
        "prompt_ids": [ids for ids in prompts for _ in range(each)],
        "sample": list(range(samples)) * len(prompts) if sampled else [None] * count,
        **{name: [settings.get(name)] * count for name in ("seed", "temperature")},
    }
    rows = pa.table({name: columns[name] for name in ROWS.names}, schema=ROWS)
    return rows.append_column("top_p", pa.array([top_p] * count, pa.float64())) if sampled and top_p < 1 else rows


def rows_of_block(samples: int, least: int) -> int:
    """Return how many rows of ``answer_rows`` a block should have: whole prompts, and at least ``least`` rows.

    Answers to a prompt share its prefill within a block. The batches of a block depend on its rows alone. So with borders
    that only settings decide, a block that is computed again gives the same answers.

    Args:
        samples: answers to each prompt.
    """
    return -(-least // max(1, samples)) * max(1, samples)


def draws_of(rows: pa.Table) -> list[Draw | None]:
    """Return how each row of a table with the columns of ``ROWS`` is sampled; None = greedily."""
    settings = rows.drop_columns(["prompt_ids"]).to_pylist()
    return [None if row["sample"] is None else Draw(**row) for row in settings]


def uniforms(draw: Draw, prompt: np.ndarray, count: int) -> np.ndarray:
    """Return random numbers in [0, 1) for the first ``count`` positions of a sampled answer, float64 [count].

    Args:
        prompt: token ids of the prompt.
    """
    digest = hashlib.blake2b(struct.pack("<QQ", draw.seed, draw.sample), digest_size=16, person=b"raydpo-sample-1")
    digest.update(np.ascontiguousarray(prompt, "<u4").tobytes())
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest.digest(), "<u8"))).random(count)


def answers_identity(model: str, engine: str, max_tokens: int, stop: Sequence[int]) -> dict[str, Any]:
    """Return what answers depend on besides the rows of ``ROWS``, with any engine; see ``cluster.work.BlockTask``.

    Args:
        model: digest of the model's identity.
        stop: token ids that end an answer.
    """
    return {"answers": 1, "model": model, "engine": engine, "max_tokens": max_tokens, "stop": stop}
