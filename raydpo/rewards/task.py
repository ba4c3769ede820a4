"""Scoring of blocks of answers with one reward function, as work that ``cluster.work`` does."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raydpo.config.rewards import RewardConfig
from raydpo.rewards.functions import RewardFunction, resolve
from raydpo.rewards.process import Caller

__all__ = ["ANSWERS", "ROWS", "RewardTask", "prompt_id"]

VERSION = 1
"""Version of how functions are called. Results of another version are not used."""
ROWS = pa.schema(
    [
        ("prompt", pa.string()),  # text or messages, as JSON
        ("completion", pa.string()),  # text of the answer without its end token
        ("completion_ids", pa.list_(pa.int32())),
        ("columns", pa.string()),  # the prompt's other columns, as a JSON object
    ]
)
"""What a function gets of an answer."""
ANSWERS = pa.unify_schemas([pa.schema([("prompt_id", pa.binary(16)), ("sample", pa.int32())]), ROWS])
"""An answer to be scored. Answers to one prompt are consecutive."""


def prompt_id(ids: Sequence[int] | np.ndarray) -> bytes:
    """Return the 16-byte digest of the token ids of a prompt."""
    content = np.ascontiguousarray(ids, "<u4")
    return hashlib.blake2b(content.tobytes(), digest_size=16, person=b"raydpo-round-p-1").digest()


@dataclass(frozen=True)
class RewardTask:
    """Work that turns rows of ``ROWS`` into rows of ``process.RESULTS``; see ``cluster.work.BlockTask``.

    The function runs in a process of its own, so whatever it does costs only its answers; see ``process.Caller``.

    Attributes:
        round, step: of ``trainer_state``.
    """

    reward: RewardConfig
    function: RewardFunction
    round: int = 0
    step: int = 0

    @classmethod
    def of(cls, reward: RewardConfig, *, round: int = 0, step: int = 0) -> RewardTask:
        """Resolve the function of a reward with ``use``.

        Raises:
            ConfigError: see ``functions.resolve``.
        """
        return cls(reward, resolve(reward), round, step)

    @property
    def identity(self) -> dict[str, Any]:
        known = dataclasses.asdict(self.function)
        del known["parameters"]
        return {"reward function": VERSION, **known, "round": self.round, "step": self.step}

    def open(self, device: str) -> Callable[[pa.Table], pa.Table]:
        """Start the function's process and return what scores a block.

        Raises:
            RaydpoError: if the function cannot be opened, or has another source on this machine.
        """
        return Caller(self.reward, self.function.digest, self.round, self.step)
