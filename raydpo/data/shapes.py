"""Cost of a group of completions: the token positions that a layout computes for it, and the attention over them.

A group is one prompt with its completions; a training pair is a group of two. Costs need the lengths and, for what groups
share, the order of their prompts. No model and no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeVar

import numpy as np

__all__ = ["PADDED_MULTIPLE", "POSITIONS_ONLY", "LayoutName", "PositionCost", "Shapes", "common_prefix", "cut_group"]

LayoutName = Literal["tree", "packed", "padded"]
"""Layout of a micro-batch, see ``model.layout``."""
Count = TypeVar("Count", int, np.ndarray)
PADDED_MULTIPLE = 16
"""Padded rows are padded to a multiple of this, which matrix units of GPUs and CPUs process faster."""


@dataclass(frozen=True, kw_only=True)
class PositionCost:
    """Cost of the parts of a forward pass, relative to one token position.

    Attributes:
        attention: one query attending to one key.
        head: one predicted token, for the vocabulary projection.
    """

    attention: float = 0.0
    head: float = 0.0


POSITIONS_ONLY = PositionCost()
"""A model whose only cost is its token positions."""


@dataclass(frozen=True)
class Shapes:
    """Lengths of many groups, int arrays [groups].

    Attributes:
        prompt: tokens of each prompt.
        tokens: completion tokens of each group, over all its completions.
        squares: sum of the squared token counts of its completions.
        longest: tokens of prompt and longest completion.
        rows: completions that have tokens.
        place: position of each group in the order of the prompts' tokens.
        common: by place, tokens that a prompt shares with the one before it; 0 for the first.
    """

    prompt: np.ndarray
    tokens: np.ndarray
    squares: np.ndarray
    longest: np.ndarray
    rows: np.ndarray
    place: np.ndarray
    common: np.ndarray

    @classmethod
    def of(cls, prompts: Sequence[np.ndarray], completions: Sequence[Sequence[int]]) -> Shapes:
        """Shapes from the token ids of prompts and the lengths of each one's completions."""
        count = len(prompts)
        # Big-endian bytes sort as their numbers do.
        keys = [np.asarray(prompt, ">u4").tobytes() for prompt in prompts]
        order = sorted(range(count), key=keys.__getitem__)
        place, common = np.empty(count, np.int64), np.zeros(count, np.int64)
        place[order] = np.arange(count)
        for index in range(1, count):
            common[index] = common_prefix(prompts[order[index - 1]], prompts[order[index]])
        prompt = np.array([len(prompt) for prompt in prompts], np.int64)
        return cls(
            prompt,
            np.array([sum(lengths) for lengths in completions], np.int64),
            np.array([sum(length * length for length in lengths) for lengths in completions], np.int64),
            prompt + np.array([max(lengths) for lengths in completions], np.int64),
            np.array([sum(length > 0 for length in lengths) for lengths in completions], np.int64),
            place,
            common,
        )

    @classmethod
    def of_lengths(cls, prompt: np.ndarray, *completions: np.ndarray) -> Shapes:
        """Shapes of groups that share nothing, from the lengths of prompts and of each completion: int arrays [groups]."""
        stacked = np.stack(completions).astype(np.int64)
        count = len(prompt)
        return cls(
            prompt.astype(np.int64),
            stacked.sum(0),
            (stacked**2).sum(0),
            prompt + stacked.max(0),
            (stacked > 0).sum(0),
            np.arange(count),
            np.zeros(count, np.int64),
        )

    def take(self, rows: np.ndarray) -> Shapes:
        """Shapes of distinct groups alone, int64 [groups]: what they share with each other is the same."""
        order = np.argsort(self.place[rows])
        place, common = np.empty(len(rows), np.int64), np.zeros(len(rows), np.int64)
        place[order] = np.arange(len(rows))
        if len(rows) > 1:
            before, last = self.place[rows][order[:-1]], self.place[rows][order[-1]]
            common[1:] = np.minimum.reduceat(self.common[: last + 1], before + 1)
        of_each = (self.prompt, self.tokens, self.squares, self.longest, self.rows)
        return Shapes(*(values[rows] for values in of_each), place, common)

    def __len__(self) -> int:
        return len(self.prompt)

    def positions(self, layout: LayoutName) -> np.ndarray:
        """Token positions of each group alone, int [groups]."""
        return positions(layout, self.prompt, self.tokens, self.longest, self.rows)

    def cost(self, layout: LayoutName, work: PositionCost) -> np.ndarray:
        """Work on each group alone, in token positions, float [groups]."""
        repeats = 1 if layout == "tree" else self.rows
        looks = repeats * self.prompt**2 / 2 + self.prompt * self.tokens + self.squares / 2
        return self.positions(layout) + work.attention * looks + work.head * self.tokens

    def shared(self, left: int, right: int) -> int:
        """Prompt tokens that two groups share; ``left`` must come before ``right`` in ``place``."""
        first, last = self.place[left] + 1, self.place[right] + 1
        return int(self.common[first:last].min()) if first < last else int(self.prompt[right])


def common_prefix(left: np.ndarray, right: np.ndarray) -> int:
    """Number of tokens that two sequences share at their start."""
    shorter = min(len(left), len(right))
    different = np.flatnonzero(left[:shorter] != right[:shorter])
    return int(different[0]) if len(different) else shorter


def positions(layout: LayoutName, prompt: Count, tokens: Count, longest: Count, rows: Count) -> Count:
    """Token positions of one group or of many; arguments as the attributes of ``Shapes``."""
    if layout == "tree":
        return prompt + tokens
    if layout == "packed":
        return rows * prompt + tokens
    return rows * (-(-longest // PADDED_MULTIPLE) * PADDED_MULTIPLE)


def cut_group(prompt: int, completions: Sequence[int], most: int, layout: LayoutName) -> list[tuple[int, int]]:
    """Cut a group into runs of its completions, each of at most ``most`` token positions or of a single completion.

    Args:
        prompt: tokens of the prompt.
        completions: tokens of each completion.

    Returns:
        (start, stop) of each run. A group within ``most`` is one run.
    """
    starts, tokens, longest = [0], 0, 0
    for index, length in enumerate(completions):
        tokens, longest = tokens + length, max(longest, length)
        if index > starts[-1] and positions(layout, prompt, tokens, prompt + longest, index + 1 - starts[-1]) > most:
            starts.append(index)
            tokens = longest = length
    return list(pairwise([*starts, len(completions)]))
