"""What a group of completions costs: the token positions that a layout computes for it, and the attention over them.

A group is one prompt with its completions; a training pair is a group of two. Counting needs lengths and, for what groups
share, the order of their prompts: no model and no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeVar

import numpy as np

__all__ = ["PADDED_MULTIPLE", "POSITIONS_ONLY", "LayoutName", "Shapes", "Work", "cut_group"]

LayoutName = Literal["tree", "packed", "padded"]
"""How a micro-batch is laid out, see ``model.layout``."""
Count = TypeVar("Count", int, np.ndarray)
PADDED_MULTIPLE = 16
"""Padded rows are as long as a multiple of this, which the matrix units of GPUs and CPUs like."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a forward pass does with a token position, a query-key pair and a predicted token, relative to one position.

    Attributes:
        attention: of one query looking at one key. head: of one predicted token, for the vocabulary projection.
    """

    attention: float = 0.0
    head: float = 0.0


POSITIONS_ONLY = Work()
"""A model whose work is the token positions alone."""


@dataclass(frozen=True)
class Shapes:
    """Lengths of many groups, int arrays [groups].

    Attributes:
        prompt: tokens of each prompt.
        tokens: completion tokens of each group, all its completions together.
        squares: sum over its completions of their tokens squared.
        longest: prompt and longest completion.
        rows: completions.
        place: place of each group in the order of the prompts' tokens.
        common: by place, tokens that a prompt shares with the one a place before; 0 for the first.
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
        """From the token ids of prompts and the lengths of each one's completions."""
        count = len(prompts)
        # Big-endian bytes sort as their numbers do.
        keys = [np.asarray(prompt, ">u4").tobytes() for prompt in prompts]
        order = sorted(range(count), key=keys.__getitem__)
        place, common = np.empty(count, np.int64), np.zeros(count, np.int64)
        place[order] = np.arange(count)
        for index in range(1, count):
            left, right = prompts[order[index - 1]], prompts[order[index]]
            shorter = min(len(left), len(right))
            different = np.flatnonzero(left[:shorter] != right[:shorter])
            common[index] = different[0] if len(different) else shorter
        prompt = np.array([len(prompt) for prompt in prompts], np.int64)
        return cls(prompt, np.array([sum(lengths) for lengths in completions], np.int64),
                   np.array([sum(length * length for length in lengths) for lengths in completions], np.int64),
                   prompt + np.array([max(lengths) for lengths in completions], np.int64),
                   np.array([len(lengths) for lengths in completions], np.int64), place, common)

    @classmethod
    def of_lengths(cls, prompt: np.ndarray, *completions: np.ndarray) -> Shapes:
        """Of groups that share nothing, from the lengths of prompts and of each completion: int arrays [groups]."""
        stacked = np.stack(completions).astype(np.int64)
        count = len(prompt)
        return cls(prompt.astype(np.int64), stacked.sum(0), (stacked**2).sum(0), prompt + stacked.max(0),
                   np.full(count, len(completions)), np.arange(count), np.zeros(count, np.int64))

    def __len__(self) -> int:
        return len(self.prompt)

    def positions(self, layout: LayoutName) -> np.ndarray:
        """Token positions of each group by itself, int [groups]."""
        return positions(layout, self.prompt, self.tokens, self.longest, self.rows)

    def cost(self, layout: LayoutName, work: Work) -> np.ndarray:
        """Work on each group by itself, in positions, float [groups]."""
        repeats = 1 if layout == "tree" else self.rows
        looks = repeats * self.prompt**2 / 2 + self.prompt * self.tokens + self.squares / 2
        return self.positions(layout) + work.attention * looks + work.head * self.tokens

    def shared(self, left: int, right: int) -> int:
        """Prompt tokens that two groups share, the first of which is placed before the second."""
        first, last = self.place[left] + 1, self.place[right] + 1
        return int(self.common[first:last].min()) if first < last else int(self.prompt[right])


def positions(layout: LayoutName, prompt: Count, tokens: Count, longest: Count, rows: Count) -> Count:
    """Token positions of one group or of many, from their numbers as ``Shapes`` has them."""
    if layout == "tree":
        return prompt + tokens
    if layout == "packed":
        return rows * prompt + tokens
    return rows * (-(-longest // PADDED_MULTIPLE) * PADDED_MULTIPLE)


def cut_group(prompt: int, completions: Sequence[int], most: int, layout: LayoutName) -> list[tuple[int, int]]:
    """A group in runs of its completions, each of at most so many token positions or of a single completion.

    Args:
        prompt: its tokens. completions: tokens of each completion.

    Returns:
        First completion of each run and the one after its last. A group that is within ``most`` is one run.
    """
    starts, tokens, longest = [0], 0, 0
    for index, length in enumerate(completions):
        tokens, longest = tokens + length, max(longest, length)
        if index > starts[-1] and positions(layout, prompt, tokens, prompt + longest, index + 1 - starts[-1]) > most:
            starts.append(index)
            tokens = longest = length
    return list(pairwise([*starts, len(completions)]))
