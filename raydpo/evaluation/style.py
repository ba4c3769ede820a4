"""The style of answers: length, repetition, variety, and the share that was cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from raydpo.data.interval import Interval, by_group, mean_by_group, ratio

__all__ = ["is_cut", "length_growth", "measure_style"]

REPEATED_GRAM = 4


def measure_style(answers: Sequence[np.ndarray], stop: Sequence[int], prompts: np.ndarray) -> dict[str, Any]:
    """Measure the style of answers, given as token ids; ``prompts`` is the number of the prompt of each answer.

    - ``tokens``: mean length, including the end token, with an interval over prompts.
    - ``repetition``: share of the 4-grams of an answer that repeat an earlier one, mean over answers of at least 4 tokens
      (seq-rep-4, Welleck et al. 2020, arXiv 1908.04319).
    - ``distinct_1``, ``distinct_2``: share of distinct tokens, and of distinct pairs of neighbours (Li et al. 2016, arXiv
      1510.03055). Both fall with the number of answers.
    - ``cut``: share that reached max_tokens.
    """
    grams = [_grams(answer, REPEATED_GRAM) for answer in answers if len(answer) >= REPEATED_GRAM]
    return {
        "tokens": mean_by_group(np.array([len(answer) for answer in answers], float), prompts),
        "repetition": float(np.mean([1 - len(set(each)) / len(each) for each in grams])) if grams else None,
        "distinct_1": _distinct(answers, 1),
        "distinct_2": _distinct(answers, 2),
        "cut": float(np.mean([is_cut(answer, stop) for answer in answers])) if answers else None,
    }


def length_growth(policy: Sequence[np.ndarray], reference: Sequence[np.ndarray], prompts: np.ndarray) -> Interval:
    """Mean length of the policy's answers divided by that of the reference's, minus 1, with an interval over prompts.

    It is not a mean of ratios. The lengths of two answers to a prompt are nearly independent, so the mean of their ratio is
    above 1 even if nothing has grown.
    """

    def lengths(answers: Sequence[np.ndarray]) -> np.ndarray:
        sums, sizes = by_group(np.array([len(answer) for answer in answers], float), prompts)
        return sums / sizes

    grown = ratio(lengths(policy), lengths(reference))
    return {name: None if value is None else value - 1 for name, value in grown.items()}


def is_cut(answer: np.ndarray, stop: Sequence[int]) -> bool:
    """Whether an answer, int [tokens], ended at ``evaluate.max_tokens`` rather than with a token of ``stop``."""
    return int(answer[-1]) not in stop


def _grams(answer: np.ndarray, size: int) -> list[tuple[int, ...]]:
    ids = answer.tolist()
    return list(zip(*(ids[start:] for start in range(size)), strict=False))


def _distinct(answers: Sequence[np.ndarray], size: int) -> float | None:
    grams = [gram for answer in answers for gram in _grams(answer, size)]
    return len(set(grams)) / len(grams) if grams else None
