"""Draws the pairs of an audit: all of them, or all pairs of some prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from raydpo.data.plan import splitmix

__all__ = ["MOST_AUDITED", "Sample", "draw"]

MOST_AUDITED = 2_000_000
"""Pairs above which a sample of about so many is audited. All of ten million pairs would take 7 GiB of memory. Two million
of them take 3.3 GiB and a minute, most of both for the copies among all ten million. The index of the cache comes on top, 40
bytes a stored row."""


@dataclass(frozen=True)
class Sample:
    """The pairs that are audited.

    Attributes:
        rows: their row numbers, ascending, int64 [pairs].
        prompts: number of the prompt of each among those of the sample, int64 [pairs].
        of_pairs, of_prompts: how many there are in all.
        seed: of the draw.
    """

    rows: np.ndarray
    prompts: np.ndarray
    of_pairs: int
    of_prompts: int
    seed: int

    @property
    def whole(self) -> bool:
        """Whether it has all pairs."""
        return len(self.rows) == self.of_pairs

    def to_dict(self) -> dict[str, Any] | None:
        """What was drawn, for JSON; None if it is all."""
        if self.whole:
            return None
        prompts = int(self.prompts.max()) + 1
        found = {"pairs": len(self.rows), "of_pairs": self.of_pairs, "prompts": prompts, "of_prompts": self.of_prompts}
        return found | {"seed": self.seed}


def draw(prompts: np.ndarray, seed: int) -> Sample:
    """Draw prompts until about ``MOST_AUDITED`` pairs are there, and take all pairs of each, so that intervals over prompts
    hold. A hash of prompt and seed decides on each prompt by itself; at least one is drawn.

    Args:
        prompts: digest of the prompt of each pair, uint64 [pairs].
    """
    count, of_prompts = len(prompts), len(np.unique(prompts))
    rows = np.arange(count)
    if count > MOST_AUDITED:
        with np.errstate(over="ignore"):
            hashes = splitmix(prompts ^ splitmix(np.uint64(seed)))
        rows = np.flatnonzero(hashes <= max(hashes.min(), np.uint64(MOST_AUDITED / count * 2**64)))
    return Sample(rows, np.unique(prompts[rows], return_inverse=True)[1], count, of_prompts, seed)
